"""Shards of text: JSON lines on the hub or on disk, read while training.

`datasets` opens and decompresses them; this module lists them, counts records and
goes on after failures.
"""

import gzip
import hashlib
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from experiments.data.hub import Report, Retries, c4_urls, network_errors, quiet_hub
from experiments.data.text_files import BadInputError, find_files

_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Characters that `datasets` reads as parts of a URL.
_NOT_IN_NAMES = frozenset("[]?#")
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)
MEND = (
    "Fetch the shard again, or choose --on-bad-input skip to leave the rest of it out; "
    "start again with --resume to go on from the checkpoint."
)


@dataclass(frozen=True)
class Shard:
    """A file of JSON lines whose ``"text"`` is a document.

    Attributes:
      url: Path, or address on the hub (``hf://...``).
      name: What the shard is, wherever it lies; decides if a run may go on with it.
      version: What its tokens are kept under: other content has another version.
    """

    url: str
    name: str
    version: str


def c4_shards(split: Literal["train", "validation"]) -> list[Shard]:
    """Return the shards of English C4's ``"train"`` or ``"validation"`` split."""
    return [Shard(url, url, url) for url in c4_urls(split)]


def local_shards(patterns: Sequence[str]) -> list[Shard]:
    """Return the files that match, sorted, as shards.

    Raises:
      FileNotFoundError: A pattern matches no file.
      ValueError: A file cannot be streamed.
    """
    shards = []
    for path in find_files(patterns):
        _check_name(path)
        path, stat = path.resolve(), path.stat()
        version = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
        shards.append(Shard(str(path), path.name, version))
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """Return a SHA-256 of the names of shards, in hex.

    Of names, not of content: a shard that was damaged may be replaced by a good copy
    in the middle of a run, and terabytes need not be read before it starts.
    """
    names = "\n".join(shard.name for shard in shards)
    return hashlib.sha256(names.encode()).hexdigest()


def records(
    shard: Shard, start: int, *, report: Report, patience: float
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 0, line) of a shard's records from ``start`` on.

    Blank lines are no records. When the connection fails the shard is opened again
    and read up to the record that is next.

    Args:
      shard: What to read.
      start: Number of the first record wanted.
      report: Takes a line for the user before each wait.
      patience: Seconds to go on trying where nothing can be read.

    Raises:
      BadInputError: The archive is damaged or cut off.
      TextError: The shard cannot be reached, or is refused.
    """
    quiet_hub()
    remote = "://" in shard.url
    retries, damaged_at, done = Retries(shard.url, report, patience), None, start
    while True:
        try:
            with closing(open_lines(shard.url)) as lines:
                for line in islice(lines, done, None):
                    yield done, line
                    done += 1
                    retries.reset()
            return
        except _DAMAGE as error:
            # What comes over a network is read a second time: it may have been cut.
            if not remote or damaged_at == done:
                raise BadInputError(
                    "damaged or truncated archive",
                    f"{shard.url}, after record {done}",
                    f"Decompressing stopped with: {error}. {MEND}",
                ) from error
            damaged_at = done
        except network_errors() as error:
            retries.wait_or_raise(error, f", record {done + 1}")


def open_lines(url: str) -> Generator[bytes]:
    """Yield the lines of a shard that are not blank."""
    from datasets import StreamingDownloadManager
    from datasets.utils.file_utils import xopen

    with xopen(StreamingDownloadManager().extract(url), "rb") as file:
        for line in file:
            if line.strip():
                yield line


def _check_name(path: Path) -> None:
    """Raise unless `datasets` can stream the file."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if name.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} cannot be streamed: shards are JSON lines, {_SUFFIXES}, plain or "
            "with .gz behind. Other text is read without --stream, into memory."
        )
    if "::" in str(path.absolute()) or not _NOT_IN_NAMES.isdisjoint(path.name):
        raise ValueError(
            f"{path} cannot be streamed: its name holds '::' or one of "
            f"{''.join(sorted(_NOT_IN_NAMES))}. Rename it."
        )
