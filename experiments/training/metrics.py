"""metrics.jsonl: one JSON object a step, written at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics file.

    Raises:
        ValueError: A line is no JSON object; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}.") from error
    return rows


class MetricsWriter:
    """Appends rows to a metrics file; a context manager.

    Rows have a `step` of their own each, in rising order. Every row is flushed, so
    that a run that dies leaves all of its rows.
    """

    def __init__(self, path: Path, *, keep_until: int) -> None:
        """Opens `path`, dropping the rows after step `keep_until`.

        Those are steps that will be done again: they came after the checkpoint that
        the run goes on from. A last line cut short by a crash goes with them.
        """
        self._drop_after(path, keep_until)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        if not path.exists():
            return
        lines = path.read_text("utf-8").splitlines(keepends=True)
        kept = [
            line
            for line in lines
            if line.endswith("\n") and json.loads(line)["step"] <= step
        ]
        # Replaced in one go: a crash here must not lose the rows that stay.
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(kept), "utf-8")
        shorter.replace(path)
