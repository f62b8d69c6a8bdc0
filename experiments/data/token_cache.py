"""Tokens on disk, memory-mapped: one file for each piece of text.

A file is a line of JSON (what it holds, a checksum), spaces up to a multiple of 64
bytes, and the three arrays of `Tokens`. It is written beside its place and moved
there, so that processes that write the same one do not disturb each other.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data.hub import Report
from experiments.data.text_files import TextError
from experiments.data.tokens import Tokens

# Part of the key: raise it when the meaning of the bytes changes.
_FORMAT = 1
_ALIGNMENT = 64


class TokenCache:
    """Tokens in a folder, by key."""

    def __init__(self, folder: Path, report: Report) -> None:
        """Open nothing yet.

        Args:
          folder: Folder of the cache, made when something is kept.
          report: Takes a line for the user when a file is not what it should be.
        """
        self._folder = folder
        self._report = report

    def load(self, key: str) -> Tokens | None:
        """Return what is kept under a key, memory-mapped; None without it.

        A file that is damaged or belongs to another key is reported and not used.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return _read(path, key)
        except ValueError as error:
            self._report(f"{path} is no good ({error}): its text is tokenized again.")
            return None

    def save(self, key: str, tokens: Tokens) -> None:
        """Keep tokens under a key, in the place of what is there.

        Raises:
          TextError: The folder cannot be written.
        """
        path = self._path(key)
        arrays = [tokens.document_ends, tokens.document_bytes, tokens.ids]
        header = {
            "key": key,
            "documents": len(tokens.document_ends),
            "tokens": len(tokens.ids),
            "dtype": tokens.ids.dtype.name,
            "crc32": _checksum(arrays),
        }
        line = json.dumps(header).encode() + b"\n"
        line += b" " * (-len(line) % _ALIGNMENT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=path.parent, suffix=".part", delete=False
            ) as part:
                _write_or_delete(part.name, part.write, [line, *arrays])
            os.replace(part.name, path)
        except OSError as error:
            raise TextError(
                f"{self._folder} cannot keep tokens ({error}). Free some space, give "
                "another --token-cache or none; start again with --resume to go on "
                "from the checkpoint."
            ) from error

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{_FORMAT}:{key}".encode()).hexdigest()
        # Subfolders: file systems are slow with 100,000 files in one.
        return self._folder / name[:2] / f"{name[2:34]}.tokens"


def _write_or_delete(
    name: str, write: Callable[[bytes], object], pieces: list[bytes | np.ndarray]
) -> None:
    """Write pieces to an open file, which is deleted if that fails."""
    try:
        for piece in pieces:
            write(bytes(piece) if isinstance(piece, bytes) else piece.tobytes())
    except OSError:
        os.unlink(name)
        raise


def _read(path: Path, key: str) -> Tokens:
    """Return the tokens of a file; raises ValueError unless it is whole and right."""
    with path.open("rb") as file:
        line = file.readline(1 << 16)
    try:
        header = json.loads(line)
        documents, count = int(header["documents"]), int(header["tokens"])
        dtype, checksum = np.dtype(header["dtype"]), header["crc32"]
        kept = header["key"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its first line is {line[:40]!r}") from error
    if kept != key:
        raise ValueError("it holds another text")
    offset = len(line) + -len(line) % _ALIGNMENT
    size = offset + 16 * documents + dtype.itemsize * count
    if path.stat().st_size != size:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {size}")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    ends, sizes, ids = np.split(
        data[offset:], np.cumsum([8 * documents, 8 * documents])
    )
    arrays = [ends.view(np.int64), sizes.view(np.int64), ids.view(dtype)]
    if _checksum(arrays) != checksum:
        raise ValueError("its checksum is wrong")
    return Tokens(ids=arrays[2], document_ends=arrays[0], document_bytes=arrays[1])


def _checksum(arrays: list[np.ndarray]) -> int:
    """Return the CRC-32 of the bytes of arrays."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array), value)
    return value
