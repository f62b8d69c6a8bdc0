"""Tokens in memory to batches, with grain: cut, shuffle, repeat, batch."""

from collections.abc import Sequence

import grain
import numpy as np

from experiments.data.batches import WHOLE, Batches, CountedBatches, Share
from experiments.data.sequences import Batch, Kind, Sequences
from experiments.data.tokens import Tokens


def train_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    kind: Kind = "joined",
    share: Share = WHOLE,
) -> Batches:
    """Return endless shuffled training batches.

    Every epoch visits each sequence once, in an order of its own (a rest at the end
    that does not fill a sequence is left out). A batch may span two epochs, so no
    sequence is dropped. The state is a number of batches.

    Rows are sliced from memory when they are asked for, without threads or
    processes: that costs some thirty microseconds a sequence.

    Args:
      tokens: The training text.
      batch_size: B, sequences per batch of all processes together.
      sequence_length: T, targets a sequence.
      seed: Seed of the order, not negative.
      kind: Treatment of documents (see `sequences`).
      share: The rows that this process provides; no others are read.

    Raises:
      ValueError: An argument out of range; too few tokens for one batch.
    """
    _check_sizes(batch_size, sequence_length)
    if seed < 0:
        raise ValueError(f"seed={seed} is negative.")
    source = Sequences(tokens, kind, sequence_length)
    if len(source) < batch_size:
        raise ValueError(
            f"{len(tokens.ids)} tokens make {len(source)} sequences of "
            f"{sequence_length}, but a batch needs batch_size={batch_size} of them. "
            "Give more text, a smaller batch or shorter sequences."
        )
    return _MemoryBatches(source, batch_size, seed, share)


class _MemoryBatches(CountedBatches):
    """Batches of sequences that are in memory."""

    _kind = "text in memory"

    def __init__(
        self, source: Sequences, batch_size: int, seed: int, share: Share
    ) -> None:
        # `seed` rather than `shuffle(seed)`: that takes seed + epoch, and runs of
        # neighbouring seeds would see the same orders one epoch apart.
        self._rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        self._batch_size = batch_size
        self._share = share.rows(batch_size)

    def __next__(self) -> Batch:
        first = self._done * self._batch_size
        self._done += 1
        return stack([self._rows[first + row] for row in self._share])


def validation_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
    kind: Kind = "joined",
    share: Share = WHOLE,
) -> tuple[list[Batch], float]:
    """Return fixed batches that count each of the first targets exactly once.

    Args:
      tokens: The validation text.
      batch_size: B, sequences per batch of all processes together.
      sequence_length: T, targets a sequence.
      max_tokens: Targets to use; all of them if there are fewer, or with None.
      kind: Treatment of documents (see `sequences`).
      share: The rows of each batch that are returned.

    Returns:
      Batches of equal shapes, whose weights sum to the number of targets used, the
      last ones padded with rows of weight 0. And the UTF-8 bytes per target, of all
      processes: a loss in nats per target divided by this and by log(2) is in bits
      per byte. A document counts by the share of its elements that are targets.

    Raises:
      ValueError: An argument out of range, or no target at all.
    """
    _check_sizes(batch_size, sequence_length)
    rows, targets, num_bytes = _validation_rows(
        tokens, Sequences(tokens, kind, sequence_length, keep_rest=True), max_tokens
    )
    padding = {name: np.zeros_like(value) for name, value in rows[0].items()}
    rows += [padding] * (-len(rows) % batch_size)
    mine = share.rows(batch_size)
    batches = [
        stack([rows[first + row] for row in mine])
        for first in range(0, len(rows), batch_size)
    ]
    return batches, num_bytes / targets


def _validation_rows(
    tokens: Tokens, source: Sequences, max_tokens: int | None
) -> tuple[list[Batch], int, float]:
    """Return the first rows, the number of their targets, and the bytes of these."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1.")
    rows: list[Batch] = []
    targets, num_bytes = 0, 0.0
    element_bytes = tokens.element_bytes
    for index in range(len(source)):
        if max_tokens is not None and targets >= max_tokens:
            break
        row, documents = source[index], source.numbers(index)
        weights = row["weights"]
        if max_tokens is not None:
            weights[targets + np.cumsum(weights) > max_tokens] = 0
        used = weights[: len(documents) - 1]
        num_bytes += float((used * element_bytes[documents[1:]]).sum())
        targets += int(weights.sum())
        rows.append(row)
    if not targets:
        raise ValueError("There are no tokens: a text with at least one is needed.")
    return rows, targets, num_bytes


def stack(rows: Sequence[Batch]) -> Batch:
    """Return rows as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    """Raise unless both sizes are positive."""
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be "
            "at least 1."
        )
