"""Prompts with their answers to batches that a causal model learns the answers of."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from experiments.data.example_batches import width_of
from experiments.data.sequences import Batch


@dataclass(frozen=True)
class Answered:
    """Tokenized prompts with their answers.

    Attributes:
      prompts: Tokens of each prompt, int32 ``(T,)``.
      answers: Tokens of each answer, with the one that ends it, likewise.
      max_length: Tokens of both together, at most.
      pad_to_max_length: Whether all batches are padded to that.
    """

    prompts: list[np.ndarray]
    answers: list[np.ndarray]
    max_length: int
    pad_to_max_length: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that are read of each example, ``(N,)``: all but the last one."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return np.array([len(p) + len(a) - 1 for p, a in pairs], np.int32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it, in hex."""
        starts = np.array([len(prompt) for prompt in self.prompts], np.int32)
        digest = hashlib.sha256(self.lengths.tobytes() + starts.tobytes())
        for array in (*self.prompts, *self.answers):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def collate(self, rows: np.ndarray, batch_size: int) -> Batch:
        """Return some examples as a batch of `batch_size`, padded to a bucket.

        Its arrays are those of pretraining: ``tokens`` ``(B, T + 1)`` int32, and
        ``weights`` ``(B, T)`` float32, 1 where the next token is the answer's.
        """
        longest = int(self.lengths[rows].max())
        width = width_of(longest, self.max_length, self.pad_to_max_length)
        tokens = np.zeros((batch_size, width + 1), np.int32)
        weights = np.zeros((batch_size, width), np.float32)
        for place, row in enumerate(rows):
            start, end = len(self.prompts[row]), int(self.lengths[row]) + 1
            tokens[place, :start] = self.prompts[row]
            tokens[place, start:end] = self.answers[row]
            weights[place, start - 1 : end - 1] = 1
        return {"tokens": tokens, "weights": weights}


def encode_answers(
    tokenizer: tokenizers.Tokenizer,
    texts: Sequence[tuple[str, str]],
    *,
    end: int,
    max_length: int,
    pad_to_max_length: bool = False,
) -> tuple[Answered, list[int]]:
    """Tokenizes prompts and answers, apart, as they are met when one is written.

    Args:
      tokenizer: Of the model; a prompt begins with the tokens that it puts first.
      texts: A prompt and its answer each.
      end: Number of the token behind an answer.
      max_length: Tokens of both together, at most.
      pad_to_max_length: Whether all batches are padded to that.

    Returns:
      The examples, and the places in `texts` of those that are longer, which are not
      among them.
    """
    prompts, answers, long = [], [], []
    for place, (prompt, answer) in enumerate(texts):
        asked = tokenizer.encode(prompt).ids
        said = [*tokenizer.encode(answer, add_special_tokens=False).ids, end]
        if len(asked) + len(said) > max_length + 1:
            long.append(place)
            continue
        prompts.append(np.array(asked, np.int32))
        answers.append(np.array(said, np.int32))
    return Answered(prompts, answers, max_length, pad_to_max_length), long
