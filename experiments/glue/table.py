"""The table of GLUE again: `python -m experiments.glue.table FOLDER`.

Nothing is run: study.json in the folder is all that is read.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from experiments.data.glue import TASKS
from experiments.glue.subject import GLUE, best_scores, main_metric
from experiments.glue.table_config import METHODS
from experiments.study.plots import legend_of, looks
from experiments.study.records import Records
from experiments.study.runs import Record
from experiments.training.report import megabytes

PROGRAM = "python -m experiments.glue.table"
_PLOT = "glue.png"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method on a task, at its best learning rate.

    Attributes:
        records: Its runs at that rate, a seed each.
        tried: Result by learning rate, on the first seed.
    """

    records: tuple[Record, ...]
    tried: Mapping[float, float]

    @property
    def scores(self) -> list[float]:
        """The task's score of each seed, in per cent; 0 where a run diverged."""
        return [
            0.0 if math.isinf(result) else -100 * result
            for result in map(GLUE.result, self.records)
        ]

    @property
    def median(self) -> float:
        """Of the scores."""
        return statistics.median(self.scores)

    @property
    def others(self) -> dict[str, float]:
        """Medians of the other scores, of the same epochs, in per cent."""
        good = [one for one in self.records if math.isfinite(GLUE.result(one))]
        found = [best_scores(record) for record in good]
        names = [name for name in (found[0] if found else {}) if "loss" not in name]
        return {
            name: 100 * statistics.median(scores[name] for scores in found)
            for name in names
            if name != main_metric(good[0])
        }

    @property
    def inside(self) -> bool:
        """Whether worse rates were tried on both sides of the best one."""
        rate = self.records[0].run.learning_rate
        return min(self.tried) < rate < max(self.tried)


@dataclasses.dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        name: What the table calls it.
        cells: By task, those that are done.
    """

    name: str
    cells: Mapping[str, Cell]

    @property
    def any_record(self) -> Record:
        """One of its runs: their states are of one size, but for the head's."""
        return next(iter(self.cells.values())).records[0]

    @property
    def memory(self) -> tuple[int, int]:
        """Values and bytes of weights and optimizer state."""
        record = self.any_record
        width = jnp.dtype(record.settings["model"]["param_dtype"]).itemsize
        weights = record.parameters["all"]
        return (
            weights + record.parameters["state"],
            width * weights + record.state_bytes["all"],
        )

    def average(self, tasks: Sequence[str]) -> float:
        """Mean over tasks of the medians; not a number while one is missing."""
        if any(task not in self.cells for task in tasks):
            return math.nan
        return statistics.mean(self.cells[task].median for task in tasks)


def rows_of(records: Records) -> list[Row]:
    """Returns the methods, the published table's first."""
    found: dict[str, dict[str, Cell]] = {}
    arms = dict.fromkeys(run.arm for run in records.runs)
    for arm in arms:
        task, _, name = arm.partition("-")
        cell = _cell(arm, records)
        if cell is not None:
            found.setdefault(name, {})[task] = cell
    order = sorted(found, key=_place)
    return [Row(name, found[name]) for name in order]


def markdown(records: Records, rows: Sequence[Row]) -> str:
    """Writes the table and what its figures are."""
    tasks = [task for task in TASKS if any(task in row.cells for row in rows)]
    heads = " | ".join(
        f"{TASKS[task].folder} ({TASKS[task].metrics[0]})" for task in tasks
    )
    inside = any(cell.inside for row in rows for cell in row.cells.values())
    lines = [
        f"| method | memory, values | memory | {heads} | average |",
        "|---|---:|---:|" + "---:|" * (len(tasks) + 1),
    ]
    for row in rows:
        values, count = row.memory
        cells = " | ".join(
            _words(row.cells.get(task), records, mark_edge=inside) for task in tasks
        )
        average = row.average(tasks)
        lines.append(
            f"| {row.name} | {values / 1e6:.2f} M | {megabytes(count)} | {cells} "
            f"| {'' if math.isnan(average) else f'**{average:.2f}**'} |"
        )
    first = rows[0].any_record
    found = {record.versions.get("device") for record in records.runs.values()}
    devices = " and ".join(sorted(found - {None}))
    made = f"Made on {devices} by:" if devices else "Made by:"
    several = len(records.seeds) > 1
    seeds = ", ".join(map(str, records.seeds))
    over = f"medians over seeds {seeds}, lowest to highest in brackets"
    edge = "An asterisk: the" if inside else "Each"
    parts = [
        "# GLUE",
        "\n".join(lines),
        "Scores of the validation splits in per cent, after the best epoch by them: "
        f"{over if several else f'seed {seeds} alone'}. {edge} best learning rate "
        "that was tried is at the edge. Memory: of "
        f"{first.parameters['all'] / 1e6:.2f} M weights, LoRA's factors beside them, "
        "and of the optimizer's state.",
        f"![scores by task and method]({_PLOT})",
        _other_scores(rows, tasks),
        _rates(rows, tasks),
        "\n".join([made, "", *(f"    {one}" for one in records.commands)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(rows: Sequence[Row]) -> Figure:
    """Draws the median score of each method by task, with lowest to highest."""
    tasks = [task for task in TASKS if any(task in row.cells for row in rows)]
    figure = Figure(figsize=(2.2 * len(tasks) + 3, 4.2), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    look = looks([row.name for row in rows])
    for panel, task in zip(axes, tasks, strict=True):
        for x, row in enumerate(rows):
            if task not in row.cells:
                continue
            scores, median = row.cells[task].scores, row.cells[task].median
            panel.errorbar(
                [x],
                [median],
                [[median - min(scores)], [max(scores) - median]],
                fmt=look[row.name].marker,
                color=look[row.name].color,
                capsize=3,
                label=row.name,
            )
        panel.set_title(TASKS[task].folder)
        panel.set_ylabel(f"{TASKS[task].metrics[0]} (%)")
        panel.set_xticks([])
        panel.grid(alpha=0.3)
    shown = legend_of(axes)
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return figure


def show(records: Records, console: Console) -> None:
    """Writes table and plot beside the records and prints the table."""
    folder, rows = records.path.parent, rows_of(records)
    if not rows:
        console.print("Nothing to report: no run on the first seed has ended.")
        return
    text = markdown(records, rows)
    (folder / "glue.md").write_text(text, "utf-8")
    plot(rows).savefig(folder / _PLOT, dpi=130)
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Table: {folder / 'glue.md'}", markup=False, soft_wrap=True)


def _cell(arm: str, records: Records) -> Cell | None:
    results = {
        run: result for run, result in records.results(GLUE).items() if run.arm == arm
    }
    first = records.seeds[0]
    tried = {run.learning_rate: x for run, x in results.items() if run.seed == first}
    if not tried:
        return None
    rate = min(tried, key=lambda rate: (tried[rate], rate))
    at_best = [run for run in results if run.learning_rate == rate]
    at_best.sort(key=lambda run: run.seed)
    chosen = tuple(records.runs[run] for run in at_best)
    return Cell(chosen, dict(sorted(tried.items())))


def _words(cell: Cell | None, records: Records, *, mark_edge: bool) -> str:
    if cell is None:
        return ""
    if all(math.isinf(result) for result in cell.tried.values()):
        return "diverged"
    scores, seeds = cell.scores, len(records.seeds)
    notes = [f"{min(scores):.1f} to {max(scores):.1f}"] if len(scores) > 1 else []
    if len(scores) < seeds:
        notes.append(f"{len(scores)} of {seeds} seeds")
    edge = "*" if mark_edge and not cell.inside else ""
    return f"{cell.median:.2f}{edge}" + (f" ({', '.join(notes)})" if notes else "")


def _other_scores(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Medians of the scores beside the table's, of tasks that have more than one."""
    lines = []
    for task in tasks:
        cells = {row.name: row.cells.get(task) for row in rows}
        others = {name: cell.others for name, cell in cells.items() if cell}
        for metric in dict.fromkeys(name for some in others.values() for name in some):
            found = [
                f"{name} {some[metric]:.2f}"
                for name, some in others.items()
                if metric in some
            ]
            lines.append(f"* {TASKS[task].folder}, {metric}: {', '.join(found)}")
    return "\n".join(["Other scores, of the same epochs:", "", *lines]) if lines else ""


def _rates(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    lines = [
        f"* {row.name}: "
        + ", ".join(
            f"{TASKS[task].folder} {row.cells[task].records[0].run.learning_rate:g} of "
            f"{', '.join(f'{rate:g}' for rate in row.cells[task].tried)}"
            for task in tasks
            if task in row.cells
        )
        for row in rows
    ]
    return "\n".join(["Learning rates:", "", *lines])


def _place(name: str) -> tuple[int, str]:
    published = [spec.partition("=")[0] for spec in METHODS]
    return published.index(name) if name in published else len(published), name


@dataclasses.dataclass(frozen=True)
class TableFolder:
    """Make table and plot again, from a folder's study.json alone.

    Attributes:
        folder: Of the table.
    """

    folder: tyro.conf.Positional[Path]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    config = tyro.cli(TableFolder, args=args, prog=PROGRAM)
    try:
        records = Records.read(config.folder / "study.json", ("glue",))
        show(records, Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
