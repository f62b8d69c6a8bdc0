"""The results as tables: Markdown for bench.md, rich for the terminal."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.bench.records import Row
from experiments.bench.results import Results
from experiments.bench.targets import Verdict

_TITLES = {
    "update": "Steady update of the hidden matrices",
    "refresh": "Update that chooses the subspaces anew",
    "step": "Training step, a refresh spread over the steps to the next",
    "compile": "Compiling the update, its refresh included",
    "state": "Bytes of optimizer state",
    "memory": "Memory of a compiled training step",
    "energy": "Gradient energy caught by a refresh, of the exact SVD's",
    "growth": "Growth of natural_galore's steady update",
}
# Of each part, the figures shown: key, heading, format.
_COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "update": (
        ("update_ms", "ms", ".2f"),
        ("update_ratio", "/ optax", ".3f"),
        ("alone_ms", "own program", ".2f"),
        ("alone_ratio", "/ optax", ".3f"),
        ("limit_ms", "limit, ms", ".2f"),
        ("times_limit", "ms / limit", ".1f"),
        ("update_ratio_low", "lower quartile", ".3f"),
        ("update_ratio_high", "upper quartile", ".3f"),
        ("limit_no_overlap_ms", "limit without overlap, ms", ".2f"),
        ("bytes_moved_mb", "to move, MB", ".1f"),
        ("products_gflop", "products, GFLOP", ".2f"),
    ),
    "step": (
        ("steady_ms", "steady, ms", ".1f"),
        ("refresh_ms", "refresh, ms", ".1f"),
        ("gap", "every ... steps", ".0f"),
        ("amortised_ms", "spread, ms", ".1f"),
        ("steady_ratio", "steady / adamw", ".3f"),
        ("amortised_ratio", "spread / adamw", ".3f"),
        ("alone_ratio", "own program / this", ".3f"),
        ("amortised_ratio_low", "lower quartile", ".3f"),
        ("amortised_ratio_high", "upper quartile", ".3f"),
    ),
    "compile": (
        ("layers", "layers", ".0f"),
        ("compile_s", "s", ".2f"),
        ("instructions", "instructions", ",.0f"),
        ("code_mb", "code, MB", ".2f"),
    ),
    "state": (
        ("state_mb", "MB", ".2f"),
        ("state_ratio", "/ galore", ".3f"),
        ("compiled_state_mb", "compiled, MB", ".2f"),
        ("basis_mb", "basis", ".2f"),
        ("history_mb", "history", ".2f"),
        ("moments_mb", "moments", ".2f"),
        ("residual_mb", "residual", ".2f"),
        ("unprojected_mb", "other", ".2f"),
    ),
    "memory": (
        ("memory_mb", "MB", ".0f"),
        ("arguments_mb", "arguments", ".0f"),
        ("temporaries_mb", "temporaries", ".0f"),
        ("outputs_mb", "outputs", ".0f"),
    ),
    "energy": (
        ("rank", "rank", ".0f"),
        ("refreshes", "refreshes", ".0f"),
        ("first_mean", "first, mean", ".4f"),
        ("first_least", "least", ".4f"),
        ("captured_mean", "later, mean", ".4f"),
        ("captured_least", "least", ".4f"),
    ),
    "growth": (
        ("update_ms", "ms", ".2f"),
        ("state_mb", "state, MB", ".2f"),
        ("exponent_of_time", "exponent of time", ".2f"),
        ("last_exponent_of_time", "of the last two", ".2f"),
        ("exponent_of_bytes", "exponent of bytes", ".2f"),
    ),
}
_COLUMNS["refresh"] = tuple(
    (key.replace("update_", "refresh_"), heading, form)
    for key, heading, form in _COLUMNS["update"]
)


_TERMINAL = 6  # columns of figures that a terminal of 80 characters has room for


class Sheet(NamedTuple):
    """One table: a title, headings, and lines of as many cells."""

    title: str
    headings: list[str]
    lines: list[list[str]]


def sheets(results: Results) -> list[Sheet]:
    """Returns the targets, and a table for each part that was measured."""
    return [_targets(results.verdicts), *_parts(results.rows)]


def markdown(results: Results, plots: Sequence[str]) -> str:
    """Returns bench.md.

    Args:
        results: What was found.
        plots: File names of the plots.
    """
    facts = results.environment
    machine, device = facts["machine"], facts["device"]
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    lines = [
        "# Bench",
        "",
        f"Made by `{results.command}` on {facts['date']}: {device['number']} x "
        f"{device['kind']} ({device['platform']}), {machine['processor']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f} at the start; "
        f"{versions}.",
        "",
        rates_line(results),
    ]
    if results.warning is not None:
        lines += ["", f"**{results.warning}**"]
    for sheet in sheets(results):
        lines += ["", f"## {sheet.title}", ""]
        lines += _markdown_table(sheet)
    if notes := _notes(results.rows):
        lines += ["", *(f"* {note}" for note in notes)]
    for name in plots:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return "\n".join(lines) + "\n"


def show(results: Results, console: Console) -> None:
    """Prints all tables, without what only bench.md has room for."""
    judged = [verdict for verdict in results.verdicts if verdict.reached is not None]
    for sheet in [*_parts(results.rows, _TERMINAL), _targets(judged)]:
        table = Table(title=sheet.title, title_justify="left")
        for heading in sheet.headings:
            words = heading in _WORDS
            table.add_column(
                heading,
                justify="left" if words else "right",
                no_wrap=heading == "optimizer",
            )
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table, markup=False)
    for note in _notes(results.rows):
        console.print(note, markup=False, soft_wrap=True)
    console.print(rates_line(results), markup=False, soft_wrap=True)
    if results.warning is not None:
        console.print(results.warning, markup=False, soft_wrap=True, style="bold")


def rates_line(results: Results) -> str:
    """Says in one line what limits are reckoned by."""
    products = ", ".join(
        f"{rate / 1e9:,.0f} GFLOP/s {dtype}"
        for dtype, rate in results.rates.products.items()
    )
    return (
        f"Limits: {results.rates.stream / 1e9:,.1f} GB/s of a stream, matrix products "
        f"at {products}, measured in the same run. Times are medians, ratios medians "
        "of ratios within a round."
    )


_WORDS = ("optimizer", "what", "where", "verdict")


def _targets(verdicts: Sequence[Verdict]) -> Sheet:
    headings = ["what", "to reach", "found", "where", "verdict"]
    lines = [
        [
            verdict.what,
            verdict.limit,
            "" if verdict.value is None else f"{verdict.value:.4f}",
            verdict.where,
            verdict.word,
        ]
        for verdict in verdicts
    ]
    return Sheet("Targets", headings, lines)


def _parts(rows: Sequence[Row], shown: int | None = None) -> Iterator[Sheet]:
    """A table a part and setting; of its columns the first few, or all."""
    for part, title in _TITLES.items():
        measured = [row for row in rows if row.part == part]
        for setting in dict.fromkeys(map(_setting, measured)):
            mine = [row for row in measured if _setting(row) == setting]
            columns = [
                column
                for column in _COLUMNS[part]
                if any(column[0] in row.figures for row in mine)
            ][:shown]
            lines = [
                [_name(row), *(_cell(row, key, form) for key, _, form in columns)]
                for row in mine
                if row.figures or row.error is not None
            ]
            if lines:
                headings = ["optimizer", *(heading for _, heading, _ in columns)]
                yield Sheet(f"{title}: {setting}", headings, lines)


def _setting(row: Row) -> str:
    return ", ".join((row.shapes, row.layout, row.dtype))


def _name(row: Row) -> str:
    return row.optimizer if row.error is None else f"{row.optimizer} (failed)"


def _cell(row: Row, key: str, form: str) -> str:
    return format(row.figures[key], form) if key in row.figures else ""


def _notes(rows: Sequence[Row]) -> list[str]:
    """Errors and notes, once each."""
    texts = (
        f"{row.optimizer}, {row.part}, {row.layout}, {row.dtype}: failed: {row.error}"
        if row.error is not None
        else f"{row.optimizer}: {row.note}"
        for row in rows
        if row.error is not None or row.note
    )
    return list(dict.fromkeys(texts))


def _markdown_table(sheet: Sheet) -> list[str]:
    rules = ["---" if name in _WORDS else "---:" for name in sheet.headings]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in sheet.lines)
    table = itertools.chain([sheet.headings, rules], escaped)
    return [f"| {' | '.join(line)} |" for line in table]
