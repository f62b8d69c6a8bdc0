"""Documents of a shard as tokens, made as they are needed or taken from the cache.

A shard is worked off in pieces of `PIECE` documents, which are what the cache keeps:
small enough that a cut run loses little, large enough that C4 does not become
millions of files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from experiments.data.hub import Report
from experiments.data.shards import MEND, Shard, records
from experiments.data.text_files import BadInputError, OnBadInput, TextError, json_text
from experiments.data.token_cache import TokenCache
from experiments.data.tokenizer import Tokenizer
from experiments.data.tokens import encode_sized, join

PIECE = 2048


@dataclass(frozen=True)
class DocumentReader:
    """Reads documents of shards as tokens.

    Attributes:
      tokenizer: Makes the tokens.
      cache: Keeps them. None: they are not kept.
      on_bad_input: Whether a record that cannot be read raises, or ends its shard.
      report: Takes a line for the user.
      patience: Seconds to go on trying where nothing can be read.
    """

    tokenizer: Tokenizer
    cache: TokenCache | None
    on_bad_input: OnBadInput
    report: Report
    patience: float

    def read(self, shard: Shard, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the elements of each document from number ``start`` on.

        The number of a document is that of its record; a document without text is
        the end of document alone.

        Raises:
          TextError: A record cannot be read (``on_bad_input="error"``), the shard
            cannot be reached, or the cache cannot be written.
        """
        if self.cache is None:
            for elements, _ in self.read_sized(shard, start):
                yield elements
        else:
            yield from self._read_cached(shard, start, self.cache)

    def _read_cached(
        self, shard: Shard, start: int, cache: TokenCache
    ) -> Iterator[np.ndarray]:
        """Read piece by piece, keeping those that the cache does not have."""
        fresh: Iterator[tuple[np.ndarray, int]] | None = None
        first = start - start % PIECE
        while True:
            key = self._key(shard, first)
            kept = cache.load(key)
            if kept is not None:
                fresh = None
                count = len(kept.document_ends)
                for number in range(max(start - first, 0), count):
                    yield kept.document(number)
            else:
                if fresh is None:
                    fresh = self.read_sized(shard, first)
                piece = []
                for elements, size in islice(fresh, PIECE):
                    piece.append((elements, size))
                    if first + len(piece) > start:
                        yield elements
                documents = [elements for elements, _ in piece]
                sizes = [size for _, size in piece]
                cache.save(key, join(documents, sizes, self.tokenizer))
                count = len(piece)
            if count < PIECE:
                return
            first += PIECE

    def _key(self, shard: Shard, first: int) -> str:
        # A shard that was cut at a bad record is whole only for those who skip.
        return (
            f"{shard.version}|{self.tokenizer.fingerprint}|{self.on_bad_input}|"
            f"{first}+{PIECE}"
        )

    def read_sized(
        self, shard: Shard, start: int = 0
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Return the elements of each document and its UTF-8 bytes, made now.

        Raises:
          TextError: As `read` does.
        """
        return encode_sized(self._texts(shard, start), self.tokenizer)

    def _texts(self, shard: Shard, start: int) -> Iterator[str]:
        """Yield the text of each record; a bad one raises, or ends the shard."""
        lines = records(shard, start, report=self.report, patience=self.patience)
        try:
            for number, line in lines:
                yield json_text(line, f"{shard.url}, record {number + 1}")
        except BadInputError as error:
            if self.on_bad_input == "error":
                raise TextError(f"{error} {MEND}") from error
            self.report(f"{error} The rest of the shard is left out.")
