"""Two processes stop, fail and restore together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.experiments.cluster import free_port
from tests.experiments.training.small_run import initial_params
from tests.xla_flags import COMPILE_FAST

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process has to tell."""
    folder = tmp_path_factory.mktemp("two")
    # The tests' own eight devices would not do here.
    env = os.environ | {"XLA_FLAGS": COMPILE_FAST}
    script, port = "tests.experiments.training.two_processes", str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", script, port, str(index), str(folder)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]


def test_a_signal_to_one_process_stops_both_after_the_same_step(found):
    for one in found:
        assert one["stopped"]["exit_code"] == 143
        assert one["stopped"]["step"] == found[0]["stopped"]["step"] < 8
        assert one["resumed"] == found[0]["straight"]


def test_a_batch_that_one_process_cannot_read_ends_both_with_the_state_saved(found):
    assert found[0]["error"] == "UnreachableError: the network is gone"
    # It may pass, which the other one's exit code is to say, too.
    other = "OtherProcessPassingError: another process cannot"
    assert found[1]["error"].startswith(other)
    for one in found:
        assert one["after error"] == found[0]["straight"]


def test_the_first_process_gets_the_whole_of_a_split_array(found):
    assert found[1]["fetched"] is None
    whole = initial_params(jax.random.key(0))["w"]
    assert found[0]["fetched"] == whole.tolist()


def test_what_lasts_in_one_process_goes_before_what_may_pass_in_another(found):
    assert found[0]["lasting"].startswith(
        "OtherProcessError: process 0: 503; process 1"
    )
    assert found[1]["lasting"] == "ValueError: a bad line"


def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(found):
    for one in found:
        (line,) = one["lines"]
        assert "6 cannot be used (ValueError: this part is broken)" in line
        assert one["damaged"] == found[0]["straight"]
