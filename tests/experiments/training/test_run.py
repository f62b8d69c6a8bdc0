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
