"""The loop with its checkpoints: resuming bit for bit, Ctrl-C, broken numbers."""

import dataclasses
import json
import math
import signal
import threading
from pathlib import Path

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from experiments.training.checkpoint import Checkpointer, ResumeError
from experiments.training.loop import NonFiniteError, Outcome, Plan, train
from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.state import TrainState, create_state
from experiments.training.step import make_train_step

SIZE = 8
IDENTITY = {"model": {"size": SIZE}}


class Quiet:
    """Shows nothing."""

    def step(self, row):
        pass


@dataclasses.dataclass
class Hook:
    """Called with each batch's number, in a run that starts at batch 0."""

    at: int
    action: object
    count: int = 0

    def __call__(self, batch):
        self.count += 1
        if self.count == self.at:
            batch = self.action(batch) or batch
        return batch


def make_batches() -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(40).seed(3).shuffle().repeat()
    return iter(dataset.to_iter_dataset())


def as_batch(index) -> dict[str, jax.Array]:
    random = np.random.default_rng(int(index))
    return {"x": random.normal(size=(4, SIZE)).astype(np.float32)}


def loss_fn(params, batch):
    target = jnp.tanh(batch["x"] * jnp.arange(SIZE)[None])
    return jnp.sum((batch["x"] @ params["w"] - target) ** 2), jnp.float32(4)


OPTIMIZER = ng.natural_galore(1e-2, rank=2, update_proj_gap=2, history=3)
STEP = make_train_step(loss_fn, OPTIMIZER, optax.constant_schedule(1e-2))


def run(
    folder: Path,
    *,
    steps: int = 6,
    resume: bool = False,
    place=lambda batch: batch,
    identity=IDENTITY,
    keep: int = 2,
    every: int = 100,
) -> Outcome:
    state = create_state(
        lambda key: {"w": jax.random.normal(key, (SIZE, SIZE))}, OPTIMIZER, seed=0
    )
    batches = make_batches()
    folder.mkdir(exist_ok=True)
    with Checkpointer(
        folder / "checkpoints", keep=keep, identity=identity
    ) as checkpointer:
        if resume:
            state = checkpointer.restore(state, batches)
        with MetricsWriter(
            folder / "metrics.jsonl", keep_until=int(state.step)
        ) as metrics:
            return train(
                state,
                step_fn=STEP,
                batches=batches,
                place=lambda index: place(as_batch(index)),
                evaluate=lambda params: {"norm": float(optax.tree.norm(params))},
                plan=Plan(steps, eval_every=2, checkpoint_every=every),
                checkpointer=checkpointer,
                metrics=metrics,
                progress=Quiet(),
            )


def rows(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def interrupt(batch):
    signal.raise_signal(signal.SIGINT)


def test_six_steps_are_three_interrupted_and_three_resumed(tmp_path):
    straight = run(tmp_path / "straight")
    first = run(tmp_path / "cut", place=Hook(3, interrupt))
    assert first.interrupted and not straight.interrupted
    assert int(first.state.step) == 3
    assert steps_saved(tmp_path / "cut") == [3]
    second = run(tmp_path / "cut", resume=True)
    assert not second.interrupted
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


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    run(tmp_path, steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": -1.0}) + '\n{"step": 6, "lo')
    run(tmp_path, steps=6, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[4]["loss"] > 0


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, steps=7, every=2, keep=2)
    assert steps_saved(tmp_path) == [6, 7]


def test_a_finished_run_resumes_to_the_same_end(tmp_path):
    before = run(tmp_path)
    after = run(tmp_path, resume=True)
    assert not after.interrupted
    chex.assert_trees_all_equal(after.state, before.state)
    assert len(rows(tmp_path)) == 6


def test_a_broken_loss_stops_with_the_last_good_checkpoint(tmp_path):
    def poison(batch):
        return {"x": np.full_like(batch["x"], np.nan)}

    with pytest.raises(NonFiniteError, match=r"step 5: .*loss"):
        run(tmp_path, every=2, place=Hook(5, poison))
    assert steps_saved(tmp_path) == [2, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    # From there the run goes on.
    assert int(run(tmp_path, resume=True).state.step) == 6


def test_a_broken_step_is_not_saved_when_its_own_checkpoint_is_due(tmp_path):
    def poison(batch):
        return {"x": np.full_like(batch["x"], np.inf)}

    with pytest.raises(NonFiniteError, match="step 4"):
        run(tmp_path, every=2, place=Hook(4, poison))
    assert steps_saved(tmp_path) == [2]


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ResumeError, match="no checkpoint"):
        run(tmp_path, resume=True)


def test_resuming_another_run_is_refused_and_says_what_differs(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ResumeError, match=r"model\.size: 8 there, 9 now"):
        run(tmp_path, resume=True, identity={"model": {"size": 9}})


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler: what a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_is_not_swallowed(tmp_path, ctrl_c_interrupts):
    def twice(batch):
        interrupt(batch)
        interrupt(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, place=Hook(2, twice))


def test_the_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path, place=Hook(2, interrupt))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_loop_runs_in_a_thread_that_may_not_handle_signals(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert int(outcomes[0].state.step) == 2


def test_plan_ends_with_an_evaluation_and_a_checkpoint():
    plan = Plan(steps=7, eval_every=3, checkpoint_every=5)
    assert [s for s in range(1, 8) if plan.evaluates_after(s)] == [3, 6, 7]
    assert [s for s in range(1, 8) if plan.saves_after(s)] == [5, 7]


def test_a_checkpoint_holds_the_state_as_it_was_when_saved(tmp_path):
    # Saving is asynchronous and the step gives its buffers up: neither may show.
    run(tmp_path, steps=2)
    saved = run(tmp_path, steps=2, resume=True).state
    run(tmp_path / "other", steps=6, every=2, keep=3)
    with Checkpointer(
        tmp_path / "other" / "checkpoints", keep=3, identity=IDENTITY
    ) as checkpointer:
        for step in (6, 4):
            checkpointer._manager.delete(step)
        restored = checkpointer.restore(saved, make_batches())
    assert isinstance(restored, TrainState)
    chex.assert_trees_all_equal(restored, saved)
