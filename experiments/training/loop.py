"""The one training loop: steps, evaluations, checkpoints, interruptions.

It knows no model and no task: a compiled step, an iterator of batches and a function
that evaluates are all it needs.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import grain
import jax
import optax

from experiments.training.checkpoint import Checkpointer
from experiments.training.metrics import MetricsWriter
from experiments.training.state import TrainState
from experiments.training.step import Batch, Metrics, StepFn

Row = dict[str, Any]


class NonFiniteError(ValueError):
    """A loss, gradient or update is infinite or NaN."""


class Progress(Protocol):
    """Shows a run while it goes on."""

    def step(self, row: Row) -> None:
        """Shows the metrics of one step."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """When the loop ends, evaluates and saves, in updates counted from 1."""

    steps: int
    eval_every: int
    checkpoint_every: int

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this update."""
        return step % self.eval_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows this update."""
        return step % self.checkpoint_every == 0 or step == self.steps


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last state, and whether Ctrl-C cut it short."""

    state: TrainState
    interrupted: bool


def train(
    state: TrainState,
    *,
    step_fn: StepFn,
    batches: grain.DatasetIterator,
    place: Callable[[Batch], Batch],
    evaluate: Callable[[optax.Params], Row],
    plan: Plan,
    checkpointer: Checkpointer,
    metrics: MetricsWriter,
    progress: Progress,
) -> Outcome:
    """Trains from `state` to the end of the plan, or until Ctrl-C.

    A step's metrics are fetched after the next step has been dispatched, so that the
    device never waits for the host, except where an evaluation or a checkpoint is
    due.

    Args:
        state: Where to start; its buffers are given up.
        step_fn: A compiled step, as `make_train_step` makes it.
        batches: Endless batches of host arrays, at the position that fits `state`.
        place: Puts a batch on the devices.
        evaluate: Metrics of given parameters, by name.
        plan: When to end, to evaluate and to save.
        checkpointer: Where to save.
        metrics: Where each step's row goes.
        progress: What the user sees.

    Returns:
        The last state, which is saved, and whether Ctrl-C ended the loop early.

    Raises:
        NonFiniteError: A loss, gradient or update is not finite. Nothing is saved
            from that step on: the newest checkpoint is good.
    """
    log = _StepLog(metrics, progress)
    step = int(state.step)
    with _catch_interrupt() as interrupt:
        while step < plan.steps and not interrupt.is_set():
            state, values = step_fn(state, place(next(batches)))
            step += 1
            log.add(step, values)
            if plan.evaluates_after(step):
                log.fetch()  # so that the step's time is without the evaluation's
                log.extend(evaluate(state.params))
            if plan.saves_after(step) or interrupt.is_set():
                # Known to be finite, and written, before the state is saved.
                log.flush()
                checkpointer.save(step, state, batches)
        log.flush()
        # Does nothing where the loop has saved already; an interrupt may arrive
        # between the loop's last two looks at it.
        checkpointer.save(step, state, batches)
        checkpointer.wait()
    return Outcome(state, interrupted=step < plan.steps)


class _StepLog:
    """Holds a step's metrics on the device until the next step is under way."""

    def __init__(self, metrics: MetricsWriter, progress: Progress) -> None:
        self._metrics = metrics
        self._progress = progress
        self._pending: tuple[int, Metrics] | None = None
        self._row: Row = {}
        self._clock = time.perf_counter()

    def add(self, step: int, values: Metrics) -> None:
        """Takes a step's metrics; writes those of the step before."""
        self.flush()
        self._pending = (step, values)

    def extend(self, row: Row) -> None:
        """Adds to the fetched row; the time spent on it is not the next step's."""
        self._row |= row
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Writes the newest step's row, if it is finite."""
        self.fetch()
        if self._row:
            self._metrics.write(self._row)
            self._progress.step(self._row)
        self._row = {}

    def fetch(self) -> None:
        """Waits for the newest step's metrics; raises where they are not finite."""
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(
                f"step {step}: {', '.join(broken)} not finite ({row}). Training "
                "stopped and saved nothing from this step on. Try a lower learning "
                "rate or --clip-norm 1."
            )
        now = time.perf_counter()
        self._row = {"step": step, **row, "seconds": now - self._clock}
        self._clock = now


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C sets; a second Ctrl-C interrupts as usual."""
    event = threading.Event()
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        # A handler may interrupt a print: only a bare write is safe in it.
        os.write(
            sys.__stderr__.fileno(), b"\nCtrl-C: finishing the step, then saving.\n"
        )

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
