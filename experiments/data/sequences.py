"""How documents become the rows of a batch.

Shapes: B sequences per batch, T targets a sequence. A batch is a dictionary of

* ``"tokens"``: (B, T + 1) int32; inputs are ``[:, :-1]``, targets ``[:, 1:]``.
* ``"weights"``: (B, T) float32; 1 for a target that counts, 0 for one that does not.
* ``"segments"``: (B, T + 1) int32, packed rows only; the number of the document that
  a token is in, from 1 in each row, 0 for padding. Attention stays within a number.

Three treatments of documents:

* ``"joined"``: one after the other, cut every T targets. Two neighbouring rows share
  one token, the last target of the one and first input of the other, so that every
  element is a target once.
* ``"packed"``: the same cut. A document's first token has weight 0: its input, the
  end of the document before, says nothing about it.
* ``"documents"``: one document a row, cut after T + 1 elements or padded with token 0
  at weight 0. Its first token is no target (T5 has no start of document). GaLore's
  runs do the same, but cut after T elements, and then replace the last one by an end
  of document that is not there.
"""

from typing import Literal

import numpy as np

from experiments.data.tokens import Tokens

Batch = dict[str, np.ndarray]
Kind = Literal["joined", "packed", "documents"]


def make_row(
    tokens: np.ndarray, length: int, numbers: np.ndarray | None = None
) -> Batch:
    """Return a row of a batch, padded where it is short.

    Args:
      tokens: (n,) tokens, n from 1 to T + 1.
      length: T.
      numbers: For a packed row: (n,) number of the document each token is in, rising
        by 1 from one document to the next.

    Returns:
      What a batch holds, without its first axis.
    """
    n = len(tokens)
    row = {
        "tokens": np.zeros(length + 1, np.int32),
        "weights": np.zeros(length, np.float32),
    }
    row["tokens"][:n] = tokens
    row["weights"][: n - 1] = 1
    if numbers is not None:
        row["weights"][: n - 1] = numbers[1:] == numbers[:-1]
        row["segments"] = np.zeros(length + 1, np.int32)
        row["segments"][:n] = numbers - numbers[0] + 1
    return row


class Sequences:
    """Random access to the rows that tokens are cut into; a grain data source."""

    def __init__(
        self, tokens: Tokens, kind: Kind, length: int, *, keep_rest: bool = False
    ) -> None:
        """Cut nothing yet.

        Args:
          tokens: Documents.
          kind: Treatment of them.
          length: T, targets a sequence.
          keep_rest: Whether joined and packed documents end with a row that is not
            full; left out otherwise.
        """
        self._tokens = tokens
        self._kind: Kind = kind
        self._length = length
        targets = len(tokens.ids) - 1
        self._count = -(-targets // length) if keep_rest else targets // length
        self._documents = np.flatnonzero(tokens.document_lengths > 1)
        if kind == "documents":
            self._count = len(self._documents)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        start, stop = self._span(index)
        numbers = self.numbers(index) if self._kind == "packed" else None
        tokens = self._tokens.ids[start:stop]
        return make_row(tokens, self._length, numbers)

    def numbers(self, index: int) -> np.ndarray:
        """(n,) int64, document of each token of a row before padding.

        -1 is the ``eos`` that stands before all documents.
        """
        start, stop = self._span(index)
        elements = np.arange(start, stop) - 1
        numbers = np.searchsorted(self._tokens.document_ends, elements, side="right")
        return np.where(elements < 0, -1, numbers)

    def _span(self, index: int) -> tuple[int, int]:
        """Return where a row lies in the array of tokens."""
        if self._kind == "documents":
            document = int(self._documents[index])
            stop = 1 + int(self._tokens.document_ends[document])
            start = stop - int(self._tokens.document_lengths[document])
        else:
            start, stop = index * self._length, len(self._tokens.ids)
        return start, min(stop, start + self._length + 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._kind}, {len(self)} x {self._length})"
