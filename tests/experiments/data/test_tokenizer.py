"""Tests of experiments.data.tokenizer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from experiments.data import tokenizer as tokenizer_module
from experiments.data.tokenizer import (
    EOS,
    MIN_VOCAB_SIZE,
    load_tokenizer,
    train_bpe,
)

SHARED = Path(__file__).parents[4] / "shared" / "data" / "tokenizers"

WORDS = "gradient subspace moment Fisher damping history of the a into".split()
TEXTS = [
    " ".join(random.Random(i).choices(WORDS, k=40)).capitalize() + ".\n"
    for i in range(60)
]
# Nothing of this was trained on; bytes make it encodable all the same.
STRANGE = "na\u00efve \u2603 \U0001f600\ttab\r\n  two  spaces \x00 end "


@pytest.fixture
def never_train(monkeypatch):
    def fail(*args):
        raise AssertionError("trained although a tokenizer was cached")

    return lambda: monkeypatch.setattr(tokenizer_module, "_train", fail)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("".join(TEXTS), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        vocab_size=60,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return folder / "small.model"


def test_trained_bpe_compresses_and_loses_nothing(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "tokenizer.json")
    ids = tokenizer.encode_batch([*TEXTS, STRANGE])
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0
    assert [tokenizer.decode(row) for row in ids] == [*TEXTS, STRANGE]
    assert tokenizer.decode(np.array(ids[0], np.uint16)) == TEXTS[0]
    assert len(ids[0]) < len(TEXTS[0]) / 3
    assert max(max(row) for row in ids) < tokenizer.vocab_size
    assert tokenizer.eos_id not in {token for row in ids for token in row}


def test_text_that_spells_the_end_of_document_does_not_end_it(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "tokenizer.json")
    (ids,) = tokenizer.encode_batch([f"before {EOS} after"])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"before {EOS} after"
    assert tokenizer.decode([tokenizer.eos_id, *ids]) == f"before {EOS} after"


def test_training_is_deterministic_and_cached(tmp_path, never_train):
    first = train_bpe(TEXTS, 300, tmp_path / "a" / "tokenizer.json")
    second = train_bpe(TEXTS, 300, tmp_path / "b" / "tokenizer.json")
    assert first.fingerprint == second.fingerprint
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"tokenizer.json", "tokenizer.key.json"}
    never_train()
    again = train_bpe(TEXTS, 300, tmp_path / "a" / "tokenizer.json")
    assert again.fingerprint == first.fingerprint
    # What is kept is a common tokenizer.json.
    tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    assert loaded.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "texts, vocab_size", [(TEXTS[:-1], 300), (TEXTS, 290), (TEXTS[::-1], 300)]
)
def test_cache_of_another_corpus_or_size_is_not_used(tmp_path, texts, vocab_size):
    cache = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, 300, cache)
    tokenizer = train_bpe(texts, vocab_size, cache)
    fresh = train_bpe(texts, vocab_size, tmp_path / "fresh.json")
    assert tokenizer.fingerprint == fresh.fingerprint
    assert load_tokenizer(cache).fingerprint == fresh.fingerprint


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer.key.json"])
def test_damaged_cache_is_trained_anew(tmp_path, damaged):
    cache = tmp_path / "tokenizer.json"
    first = train_bpe(TEXTS, 300, cache)
    content = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(content[: len(content) // 2])
    assert train_bpe(TEXTS, 300, cache).fingerprint == first.fingerprint
    assert load_tokenizer(cache).fingerprint == first.fingerprint


def test_interruption_while_saving_leaves_nothing_half_done(tmp_path, monkeypatch):
    cache = tmp_path / "tokenizer.json"
    first = train_bpe(TEXTS, 300, cache)
    write = tokenizer_module._write_atomically

    def interrupted(path, text):
        if path == cache:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(tokenizer_module, "_write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_bpe(TEXTS, 290, cache)
    assert load_tokenizer(cache).fingerprint == first.fingerprint
    monkeypatch.undo()
    assert train_bpe(TEXTS, 290, cache).vocab_size == 290
    assert train_bpe(TEXTS, 300, cache).fingerprint == first.fingerprint


def test_a_small_corpus_gives_the_vocabulary_it_can(tmp_path):
    tokenizer = train_bpe(["ab ab ab"], 5000, tmp_path / "tokenizer.json")
    assert MIN_VOCAB_SIZE <= tokenizer.vocab_size < 300


def test_training_refuses_what_it_cannot_do(tmp_path):
    cache = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(TEXTS, 256, cache)
    with pytest.raises(ValueError, match="texts is empty"):
        train_bpe([], 300, cache)
    with pytest.raises(FileExistsError, match="no tokenizer that was trained here"):
        train_bpe(TEXTS, 300, tmp_path)
    cache.write_text("somebody else's")
    with pytest.raises(FileExistsError, match="no tokenizer that was trained here"):
        train_bpe(TEXTS, 300, cache)
    assert cache.read_text() == "somebody else's"


def test_sentencepiece_model(sentencepiece_file, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file)
    (ids,) = tokenizer.encode_batch([TEXTS[0].strip()])
    assert all(isinstance(token, int) for token in ids)
    assert tokenizer.decode(np.array(ids, np.uint8)) == TEXTS[0].strip()
    assert tokenizer.eos_id == 2
    assert tokenizer.eos_id not in ids
    assert max(ids) < tokenizer.vocab_size <= 60
    # The content decides, not the name.
    renamed = tmp_path / "renamed.json"
    renamed.write_bytes(sentencepiece_file.read_bytes())
    assert load_tokenizer(renamed).fingerprint == tokenizer.fingerprint


def test_special_tokens_and_padding_of_a_file_are_not_added(tmp_path):
    cache = tmp_path / "tokenizer.json"
    expected = train_bpe(TEXTS, 300, cache).encode_batch(TEXTS)
    inner = tokenizers.Tokenizer.from_file(str(cache))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)]
    )
    inner.enable_padding()
    inner.enable_truncation(5)
    other = tmp_path / "other.json"
    inner.save(str(other))
    assert load_tokenizer(other).encode_batch(TEXTS) == expected


def test_files_that_are_no_tokenizer_are_errors(tmp_path, sentencepiece_file):
    with pytest.raises(FileNotFoundError, match="No tokenizer at"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="No tokenizer at"):
        load_tokenizer(tmp_path)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(path)
    path.write_bytes(b"\x00\xff neither")
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer(path)
    path.write_bytes(sentencepiece_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_tokenizer(path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(ValueError, match="no end-of-document token"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "name, vocab_size, eos_id",
    [
        ("llama2_tokenizer.model", 32_000, 2),
        ("llama_tokenizer.json", 32_003, 2),
        ("t5_spiece.model", 32_000, 1),
        ("torchtune_m_2000.model", 2_000, 2),
    ],
)
def test_published_tokenizers(name, vocab_size, eos_id):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    tokenizer = load_tokenizer(path)
    text = "A basis of the gradient's subspace."
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (vocab_size, eos_id)
    (ids,) = tokenizer.encode_batch([text])
    assert ids[0] != 1 and ids[-1] != eos_id  # neither BOS nor EOS added
    assert tokenizer.decode(ids).strip() == text
