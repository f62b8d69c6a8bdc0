"""Documents as one array of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from experiments.data.tokenizer import Tokenizer

# Bounds the memory that lists of Python integers take while tokenizing.
_DOCUMENTS_AT_ONCE = 256
# Where they are made as they are needed: small, so that no other stream waits for long.
_FEW_AT_ONCE = 64


@dataclass(frozen=True)
class Tokens:
    """Documents as one array: ``eos, document, eos, document, eos``.

    The first ``eos`` is context only. What follows are the elements: the tokens of
    a document and the ``eos`` behind them belong to it.

    Attributes:
      ids: (1 + elements,) tokens in the smallest unsigned integer type for the
        vocabulary.
      document_ends: (documents,) int64, elements up to the end of each document.
      document_bytes: (documents,) int64, UTF-8 bytes of each document.
    """

    ids: np.ndarray
    document_ends: np.ndarray
    document_bytes: np.ndarray

    @property
    def document_lengths(self) -> np.ndarray:
        """(documents,) int64, elements of each document."""
        return np.diff(self.document_ends, prepend=0)

    @property
    def element_bytes(self) -> np.ndarray:
        """(documents,) float64, bytes that an element of each document stands for."""
        return self.document_bytes / self.document_lengths

    def document(self, index: int) -> np.ndarray:
        """Return the elements of one document, its ``eos`` last."""
        start = self.document_ends[index - 1] if index else 0
        return self.ids[1 + start : 1 + self.document_ends[index]]


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Encode documents and join them with the tokenizer's end of document.

    Raises:
      ValueError: ``texts`` is empty.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to tokenize.")
    pairs = encode_sized(texts, tokenizer, _DOCUMENTS_AT_ONCE)
    documents, sizes = zip(*pairs, strict=True)
    return join(documents, sizes, tokenizer)


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the elements of each text: its tokens and the end of document."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    eos = tokenizer.eos_id
    return [np.array([*ids, eos], dtype) for ids in tokenizer.encode_batch(texts)]


def encode_sized(
    texts: Iterable[str], tokenizer: Tokenizer, at_once: int = _FEW_AT_ONCE
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the elements of each text and its UTF-8 bytes, made as they are needed."""
    texts = iter(texts)
    while batch := list(islice(texts, at_once)):
        sizes = (len(text.encode()) for text in batch)
        yield from zip(encode_documents(batch, tokenizer), sizes, strict=True)


def join(
    documents: Sequence[np.ndarray], sizes: Iterable[int], tokenizer: Tokenizer
) -> Tokens:
    """Return documents as `encode_documents` gives them, and their bytes, joined."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return Tokens(
        ids=np.concatenate([np.array([tokenizer.eos_id], dtype), *documents]),
        document_ends=np.cumsum([len(ids) for ids in documents], dtype=np.int64),
        document_bytes=np.array(list(sizes), np.int64),
    )
