"""What is learnt in pretraining: text, tokenizer, lengths."""

import dataclasses
from pathlib import Path
from typing import Literal

Sequences = Literal["joined", "packed", "documents"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What is learnt: text, tokenizer, lengths.

    Attributes:
        data: "c4" for the English C4, streamed from the Hugging Face hub; or globs of
            training text: .txt, .jsonl, .json with a text a line, also .gz and .zst.
            None given: the English documentation that comes with the Python
            installation.
        validation_data: Globs of validation text. None given: C4's validation split,
            or a share of the training documents.
        stream: Read the files of `data` (JSON lines in shards, plain or .gz, as C4's)
            while training, instead of all of them into memory first. Needs `tokenizer`
            and `validation_data`. C4 always streams.
        streams: Shards read side by side. The order of the text depends on it, but not
            on the number of processes and workers that share them: a multiple of
            both, a divisor of the batch size, at most the number of shards.
        shuffle_buffer: Sequences among which the order is random within each stream.
            Text in memory is shuffled as a whole instead.
        workers: Processes that read and tokenize ahead on each host. 0: a thread does.
        token_cache: Folder to keep tokens in, memory-mapped, so that a second epoch or
            run does not tokenize again. None: they are not kept.
        sequences: How documents become sequences. joined: one after the other, an
            end-of-document token between, attention across. packed: the same, but
            attention stays within a document. documents: one document each, cut or
            padded, as published for C4. None: documents for C4, joined for other text.
        on_bad_input: Whether a file or record that cannot be read stops the run, or is
            skipped and counted.
        tokenizer: A tokenizer.json or a SentencePiece model, or "t5-base" for the
            hub's. None: t5-base for C4; else a byte-level BPE of as many tokens as the
            model has is trained on the text and kept in the run's folder.
        sequence_length: Tokens of context.
        validation_tokens: Tokens to evaluate on, at most; always the same ones.
    """

    data: tuple[str, ...] = ()
    validation_data: tuple[str, ...] = ()
    stream: bool = False
    streams: int = 8
    shuffle_buffer: int = 1024
    workers: int = 0
    token_cache: Path | None = None
    sequences: Sequences | None = None
    on_bad_input: Literal["error", "skip"] = "error"
    tokenizer: Path | Literal["t5-base"] | None = None
    sequence_length: int = 256
    validation_tokens: int = 131_072

    @property
    def is_c4(self) -> bool:
        """Whether the text is the hub's C4."""
        return self.data == ("c4",)

    @property
    def streamed(self) -> bool:
        """Whether text is read while training."""
        return self.stream or self.is_c4

    @property
    def treatment(self) -> Sequences:
        """How documents become sequences, the default resolved."""
        return self.sequences or ("documents" if self.is_c4 else "joined")
