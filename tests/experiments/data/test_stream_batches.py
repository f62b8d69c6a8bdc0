"""Tests of experiments.data.stream_batches: one order, whoever reads."""

import json
import os

import numpy as np
import pytest

from experiments.data import documents
from experiments.data.batches import Share
from experiments.data.text_files import TextError
from tests.experiments.data.shard_cases import (
    assert_same,
    make_batches,
    take,
    write_shards,
)

KINDS = ("joined", "packed", "documents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    return {kind: take(make_batches(folder, kind=kind), 120) for kind in KINDS}


def joined_rows(parts):
    """Batches of processes as global batches."""
    return [
        {name: np.concatenate([p[name] for p in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_same_batches(folder, undisturbed, kind, count):
    parts = [
        take(make_batches(folder, kind=kind, share=Share(index, count)), 12)
        for index in range(count)
    ]
    assert parts[0][0]["tokens"].shape == (8 // count, 8)
    assert_same(joined_rows(parts), undisturbed[kind][:12])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 9, 27])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_resume_goes_on_with_any_number_of_processes(
    folder, undisturbed, kind, done, before, after
):
    states = []
    for index in range(before):
        batches = make_batches(folder, kind=kind, share=Share(index, before))
        take(batches, done)
        states.append(json.loads(json.dumps(batches.get_state())))
        batches.close()
    parts = []
    for index in range(after):
        batches = make_batches(folder, kind=kind, share=Share(index, after))
        batches.set_state(states[::-1])
        parts.append(take(batches, 5))
        batches.close()
    assert_same(joined_rows(parts), undisturbed[kind][done : done + 5])


def test_a_state_may_be_set_on_batches_under_way(folder, undisturbed):
    batches = make_batches(folder)
    take(batches, 3)
    state = batches.get_state()
    take(batches, 7)
    batches.set_state([state])
    assert_same(take(batches, 20), undisturbed["joined"][3:23])
    assert make_batches(folder).get_state() != state


def test_workers_read_the_same_order_and_leave_with_their_batches(
    folder, undisturbed, tmp_path
):
    batches = make_batches(folder, workers=2, cache=tmp_path)
    assert_same(take(batches, 60), undisturbed["joined"][:60])
    state = batches.get_state()
    batches.close()
    other = make_batches(folder)
    other.set_state([state])
    assert_same(take(other, 10), undisturbed["joined"][60:70])
    assert any(tmp_path.rglob("*.tokens"))


def test_a_worker_fails_with_the_shards_name(tmp_path):
    write_shards(tmp_path, count=2)
    path = sorted(tmp_path.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-20])
    batches = make_batches(tmp_path, count=2, workers=1)
    with pytest.raises(TextError, match=f"{path.name}.*truncated"):
        take(batches, 100)
    batches.close()


def test_a_mended_shard_goes_on_where_it_failed(tmp_path):
    write_shards(tmp_path, count=2)
    expected = take(make_batches(tmp_path, count=2), 60)
    path = sorted(tmp_path.iterdir())[1]
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    batches = make_batches(tmp_path, count=2)
    got = []
    with pytest.raises(TextError, match="truncated"):
        got.extend(iter(batches.__next__, None))
    path.write_bytes(data)
    assert_same(got + take(batches, 60 - len(got)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing_and_spares_reading(
    folder, undisturbed, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE", 16)  # 40 documents: the last is shorter
    assert_same(  # more than an epoch
        take(make_batches(folder, kind=kind, cache=tmp_path), 120), undisturbed[kind]
    )
    monkeypatch.setattr(documents, "records", None)  # nothing is read any more
    batches = make_batches(folder, kind=kind, cache=tmp_path)
    assert_same(take(batches, 25), undisturbed[kind][:25])
    other = make_batches(folder, kind=kind, cache=tmp_path)
    other.set_state([batches.get_state()])
    assert_same(take(other, 80), undisturbed[kind][25:105])


def test_a_cache_of_half_a_shard_is_completed(
    folder, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE", 16)
    first = make_batches(folder, cache=tmp_path)
    take(first, 60)
    first.close()
    files = sorted(tmp_path.rglob("*.tokens"))
    for path in files[::2]:
        os.unlink(path)
    again = make_batches(folder, cache=tmp_path)
    again.set_state([first.get_state()])
    assert_same(take(again, 60), undisturbed["joined"][60:])
    again.close()
    anew = make_batches(folder, cache=tmp_path)
    assert_same(take(anew, 120), undisturbed["joined"])
    anew.close()
    assert set(files) <= set(tmp_path.rglob("*.tokens"))


def test_rows_of_a_batch_belong_to_streams_in_turn(folder, undisturbed):
    own = [
        {
            token
            for shard in write_shards(folder)[stream::4]
            for text in shard
            for token in map(int, text.split())
        }
        for stream in range(4)
    ]
    for batch in undisturbed["joined"]:
        for row, tokens in enumerate(batch["tokens"][:, 1:]):
            assert set(tokens.tolist()) - {0} <= own[row // 2]


def test_uneven_shares_and_foreign_states_are_errors(folder):
    with pytest.raises(ValueError, match="4 streams cannot be shared by 3"):
        make_batches(folder, share=Share(0, 3))
    with pytest.raises(ValueError, match="3 workers cannot share the 2 streams"):
        make_batches(folder, share=Share(0, 2), workers=3)
    half = make_batches(folder, share=Share(1, 2))
    with pytest.raises(ValueError, match=r"lacks the streams \[0, 1\]"):
        make_batches(folder).set_state([half.get_state()])
    with pytest.raises(ValueError, match="lacks the streams"):
        half.set_state([{"batches": 3}])
    with pytest.raises(ValueError, match="no share 2 of 2"):
        Share(2, 2)
