"""A row of metrics a step, judged while the next step is under way."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax

from experiments.training.spikes import SpikeDetector
from experiments.training.step import Metrics

Row = dict[str, Any]


class NonFiniteError(ValueError):
    """Losses, gradients or an update are infinite or NaN."""


class Writer(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Keeps a row."""
        ...

    def sync(self) -> None:
        """Brings all rows to where they outlive the machine."""
        ...


class Progress(Protocol):
    """Shows a run while it goes on."""

    def step(self, row: Row) -> None:
        """Shows the metrics of one step."""
        ...


class StepLog:
    """Holds a step's metrics on the device until the next step is under way.

    Attributes:
        error: Why training should stop, with a state that is good: too many skipped
            steps in a row. None while it may go on.
    """

    def __init__(
        self,
        writer: Writer,
        progress: Progress,
        *,
        max_skipped: int,
        unit: str,
        earlier: Iterable[Row],
        throughput: Callable[[float, float], Row],
    ) -> None:
        """Starts to log.

        Args:
            writer: Where each row goes.
            progress: What the user sees.
            max_skipped: Skipped steps in a row that are too many.
            unit: Name of a step's sum of weights.
            earlier: Rows of the steps before, which losses are judged by.
            throughput: What that sum and a step's seconds add to its row.
        """
        self.error: NonFiniteError | None = None
        self._writer = writer
        self._progress = progress
        self._unit = unit
        self._throughput = throughput
        self._max_skipped = max_skipped
        self._skipped = 0  # in a row
        # Those that `fetch` has judged.
        losses = (row["loss"] for row in earlier if not row["skipped"])
        self._spikes = SpikeDetector(loss for loss in losses if loss is not None)
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
        """Writes the newest step's row; raises as `fetch` does."""
        self.fetch()
        if self._row:
            self._writer.write(self._row)
            self._progress.step(self._row)
        self._row = {}

    def fetch(self) -> None:
        """Waits for the newest step's metrics.

        Raises:
            NonFiniteError: The step was not skipped, yet its update is not finite: the
                state is lost.
        """
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        row = {
            name: value if math.isfinite(value) else None
            for name, value in numbers.items()
        }
        row["skipped"] = int(numbers["skipped"])
        now = time.perf_counter()
        seconds = now - self._clock
        speed = self._throughput(numbers[self._unit], seconds)
        self._row = {"step": step, **row, "seconds": seconds, **speed}
        self._clock = now
        # Where pieces of a batch are skipped, the others make an update.
        if row["skipped"] and math.isfinite(numbers["update_norm"]):
            self._count_skipped(step)
        else:
            self._judge(step, numbers)

    def _judge(self, step: int, numbers: dict[str, float]) -> None:
        self._skipped = 0
        broken = [name for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(
                f"step {step}: {', '.join(broken)} not finite ({numbers}), though loss "
                "and gradient are. Training stopped and saved nothing from this step "
                "on. Try a lower learning rate or --clip-norm 1."
            )
        deviations = self._spikes.judge(numbers["loss"])
        if deviations is not None:
            self._row["spike"] = deviations

    def _count_skipped(self, step: int) -> None:
        self._skipped += 1
        if self._skipped >= self._max_skipped and self.error is None:
            self.error = NonFiniteError(
                f"loss or gradient was not finite in {self._skipped} steps in a row, "
                f"from step {step - self._skipped + 1} on. The state without them is "
                "saved. Try a lower learning rate, --clip-norm 1 or "
                "--model.dtype float32, or look at the text read there; --resume goes "
                "on behind it, --max-skipped allows more."
            )
