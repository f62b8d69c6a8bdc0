"""Documents from text and JSON-lines files, plain or compressed."""

import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import zstandard

OnBadInput = Literal["error", "skip"]

_JSON_LINES = frozenset({".json", ".jsonl", ".ndjson"})
_COMPRESSED = frozenset({".gz", ".zst"})


class TextError(ValueError):
    """Text that cannot be read; the message names it and says what to do."""


class BadInputError(TextError):
    """Input that holds no document; ``reason`` is what a summary counts."""

    def __init__(self, reason: str, where: str, hint: str) -> None:
        super().__init__(f"{where}: {reason}. {hint}")
        self.reason = reason


def read_documents(
    patterns: Sequence[str], on_bad_input: OnBadInput
) -> tuple[list[str], Counter[str]]:
    """Read every document of the files that match ``patterns``.

    The name of a file decides its format, ``.gz`` or ``.zst`` taken off first:
    ``.jsonl``, ``.ndjson`` and ``.json`` (the layout of C4) hold one JSON object a
    line whose ``"text"`` is a document; any other file is one document as a whole.

    Args:
      patterns: Globs, ``**`` included. Files are read in sorted order, each once.
      on_bad_input: ``"error"`` raises at the first bad input. ``"skip"`` counts
        it and goes on: a bad line costs that line, a damaged archive that file.

    Returns:
      The documents, not cleaned, and how many inputs were skipped by reason.

    Raises:
      FileNotFoundError: A pattern matches no file.
      ValueError: Text that is not UTF-8, a line that is not a JSON object with a
        string ``"text"``, a damaged or truncated archive (``on_bad_input="error"``).
    """
    documents: list[str] = []
    skipped: Counter[str] = Counter()
    for path in find_files(patterns):
        try:
            data = _read_bytes(path)
        except BadInputError as error:
            _raise_or_count(error, on_bad_input, skipped)
            continue
        for where, piece, is_json in _pieces(path, data):
            try:
                text = json_text(piece, where) if is_json else _decode(piece, where)
                documents.append(text)
            except BadInputError as error:
                _raise_or_count(error, on_bad_input, skipped)
    return documents, skipped


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that match any of ``patterns``, sorted, each once.

    Raises:
      FileNotFoundError: A pattern matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            folder = " It matches a folder: name its files, as in 'folder/*.txt'."
            raise FileNotFoundError(
                f"{pattern!r} matches no file (seen from {Path.cwd()})."
                + (folder if matches else " Check the path, or quote the pattern.")
            )
        found.update(files)
    return sorted(found)


def _raise_or_count(
    error: BadInputError, on_bad_input: OnBadInput, skipped: Counter[str]
) -> None:
    """Raise the error, or count it where the user chose to skip."""
    if on_bad_input == "error":
        raise error
    skipped[error.reason] += 1


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".zst":
            return _decompress_zstandard(data)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BadInputError(
            "damaged or truncated archive",
            str(path),
            f"Decompressing stopped with: {error}. Fetch the file again.",
        ) from error
    return data


def _decompress_zstandard(data: bytes) -> bytes:
    """Return all frames of ``data``; unlike zstandard's reader, notice a cut."""
    frames = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("the last frame has no end")
        data = frame.unused_data
    return b"".join(frames)


def _pieces(path: Path, data: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (where, content, is it JSON) of what may be a document."""
    name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    if name.suffix not in _JSON_LINES:
        yield str(path), data, False
        return
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            yield f"{path}:{number}", line, True


def _decode(data: bytes, where: str) -> str:
    """Return UTF-8 bytes (a byte-order mark taken off) as text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            "not UTF-8",
            where,
            f"Byte {error.start} cannot be read ({error.reason}). Convert the file, "
            "as with `iconv -t UTF-8`, or choose to skip bad inputs.",
        ) from error


def json_text(line: bytes, where: str) -> str:
    """Return the string ``"text"`` of a line that is a JSON object.

    Raises:
      BadInputError: It has none, or is not such an object; ``where`` names it.
    """
    text = _decode(line, where)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInputError(
            "line that is not JSON",
            where,
            f"{error}. A JSON-lines file holds one object per line.",
        ) from error
    document = value.get("text") if isinstance(value, dict) else None
    if not isinstance(document, str):
        found = f"keys {sorted(value)}" if isinstance(value, dict) else repr(value)[:40]
        raise BadInputError(
            'line without a string "text"',
            where,
            f'Each line needs an object such as {{"text": "..."}}; found {found}.',
        )
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            "not UTF-8", where, 'Its "text" holds half of a surrogate pair.'
        ) from error
    return document
