"""What the user sees while a run goes on: a progress bar, or plain lines."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Without a terminal (a log file, CI) a run prints about this many lines.
_PLAIN_LINES = 20


class ConsoleProgress:
    """Shows loss, speed and time left; a context manager.

    On a terminal a bar is redrawn in place; elsewhere plain lines are printed, about
    twenty a run. Evaluations, skipped steps and loss spikes are printed as lines of
    their own on both.
    """

    def __init__(
        self, console: Console, *, steps: int, done: int, unit: str = "tokens"
    ) -> None:
        """Prepares to show a run of `steps` steps of which `done` are done.

        Its rows count what they learn from under the name `unit`.
        """
        self._console = console
        self._unit = unit
        self._steps = steps
        self._done = done
        self._every = max(1, steps // _PLAIN_LINES)
        self._rate = 0.0
        self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn(f"{{task.fields[rate]:,.0f}} {unit}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=steps, completed=done, loss=float("nan"), rate=0.0
        )

    def step(self, row: dict[str, Any]) -> None:
        """Shows one row of metrics."""
        rate = row[self._unit] / row["seconds"]
        # Smoothed over about ten steps; the first step, which compiles, would
        # otherwise hang on.
        first = row["step"] <= self._done + 2
        self._rate = rate if first else 0.9 * self._rate + 0.1 * rate
        loss = float("nan") if row["loss"] is None else row["loss"]
        self._bar.update(self._task, completed=row["step"], loss=loss, rate=self._rate)
        if row["skipped"]:
            self._console.print(
                f"step {row['step']}: skipped, loss or gradient is not finite"
            )
        if "spike" in row:
            self._console.print(
                f"step {row['step']}: loss {row['loss']:.3f} is {row['spike']:.1f} "
                "deviations above the recent ones"
            )
        if "validation_loss" in row:
            found = (
                f"{name.removeprefix('validation_').replace('_', ' ')} {value:.4f}"
                for name, value in row.items()
                if name.startswith("validation_")
            )
            self._console.print(f"step {row['step']}: validation {', '.join(found)}")
        elif not self._console.is_terminal and row["step"] % self._every == 0:
            self._console.print(self._line(row["step"], loss))

    def __enter__(self) -> Self:
        """Start to show."""
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop to show."""
        self._bar.stop()

    def _line(self, step: int, loss: float) -> str:
        elapsed = time.perf_counter() - self._started
        left = elapsed / (step - self._done) * (self._steps - step)
        return (
            f"step {step}/{self._steps}: loss {loss:.3f}, "
            f"{self._rate:,.0f} {self._unit}/s, {left:,.0f} s left"
        )
