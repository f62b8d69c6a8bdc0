"""What is left of a run: of a real one, and of the process that makes it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from experiments.study.__main__ import main
from experiments.study.arms import parse_arms
from experiments.study.harvest import weigh
from experiments.study.pretraining import PRETRAINING
from experiments.study.processes import Processes
from experiments.study.records import Records
from tests.experiments.study.fake_runs import MODEL, in_process, write_texts


def test_a_real_run_is_recorded_and_its_checkpoints_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Processes, "run", lambda self, arguments, log: in_process(arguments, log)
    )
    data = write_texts(tmp_path / "texts")
    folder = tmp_path / "study"
    arms = ["calm=--optimizer adamw", "wild=--optimizer adamw --learning-rate 1e30"]
    arguments = ["--study-dir", str(folder), "--seeds", "0", "--factors", "1"]
    arguments += ["--workers", "1", "--data", data, "--arms", *arms, *MODEL]
    assert main([*arguments, "--extensions", "0"]) == 0
    calm, wild = Records.read(folder / "study.json").runs.values()
    assert calm.curve["step"] == [1, 2, 3, 4]
    assert calm.curve["tokens"] == [32, 64, 96, 128]
    assert 0 < calm.curve["seconds"][0] < calm.curve["seconds"][3]
    # A model that knows nothing yet: the logarithm of 280 tokens.
    assert calm.final_loss == pytest.approx(5.6, abs=0.2)
    assert wild.final_loss == float("inf") and "not finite" in wild.diverged
    assert (folder / "runs" / "calm-lr0.001-seed0" / "report.md").exists()
    assert not (folder / "runs" / "calm-lr0.001-seed0" / "checkpoints").exists()


def test_state_and_parameters_of_the_matrices_are_told_apart():
    weights = {
        name: weigh(arm, PRETRAINING)
        for arm in parse_arms(
            ["adamw", "galore", "clipped=--optimizer adamw --clip-norm 1"],
            MODEL,
            PRETRAINING,
        )
        for name in [arm.name]
    }
    layer = 4 * 8 * 8 + 3 * 8 * 8
    rest = 2 * 280 * 8 + 3 * 8  # embedding, output layer, norms
    count = 4
    assert weights["adamw"] == {
        "parameters": {
            "all": layer + rest,
            "matrices": layer,
            "state": 2 * (layer + rest) + count,
        },
        "state_bytes": {
            # Two moments and a step counter; the schedule counts, too.
            "all": 8 * (layer + rest) + 4 * count,
            "matrices": 8 * layer + 2 * count,
        },
    }
    assert weights["clipped"] == weights["adamw"]
    galore = weights["galore"]["state_bytes"]
    assert galore["all"] - galore["matrices"] == 8 * rest + 2 * count
    # Basis and two moments of 7 matrices at rank 2, and some counters.
    assert 0 <= galore["matrices"] - 7 * 3 * (8 * 2 * 4) < 100


def test_a_process_that_fails_says_why_and_all_can_be_stopped(tmp_path, monkeypatch):
    log = tmp_path / "run.log"
    processes = Processes(PRETRAINING.module)
    arguments = ["--data", f"{tmp_path}/*.txt", "--run-dir", f"{tmp_path}/run"]
    assert processes.run(arguments, log) == 1
    assert f"error: '{tmp_path}/*.txt' matches no file" in log.read_text()

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: popen(command))
    threading.Timer(0.5, processes.stop).start()
    assert processes.run([], log) == -signal.SIGTERM
    assert processes.run([], log) == 143  # and starts nothing


def test_runs_at_a_time_are_spread_over_gpus(tmp_path, monkeypatch):
    shown, others = [], []

    class Fake:
        """A run during which others start, one in the other."""

        def __init__(self, command, env, **options):
            shown.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait(self):
            if others:
                others.pop()()
            return 0

    monkeypatch.setattr(subprocess, "Popen", Fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")

    def run():
        assert processes.run([], tmp_path / "log") == 0

    processes = Processes("some.module", ["4", "5", "6"])
    others += [run] * 3
    run()
    assert shown == ["4", "5", "6", "4"]
    run()  # they are free again
    assert shown[4:] == ["4"]
    processes = Processes("some.module")
    run()
    assert shown[5:] == [os.environ["CUDA_VISIBLE_DEVICES"]]
