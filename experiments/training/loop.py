"""The one training loop: steps, evaluations, checkpoints, interruptions.

It knows no model and no task: a compiled step, an iterator of batches and a function
that evaluates are all it needs.
"""

import dataclasses
import signal
from collections.abc import Callable, Sequence
from typing import Self

import optax

from experiments.errors import may_pass
from experiments.training.agreement import exchange
from experiments.training.checkpoint import Checkpointer
from experiments.training.distributed import (
    OtherProcessError,
    OtherProcessPassingError,
    agreed,
)
from experiments.training.read_ahead import ReadAhead, Source
from experiments.training.signals import StopSignals
from experiments.training.state import TrainState
from experiments.training.step import Batch, StepFn
from experiments.training.step_log import Progress, Row, StepLog, Writer

# What a process says of its next batch; the largest is heard.
_IS_THERE, _MAY_PASS, _FAILS = 0, 1, 2
_SAVE_EVERY = 500  # steps of a long epoch


@dataclasses.dataclass(frozen=True)
class Plan:
    """When the loop ends, evaluates and saves, in updates counted from 1."""

    steps: int
    eval_every: int
    checkpoint_every: int
    max_skipped: int = 10  # in a row, before the loop gives up
    save_evaluated: bool = False  # besides, so that any evaluated state can be the best

    @classmethod
    def of_epochs(cls, epochs: int, an_epoch: int, max_skipped: int) -> Self:
        """Returns one that evaluates and saves after each epoch.

        Where epochs are of more than 500 steps, every 500th step is saved as well.
        """
        every = min(an_epoch, _SAVE_EVERY)
        return cls(epochs * an_epoch, an_epoch, every, max_skipped, save_evaluated=True)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this update."""
        return step % self.eval_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows this update."""
        due = step % self.checkpoint_every == 0 or step == self.steps
        return due or (self.save_evaluated and self.evaluates_after(step))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        state: The last state, which is saved.
        steps: What the plan was.
        stopped_by: The signal that cut it short; None if it ran to its end.
    """

    state: TrainState
    steps: int
    stopped_by: signal.Signals | None

    @property
    def exit_code(self) -> int:
        """The shell's: 0, 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def train(
    state: TrainState,
    *,
    step_fn: StepFn,
    batches: Source,
    place: Callable[[Batch], Batch],
    evaluate: Callable[[optax.Params], Row],
    plan: Plan,
    checkpointer: Checkpointer,
    metrics: Writer,
    progress: Progress,
    objective: Callable[[Row], float | None] = lambda row: row.get("validation_loss"),
    unit: str = "tokens",
    earlier: Sequence[Row] = (),
    throughput: Callable[[float, float], Row] = lambda count, seconds: {},
) -> Outcome:
    """Trains from `state` to the end of the plan, or until Ctrl-C or SIGTERM.

    A step's metrics are fetched after the next step has been dispatched, so that the
    device never waits for the host, except where an evaluation or a checkpoint is
    due. With several processes all of them stop after the same step.

    Args:
        state: Where to start; its buffers are given up.
        step_fn: A compiled step, as `make_train_step` makes it.
        batches: Endless batches of host arrays, at the position that fits `state`. One
            is read ahead.
        place: Puts a batch on the devices.
        evaluate: Metrics of given parameters, by name.
        plan: When to end, to evaluate and to save.
        checkpointer: Where to save.
        metrics: Where each step's row goes.
        progress: What the user sees.
        objective: Of the metrics of an evaluation, which its checkpoint is judged by:
            lower is better.
        unit: Name that a step's metrics have for its sum of weights.
        earlier: Rows of the steps before, which loss spikes are judged by.
        throughput: What that sum and a step's seconds add to its row.

    Returns:
        The last state, which is saved, and the signal that ended the loop early.

    Raises:
        NonFiniteError: `plan.max_skipped` steps in a row had to be skipped, and the
            state is saved; or an update was not finite, and nothing is saved from that
            step on.
        SaveError: A checkpoint could not be written.
        OtherProcessError: Another process has no next batch. What is done is saved, as
            it is when a batch cannot be read here, whose error is raised on. One that
            may pass, if all that failed may.
    """
    log = StepLog(
        metrics,
        progress,
        max_skipped=plan.max_skipped,
        unit=unit,
        earlier=earlier,
        throughput=throughput,
    )
    step, number, failed = int(state.step), 0, 0
    value: float | None = None  # by the evaluation after the newest step
    with StopSignals() as signals:
        ahead = ReadAhead(batches)

        def word() -> tuple[int, int]:
            if ahead.error is None:
                return int(signals.caught or 0), _IS_THERE
            failure = _MAY_PASS if may_pass(ahead.error) else _FAILS
            return int(signals.caught or 0), failure

        heard = exchange(word)
        while step < plan.steps and log.error is None:
            number, failed = heard()
            if number or failed:
                break
            batch = ahead.take()
            heard = exchange(word)
            state, values = step_fn(state, place(batch))
            step += 1
            log.add(step, values)
            checkpointer.check()
            value = None
            if plan.evaluates_after(step):
                log.fetch()  # so that the step's time is without the evaluation's
                found = evaluate(state.params)
                log.extend(found)
                value = objective(found)
            if plan.saves_after(step):
                # Known to be finite, and written, before the state is saved.
                with agreed():
                    log.flush()
                    metrics.sync()
                checkpointer.save(step, state, ahead.position, value)
        with agreed():
            log.flush()
            metrics.sync()
        # Does nothing where the loop has saved already.
        checkpointer.save(step, state, ahead.position, value)
        checkpointer.wait()
    if log.error is not None:
        raise log.error
    if failed and not number:
        passing = failed == _MAY_PASS
        # What lasts elsewhere goes before what may pass here.
        if ahead.error is not None and (passing or not may_pass(ahead.error)):
            raise ahead.error
        raise (OtherProcessPassingError if passing else OtherProcessError)(
            f"another process cannot read its next batch; step {step} is saved."
        ) from ahead.error
    return Outcome(state, plan.steps, signal.Signals(number) if number else None)
