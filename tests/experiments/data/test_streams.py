"""Tests of experiments.data.streams: nothing twice, nothing lost, shuffled."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from experiments.data.documents import DocumentReader
from experiments.data.streams import Position
from experiments.data.text_files import TextError
from tests.experiments.data.shard_cases import (
    EOS,
    Numbers,
    make_streams,
    numbered,
    write_shard,
    write_shards,
)

START = Position()


def reader(on_bad_input="error", report=print, patience=0):
    return DocumentReader(Numbers(), None, on_bad_input, report, patience)


def rows_of(streams, stream, count, position=START, **options):
    rows = streams.rows(stream, position, reader(**options))
    return [next(rows) for _ in range(count)]


def targets(rows):
    return [
        int(token)
        for row, _ in rows
        for token, weight in zip(row["tokens"][1:], row["weights"], strict=True)
        if weight
    ]


@pytest.fixture
def whole_epochs(tmp_path):
    """Three shards whose elements make exactly 30 rows of 7: three windows of 10."""
    texts = numbered([9, 13, 20, 27, 6, 34, 48, 4, 18, 6, 13])
    assert sum(len(text.split()) + 1 for text in texts) == 209
    texts[-1] += " 9999"
    for index, part in enumerate((texts[:4], texts[4:7], texts[7:])):
        write_shard(tmp_path / f"part-{index}.jsonl", part)
    return tmp_path, [int(token) for text in texts for token in text.split()]


def test_an_epoch_of_joined_rows_has_every_element_once(whole_epochs):
    folder, numbers = whole_epochs
    rows = rows_of(make_streams(folder, count=1), 0, 60)
    for epoch in (rows[:30], rows[30:]):
        counted = Counter(targets(epoch))
        assert counted.pop(EOS) == 11
        assert counted == Counter(numbers)
    assert targets(rows[:30]) != targets(rows[30:])


def test_an_epoch_of_packed_rows_leaves_out_first_tokens_only(whole_epochs):
    folder, numbers = whole_epochs
    rows = rows_of(make_streams(folder, count=1, kind="packed"), 0, 30)
    counted = Counter(targets(rows))
    assert counted.pop(EOS) == 11
    left_out = set(numbers) - set(counted)
    assert len(left_out) == 11
    assert max(counted.values()) == 1


def test_an_epoch_of_documents_has_every_document_once(tmp_path):
    shards = write_shards(tmp_path, count=4, documents=25)
    firsts = {int(text.split()[0]) for shard in shards for text in shard}
    streams = make_streams(tmp_path, count=1, kind="documents", shuffle_buffer=20)
    rows = rows_of(streams, 0, 200)
    for epoch in (rows[:100], rows[100:]):
        starts = [int(row["tokens"][0]) for row, _ in epoch]
        assert sorted(starts) == sorted(firsts)


def test_streams_own_shards_of_their_own_and_together_all(tmp_path):
    shards = write_shards(tmp_path, count=7)
    everything = [{int(t) for text in s for t in text.split()} for s in shards]
    streams = make_streams(tmp_path, count=3)
    for stream in range(3):
        seen = set(targets(rows_of(streams, stream, 400))) - {EOS}
        assert seen == set.union(*everything[stream::3])


def test_rows_are_shuffled_within_windows_and_shards_within_epochs(tmp_path):
    write_shards(tmp_path, count=6)
    buffer = 30
    streams = make_streams(tmp_path, count=1, kind="documents", shuffle_buffer=buffer)
    plain = make_streams(tmp_path, count=1, kind="documents", shuffle_buffer=1)
    shuffled = [int(r["tokens"][0]) for r, _ in rows_of(streams, 0, 480)]
    in_order = [int(r["tokens"][0]) for r, _ in rows_of(plain, 0, 480)]
    orders = set()
    for start in range(0, 480, buffer):
        window, text = (x[start : start + buffer] for x in (shuffled, in_order))
        assert window != text
        assert sorted(window) == sorted(text)
        orders.add(tuple(np.argsort(np.argsort(window))))
    assert len(orders) == 480 // buffer
    shards = [x for x in in_order[:240:40]], [x for x in in_order[240::40]]
    assert sorted(shards[0]) == sorted(shards[1])
    assert shards[0] != shards[1]
    assert shards[0] != sorted(shards[0])


def test_the_seed_and_the_stream_decide_the_order(tmp_path):
    write_shards(tmp_path, count=2)
    streams = make_streams(tmp_path, count=1)
    other = dataclasses.replace(streams, seed=6)
    assert targets(rows_of(streams, 0, 20)) == targets(rows_of(streams, 0, 20))
    assert targets(rows_of(streams, 0, 20)) != targets(rows_of(other, 0, 20))


@pytest.mark.parametrize("kind", ["joined", "packed", "documents"])
def test_every_position_continues(tmp_path, kind):
    write_shards(tmp_path, count=2, documents=6)
    streams = make_streams(tmp_path, count=1, kind=kind, shuffle_buffer=4)
    rows = rows_of(streams, 0, 60)
    assert rows[-1][1].epoch > 0
    for done in range(1, 50):
        following = rows_of(streams, 0, 10, position=rows[done - 1][1])
        for (row, place), (wanted, behind) in zip(
            following, rows[done : done + 10], strict=True
        ):
            assert place == behind
            for name in wanted:
                np.testing.assert_array_equal(row[name], wanted[name])


def test_documents_without_text_are_left_out(tmp_path):
    write_shard(tmp_path / "a.jsonl", ["1 2 3", "", " ", "4 5"])
    streams = make_streams(tmp_path, count=1, length=2, shuffle_buffer=1)
    rows = rows_of(streams, 0, 7)
    assert targets(rows) == [1, 2, 3, EOS, 4, 5, EOS, 1, 2, 3, EOS, 4, 5, EOS]
    write_shard(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(TextError, match=r"no document to read in .*a\.jsonl"):
        rows_of(make_streams(tmp_path, count=1), 0, 1)


def test_a_bad_line_names_its_record_or_ends_its_shard(tmp_path):
    write_shard(tmp_path / "a.jsonl", ["1 2 3", "4 5 6"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n{not json}\n" + json.dumps({"text": "7 8"}) + "\n")
    write_shard(tmp_path / "b.jsonl", ["9 10"])
    streams = make_streams(tmp_path, count=1, kind="documents", shuffle_buffer=1)
    with pytest.raises(TextError, match=r"a\.jsonl, record 3: line that is not JSON"):
        rows_of(streams, 0, 10)
    lines = []
    rows = rows_of(streams, 0, 6, on_bad_input="skip", report=lines.append)
    assert Counter(int(row["tokens"][0]) for row, _ in rows) == {1: 2, 4: 2, 9: 2}
    assert len(lines) == 2
    assert "record 3" in lines[0]
    assert lines[0].endswith("The rest of the shard is left out.")
