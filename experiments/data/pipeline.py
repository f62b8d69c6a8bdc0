"""Tokens to batches, with grain: cut, shuffle, repeat, batch.

Shapes: B sequences a batch, T targets a sequence. A batch is a dictionary of

* ``"tokens"``: (B, T + 1) int32; inputs are ``[:, :-1]``, targets ``[:, 1:]``.
* ``"weights"``: (B, T) float32; 1 for a target that counts, 0 for padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from experiments.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

# Bounds the memory that lists of Python integers take while tokenizing.
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Tokens:
    """Documents as one array: ``eos, document, eos, document, eos``.

    The first ``eos`` is context only, so that every token of every document, and
    the ``eos`` behind it, is a target: there are ``len(ids) - 1`` targets.

    Attributes:
      ids: (N,) tokens in the smallest unsigned integer type for the vocabulary.
      document_ends: (documents,) int64, targets up to the end of each document.
      document_bytes: (documents,) int64, UTF-8 bytes of each document.
    """

    ids: np.ndarray
    document_ends: np.ndarray
    document_bytes: np.ndarray

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.document_bytes.sum())

    def bytes_per_token(self, max_tokens: int | None = None) -> float:
        """Return the UTF-8 bytes per target among the first ``max_tokens`` targets.

        A loss in nats per target divided by this and by log(2) is in bits per byte.
        A document that is cut counts by the share of its tokens; None counts all.
        """
        count = _target_count(self, max_tokens)
        ends = np.concatenate([[0], self.document_ends])
        sizes = np.concatenate([[0], self.document_bytes.cumsum()])
        return float(np.interp(count, ends, sizes)) / count


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Encode documents and join them with the tokenizer's end of document.

    Raises:
      ValueError: ``texts`` is empty.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to tokenize.")
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    eos = np.array([tokenizer.eos_id], dtype)
    parts, lengths = [eos], []
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        for ids in tokenizer.encode_batch(texts[start : start + _DOCUMENTS_AT_ONCE]):
            parts += [np.array(ids, dtype), eos]
            lengths.append(len(ids) + 1)
    sizes = [len(text.encode()) for text in texts]
    return Tokens(
        ids=np.concatenate(parts),
        document_ends=np.cumsum(lengths, dtype=np.int64),
        document_bytes=np.array(sizes, np.int64),
    )


def train_batches(
    tokens: Tokens, *, batch_size: int, sequence_length: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Return an endless iterator of shuffled training batches.

    The tokens are cut into sequences that do not overlap (but for the one token
    that is both target and next context; a rest at the end is left out). Every
    epoch visits each sequence once, in an order of its own. A batch may span two
    epochs, so no sequence is dropped.

    The iterator is grain's: ``get_state`` and ``set_state`` (a step count, since
    the order is a function of the seed and of it) continue it bit for bit, and
    ``grain.checkpoint.CheckpointSave`` puts it into an Orbax checkpoint.

    Batches are sliced from memory when they are asked for, without threads or
    processes: that costs some thirty microseconds a sequence, and grain advises
    against threads for data in memory.

    Args:
      tokens: The training text.
      batch_size: B, sequences a batch.
      sequence_length: T, targets a sequence.
      seed: Seed of the order, not negative.

    Returns:
      Iterator of batches (see the module), all weights 1.

    Raises:
      ValueError: An argument out of range; too few tokens for one batch.
    """
    _check_sizes(batch_size, sequence_length)
    if seed < 0:
        raise ValueError(f"seed={seed} is negative.")
    source = _Sequences(tokens.ids, sequence_length)
    if len(source) < batch_size:
        raise ValueError(
            f"{len(tokens.ids)} tokens make {len(source)} sequences of "
            f"{sequence_length}, but a batch needs batch_size={batch_size} of them. "
            "Give more text, a smaller batch or shorter sequences."
        )
    return iter(
        # `seed` rather than `shuffle(seed)`: that takes seed + epoch, and runs of
        # neighbouring seeds would see the same orders one epoch apart.
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size)
        .map(_with_weights)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def validation_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
) -> list[Batch]:
    """Return fixed batches that count each of the first targets exactly once.

    Args:
      tokens: The validation text.
      batch_size: B, sequences a batch.
      sequence_length: T, targets a sequence.
      max_tokens: Targets to use; all of them if there are fewer, or with None.

    Returns:
      Batches (see the module) of equal shapes, whose weights sum to the number of
      targets used. The last ones are padded with token 0 at weight 0.

    Raises:
      ValueError: An argument out of range, or no target at all.
    """
    _check_sizes(batch_size, sequence_length)
    targets = _target_count(tokens, max_tokens)
    rows = -(-targets // sequence_length)
    rows += -rows % batch_size
    used = np.zeros(rows * sequence_length + 1, np.int32)
    used[: targets + 1] = tokens.ids[: targets + 1]
    starts = sequence_length * np.arange(rows)[:, None]
    sequences = used[starts + np.arange(sequence_length + 1)]
    weights = np.arange(rows * sequence_length) < targets
    weights = weights.astype(np.float32).reshape(rows, sequence_length)
    return [
        {
            "tokens": sequences[row : row + batch_size],
            "weights": weights[row : row + batch_size],
        }
        for row in range(0, rows, batch_size)
    ]


class _Sequences:
    """Random access to the sequences of a token array; grain's data source."""

    def __init__(self, ids: np.ndarray, length: int) -> None:
        self._ids = ids
        self._length = length

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._length
        return self._ids[start : start + self._length + 1].astype(np.int32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {self._length})"


def _with_weights(tokens: np.ndarray) -> Batch:
    """Return a batch in which every target counts."""
    batch, length = tokens.shape
    return {"tokens": tokens, "weights": np.ones((batch, length - 1), np.float32)}


def _target_count(tokens: Tokens, max_tokens: int | None) -> int:
    """Return how many targets there are, ``max_tokens`` at most."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1.")
    count = len(tokens.ids) - 1
    if count < 1:
        raise ValueError("There are no tokens: a text with at least one is needed.")
    return count if max_tokens is None else min(count, max_tokens)


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    """Raise unless both sizes are positive."""
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be "
            "at least 1."
        )
