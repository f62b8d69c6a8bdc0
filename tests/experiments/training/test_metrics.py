"""metrics.jsonl and its mirrors: flushed rows, nothing twice, nothing lost."""

import json
import math
import os
import struct
import subprocess
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.mirrors import TensorBoard, open_mirrors


def events(folder):
    """All events of a TensorBoard folder, in its reader's order."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # records: length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(folder):
    """What TensorBoard shows: a START event drops what is known of later steps."""
    curves = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            curves = {at: value for at, value in curves.items() if at[1] < event.step}
        for value in event.summary.value:
            curves[value.tag, event.step] = value.simple_value
    return curves


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until=0) as writer:
        writer.write({"step": 1, "loss": 2.5})
        assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_rows_after_the_checkpoint_and_half_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with MetricsWriter(path, keep_until=2) as writer:
        writer.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_row_that_a_crash_cut_short_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]


def test_rows_that_are_missing_are_told_of(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 6}\n')
    with MetricsWriter(path, keep_until=5, report=lines.append):
        assert "the rows of 2 of the 5 steps" in lines.pop()
    with MetricsWriter(path, keep_until=2, report=lines.append):
        assert not lines


def test_synced_rows_are_on_disk(tmp_path, monkeypatch):
    path, synced = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with MetricsWriter(path, keep_until=0) as writer:
        writer.write({"step": 1})
        writer.sync()
    assert synced == [path.stat().st_size] != [0]


def test_a_damaged_row_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricsWriter(path, keep_until=5)
    assert path.read_text() == '{"step": 1}\nnonsense\n'


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until=0) as writer:
        writer.write({"step": 1, "loss": math.nan, "norm": math.inf, "tokens": 4})

    def refuse(word):
        raise AssertionError(word)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "norm": None, "tokens": 4}


def test_a_full_disk_is_an_error_with_advice_and_resume_goes_on(tmp_path):
    # In a process of its own, whose files the kernel does not let grow.
    path = tmp_path / "metrics.jsonl"
    code = (
        "import pathlib, resource, signal, sys\n"
        "from experiments.training.metrics import MetricsWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    with MetricsWriter(path, keep_until=0) as writer:\n"
        "        for step in range(1, 100):\n"
        "            writer.write({'step': step, 'loss': 0.5})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert "make room" in done.stdout and "--resume" in done.stdout
    assert str(path) in done.stdout
    assert path.stat().st_size == 1000
    with MetricsWriter(path, keep_until=20):
        pass
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 21))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="--run-dir"):
        MetricsWriter(tmp_path / "metrics.jsonl", keep_until=0)


# --------------------------------------------------------------------------- mirrors


def run(tmp_path, *, done, until, wandb_project=None):
    mirrors = open_mirrors(
        tmp_path, keep_until=done, wandb_project=wandb_project, config={"rank": 8}
    )
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until=done, mirrors=mirrors) as writer:
        for step in range(done + 1, until + 1):
            loss = math.nan if step == 2 else 10.0 * done + step
            writer.write({"step": step, "loss": loss, "note": "text"})


def test_tensorboard_reads_back_without_what_was_done_again(tmp_path):
    run(tmp_path, done=0, until=5)
    run(tmp_path, done=3, until=6)
    assert shown(tmp_path / "tensorboard") == {
        ("loss", 1): 1,
        ("loss", 3): 3,
        ("loss", 4): 34,
        ("loss", 5): 35,
        ("loss", 6): 36,
    }
    assert all(event.wall_time for event in events(tmp_path / "tensorboard"))


def test_tensorboard_is_on_disk_at_once_and_a_restart_overwrites_nothing(tmp_path):
    board = TensorBoard(tmp_path, keep_until=0)
    board.write(1, {"loss": 2.0})
    again = TensorBoard(tmp_path, keep_until=1)  # within the same second
    assert len(list(tmp_path.iterdir())) == 2
    assert shown(tmp_path) == {("loss", 1): 2}
    board.close()
    again.close()


class Broken:
    name = "Broken board"

    def __init__(self):
        self.calls = 0

    def write(self, step, scalars):
        self.calls += 1
        raise RuntimeError("service away")

    def close(self):
        raise RuntimeError("never reached")


class Good:
    name = "Good board"

    def __init__(self):
        self.rows = []
        self.closed = False

    def write(self, step, scalars):
        self.rows.append((step, scalars))

    def close(self):
        self.closed = True


def test_a_mirror_that_fails_is_reported_once_and_costs_nothing(tmp_path):
    broken, good, said = Broken(), Good(), []
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(
        path, keep_until=0, mirrors=[broken, good], report=said.append
    ) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 3.0, "spike": None})
    assert len(read_metrics(path)) == 2
    assert good.rows == [(1, {"loss": 3.0}), (2, {"loss": 3.0})] and good.closed
    assert broken.calls == 1
    (line,) = said
    assert "Broken board" in line and "service away" in line and str(path) in line


def test_a_mirror_that_cannot_be_opened_is_reported_and_left_out(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    mirrors = open_mirrors(
        tmp_path, keep_until=0, wandb_project=None, config={}, report=said.append
    )
    assert mirrors == []
    assert len(said) == 1 and "TensorBoard could not be opened" in said[0]


class FakeWandb(types.ModuleType):
    """wandb.init, log and finish, recorded."""

    def __init__(self):
        super().__init__("wandb")
        self.settings, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        return self

    def log(self, row, *, step):
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_rows_and_one_run_across_resumes(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, done=0, until=1, wandb_project="llamas")
    run(tmp_path, done=1, until=3, wandb_project="llamas")
    first, second = fake.settings
    assert first == second
    assert first["project"] == "llamas" and first["config"] == {"rank": 8}
    assert first["id"] and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path)
    assert fake.logged == [(1, {"loss": 1.0}), (2, {}), (3, {"loss": 13.0})]
    assert fake.finished == 2


def test_wandb_offline_keeps_one_run_across_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an option: uv sync --group wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, done=0, until=2, wandb_project="llamas")
    run(tmp_path, done=2, until=3, wandb_project="llamas")
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    (run_id,) = tmp_path.glob("wandb_run_id.txt")
    assert names == {f"run-{run_id.read_text()}.wandb"}
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_is_asked_for_but_absent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="uv sync --group wandb"):
        open_mirrors(tmp_path, keep_until=0, wandb_project="llamas", config={})


def test_wandb_is_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from experiments.training.mirrors import open_mirrors\n"
        "open_mirrors(pathlib.Path(sys.argv[1]), keep_until=0, wandb_project=None,"
        " config={})\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
