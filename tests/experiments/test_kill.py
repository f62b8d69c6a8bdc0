"""The kill test, with fewer kills than its command makes by default."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.kill_test import equal, main
from experiments.training.folder import RunFolder

ROOT = Path(__file__).parents[2]
KILLS = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder of a kill test that has been made."""
    work = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "-m", "experiments.kill_test", "--kills", str(KILLS)]
    done = subprocess.run(
        [*command, "--work-dir", str(work), "--json", str(work / "results.json")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_a_killed_run_ends_as_the_undisturbed_one_does(work):
    results = json.loads((work / "results.json").read_text())
    assert results["equal"] is True
    assert results["kills"] == KILLS
    assert results["of which in a save"] >= KILLS / 3
    assert results["of which before the first checkpoint"] >= 1
    assert results["steps done twice"] > 0
    # A save every three steps, which go on until the next one while it is written.
    assert results["of which after one kill at most"] <= 6
    assert results["damaged checkpoints"] == 0


def test_a_folder_that_holds_anything_is_refused(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    assert main(["--work-dir", str(tmp_path)]) == 2
    assert "--work-dir" in capsys.readouterr().err


def test_a_difference_would_be_noticed(work, tmp_path):
    results = json.loads((work / "results.json").read_text())
    good, step = RunFolder(work / "undisturbed"), results["steps"]
    shutil.copytree(work / "killed", tmp_path / "metrics")
    other = RunFolder(tmp_path / "metrics")
    assert equal(good, other, step)
    other.metrics.write_text(
        other.metrics.read_text().replace('"loss": 5', '"loss": 4', 1)
    )
    assert not equal(good, other, step)

    shutil.copytree(work / "killed", tmp_path / "state")
    other = RunFolder(tmp_path / "state")
    before = max(
        int(path.name)
        for path in other.checkpoints.iterdir()
        if path.name.isdecimal() and int(path.name) < step
    )
    shutil.rmtree(other.checkpoints / str(step) / "state")
    shutil.copytree(
        other.checkpoints / str(before) / "state",
        other.checkpoints / str(step) / "state",
    )
    assert not equal(good, other, step)
