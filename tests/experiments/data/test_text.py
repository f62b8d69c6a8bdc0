"""Tests of experiments.data.text: both ways to text behind one call."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.configs.text import TextConfig
from experiments.data import text as text_module
from experiments.data.batches import WHOLE, Share
from experiments.data.text import load_text
from experiments.data.text_files import TextError
from experiments.data.tokenizer import EOS, load_tokenizer, train_bpe
from tests.experiments.data.shard_cases import assert_same, take, write_shard

SHARED = Path(__file__).parents[4] / "shared" / "data"
WORDS = "the quick brown fox jumps over a lazy dog and runs far away".split()


def prose(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS, rng.integers(3, 60))) + f" {seed}.{index}"
        for index in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        write_shard(tmp_path / f"c4-train.{index}.json.gz", prose(30, seed=index))
    write_shard(tmp_path / "held-out.jsonl", prose(20, seed=9))
    train_bpe(prose(50, seed=5), 300, tmp_path / "tokenizer.json")
    return tmp_path


def load(folder, *, stream, share=WHOLE, vocab_size=300, report=print, **settings):
    defaults = {
        "data": (f"{folder}/c4-train.*.json.gz",),
        "validation_data": (f"{folder}/held-out.jsonl",),
        "stream": stream,
        "streams": 4,
        "shuffle_buffer": 8,
        "tokenizer": folder / "tokenizer.json",
        "sequence_length": 16,
        "validation_tokens": 500,
    }
    return load_text(
        TextConfig(**(defaults | settings)),
        vocab_size=vocab_size,
        batch_size=8,
        eval_batch_size=4,
        seed=0,
        share=share,
        tokenizer_file=folder / "trained.json",
        report=report,
    )


@pytest.mark.parametrize("kind", ["joined", "packed", "documents"])
@pytest.mark.parametrize("stream", [False, True])
def test_two_processes_are_one_and_a_resume_changes_nothing(folder, stream, kind):
    whole = load(folder, stream=stream, sequences=kind)
    batches = take(whole.batches, 10)
    assert ("segments" in batches[0]) == (kind == "packed")
    states = []
    for index in range(2):
        part = load(folder, stream=stream, sequences=kind, share=Share(index, 2))
        half = [
            {name: value[4 * index : 4 * index + 4] for name, value in batch.items()}
            for batch in batches
        ]
        assert_same(take(part.batches, 6), half[:6])
        states.append(json.loads(json.dumps(part.batches.get_state())))
        own = slice(2 * index, 2 * index + 2)
        assert_same(
            part.validation,
            [{n: v[own] for n, v in batch.items()} for batch in whole.validation],
        )
        assert part.identity == whole.identity
        assert part.bytes_per_token == whole.bytes_per_token
    again = load(folder, stream=stream, sequences=kind)
    again.batches.set_state(states)
    assert_same(take(again.batches, 4), batches[6:])


@pytest.mark.parametrize("stream", [False, True])
def test_both_ways_evaluate_on_the_same_text(folder, stream):
    loaded = load(folder, stream=stream)
    other = load(folder, stream=not stream)
    assert_same(loaded.validation, other.validation)
    assert sum(batch["weights"].sum() for batch in loaded.validation) == 500
    assert loaded.bytes_per_token == other.bytes_per_token > 1
    assert loaded.identity["tokenizer"] == other.identity["tokenizer"]
    assert json.loads(json.dumps(dict(loaded.summary))) == dict(loaded.summary)


def test_a_streamed_run_is_not_evaluated_on_what_it_trains_on(folder):
    both = (f"{folder}/held-out.jsonl", f"{folder}/../*/c4-train.3.json.gz")
    with pytest.raises(ValueError, match=r"both take .*c4-train\.3\.json\.gz"):
        load(folder, stream=True, validation_data=both)


def test_other_validation_text_makes_another_run(folder):
    before = load(folder, stream=True).identity
    assert load(folder, stream=True).identity == before
    write_shard(folder / "held-out.jsonl", prose(20, seed=8))
    after = load(folder, stream=True).identity
    assert after["text"] != before["text"]
    assert after["tokenizer"] == before["tokenizer"]


def test_no_more_validation_text_is_tokenized_than_is_used(folder, monkeypatch):
    write_shard(folder / "held-out.jsonl", prose(1000, seed=9))
    asked = []
    encode = load_tokenizer(folder / "tokenizer.json").encode_batch

    class Counting:
        vocab_size, eos_id, fingerprint = 300, 0, "counting"

        def encode_batch(self, texts):
            asked.extend(texts)
            return encode(texts)

    monkeypatch.setattr(text_module, "load_tokenizer", lambda choice: Counting())
    loaded = load(folder, stream=True)
    assert sum(batch["weights"].sum() for batch in loaded.validation) == 500
    assert 500 / 60 < len(asked) < 200


def test_the_user_is_told_what_is_read(folder):
    lines = []
    write_shard(folder / "c4-train.9.json.gz", ["", "text"])
    load(folder, stream=False, report=lines.append)
    assert lines[0].startswith(f"Text: {folder}/c4-train.*.json.gz; validation: ")
    assert lines[0].endswith(" 0.0 MB")
    assert lines[1] == "  skipped 1: empty document"
    lines.clear()
    load(folder, stream=True, report=lines.append)
    (line,) = lines
    assert line.endswith(": 5 shards, read while training as 4 streams")


def test_text_in_memory_keeps_its_tokens_too(folder, monkeypatch):
    cache = folder / "cache"
    first = load(folder, stream=False, token_cache=cache)
    tokenize = text_module.tokenize
    calls = []

    def counted(texts, tokenizer):
        calls.append(len(texts))
        return tokenize(texts, tokenizer)

    monkeypatch.setattr(text_module, "tokenize", counted)
    second = load(folder, stream=False, token_cache=cache)
    assert calls == [20]  # the validation text
    assert_same(take(first.batches, 5), take(second.batches, 5))


def test_settings_that_do_not_fit_are_errors(folder):
    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            load(folder, **{"stream": True, **settings})

    refused("4 shards cannot make 5 streams", streams=5)
    refused("3 streams cannot fill a batch of 8", streams=3)
    refused("--stream needs --data", data=())
    refused("--validation-data", validation_data=())
    refused("needs a tokenizer", tokenizer=None)
    refused("3 workers cannot share", workers=3)
    refused("give --model.vocab-size 300", vocab_size=299)
    refused("give --model.vocab-size 300", vocab_size=299, stream=False)
    refused("cannot be split over 3", share=Share(0, 3), stream=False)
    refused("cannot be split over 8 processes", share=Share(0, 8), stream=False)
    with pytest.raises(FileNotFoundError, match="matches no file"):
        load(folder, stream=True, data=(f"{folder}/absent*",))


def test_a_damaged_shard_stops_the_run_or_is_left_out(folder):
    for index in range(4, 8):  # each stream has two shards
        write_shard(folder / f"c4-train.{index}.json.gz", prose(30, seed=index))
    path = folder / "c4-train.2.json.gz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    stopped = load(folder, stream=True)
    with pytest.raises(TextError, match=r"c4-train\.2\.json\.gz, after record \d+"):
        take(stopped.batches, 200)
    lines = []
    skipping = load(folder, stream=True, on_bad_input="skip", report=lines.append)
    take(skipping.batches, 60)
    assert any("c4-train.2.json.gz, after record" in line for line in lines)
    path.write_bytes(data)  # mended: a run that had stopped may go on
    mended = load(folder, stream=True)
    assert mended.identity == skipping.identity
    take(mended.batches, 20)


def test_real_c4_in_its_layout_with_the_t5_tokenizer(tmp_path):
    source = SHARED / "c4like" / "c4_real_train.jsonl"
    model = SHARED / "tokenizers" / "t5_spiece.model"
    if not (source.is_file() and model.is_file()):
        pytest.skip(f"{source} or {model} is absent")
    lines = source.read_bytes().splitlines(keepends=True)
    for index in range(4):
        name = f"c4-train.{index:05d}-of-00004.json.gz"
        (tmp_path / name).write_bytes(gzip.compress(b"".join(lines[index:400:4])))
    texts = [json.loads(line)["text"] for line in lines[:400]]
    loaded = load(
        tmp_path,
        stream=True,
        vocab_size=32_000,
        tokenizer=model,
        sequence_length=64,
        shuffle_buffer=1,
        sequences="documents",
        validation_data=(str(SHARED / "c4like" / "c4_real_validation.jsonl"),),
    )
    rows = np.concatenate([batch["tokens"] for batch in take(loaded.batches, 50)])
    tokenizer = load_tokenizer(model)
    expected = {
        tuple(([*ids, 1] + [0] * 64)[:65])
        for ids in tokenizer.encode_batch(texts)
        if ids
    }
    # 400 documents are 50 batches of 8: each of them once.
    assert len(rows) == len(texts)
    assert {tuple(row) for row in rows.tolist()} == expected
    assert 3 < loaded.bytes_per_token < 6


def test_a_tokenizer_is_trained_on_text_in_memory(folder):
    loaded = load(folder, stream=False, tokenizer=None)
    trained = load_tokenizer(folder / "trained.json")
    assert loaded.identity["tokenizer"] == trained.fingerprint
    assert EOS not in trained.decode(loaded.validation[0]["tokens"][0])
