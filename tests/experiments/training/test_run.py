"""A run in its folder: what it does with the best checkpoint."""

import shutil

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments.assembly import Parts
from experiments.glue.presets import parse
from experiments.training.folder import RunFolder
from experiments.training.loop import Plan
from experiments.training.run import Job, run
from tests.experiments.training import small_run


def job(evaluated, finish, plan):
    return Job(
        parts=Parts(
            small_run.initial_params,
            small_run.loss_fn,
            small_run.OPTIMIZER,
            optax.constant_schedule(1e-2),
        ),
        plan=plan,
        batches=Batches(),
        evaluate=lambda params: next(evaluated),
        fingerprints={},
        data={"examples": 3},
        throughput=lambda count, seconds: {},
        objective=lambda row: -row["validation_score"],
        pretrained=lambda params: {"w": params["w"] + 1},
        finish=finish,
    )


class Batches(small_run.Numbers):
    def __next__(self):
        return small_run.as_batch(super().__next__())

    def close(self):
        pass


def test_a_run_ends_with_its_best_parameters_and_starts_from_given_ones(tmp_path):
    scores, seen = [0.1, 0.9, 0.5, 0.9], []
    config = parse(["--run-dir", str(tmp_path / "run"), "--batch-size", "4"])

    def trained(name, finish, scores, every=1):
        evaluated = iter(
            {"validation_loss": 1.0, "validation_score": score} for score in scores
        )
        plan = Plan(every * len(scores), every, every)
        return run(
            config,
            RunFolder(tmp_path / name),
            lambda layout: job(evaluated, finish, plan),
            Console(quiet=True),
        )

    outcome = trained("run", seen.append, scores)
    (best,) = seen
    # The last one's arrays have made room for it.
    assert outcome.steps == 4 and not any(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outcome.state)
    )
    last = trained("last", None, scores).state
    assert int(last.step) == 4
    assert not np.array_equal(best["w"], last.params["w"])

    # Two steps end where the best checkpoint was made.
    short = trained("short", None, [0.0], every=2).state
    np.testing.assert_array_equal(best["w"], short.params["w"])
    start = small_run.initial_state().params["w"]
    moved = np.abs(short.params["w"] - (start + 1)).max()
    assert 0 < moved < 0.2  # two steps of 1e-2 from the given values


@pytest.mark.parametrize("scores", [(0.9, 0.1, 0.5), (0.1, 0.9, 0.5)])
def test_saves_within_an_epoch_leave_its_best_as_it_is(tmp_path, scores):
    """Three epochs of three steps, every second one saved; resumed after the fourth."""

    def train(name, scores, *more):
        run_dir, seen = tmp_path / name, []
        given = ["--run-dir", str(run_dir), "--batch-size", "4", *more]
        evaluated = iter(
            {"validation_loss": 1.0, "validation_score": score} for score in scores
        )
        plan = Plan(9, 3, 2, save_evaluated=True)
        run(
            parse(given),
            RunFolder(run_dir),
            lambda layout: job(evaluated, seen.append, plan),
            Console(quiet=True),
        )
        (best,) = seen
        return best["w"], small_run.steps_saved(run_dir)

    expected, saved = train("straight", scores, "--keep-checkpoints", "9")
    assert saved == [2, 3, 4, 6, 8, 9]
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    for step in saved[3:]:
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    best, saved = train("cut", scores[1:], "--resume")
    np.testing.assert_array_equal(best, expected)
    assert saved == [3 * (1 + scores.index(0.9)), 8, 9]
