"""A run of the loop on one small matrix, for the tests of loop and checkpoints."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngalore_jax as ng
from experiments.training.checkpoint import Checkpointer
from experiments.training.loop import Outcome, Plan, train
from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.state import TrainState, create_state
from experiments.training.step import make_train_step

SIZE = 8
IDENTITY = {"model": {"size": SIZE}}
CONFIG = {"optimizer": "natural_galore"}


class Quiet:
    """Shows nothing."""

    def step(self, row):
        pass


class Numbers:
    """Batches that are numbers, 100 to begin with; an action may take its turn."""

    def __init__(self, actions: dict[int, Callable] | None = None) -> None:
        self.number = 100
        self.actions = actions or {}

    def __next__(self) -> int:
        if action := self.actions.get(self.number - 99):
            action()
        self.number += 1
        return self.number - 1

    def get_state(self) -> dict:
        return {"number": self.number}

    def set_state(self, states) -> None:
        (state,) = states
        self.number = state["number"]


@dataclasses.dataclass
class Hook:
    """Called with each batch on its way to the device; acts on some by their order."""

    actions: dict[int, Callable]
    count: int = 0

    def __call__(self, batch):
        self.count += 1
        if action := self.actions.get(self.count):
            batch = action(batch) or batch
        return batch


def as_batch(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    return {"x": random.normal(size=(4, SIZE)).astype(np.float32)}


def loss_fn(params, batch):
    target = jnp.tanh(batch["x"] * jnp.arange(SIZE)[None])
    return jnp.sum((batch["x"] @ params["w"] - target) ** 2), jnp.float32(4)


OPTIMIZER = ng.natural_galore(1e-2, rank=2, update_proj_gap=2, history=3)
STEP = make_train_step(loss_fn, OPTIMIZER, optax.constant_schedule(1e-2))


def initial_params(key):
    return {"w": jax.random.normal(key, (SIZE, SIZE))}


def initial_state() -> TrainState:
    return create_state(initial_params, OPTIMIZER, seed=0)


def checkpointer(folder: Path, *, keep=2, identity=IDENTITY, report=print):
    return Checkpointer(
        folder / "checkpoints",
        keep=keep,
        identity=identity,
        config=CONFIG,
        report=report,
    )


def run(
    folder: Path,
    *,
    steps: int = 6,
    every: int = 100,
    max_skipped: int = 10,
    keep: int = 2,
    resume: bool = False,
    auto_resume: bool = False,
    identity=IDENTITY,
    place=lambda batch: batch,
    batches: Numbers | None = None,
    losses: dict[int, float] | None = None,
    report=print,
    progress=None,
    step_fn=STEP,
) -> Outcome:
    """Trains in a folder; `losses` are those of validation, by evaluation's order."""
    folder.mkdir(exist_ok=True)
    batches = Numbers() if batches is None else batches
    known = iter((losses or {}).values())

    def evaluate(params):
        norm = float(optax.tree.norm(params))
        return {"norm": norm} | ({"validation_loss": next(known)} if losses else {})

    with checkpointer(folder, keep=keep, identity=identity, report=report) as saved:
        state = saved.start(
            initial_state(), batches, resume=resume, auto_resume=auto_resume
        )
        path = folder / "metrics.jsonl"
        with MetricsWriter(path, keep_until=int(state.step)) as metrics:
            return train(
                state,
                step_fn=step_fn,
                batches=batches,
                place=lambda number: place(as_batch(number)),
                evaluate=evaluate,
                plan=Plan(steps, 2, every, max_skipped),
                checkpointer=saved,
                metrics=metrics,
                progress=progress or Quiet(),
                earlier=read_metrics(path),
            )


def rows(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def steps_saved(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())
