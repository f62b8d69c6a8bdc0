"""The text of a run, ready for training: in memory, or streamed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configs.text import TextConfig
from experiments.data.batches import Batches, Share
from experiments.data.corpus import (
    Corpus,
    fingerprint_texts,
    load_corpus,
    load_held_out,
)
from experiments.data.documents import DocumentReader
from experiments.data.hub import C4_REVISION, Report, t5_tokenizer
from experiments.data.pipeline import train_batches, validation_batches
from experiments.data.sequences import Batch
from experiments.data.shards import Shard, c4_shards, fingerprint, local_shards
from experiments.data.stream_batches import Source, StreamBatches
from experiments.data.streams import Streams
from experiments.data.text_files import find_files
from experiments.data.token_cache import TokenCache
from experiments.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from experiments.data.tokens import Tokens, encode_sized, join, tokenize

# Seconds to go on trying to reach the hub. A user waits for the start of a run; where
# there are many processes, the hub may put them off, and one that gives up ends all.
_PATIENCE, _PATIENCE_OF_MANY = 20.0, 300.0


@dataclass(frozen=True)
class Text:
    """The text of a run.

    Attributes:
      batches: Endless training batches, this process' rows.
      validation: This process' rows of the validation batches, always the same.
      bytes_per_token: UTF-8 bytes per target of the validation batches.
      tokenizer: What has made the tokens.
      identity: Fingerprints of text and tokenizer.
      summary: JSON-able facts on what is read, for people.
    """

    batches: Batches
    validation: list[Batch]
    bytes_per_token: float
    tokenizer: Tokenizer
    identity: dict[str, str]
    summary: Mapping[str, Any]


def load_text(
    settings: TextConfig,
    *,
    vocab_size: int,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    share: Share,
    tokenizer_file: Path,
    report: Report,
) -> Text:
    """Read the text, or find its shards; train or load the tokenizer; cut batches.

    Args:
      settings: What is read and how.
      vocab_size: Tokens of the model, for which the tokenizer may not be too large.
      batch_size: Sequences per training batch of all processes together.
      eval_batch_size: Sequences per validation batch, likewise.
      seed: Seed of the order.
      share: The rows that this process provides.
      tokenizer_file: Where a tokenizer that is trained on the text is kept.
      report: Takes a line for the user.

    Raises:
      FileNotFoundError: A pattern matches no file, or there is no tokenizer.
      ValueError: Settings that do not fit together, or text that cannot be read
        (`TextError`).
    """
    for size in (batch_size, eval_batch_size):
        share.rows(size)
    load = _load_streamed if settings.streamed else _load_in_memory
    request = _Request(settings, vocab_size, batch_size, seed, share, report)
    loaded = load(request, tokenizer_file)
    validation, bytes_per_token = validation_batches(
        loaded.validation,
        batch_size=eval_batch_size,
        sequence_length=settings.sequence_length,
        max_tokens=settings.validation_tokens,
        kind=settings.treatment,
        share=share,
    )
    identity = {
        "text": loaded.summary["fingerprint"],
        "tokenizer": loaded.tokenizer.fingerprint,
    }
    return Text(
        batches=loaded.batches,
        validation=validation,
        bytes_per_token=bytes_per_token,
        tokenizer=loaded.tokenizer,
        identity=identity,
        summary=loaded.summary,
    )


@dataclass(frozen=True)
class _Request:
    """What both ways of loading are given."""

    settings: TextConfig
    vocab_size: int
    batch_size: int
    seed: int
    share: Share
    report: Report

    def checked(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return a tokenizer whose tokens the model knows."""
        if tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{self.vocab_size}: give --model.vocab-size {tokenizer.vocab_size}."
            )
        return tokenizer

    def given_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that the settings name, if they do."""
        choice = self.settings.tokenizer
        if choice is None and self.settings.is_c4:
            choice = "t5-base"
        if choice is None:
            return None
        if choice == "t5-base":
            choice = t5_tokenizer(self.report, self.patience)
        return self.checked(load_tokenizer(choice))

    @property
    def patience(self) -> float:
        """Return the seconds to go on trying to reach the hub."""
        return _PATIENCE if self.share.count == 1 else _PATIENCE_OF_MANY


@dataclass(frozen=True)
class _Loaded:
    """What both ways of loading give."""

    batches: Batches
    validation: Tokens
    tokenizer: Tokenizer
    summary: Mapping[str, Any]


def _load_in_memory(request: _Request, tokenizer_file: Path) -> _Loaded:
    """Load a corpus that is read as a whole."""
    settings, report = request.settings, request.report
    corpus = load_corpus(
        settings.data,
        validation_patterns=settings.validation_data,
        on_bad_input=settings.on_bad_input,
    )
    summary = corpus.summary
    report(
        f"Text: {summary['source']}: {summary['documents']:,} documents, "
        f"{summary['bytes'] / 1e6:.1f} MB"
    )
    _report_skipped(summary["skipped"], report)
    tokenizer = request.given_tokenizer()
    if tokenizer is None:
        tokenizer = request.checked(
            train_bpe(corpus.train, request.vocab_size, tokenizer_file)
        )
    batches = train_batches(
        _tokenize_kept(corpus, tokenizer, settings.token_cache, report),
        batch_size=request.batch_size,
        sequence_length=settings.sequence_length,
        seed=request.seed,
        kind=settings.treatment,
        share=request.share,
    )
    validation = tokenize(corpus.validation, tokenizer)
    return _Loaded(batches, validation, tokenizer, summary)


def _tokenize_kept(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path | None, report: Report
) -> Tokens:
    """Return the tokens of the training text, from the cache if it has them."""
    if folder is None:
        return tokenize(corpus.train, tokenizer)
    cache = TokenCache(folder, report)
    key = f"{corpus.summary['fingerprint']}|{tokenizer.fingerprint}|train"
    tokens = cache.load(key)
    if tokens is None:
        tokens = tokenize(corpus.train, tokenizer)
        cache.save(key, tokens)
    return tokens


def _load_streamed(request: _Request, tokenizer_file: Path) -> _Loaded:
    """Find shards that are read while training, and read some validation text."""
    del tokenizer_file  # the text to train a tokenizer on is not here as a whole
    settings, report = request.settings, request.report
    shards, source = _find_shards(settings)
    _check_streams(settings.streams, len(shards), request.batch_size)
    report(
        f"Text: {source}: {len(shards):,} shards, read while training as "
        f"{settings.streams} streams"
    )
    tokenizer = request.given_tokenizer()
    if tokenizer is None:
        raise ValueError(
            "Streamed text needs a tokenizer: give --tokenizer t5-base, a "
            "tokenizer.json or a SentencePiece model."
        )
    streams = Streams(
        shards=tuple(shards),
        count=settings.streams,
        kind=settings.treatment,
        length=settings.sequence_length,
        shuffle_buffer=settings.shuffle_buffer,
        seed=request.seed,
        eos=tokenizer.eos_id,
    )
    batches = StreamBatches(
        Source(
            streams,
            tokenizer,
            settings.token_cache,
            settings.on_bad_input,
            block=request.batch_size // settings.streams,
        ),
        share=request.share,
        workers=settings.workers,
        report=report,
    )
    summary = {
        "source": source,
        "shards": len(shards),
        "streams": settings.streams,
        "fingerprint": fingerprint(shards),
    }
    if not settings.validation_data:
        validation = _c4_validation(request, tokenizer)
    else:
        validation, digest = _given_validation(request, tokenizer)
        summary["fingerprint"] += f" {digest}"
    return _Loaded(batches, validation, tokenizer, summary)


def _find_shards(settings: TextConfig) -> tuple[list[Shard], str]:
    """Return the training shards, and where they are from, for people."""
    if settings.is_c4:
        return c4_shards("train"), f"allenai/c4 (en) at {C4_REVISION[:8]}"
    if not settings.data:
        raise ValueError("--stream needs --data: globs of JSON-lines shards.")
    if not settings.validation_data:
        raise ValueError(
            "Streamed files need text of their own to evaluate on: give "
            "--validation-data, globs of text."
        )
    shards = local_shards(settings.data)
    held_out = {str(path.resolve()) for path in find_files(settings.validation_data)}
    if shared := held_out & {shard.url for shard in shards}:
        raise ValueError(
            f"--data and --validation-data both take {min(shared)}: a run would be "
            "evaluated on text that it trains on. Give globs that do not overlap."
        )
    return shards, ", ".join(settings.data)


def _check_streams(streams: int, shards: int, batch_size: int) -> None:
    """Raise unless every stream has a shard and the same part of a batch."""
    if shards < streams:
        raise ValueError(
            f"{shards} shards cannot make {streams} streams: give --streams {shards} "
            "or fewer."
        )
    if batch_size % streams:
        raise ValueError(
            f"{streams} streams cannot fill a batch of {batch_size} sequences evenly: "
            "give --streams a divisor of it."
        )


def _given_validation(request: _Request, tokenizer: Tokenizer) -> tuple[Tokens, str]:
    """Return as much of the given validation text as is used, and a hash of all."""
    texts, skipped = load_held_out(
        request.settings.validation_data, on_bad_input=request.settings.on_bad_input
    )
    _report_skipped(skipped, request.report)
    tokens = _as_much_as_is_used(encode_sized(texts, tokenizer), request, tokenizer)
    return tokens, fingerprint_texts(texts)


def _c4_validation(request: _Request, tokenizer: Tokenizer) -> Tokens:
    """Return as much of C4's validation text as is used."""
    bad_input, report = request.settings.on_bad_input, request.report
    reader = DocumentReader(tokenizer, None, bad_input, report, request.patience)
    documents = chain.from_iterable(map(reader.read_sized, c4_shards("validation")))
    return _as_much_as_is_used(documents, request, tokenizer)


def _as_much_as_is_used(
    documents: Iterable[tuple[np.ndarray, int]], request: _Request, tokenizer: Tokenizer
) -> Tokens:
    """Return the first documents, as many as the validation batches take."""
    longest, taken, sizes, targets = request.settings.sequence_length, [], [], 0
    for elements, size in documents:
        taken.append(elements)
        sizes.append(size)
        # Enough for any treatment: a cut document has this many targets.
        targets += min(len(elements) - 1, longest)
        if targets >= request.settings.validation_tokens:
            break
    return join(taken, sizes, tokenizer)


def _report_skipped(skipped: Mapping[str, int], report: Report) -> None:
    for reason, count in skipped.items():
        report(f"  skipped {count:,}: {reason}")
