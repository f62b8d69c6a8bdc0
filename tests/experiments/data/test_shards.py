"""Tests of experiments.data.shards: listing, counting, failures."""

import gzip
import json

import pytest

from experiments.data import hub, shards
from experiments.data.shards import fingerprint, local_shards, records
from experiments.data.text_files import BadInputError, TextError
from tests.experiments.data.shard_cases import write_shard

TEXTS = [f"text {number}" * 20 for number in range(3000)]


def read(path, start=0, report=print, patience=0.0):
    (shard,) = local_shards([str(path)])
    return list(records(shard, start, report=report, patience=patience))


@pytest.fixture
def no_waiting(monkeypatch):
    """Time passes only when somebody waits."""
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(hub.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(hub.time, "sleep", sleep)
    return clock


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl", "a.ndjson.gz", "a b'ü.json"])
def test_records_are_numbered_and_may_start_anywhere(tmp_path, name):
    write_shard(tmp_path / name, TEXTS)
    numbers, lines = zip(*read(tmp_path / name), strict=True)
    assert list(numbers) == list(range(3000))
    assert [json.loads(line)["text"] for line in lines] == TEXTS
    for start in (1, 1499, 2999):
        assert read(tmp_path / name, start) == list(zip(numbers, lines))[start:]
    assert read(tmp_path / name, 3000) == []


def test_blank_lines_are_no_records_and_other_line_ends_no_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b\x85c"}\r\n\n  \n{"text": "d"}'.encode())
    assert [json.loads(line)["text"] for _, line in read(path)] == [
        "a\u2028b\x85c",
        "d",
    ]
    assert [number for number, _ in read(path)] == [0, 1]


def test_files_that_cannot_be_streamed_are_errors(tmp_path):
    for name in ("a.txt", "a.json.zst", "a.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"{name} cannot be streamed: shards are"):
            local_shards([str(tmp_path / name)])
    (tmp_path / "a[1]?.json").write_bytes(b"x")
    with pytest.raises(ValueError, match="Rename it"):
        local_shards([str(tmp_path / "*.json")])
    with pytest.raises(FileNotFoundError, match="matches no file"):
        local_shards([str(tmp_path / "absent*")])


def test_a_run_knows_its_shards_by_name_and_a_cache_by_content(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "a.json.gz", TEXTS[:10])
    here, there = (local_shards([f"{tmp_path}/{x}/*"]) for x in ("here", "there"))
    assert fingerprint(here) == fingerprint(there)
    assert here[0].version != there[0].version
    write_shard(tmp_path / "here" / "a.json.gz", TEXTS[:11])
    mended = local_shards([f"{tmp_path}/here/*"])
    assert fingerprint(mended) == fingerprint(here)
    assert mended[0].version != here[0].version
    write_shard(tmp_path / "here" / "b.json.gz", TEXTS)
    assert fingerprint(local_shards([f"{tmp_path}/here/*"])) != fingerprint(here)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_archive_names_the_shard_and_the_record(tmp_path, damage):
    path = tmp_path / "a.json.gz"
    write_shard(path, [f"{number} {hash(str(number))}" for number in range(3000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-6] ^= 255  # the checksum at the end
    else:
        data = b'{"text": "plain"}\n'
    path.write_bytes(data)
    (shard,) = local_shards([str(path)])
    got = []
    with pytest.raises(BadInputError) as raised:
        for number, _ in records(shard, 0, report=print, patience=100):
            got.append(number)
    assert got == list(range(len(got)))
    assert f"{path}, after record {len(got)}: damaged or truncated" in str(raised.value)
    assert "--on-bad-input skip" in str(raised.value)
    assert "--resume" in str(raised.value)


class Flaky:
    """Lines of a shard whose connection breaks before some of them."""

    def __init__(self, breaks, error):
        self.breaks = list(breaks)
        self.error = error
        self.opened = 0

    def __call__(self, url):
        self.opened += 1
        for number in range(100):
            if self.breaks and self.breaks[0] == number:
                del self.breaks[0]
                raise self.error
            yield str(number).encode()


def remote():
    url = "hf://datasets/x/y@1/a.json.gz"
    return shards.Shard(url, url, url)


def test_a_broken_connection_is_mended_without_a_gap(monkeypatch, no_waiting):
    flaky = Flaky([0, 40, 40, 7, 99], ConnectionResetError("gone"))
    monkeypatch.setattr(shards, "open_lines", flaky)
    lines = []
    got = list(records(remote(), 5, report=lines.append, patience=60))
    assert got == [(number, str(number).encode()) for number in range(5, 100)]
    assert flaky.opened == 6
    assert [line.rpartition("Trying")[2] for line in lines] == [
        f" again in {wait} s." for wait in (1, 1, 2, 4, 1)
    ]
    assert (
        "y@1/a.json.gz, record 41: cannot be read (ConnectionResetError: gone)"
        in (lines[1])
    )


def test_patience_ends_with_the_shard_and_the_record(monkeypatch, no_waiting):
    flaky = Flaky([3] * 1000, ConnectionResetError("gone"))
    monkeypatch.setattr(shards, "open_lines", flaky)
    with pytest.raises(TextError, match=r"a\.json\.gz, record 4: .*Tried for 31 s"):
        list(records(remote(), 0, report=print, patience=60))
    assert flaky.opened == 6
    assert no_waiting[0] == 31


def test_a_cut_transfer_is_read_a_second_time(monkeypatch, no_waiting):
    monkeypatch.setattr(shards, "open_lines", Flaky([50], EOFError("cut")))
    assert len(list(records(remote(), 0, report=print, patience=0))) == 100
    flaky = Flaky([50, 50], gzip.BadGzipFile("bad"))
    monkeypatch.setattr(shards, "open_lines", flaky)
    with pytest.raises(BadInputError, match="after record 50"):
        list(records(remote(), 0, report=print, patience=60))
    assert flaky.opened == 2


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError("no")])
def test_what_does_not_pass_is_not_tried_again(monkeypatch, no_waiting, error):
    flaky = Flaky([0], error)
    monkeypatch.setattr(shards, "open_lines", flaky)
    with pytest.raises(TextError, match=r"a\.json\.gz, record 1"):
        list(records(remote(), 0, report=print, patience=60))
    assert flaky.opened == 1
    assert no_waiting[0] == 0
