"""Shards of numbered documents: every token of a corpus is another number."""

import gzip
import json
from itertools import pairwise

import numpy as np

from experiments.data.batches import WHOLE
from experiments.data.shards import local_shards
from experiments.data.stream_batches import Source, StreamBatches
from experiments.data.streams import Streams

EOS = 0


class Numbers:
    """A tokenizer for texts such as "17 18 19"."""

    eos_id = EOS
    vocab_size = 60_000
    fingerprint = "numbers"

    def encode_batch(self, texts):
        return [[int(number) for number in text.split()] for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))


def numbered(lengths, first=1):
    """Documents of so many tokens each, numbered on from `first`."""
    stops = np.cumsum([first, *lengths])
    return [" ".join(map(str, range(a, b))) for a, b in pairwise(stops)]


def write_shard(path, texts):
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    data = lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_shards(folder, count=8, documents=40, seed=0):
    """Writes C4's layout; returns the texts of each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards, first = [], 1
    for index in range(count):
        lengths = rng.integers(1, 30, documents)
        texts = numbered(lengths, first)
        first += int(lengths.sum())
        write_shard(folder / f"c4-train.{index:05d}-of-{count:05d}.json.gz", texts)
        shards.append(texts)
    return shards


def make_streams(folder, *, count=4, kind="joined", length=7, shuffle_buffer=10):
    return Streams(
        shards=tuple(local_shards([f"{folder}/*.json*"])),
        count=count,
        kind=kind,
        length=length,
        shuffle_buffer=shuffle_buffer,
        seed=5,
        eos=EOS,
    )


def make_batches(
    folder, *, share=WHOLE, workers=0, cache=None, report=print, batch_size=8, **streams
):
    streams = make_streams(folder, **streams)
    source = Source(
        streams, Numbers(), cache, "error", block=batch_size // streams.count
    )
    return StreamBatches(source, share=share, workers=workers, report=report)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
