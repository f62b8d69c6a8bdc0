"""Tests of C4 and its tokenizer as they come from the hub, here one on the loopback."""

import gzip
import json

import pytest

from experiments.configs.text import TextConfig
from experiments.data import hub, text
from experiments.data.batches import WHOLE, Share
from experiments.data.text_files import TextError
from tests.experiments.data.fake_hub import FakeHub

huggingface_hub = pytest.importorskip("huggingface_hub")
datasets = pytest.importorskip("datasets")


def shard(texts):
    return gzip.compress(
        "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    )


@pytest.fixture
def c4(tmp_path, monkeypatch):
    """A hub with a small C4, which the libraries take for theirs."""
    import sentencepiece

    words = [f"word{letter}" for letter in "abcdefghijklmnop"]
    texts = [f"{words[i % 16]} {words[i // 16]} again" for i in range(256)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=22,
        eos_id=1,
        pad_id=0,
        bos_id=-1,
        unk_id=2,
        minloglevel=2,
    )
    monkeypatch.setattr(hub, "_C4_SHARDS", {"train": 4, "validation": 2})
    folder = "datasets/allenai/c4/en/c4-"
    files = {
        f"{folder}train.{i:05d}-of-00004.json.gz": shard(texts[i::4]) for i in range(4)
    }
    for i in range(2):
        name = f"{folder}validation.{i:05d}-of-00002.json.gz"
        files[name] = shard(texts[i * 20 : i * 20 + 20])
    files["google-t5/t5-base/spiece.model"] = (tmp_path / "spiece.model").read_bytes()
    fake = FakeHub(files)
    with fake.running() as address:
        point_at(monkeypatch, address, tmp_path)
        yield fake


def point_at(monkeypatch, address, tmp_path):
    """Makes the libraries ask another hub."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hub, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(text, "_PATIENCE", 0.2)


def load(report=print, share=WHOLE, **settings):
    return text.load_text(
        TextConfig(
            data=("c4",),
            streams=4,
            shuffle_buffer=4,
            sequence_length=8,
            sequences="documents",
            **{"validation_tokens": 50, **settings},
        ),
        vocab_size=100,
        batch_size=8,
        eval_batch_size=4,
        seed=0,
        share=share,
        tokenizer_file=None,
        report=report,
    )


def test_c4_streams_with_its_tokenizer_and_validation_split(c4):
    lines = []
    loaded = load(lines.append)
    assert lines == [
        "Text: allenai/c4 (en) at 1588ec45: 4 shards, read while training as 4 streams"
    ]
    assert sum(batch["weights"].sum() for batch in loaded.validation) == 50
    batch = next(loaded.batches)
    loaded.batches.close()
    assert batch["tokens"].shape == (8, 9)
    paths = [path for _, path in c4.requests]
    read = {path.rpartition("/")[2] for path in paths if "/resolve/" in path}
    assert "c4-validation.00000-of-00002.json.gz" in read
    assert sum(name.startswith("c4-train") for name in read) == 4
    commit = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    assert all(commit in path for path in paths if "/datasets/" in path)


def test_a_second_validation_shard_is_read_where_one_is_short(c4):
    loaded = load(validation_tokens=100_000)
    assert sum(len(batch["tokens"]) for batch in loaded.validation) == 40


def test_where_there_are_many_processes_each_waits_for_long(c4, monkeypatch):
    monkeypatch.setattr(text, "_PATIENCE", 0.0)
    monkeypatch.setattr(text, "_PATIENCE_OF_MANY", 20.0)
    answers = iter([503, 503])

    def fail(method, path):
        return next(answers, None) if "c4-validation" in path else None

    c4.fail = fail
    loaded = load(share=Share(0, 2))
    assert next(answers, None) is None
    assert sum(batch["weights"].sum() for batch in loaded.validation) > 0
    loaded.batches.close()


def test_hiccups_of_the_hub_pass(c4, monkeypatch):
    monkeypatch.setattr(text, "_PATIENCE", 20.0)
    answers = iter([503, 0, 500, 0])

    def fail(method, path):
        return next(answers, None) if "/datasets/" in path else None

    smooth = load()
    expected = [next(smooth.batches)["tokens"].tolist() for _ in range(5)]
    smooth.batches.close()
    c4.fail = fail
    huggingface_hub.HfFileSystem.clear_instance_cache()  # forgets what it knows
    lines = []
    loaded = load(lines.append)
    got = [next(loaded.batches)["tokens"].tolist() for _ in range(5)]
    loaded.batches.close()
    assert got == expected
    assert any("HTTP status 503. Trying again" in line for line in lines)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_is_not_asked_twice(c4, status):
    c4.fail = lambda method, path: status if "/datasets/" in path else None
    with pytest.raises(TextError) as raised:
        load(lambda line: None if line.startswith("Text") else pytest.fail(line))
    message = str(raised.value)
    assert "c4-validation.00000-of-00002.json.gz, record 1" in message
    assert f"HTTP status {status}" in message
    assert "--resume" in message


@pytest.mark.parametrize("cached_tokenizer", [False, True])
def test_without_a_network_one_clear_line(c4, monkeypatch, tmp_path, cached_tokenizer):
    if cached_tokenizer:
        load().batches.close()
    # huggingface_hub has waits of its own, 15 seconds in all.
    http = huggingface_hub.utils._http
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(hub.UnreachableError) as raised:
        load()
    message = str(raised.value)
    expected = "c4-validation.00000" if cached_tokenizer else "t5-base/spiece.model"
    assert expected in message
    assert "Check the network" in message
    assert "\n" not in message


def test_offline_mode_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TextError, match="HF_HUB_OFFLINE is set"):
        load()
