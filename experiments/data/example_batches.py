"""Labelled texts to batches: tokenized, alike in length, padded to few lengths.

A batch is padded to one of `BUCKETS` or to the longest that an example may be, so that
no more programs than these are compiled; on demand always to the longest: one program.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tokenizers

from experiments.data.batches import WHOLE, CountedBatches, Share
from experiments.data.glue import Examples
from experiments.data.sequences import Batch

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
BUCKETS += (1024, 1536, 2048, 3072, 4096)
# Batches whose examples are sorted by length before they are cut.
_WINDOW = 50


class Tokenized(Protocol):
    """Examples that batches can be made of."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, ``(N,)``."""
        ...

    def collate(self, rows: np.ndarray, batch_size: int) -> Batch:
        """Return some as a batch of `batch_size`; rows without any have weight 0."""
        ...


def width_of(longest: int, most: int, pad_to_most: bool) -> int:
    """Returns what a batch is padded to: a bucket, or the most."""
    buckets = () if pad_to_most else BUCKETS
    return next((size for size in buckets if longest <= size <= most), most)


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples.

    Attributes:
      tokens: Numbers of each example's tokens, special ones included, int32 ``(T,)``.
      types: Which text each of them is of, 0 or 1, likewise.
      labels: As of `Examples`.
      max_length: Tokens of an example, at most.
      pad_to_max_length: Whether all batches are padded to that.
    """

    tokens: list[np.ndarray]
    types: list[np.ndarray]
    labels: np.ndarray | None
    max_length: int
    pad_to_max_length: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, ``(N,)``."""
        return np.array([len(tokens) for tokens in self.tokens], np.int32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it, in hex."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for array in (*self.tokens, *self.types):
            digest.update(array.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def collate(self, rows: np.ndarray, batch_size: int) -> Batch:
        """Return some examples as a batch of `batch_size`, padded to a bucket.

        Its arrays: ``tokens`` and ``types`` ``(B, T)`` int32, ``lengths`` ``(B,)``
        int32, ``weights`` ``(B,)`` float32, and ``labels`` ``(B, ...)`` where they
        are told.
        """
        longest = max(len(self.tokens[row]) for row in rows)
        width = width_of(longest, self.max_length, self.pad_to_max_length)
        tokens = np.zeros((batch_size, width), np.int32)
        types = np.zeros_like(tokens)
        lengths = np.ones(batch_size, np.int32)  # attention needs something to look at
        weights = np.zeros(batch_size, np.float32)
        for place, row in enumerate(rows):
            length = len(self.tokens[row])
            tokens[place, :length] = self.tokens[row]
            types[place, :length] = self.types[row]
            lengths[place], weights[place] = length, 1
        batch = {
            "tokens": tokens,
            "types": types,
            "lengths": lengths,
            "weights": weights,
        }
        if self.labels is not None:
            shape = (batch_size, *self.labels.shape[1:])
            batch["labels"] = np.zeros(shape, self.labels.dtype)
            batch["labels"][: len(rows)] = self.labels[rows]
        return batch


def encode(
    tokenizer: tokenizers.Tokenizer,
    examples: Examples,
    *,
    max_length: int,
    token_types: int,
    pad_to_max_length: bool = False,
) -> Encoded:
    """Tokenizes examples, special tokens added.

    Args:
      tokenizer: Of the model.
      examples: Of one text each, or of two.
      max_length: Tokens that an example is cut to, the longer text first.
      token_types: Of the model; with 1 the second text is not told from the first.
      pad_to_max_length: Whether all batches are padded to that.
    """
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    texts = [t if len(t) > 1 else t[0] for t in examples.texts]
    found = tokenizer.encode_batch_fast(texts)
    tokens = [np.array(one.ids, np.int32) for one in found]
    types = [np.array(one.type_ids, np.int32) for one in found]
    return Encoded(
        tokens,
        [np.minimum(one, token_types - 1) for one in types],
        examples.labels,
        max_length,
        pad_to_max_length,
    )


class TrainingExamples(CountedBatches):
    """Endless shuffled batches of labelled examples.

    Every epoch visits each example once, in an order of its own; its last batch is
    filled up with rows of weight 0. A batch has, besides what `collate` says, "noise":
    (B,) uint32, random numbers that dropout is drawn by. The state is a number of
    batches.
    """

    _kind = "labelled examples"

    def __init__(
        self, encoded: Tokenized, batch_size: int, seed: int, share: Share = WHOLE
    ) -> None:
        """Take examples, at least one; `batch_size` is of all processes together."""
        self._encoded = encoded
        self._lengths = encoded.lengths
        self._batch_size = batch_size
        self._seed = seed
        self._share = slice(share.rows(batch_size).start, share.rows(batch_size).stop)
        self._epoch = -1
        self._order: list[np.ndarray] = []

    @property
    def steps_an_epoch(self) -> int:
        """Batches that hold every example once."""
        return -(-len(self._lengths) // self._batch_size)

    def __next__(self) -> Batch:
        epoch, step = divmod(self._done, self.steps_an_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        batch = self._encoded.collate(self._order[step], self._batch_size)
        dice = np.random.default_rng((self._seed, self._done))
        batch["noise"] = dice.integers(2**32, size=self._batch_size, dtype=np.uint32)
        self._done += 1
        return {name: value[self._share] for name, value in batch.items()}

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        """Numbers of the examples of each batch of an epoch."""
        dice = np.random.default_rng((self._seed, epoch))
        order = dice.permutation(len(self._lengths))
        window = _WINDOW * self._batch_size
        batches = []
        for first in range(0, len(order), window):
            some = order[first : first + window]
            some = some[np.argsort(self._lengths[some], kind="stable")]
            batches += np.split(
                some, range(self._batch_size, len(some), self._batch_size)
            )
        return [batches[number] for number in dice.permutation(len(batches))]


def evaluation_batches(
    encoded: Tokenized, batch_size: int, share: Share = WHOLE
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield every example once: the numbers of a batch's examples, and the batch.

    Short ones first; rows that fill up the last batch have weight 0 and no number.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    for rows in np.split(order, range(batch_size, len(order), batch_size)):
        batch = encoded.collate(rows, batch_size)
        mine = share.rows(batch_size)
        yield rows, {name: value[mine] for name, value in batch.items()}
