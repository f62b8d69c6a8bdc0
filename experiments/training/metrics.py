"""The one writer of metrics: metrics.jsonl, and mirrors of it for people to look at.

metrics.jsonl is the run's record: one JSON object per step, written at once. Mirrors
(`experiments.training.mirrors`) are copies of it for TensorBoard and Weights & Biases;
one that fails is reported and dropped, and the run goes on.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from experiments.files import replace_text

Row = Mapping[str, Any]


class Mirror(Protocol):
    """A copy of the metrics in another format."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        ...

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the finite numbers of one step's row."""
        ...

    def close(self) -> None:
        """Writes what is left to write."""
        ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics file, but for a last one that a crash cut short.

    Raises:
        ValueError: A line is no JSON object; the message names it.
    """
    return [row for _, row in _complete(path)]


class MetricsWriter:
    """Appends rows to a metrics file and its mirrors; a context manager.

    Rows have a `step` of their own each, in rising order. Every row is handed to the
    operating system at once, so that a run that is killed leaves all of its rows. A
    number that is not finite is written as null, since JSON has no other word for it.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_until: int,
        mirrors: Sequence[Mirror] = (),
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """Opens `path`, dropping the rows after step `keep_until`.

        Those are steps that will be done again: they came after the checkpoint that
        the run goes on from. A last line cut short by a crash goes with them. Rows of
        steps before that are not there, because a machine was lost before they were on
        its disk or in its bucket, are told of.

        Args:
            path: The metrics file; made if there is none.
            keep_until: Last step whose row stays.
            mirrors: Where each row goes as well.
            report: Tells the user that a mirror failed, or that rows are missing.

        Raises:
            OSError: The file cannot be written; the message says what to do.
            ValueError: A row that is kept is no JSON object.
        """
        self._path = path
        self._mirrors = list(mirrors)
        self._report = report
        try:
            kept = _drop_after(path, keep_until)
            # Unbuffered: after a failure nothing is left that `close` would try again.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._explained(error) from error
        if kept < keep_until:
            report(
                f"{path} has the rows of {kept:,} of the {keep_until:,} steps before: "
                "sums over a run, as of time, are of these."
            )

    def write(self, row: Row) -> None:
        """Appends one row.

        Raises:
            OSError: It could not be written, for one because the disk is full. A row
                cut short by that is dropped when the run is resumed.
        """
        finite = {name: _null_unless_finite(value) for name, value in row.items()}
        left = memoryview((json.dumps(finite, allow_nan=False) + "\n").encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._explained(error) from error
        scalars = {
            name: float(value)
            for name, value in finite.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._each_mirror(lambda mirror: mirror.write(row["step"], scalars))

    def sync(self) -> None:
        """Returns when all rows are on disk, where they outlive the machine's power.

        Raises:
            OSError: They cannot be brought there.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._explained(error) from error

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file and the mirrors."""
        self._file.close()
        self._each_mirror(lambda mirror: mirror.close())

    def _each_mirror(self, act: Callable[[Mirror], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                act(mirror)
            # Whatever a library of another's raises: no picture is worth the run.
            except Exception as error:
                self._mirrors.remove(mirror)
                self._report(
                    f"{mirror.name} failed and gets no more of this run's metrics "
                    f"({type(error).__name__}: {error}). {self._path} has them all."
                )

    def _explained(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"cannot write metrics ({error.strerror}): make room or give another "
            "--run-dir; the newest checkpoint is good, --resume goes on from it",
            str(self._path),
        )


class NullMetrics:
    """Takes rows and keeps none: the writer of all processes but the first."""

    def write(self, row: Row) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is no JSON: {error}.") from error


def _complete(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines that were written to their end, and their rows."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [
        (line, _parse(path, number, line))
        for number, line in enumerate(lines, start=1)
        if line.endswith("\n")
    ]


def _drop_after(path: Path, step: int) -> int:
    """Drops the rows after a step and returns how many there are up to it."""
    if not path.exists():
        return 0
    kept = [line for line, row in _complete(path) if row["step"] <= step]
    text = "".join(kept)
    if len(text.encode()) < path.stat().st_size:
        # Replaced in one go: a crash here must not lose the rows that stay.
        replace_text(path, text)
    return len(kept)


def _null_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
