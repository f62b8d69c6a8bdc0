"""Tokenizers: a byte-level BPE trained on the corpus, or one from a file."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from experiments.data.corpus import fingerprint_texts
from experiments.data.text_files import TextError
from experiments.files import replace_text

EOS = "<|endoftext|>"
"""End-of-document token of the tokenizers trained here; its id is 0."""

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-document token."""

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""What transformers reads beside a model's tokenizer.json, where it is there."""

_KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>")
# Part of the cache's key: raise it when training changes.
_TRAINING_VERSION = 1


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer.

    Attributes:
      vocab_size: Number of ids; every id is below it.
      eos_id: Id that ends a document.
      fingerprint: SHA-256 of the tokenizer's file, in hex. Runs whose fingerprints
        differ do not understand each other's tokens.
    """

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's file beside a model, under its usual name."""
        ...


def train_bpe(texts: Sequence[str], vocab_size: int, cache: Path) -> Tokenizer:
    """Train a byte-level BPE on ``texts``, or reuse the one that was trained before.

    ``cache`` becomes a common ``tokenizer.json``. A file beside it (``.key.json``)
    holds hashes of the texts and of the tokenizer, and the vocabulary size: a
    tokenizer of another corpus or size, or half a file, is trained anew.

    Args:
      texts: Documents to train on.
      vocab_size: Number of ids wanted, at least ``MIN_VOCAB_SIZE``. A small corpus
        may have fewer pairs to merge; the tokenizer's own ``vocab_size`` counts.
      cache: File to keep the tokenizer in; its folder is made if absent.

    Returns:
      The tokenizer. The same arguments give the same one, trained or reused.

    Raises:
      ValueError: ``vocab_size`` too small, or no texts.
      FileExistsError: ``cache`` is a folder, or a file that is not from here.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: a byte-level BPE needs at least "
            f"{MIN_VOCAB_SIZE} (256 bytes and the end of a document)."
        )
    if not texts:
        raise ValueError("texts is empty: a tokenizer needs text to be trained on.")
    key_file = cache.with_suffix(".key.json")
    if cache.exists() and not (cache.is_file() and key_file.is_file()):
        raise FileExistsError(
            f"{cache} is no tokenizer that was trained here: use it as a given "
            "tokenizer, or train into another file."
        )
    key = {
        "training": _TRAINING_VERSION,
        "vocab_size": vocab_size,
        "texts_sha256": fingerprint_texts(texts),
    }
    if cache.exists():
        sha256 = hashlib.sha256(cache.read_bytes()).hexdigest()
        if _read_key(key_file) == key | {"tokenizer_sha256": sha256}:
            return load_tokenizer(cache)
    trained = _train(texts, vocab_size).to_str()
    sha256 = hashlib.sha256(trained.encode()).hexdigest()
    cache.parent.mkdir(parents=True, exist_ok=True)
    # The key first: it then names a tokenizer that is not there yet, whatever
    # happens in between.
    _write_atomically(key_file, json.dumps(key | {"tokenizer_sha256": sha256}))
    _write_atomically(cache, trained)
    return load_tokenizer(cache)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a Hugging Face ``tokenizer.json`` or a SentencePiece model.

    The content decides which of the two it is, not the name.

    Raises:
      FileNotFoundError: ``path`` is not a file.
      ValueError: The file is neither, or has no end-of-document token.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"No tokenizer at {path}. Give a tokenizer.json or a SentencePiece .model "
            "file."
        )
    data = path.read_bytes()
    if data.lstrip().startswith(b"{"):
        return _HuggingFaceTokenizer(data, path)
    return _SentencePieceTokenizer(data, path)


def load_model_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Load the tokenizer.json that lies beside a model; it neither pads nor cuts.

    Raises:
      TextError: There is none, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise TextError(f"{folder} has no tokenizer.json.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise TextError(f"{path} is no tokenizer: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def copy_tokenizer_settings(source: Path, target: Path) -> None:
    """Copy those of `TOKENIZER_SETTINGS` that are in a model's folder to another."""
    for name in TOKENIZER_SETTINGS:
        if (source / name).exists():
            shutil.copy(source / name, target)


def check_tokens(tokens: Iterable[np.ndarray], vocab_size: int, model: str) -> None:
    """Refuse tokens that a model does not know, of which it would make NaN.

    Args:
      tokens: Numbers of the tokens of each example.
      vocab_size: Tokens of the model.
      model: Its name or folder, for the message.

    Raises:
      TextError: One of them is not below `vocab_size`.
    """
    largest = max((int(one.max()) for one in tokens if one.size), default=0)
    if largest >= vocab_size:
        raise TextError(
            f"{model}: its tokenizer (tokenizer.json) makes token {largest}, the model "
            f"(vocab_size in config.json) has {vocab_size} tokens, numbered from 0: "
            "give a model with the tokenizer that it was trained with."
        )


class _HuggingFaceTokenizer:
    """A ``tokenizer.json`` as a ``Tokenizer``."""

    def __init__(self, data: bytes, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # The library raises bare Exceptions.
            raise ValueError(
                f"{path} is JSON but no tokenizer.json of Hugging Face tokenizers "
                f"({error}). A vocab.json alone does not suffice."
            ) from error
        # A text that spells a special token is still text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._data = data
        ids = [self._tokenizer.token_to_id(token) for token in _KNOWN_EOS]
        known = [token_id for token_id in ids if token_id is not None]
        if not known:
            raise ValueError(
                f"{path} has no end-of-document token: one of {_KNOWN_EOS} is needed."
            )
        self.eos_id: int = known[0]
        # Added tokens may leave gaps, so that counting tokens is not enough.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values())
        self.fingerprint: str = hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, no special tokens added."""
        encodings = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens left out."""
        return self._tokenizer.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, and what transformers has to know of it."""
        (folder / "tokenizer.json").write_bytes(self._data)
        settings = {
            # That of a Llama would put a token of its own before each text.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._tokenizer.id_to_token(self.eos_id),
        }
        replace_text(folder / TOKENIZER_SETTINGS[0], json.dumps(settings, indent=2))


class _SentencePieceTokenizer:
    """A SentencePiece model as a ``Tokenizer``."""

    def __init__(self, data: bytes, path: Path) -> None:
        if not data:
            raise ValueError(f"{path} is empty; it should hold a tokenizer.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is neither a tokenizer.json nor a SentencePiece model "
                f"({error})."
            ) from error
        self._data = data
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(
                f"{path} has no end-of-document piece; train it with an eos_id."
            )
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint: str = hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, no special tokens added."""
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens left out."""
        # The processor takes Python integers only.
        return self._processor.decode([int(token) for token in ids])

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.model``."""
        (folder / "tokenizer.model").write_bytes(self._data)


def _train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train GPT-2's kind of tokenizer: bytes, split at words, merged by counts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _read_key(path: Path) -> object:
    """Return what a key file holds, None if it is damaged (it is a cache)."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    # A name of its own, for processes of several machines may write here at once.
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False
    ) as part:
        part.write(text.encode())
    os.replace(part.name, path)
