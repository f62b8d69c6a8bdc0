"""What the user sees while a study goes on."""

import statistics
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)


class StudyProgress:
    """A bar of runs done, and a line a finished run; a context manager.

    The time left is that of the runs left if they take as long as those that have
    ended here, and unknown before one has.
    """

    def __init__(self, console: Console, workers: int) -> None:
        """Prepares to show a study that does `workers` runs at a time."""
        self._console = console
        self._workers = workers
        self._seconds: list[float] = []
        self._done = self._total = 0
        self._bar = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=None, left=self.time_left)

    @property
    def time_left(self) -> str:
        """How long the rest takes, in words."""
        if not self._seconds:
            return "time left unknown until a run has ended"
        left = self._total - self._done
        turns = max(left / self._workers, min(left, 1))
        minutes = round(turns * statistics.mean(self._seconds) / 60)
        return f"about {minutes // 60} h {minutes % 60:02} min left"

    def show(self, done: int, total: int) -> None:
        """Shows how many runs are done, of those known to be needed."""
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, total=total, left=self.time_left)

    def ended(self, name: str, result: str, seconds: float) -> None:
        """Prints the line of a run that has taken so long."""
        self._seconds.append(seconds)
        where = "" if self._console.is_terminal else f" [{self._done}/{self._total}]"
        self._console.print(
            f"{name}: {result} ({seconds:,.0f} s){where}",
            markup=False,
            soft_wrap=True,
        )

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
