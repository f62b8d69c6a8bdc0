"""The loop: resuming bit for bit, signals, broken numbers, batches that fail."""

import io
import json
import math
import os
import signal
import threading
import time

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.training.checkpoint import SaveError
from experiments.training.loop import Plan
from experiments.training.progress import ConsoleProgress
from experiments.training.step_log import NonFiniteError
from tests.experiments.training.small_run import (
    STEP,
    Hook,
    Numbers,
    rows,
    run,
    steps_saved,
)


class WithoutThird(Numbers):
    """As if the third batch did not exist."""

    def __next__(self):
        number = super().__next__()
        return super().__next__() if number == 102 else number


def interrupt(batch):
    signal.raise_signal(signal.SIGINT)


def terminate(batch):
    signal.raise_signal(signal.SIGTERM)


def poison(batch):
    return {"x": np.full_like(batch["x"], np.nan)}


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler: what a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("action", "number", "code"),
    [(interrupt, signal.SIGINT, 130), (terminate, signal.SIGTERM, 143)],
)
def test_six_steps_are_three_stopped_by_a_signal_and_three_resumed(
    tmp_path, action, number, code
):
    straight = run(tmp_path / "straight")
    first = run(tmp_path / "cut", place=Hook({3: action}))
    assert (first.stopped_by, first.exit_code) == (number, code)
    assert (straight.stopped_by, straight.exit_code) == (None, 0)
    assert int(first.state.step) == 3
    assert steps_saved(tmp_path / "cut") == [3]
    second = run(tmp_path / "cut", resume=True)
    assert second.stopped_by is None
    chex.assert_trees_all_equal(second.state, straight.state)
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")
    assert STEP._cache_size() == 1


def test_the_position_in_the_data_is_part_of_the_checkpoint(tmp_path):
    seen = []

    def note(batch):
        seen.append(float(batch["x"][0, 0]))
        return batch

    run(tmp_path / "straight", place=note)
    straight, seen = seen, []
    run(tmp_path / "cut", steps=3, place=note)
    run(tmp_path / "cut", steps=6, resume=True, place=note)
    assert seen == straight and len(set(seen)) == 6


def test_every_step_has_a_row_and_evaluations_are_in_it(tmp_path):
    run(tmp_path, steps=5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert ["norm" in row for row in rows(tmp_path)] == [False, True, False, True, True]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    assert all(row["skipped"] == 0 for row in rows(tmp_path))


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    run(tmp_path, steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": -1.0}) + '\n{"step": 6, "lo')
    run(tmp_path, steps=6, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[4]["loss"] > 0


def test_a_finished_run_resumes_to_the_same_end(tmp_path):
    before = run(tmp_path)
    after = run(tmp_path, resume=True)
    assert after.stopped_by is None
    chex.assert_trees_all_equal(after.state, before.state)
    assert len(rows(tmp_path)) == 6


# ------------------------------------------------------------------- broken numbers


def test_a_broken_step_is_skipped_counted_and_shown(tmp_path):
    output = io.StringIO()
    progress = ConsoleProgress(Console(file=output), steps=6, done=0)
    broken = run(tmp_path / "a", place=Hook({3: poison}), progress=progress)
    assert int(broken.state.step) == 6
    assert [row["skipped"] for row in rows(tmp_path / "a")] == [0, 0, 1, 0, 0, 0]
    third = rows(tmp_path / "a")[2]
    assert third["loss"] is None and third["update_norm"] == 0
    assert "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert output.getvalue().count("step 3: skipped, loss or gradient") == 1
    # As if the batch had not been there.
    expected = run(tmp_path / "b", steps=5, batches=WithoutThird())
    chex.assert_trees_all_equal(broken.state.params, expected.state.params)
    chex.assert_trees_all_equal(broken.state.opt_state, expected.state.opt_state)


def test_too_many_skipped_in_a_row_stop_with_the_state_saved(tmp_path):
    broken = dict.fromkeys(range(5, 100), poison)
    with pytest.raises(NonFiniteError, match="3 steps in a row, from step 5 on"):
        run(tmp_path, steps=50, max_skipped=3, place=Hook(broken))
    # One more step was under way when the third came back.
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 4 + [1] * 4
    assert steps_saved(tmp_path) == [8]
    # The state is that after step 4, and the run goes on behind the broken batches.
    assert int(run(tmp_path, steps=10, resume=True).state.step) == 10
    assert [row["skipped"] for row in rows(tmp_path)][8:] == [0, 0]


def test_an_evaluation_that_is_not_finite_keeps_no_state_from_being_saved(tmp_path):
    broken = dict.fromkeys(range(5, 100), poison)
    losses = dict.fromkeys(range(2, 50, 2), float("nan"))
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(
            tmp_path,
            steps=50,
            every=2,
            max_skipped=3,
            place=Hook(broken),
            losses=losses,
        )
    assert steps_saved(tmp_path)[-1] == 8
    assert rows(tmp_path)[-1]["validation_loss"] is None
    assert int(run(tmp_path, steps=10, every=2, resume=True).state.step) == 10


def test_skipped_steps_that_are_not_in_a_row_do_not_stop(tmp_path):
    hook = Hook({n: poison for n in (1, 2, 4, 5, 7, 8)})
    assert int(run(tmp_path, steps=9, max_skipped=3, place=hook).state.step) == 9


def test_a_broken_update_stops_with_the_checkpoint_before_it(tmp_path):
    def lose(state, batch):
        state, values = STEP(state, batch)
        if int(state.step) == 4:
            values["update_norm"] = jnp.float32(np.inf)
        return state, values

    with pytest.raises(NonFiniteError, match=r"step 4: update_norm not finite"):
        run(tmp_path, every=2, step_fn=lose)
    assert steps_saved(tmp_path) == [2]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_loss_spike_is_marked_also_when_the_steps_before_are_another_process(
    tmp_path,
):
    def spike(batch):
        return {"x": 100 * batch["x"]}

    run(tmp_path / "straight", steps=50, place=Hook({41: spike}))
    spikes = {
        r["step"]: r["spike"] for r in rows(tmp_path / "straight") if "spike" in r
    }
    assert list(spikes) == [41] and spikes[41] > 6
    run(tmp_path / "cut", steps=40)
    run(tmp_path / "cut", steps=50, resume=True, place=Hook({1: spike}))
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")


# ---------------------------------------------------------------- batches and saves


def test_what_is_done_is_saved_when_a_batch_cannot_be_read(tmp_path):
    def fail():
        raise OSError("the network is gone")

    straight = run(tmp_path / "straight")
    with pytest.raises(OSError, match="the network is gone"):
        run(tmp_path / "cut", batches=Numbers({4: fail}))
    assert steps_saved(tmp_path / "cut") == [3]
    assert len(rows(tmp_path / "cut")) == 3
    chex.assert_trees_all_equal(
        run(tmp_path / "cut", resume=True).state, straight.state
    )
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")


def test_a_batch_that_is_not_needed_may_fail(tmp_path):
    def fail():
        raise OSError("the network is gone")

    assert int(run(tmp_path, batches=Numbers({7: fail})).state.step) == 6


def test_a_save_that_failed_ends_the_run_before_the_next_is_due(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fill_the_disk(batch):
        monkeypatch.setattr(os, "rename", full)

    def wait_for_the_save(batch):
        for thread in threading.enumerate():
            if thread.name == "save_finalize":
                while thread.is_alive():  # `join` would raise its error here
                    time.sleep(0.01)

    actions = {9: fill_the_disk, 12: wait_for_the_save}
    with pytest.raises(SaveError, match=r"No space left .*make room"):
        run(tmp_path, steps=20, every=10, place=Hook(actions))
    assert len(rows(tmp_path)) < 19


# -------------------------------------------------------------------------- signals


def test_a_second_ctrl_c_is_not_swallowed(tmp_path, ctrl_c_interrupts):
    def twice(batch):
        interrupt(batch)
        interrupt(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, place=Hook({2: twice}))


def test_a_second_sigterm_changes_nothing(tmp_path):
    def twice(batch):
        terminate(batch)
        terminate(batch)

    outcome = run(tmp_path, place=Hook({2: twice}))
    assert (outcome.exit_code, int(outcome.state.step)) == (143, 2)


def test_the_handlers_are_put_back(tmp_path):
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    run(tmp_path, place=Hook({2: interrupt}))
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_the_loop_runs_in_a_thread_that_may_not_handle_signals(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert int(outcomes[0].state.step) == 2


# ----------------------------------------------------------------------------- plan


def test_plan_ends_with_an_evaluation_and_a_checkpoint():
    plan = Plan(steps=7, eval_every=3, checkpoint_every=5)
    assert [s for s in range(1, 8) if plan.evaluates_after(s)] == [3, 6, 7]
    assert [s for s in range(1, 8) if plan.saves_after(s)] == [5, 7]


@pytest.mark.parametrize(
    ("an_epoch", "saved"),
    [(1200, [500, 1000, 1200, 1500, 2000, 2400]), (300, [300, 600])],
)
def test_long_epochs_are_saved_within_and_each_at_its_end(an_epoch, saved):
    plan = Plan.of_epochs(2, an_epoch, max_skipped=3)
    steps = range(1, plan.steps + 1)
    assert [s for s in steps if plan.evaluates_after(s)] == [an_epoch, 2 * an_epoch]
    assert [s for s in steps if plan.saves_after(s)] == saved
    assert plan.max_skipped == 3
