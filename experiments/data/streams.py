"""Streams: endless shuffled rows of some of the shards, and positions in them.

With L streams, stream l owns the shards l, l + L, l + 2 L ..., in an order of its own
in every epoch. Its documents become rows one after the other, and nothing is left out
between shards or epochs. Rows are shuffled in windows: a window holds the next
`shuffle_buffer` rows, in random order. A position names the start of a window and the
rows taken from it, so a few integers are enough to go on: the window is read again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.data.documents import DocumentReader
from experiments.data.sequences import Batch, Kind, make_row
from experiments.data.shards import Shard
from experiments.data.text_files import TextError

# What a random order is for: keeps the orders of shards and rows independent.
_OF_SHARDS, _OF_ROWS = 0, 1


class Start(NamedTuple):
    """Where a row starts: its first target, or first token, is what comes next."""

    epoch: int = 0
    shard: int = 0  # counted in the order of the epoch
    document: int = 0
    offset: int = 0  # elements of the document that are done with


class Position(NamedTuple):
    """A place in a stream between two rows."""

    epoch: int = 0
    shard: int = 0
    document: int = 0
    offset: int = 0
    window: int = 0
    taken: int = 0  # rows taken from the window, which starts at the first four

    @property
    def start(self) -> Start:
        """Where the window starts."""
        return Start(*self[:4])


@dataclass(frozen=True)
class Streams:
    """Text in streams: what decides their rows.

    Attributes:
      shards: Shards of all streams.
      count: L, number of streams.
      kind: Treatment of documents.
      length: T, targets a row.
      shuffle_buffer: Rows a window.
      seed: Seed of all orders.
      eos: Token that ends a document.
    """

    shards: tuple[Shard, ...]
    count: int
    kind: Kind
    length: int
    shuffle_buffer: int
    seed: int
    eos: int

    def rows(
        self, stream: int, position: Position, reader: DocumentReader
    ) -> Iterator[tuple[Batch, Position]]:
        """Yield each row of a stream and the position behind it, without end.

        Raises:
          TextError: Text cannot be read, or the shards of a stream hold none.
        """
        start, window, taken = position.start, position.window, position.taken
        following = self._unshuffled(stream, start, reader)
        while True:
            content: list[Batch] = []
            after = start
            for _ in range(self._window_size(stream, window)):
                row, after = next(following)
                content.append(row)
            size = len(content)
            order = self._random(_OF_ROWS, stream, window).permutation(size)
            for index in range(taken, size):
                if index + 1 < size:
                    behind = Position(*start, window, index + 1)
                else:
                    behind = Position(*after, window + 1, 0)
                yield content[order[index]], behind
            start, window, taken = after, window + 1, 0

    def _window_size(self, stream: int, window: int) -> int:
        """Return the rows of a window; first ones differ, so that streams take turns.

        With windows of one size all streams would have to be read ahead at once.
        """
        if window > 0:
            return self.shuffle_buffer
        return -(-self.shuffle_buffer * (stream + 1) // self.count)

    def _random(self, what: int, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, stream, number])

    def _documents(
        self, stream: int, start: Start, reader: DocumentReader
    ) -> Iterator[tuple[Start, np.ndarray]]:
        """Yield where each document starts, and its elements, without end."""
        shards = self.shards[stream :: self.count]
        epoch, first_shard, first_document, _ = start
        while True:
            found = (first_shard, first_document) != (0, 0)
            order = self._random(_OF_SHARDS, stream, epoch).permutation(len(shards))
            for index in range(first_shard, len(shards)):
                documents = reader.read(shards[order[index]], first_document)
                for number, elements in enumerate(documents, start=first_document):
                    found = found or len(elements) > 1
                    yield Start(epoch, index, number), elements
                first_document = 0
            if not found:
                names = ", ".join(shard.url for shard in shards)
                raise TextError(f"There is no document to read in {names}.")
            epoch, first_shard = epoch + 1, 0

    def _unshuffled(
        self, stream: int, start: Start, reader: DocumentReader
    ) -> Iterator[tuple[Batch, Start]]:
        """Yield each row in the order of the text, and where the next one starts."""
        documents = self._documents(stream, start, reader)
        cut = cut_documents if self.kind == "documents" else cut_joined
        return cut(documents, start.offset, self)


def cut_documents(
    documents: Iterator[tuple[Start, np.ndarray]], offset: int, streams: Streams
) -> Iterator[tuple[Batch, Start]]:
    """Yield one row per document, and the place behind it."""
    for start, elements in documents:
        if len(elements) > max(1, offset):
            row = make_row(elements[: streams.length + 1], streams.length)
            yield row, start._replace(offset=len(elements))
        offset = 0


def cut_joined(
    documents: Iterator[tuple[Start, np.ndarray]], offset: int, streams: Streams
) -> Iterator[tuple[Batch, Start]]:
    """Yield the rows that documents one after the other are cut into.

    A row starts with the token before its first target: an ``eos`` where that is a
    document's first token.
    """
    full = streams.length + 1
    tokens, numbers = np.zeros(full, np.int32), np.zeros(full, np.int64)
    filled, number = 0, 0
    packed = streams.kind == "packed"
    for start, elements in documents:
        if len(elements) == 1:  # a document without text
            continue
        number += 1
        while offset < len(elements):
            if not filled:
                tokens[0] = elements[offset - 1] if offset else streams.eos
                numbers[0] = number if offset else number - 1
                filled = 1
            taken = min(full - filled, len(elements) - offset)
            tokens[filled : filled + taken] = elements[offset : offset + taken]
            numbers[filled : filled + taken] = number
            filled, offset = filled + taken, offset + taken
            if filled == full:
                row = make_row(tokens, streams.length, numbers if packed else None)
                yield row, start._replace(offset=offset)
                filled = 0
        offset = 0
