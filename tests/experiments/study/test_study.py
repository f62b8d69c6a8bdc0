"""The command: same tries for all, nothing twice, nothing lost."""

import os
import shutil
import signal

import pytest

from experiments.study import report
from experiments.study.__main__ import main
from experiments.study.pretraining import PRETRAINING
from experiments.study.processes import Processes
from experiments.study.records import Records
from tests.experiments.study.fake_runs import MODEL, SECONDS, write_texts


@pytest.fixture
def command(tmp_path, runs):
    """The command on two arms; more arguments take the place of those before."""
    data = write_texts(tmp_path / "texts")

    def study(*more: str) -> int:
        return main(
            [
                *f"--study-dir {tmp_path}/study --seeds 0 1 --workers 1".split(),
                *("--arms", "adamw", "low=--optimizer galore --rank 1"),
                *("--data", data, *MODEL, *more),
            ]
        )

    return study


@pytest.mark.parametrize(
    ("mesh", "expected"), [((), ("2", "3")), (("--mesh.fsdp", "2"), ())]
)
def test_runs_on_one_device_are_shown_a_gpu_each(mesh, expected, command, monkeypatch):
    given = []

    def take(self, module, gpus=()):
        given.append(tuple(gpus))
        raise ValueError("seen")

    monkeypatch.setattr(Processes, "__init__", take)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert command(*mesh) == 1
    assert given == [expected]


def read(tmp_path) -> Records:
    return Records.read(tmp_path / "study" / "study.json")


def test_every_arm_is_tuned_alike_and_compared_over_seeds(
    command, runs, tmp_path, capsys
):
    runs.best["galore"] = 16e-3  # at the edge of the factors: one more is tried
    assert command() == 0
    assert runs.started == [
        *(f"adamw-lr{rate}-seed0" for rate in ("0.0005", "0.001", "0.002")),
        *(f"low-lr{rate}-seed0" for rate in ("0.004", "0.008", "0.016")),
        *("adamw-lr0.001-seed1", "low-lr0.032-seed0", "low-lr0.016-seed1"),
    ]
    records = read(tmp_path)
    assert {run.name for run in records.runs} == set(runs.started)
    record = records.runs[next(run for run in records.runs if run.arm == "low")]
    assert record.curve["step"] == [1, 2, 3, 4]
    assert record.curve["tokens"] == [32, 64, 96, 128]
    assert record.curve["seconds"] == [SECONDS * n for n in (1, 2, 3, 4)]
    assert record.settings["optimization"]["rank"] == 1
    assert record.settings["text"]["validation_tokens"] == 64
    assert len(record.settings["fingerprints"]["text"]) == 64
    assert {"jax", "optax", "flax"} <= set(record.versions)
    assert record.versions["device"] == "cpu"

    table = (tmp_path / "study" / "study.md").read_text()
    # Method adamw: distance 0, 0.01 a seed, rank 2; 1/4 at the end, 1/2 at half.
    assert "| adamw | 0.001 | 3, inside | 3.5550 | 3.5500 to 3.5600 " in table
    assert "| **3.3050** | 3.3000 to 3.3100 |" in table
    assert "| low | 0.016 | 4, inside | 3.6050 |" in table
    assert "Kendall's tau 1.00" in table
    assert "output layer are on Adam (learning rate 0.008) in every row" in table
    assert "python -m experiments.study --study-dir" in table
    assert "| adamw | 0.001 |" in capsys.readouterr().out

    # Not again, and not with more arms or seeds either.
    del runs.started[:]
    assert command() == 0 and not runs.started
    assert command("--seeds", "0", "1", "2") == 0
    assert runs.started == ["adamw-lr0.001-seed2", "low-lr0.016-seed2"]


def test_a_study_of_which_study_json_alone_is_left_is_added_to(command, runs, tmp_path):
    assert command("--arms", "adamw") == 0
    shutil.rmtree(tmp_path / "study" / "runs")
    del runs.started[:]
    assert command("--arms", "adamw", "galore") == 0
    assert len(runs.started) == 4 and all("galore" in name for name in runs.started)
    assert len(read(tmp_path).commands) == 2
    table = (tmp_path / "study" / "study.md").read_text()
    assert "| adamw | " in table and "| galore | " in table


def test_runs_read_tokens_and_tokenizer_that_are_made_once(command, runs, tmp_path):
    assert command("--arms", "adamw") == 0
    given = dict(zip(runs.arguments, runs.arguments[1:], strict=False))
    kept = tmp_path / "study" / "runs" / "text"
    assert given["--tokenizer"] == str(kept / "tokenizer.json")
    assert given["--token-cache"] == str(kept / "tokens")
    assert (kept / "tokenizer.json").exists() and list(kept.glob("tokens/*/*.tokens"))
    assert "--auto-resume" in runs.arguments
    assert not list((tmp_path / "study" / "runs").glob("*/checkpoints"))


def test_a_run_that_diverges_is_bad_and_the_study_goes_on(command, runs, tmp_path):
    runs.diverges_above = 6e-4
    assert command("--arms", "adamw") == 0
    losses = {
        run.name: loss for run, loss in read(tmp_path).results(PRETRAINING).items()
    }
    assert (
        losses["adamw-lr0.001-seed0"] == losses["adamw-lr0.002-seed0"] == float("inf")
    )
    record = next(r for r in read(tmp_path).runs.values() if r.diverged)
    assert "update_norm not finite" in record.diverged
    assert record.curve["step"] == [1]
    assert (
        "| adamw | 0.0005 | 4, inside |"
        in (tmp_path / "study" / "study.md").read_text()
    )

    runs.last_loss = {"validation_loss": None}
    assert command("--arms", "galore") == 0
    assert (
        "| galore | 0.002 | 4, all diverged | "
        in (tmp_path / "study" / "study.md").read_text()
    )
    assert "galore-lr0.002-seed1" not in runs.started


def test_a_run_that_fails_is_reported_and_the_rest_kept(
    command, runs, tmp_path, capsys
):
    runs.breaks = "low-lr0.008"
    assert command() == 1
    error = capsys.readouterr().err
    assert error == "error: low-lr0.008-seed0: SomeError: the disk is on fire\n"
    names = {run.name for run in read(tmp_path).runs}
    assert names == set(runs.started) - {"low-lr0.008-seed0"}
    assert "adamw-lr0.001-seed1" in names
    assert "low-lr0.008-seed1" not in runs.started  # its best rate is not known
    runs.breaks = None
    del runs.started[:]
    assert command() == 0
    assert runs.started == ["low-lr0.008-seed0", "low-lr0.008-seed1"]


def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(
    command, runs, tmp_path, capsys
):
    def press(name):
        if len(runs.started) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return 130 if len(runs.started) >= 3 else None

    runs.on_start = press
    assert command() == 130
    assert not capsys.readouterr().err.count("error:")
    assert len(read(tmp_path).runs) == 2
    runs.on_start = lambda name: None
    del runs.started[:]
    assert command() == 0
    assert len(runs.started) == 8 - 2
    assert runs.started[0] == "adamw-lr0.002-seed0"  # the one that was cut


def test_what_does_not_fit_is_refused(command, runs, tmp_path, capsys):
    assert command("--arms", "adamw") == 0
    del runs.started[:]
    for more, message in [
        (("--rank", "1"), "optimization.rank: 2 there, 1 now"),
        (("--seeds", "1"), "tuned on seed 0, not 1"),
        (("--seeds", "0", "0"), "none of them twice"),
        (("--data", f"{tmp_path}/none"), "matches no file"),
        (("--workers", "0"), "workers=0 must be at least 1"),
    ]:
        assert command("--arms", "adamw", *more) == 1
        assert message in capsys.readouterr().err
    assert not runs.started


def test_two_commands_do_not_undo_each_other(command, runs, tmp_path, capsys):
    def start_another(name):
        inner.append(command("--arms", "galore"))

    runs.on_start = start_another
    inner: list[int] = []
    one_run = ("--factors", "1", "--seeds", "0")
    assert command("--arms", "adamw", *one_run) == 0
    assert inner == [1]
    assert "another command is at work in" in capsys.readouterr().err
    runs.on_start = lambda name: None
    assert command("--arms", "galore", *one_run) == 0
    assert {run.arm for run in read(tmp_path).runs} == {"adamw", "galore"}


def test_a_text_that_changes_meanwhile_is_noticed(command, runs, tmp_path, capsys):
    def edit(name):
        (tmp_path / "texts" / "3.txt").write_text(name)

    runs.on_start = edit
    assert command("--arms", "adamw", "--factors", "1", "--seeds", "0") == 1
    assert "has read another text" in capsys.readouterr().err


def test_the_report_is_made_again_without_a_run(command, runs, tmp_path, capsys):
    assert command() == 0
    folder = tmp_path / "study"
    table = (folder / "study.md").read_text()
    pictures = ["loss_tokens.png", "loss_seconds.png", "loss_state.png", "memory.png"]
    assert all(f"]({name})" in table for name in pictures)
    for name in ["study.md", *pictures]:
        (folder / name).unlink()
    del runs.started[:]
    capsys.readouterr()
    assert report.main([str(folder), str(folder)]) == 0
    assert (folder / "study.md").read_text() == table
    assert all((folder / name).stat().st_size > 10_000 for name in pictures)
    assert capsys.readouterr().out.count("| adamw | 0.001 |") == 2
    assert not runs.started
    assert report.main([f"{tmp_path}/nowhere"]) == 1
    assert "nowhere/study.json is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([])
