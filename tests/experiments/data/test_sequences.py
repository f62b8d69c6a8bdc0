"""Tests of the three treatments of documents, against a plain reference."""

import random

import numpy as np
import pytest

from experiments.data.pipeline import validation_batches
from experiments.data.sequences import Sequences
from experiments.data.streams import Start, Streams, cut_documents, cut_joined
from experiments.data.tokens import tokenize
from tests.experiments.data.shard_cases import EOS, Numbers, numbered


def reference(kind, texts, length):
    """Rows of (tokens, weights, segments, bytes of each target), in plain Python."""
    encoded = [[*map(int, text.split()), EOS] for text in texts]
    per_element = [
        len(text.encode()) / len(ids) for text, ids in zip(texts, encoded, strict=True)
    ]
    if kind == "documents":
        for ids, size in zip(encoded, per_element, strict=True):
            kept = ids[: length + 1]
            missing = length + 1 - len(kept)
            targets = len(kept) - 1
            yield (
                kept + [0] * missing,
                [1] * targets + [0] * missing,
                None,
                [size] * targets + [0] * missing,
            )
        return
    elements = [(EOS, -1, 0, False)]
    for number, (ids, size) in enumerate(zip(encoded, per_element, strict=True)):
        elements += [(t, number, size, i == 0) for i, t in enumerate(ids)]
    while len(elements) > 1:
        row = elements[: length + 1]
        missing = length + 1 - len(row)
        tokens = [t for t, *_ in row] + [0] * missing
        packed = kind == "packed"
        weights = [0 if packed and begins else 1 for *_, begins in row[1:]]
        segments = [number - row[0][1] + 1 for _, number, *_ in row]
        sizes = [size for _, _, size, _ in row[1:]]
        yield (
            tokens,
            weights + [0] * missing,
            segments + [0] * missing if packed else None,
            sizes + [0] * missing,
        )
        elements = elements[length:]


def corpus(seed):
    rng = random.Random(seed)
    return numbered([rng.randint(1, 25) for _ in range(30)])


def assert_row(row, expected, kind):
    tokens, weights, segments, _ = expected
    assert row["tokens"].tolist() == tokens
    assert row["weights"].tolist() == weights
    assert ("segments" in row) == (kind == "packed")
    if kind == "packed":
        assert row["segments"].tolist() == segments
        assert row["segments"].dtype == np.int32
    assert row["tokens"].dtype == np.int32
    assert row["weights"].dtype == np.float32


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 4, 10, 40])
@pytest.mark.parametrize("kind", ["joined", "packed", "documents"])
def test_rows_in_memory_are_the_references(kind, length, seed):
    texts = corpus(seed)
    tokens = tokenize(texts, Numbers())
    expected = list(reference(kind, texts, length))
    rows = Sequences(tokens, kind, length, keep_rest=True)
    assert len(rows) == len(expected)
    for index, row in enumerate(expected):
        assert_row(rows[index], row, kind)
    full = Sequences(tokens, kind, length)
    assert len(expected) - len(full) == (
        kind != "documents" and (len(tokens.ids) - 1) % length > 0
    )


@pytest.mark.parametrize("length", [1, 4, 10, 40])
@pytest.mark.parametrize("kind", ["joined", "packed", "documents"])
def test_streamed_rows_are_the_references(kind, length):
    texts = corpus(3)
    expected = list(reference(kind, texts, length))
    streams = Streams((), 1, kind, length, 1, 0, EOS)
    encoded = [
        (Start(document=number), np.array([*map(int, text.split()), EOS]))
        for number, text in enumerate(texts)
    ]
    cut = cut_documents if kind == "documents" else cut_joined
    rows = list(cut(iter(encoded), 0, streams))
    assert len(expected) - len(rows) in ((0,) if kind == "documents" else (0, 1))
    for (row, _), wanted in zip(rows, expected, strict=False):
        assert_row(row, wanted, kind)
    # Each row's place is where the next ones start.
    for done, (_, place) in list(enumerate(rows, start=1))[::7]:
        rest = list(cut(iter(encoded[place.document :]), place.offset, streams))
        assert len(rest) == len(rows) - done
        for (row, _), wanted in zip(rest, rows[done:], strict=True):
            for name, value in wanted[0].items():
                np.testing.assert_array_equal(row[name], value)


@pytest.mark.parametrize("max_tokens", [None, 1, 50, 171])
@pytest.mark.parametrize("kind", ["joined", "packed", "documents"])
def test_bytes_per_token_are_those_of_the_targets_used(kind, max_tokens):
    texts = corpus(4)
    batches, bytes_per_token = validation_batches(
        tokenize(texts, Numbers()),
        batch_size=3,
        sequence_length=10,
        max_tokens=max_tokens,
        kind=kind,
    )
    targets = [
        size
        for _, weights, _, sizes in reference(kind, texts, 10)
        for weight, size in zip(weights, sizes, strict=True)
        if weight
    ][:max_tokens]
    assert bytes_per_token == pytest.approx(sum(targets) / len(targets))
    assert sum(batch["weights"].sum() for batch in batches) == len(targets)


def test_documents_without_tokens_make_no_row_of_their_own():
    tokens = tokenize(["1 2", "", "3", "4 5"], Numbers())
    rows = Sequences(tokens, "documents", 3)
    assert [rows[i]["tokens"].tolist() for i in range(len(rows))] == [
        [1, 2, EOS, 0],
        [3, EOS, 0, 0],
        [4, 5, EOS, 0],
    ]
