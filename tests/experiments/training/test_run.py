"""A run in its folder: what it does with the best checkpoint."""

import jax
import numpy as np
import optax
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
        rank=lambda row: -row["validation_score"],
        pretrained=lambda params: {"w": params["w"] + 1},
        finish=finish,
    )


class Batches(small_run.Numbers):
    def __next__(self):
        return small_run.as_batch(super().__next__())

    def close(self):
        pass


def test_a_run_ends_with_its_best_parameters_and_starts_from_given_ones(tmp_path):
    scores = [0.1, 0.9, 0.5, 0.9]
    evaluated = iter(
        {"validation_loss": 1.0, "validation_score": score} for score in scores
    )
    seen = []
    config = parse(["--run-dir", str(tmp_path / "run"), "--batch-size", "4"])
    outcome = run(
        config,
        RunFolder(tmp_path / "run"),
        lambda layout: job(evaluated, seen.append, Plan(4, 1, 1)),
        Console(quiet=True),
    )
    (best,) = seen
    # Not the last one, whose arrays made room for it.
    assert outcome.steps == 4 and not any(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outcome.state)
    )

    # Two steps end where the best checkpoint was made.
    run(
        config,
        RunFolder(tmp_path / "short"),
        lambda layout: job(
            iter([{"validation_loss": 1.0, "validation_score": 0.0}]),
            seen.append,
            Plan(2, 2, 2),
        ),
        Console(quiet=True),
    )
    np.testing.assert_array_equal(best["w"], seen[1]["w"])
    start = small_run.initial_state().params["w"]
    moved = np.abs(best["w"] - (start + 1)).max()
    assert 0 < moved < 0.2  # two steps of 1e-2 from the given values
