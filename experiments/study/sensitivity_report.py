"""sensitivity.md: a table and small plots, one a setting."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.study.plots import COLOURS, band
from experiments.study.records import Records
from experiments.study.summary import Summary
from experiments.study.table import loss, low_to_high, provenance
from experiments.training.report import megabytes

_PICTURE = "sensitivity.png"
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Panel:
    """What came of the values of one setting.

    Attributes:
        setting: Its name.
        default: Its value where another setting is varied.
        results: By value, in rising order.
    """

    setting: str
    default: Any
    results: dict[Any, Summary]


def sensitivity_markdown(
    records: Records, summaries: Sequence[Summary], folder: Path
) -> str:
    """Draws the plot into a folder and writes the page that shows it.

    Raises:
        ValueError: The method was not run at its defaults.
    """
    base = [summary for summary in summaries if "=" not in summary.arm]
    if len(base) != 1:
        raise ValueError(
            f"{records.path} needs runs of a method at its defaults, the same one for "
            "all settings: start `python -m experiments.study.sensitivity` again."
        )
    panels = _panels(base[0], summaries)
    _draw(base[0], panels).savefig(folder / _PICTURE, dpi=130)
    return "\n\n".join(
        [
            f"# Sensitivity of {base[0].arm}",
            "\n".join(_table(panels)),
            f"One setting at a time around the defaults (bold). Learning rate "
            f"{base[0].learning_rate:g}, held for all: a setting that acts like a step "
            "size, such as scale, would do best elsewhere at another rate.",
            *provenance(records, base[0]),
            f"![loss by setting]({_PICTURE})\n",
        ]
    )


def _panels(base: Summary, summaries: Sequence[Summary]) -> list[Panel]:
    by_setting: dict[str, dict[Any, Summary]] = {}
    for summary in summaries:
        setting, varied, _ = summary.arm.partition("=")
        if varied:
            results = by_setting.setdefault(setting, {})
            results[_value(summary, setting)] = summary
    panels = []
    for setting, results in sorted(by_setting.items()):
        default = _value(base, setting)
        results[default] = base
        in_order = sorted(results, key=_rank)
        panels.append(
            Panel(setting, default, {value: results[value] for value in in_order})
        )
    return panels


def _value(summary: Summary, setting: str) -> Any:
    return summary.records[0].settings["optimization"][setting]


def _rank(value: Any) -> tuple[int, Any]:
    """None, then numbers, then words."""
    if value is None:
        return 0, 0
    return (2, value) if isinstance(value, str) else (1, value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _table(panels: Sequence[Panel]) -> list[str]:
    lines = [
        "| setting | value | loss at the end | seeds | lowest to highest | state "
        "| of matrices | a run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for panel in panels:
        for value, summary in panel.results.items():
            mark = "**" if value == panel.default else ""
            state = summary.records[0].state_bytes
            lines.append(
                f"| {panel.setting} | {mark}{_text(value)}{mark} "
                f"| {loss(summary.final.median)} | {len(summary.records)} "
                f"| {low_to_high(summary.final)} "
                f"| {megabytes(state['all'])} | {megabytes(state['matrices'])} "
                f"| {summary.seconds:,.0f} s |"
            )
    return lines


def _draw(base: Summary, panels: Sequence[Panel]) -> Figure:
    """Medians, with what lies from lowest to highest; all panels share their losses."""
    columns = max(1, min(_COLUMNS, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel)
        axes.axhline(base.final.median, color="black", linestyle=":", linewidth=1)
    figure.supylabel("validation loss at the end (nats per token)", fontsize="medium")
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Values evenly spaced, for they are chosen so; words have no line between them."""
    x = list(range(len(panel.results)))
    spreads = [summary.final for summary in panel.results.values()]
    medians = [spread.median for spread in spreads]
    words = any(isinstance(value, str | bool) for value in panel.results)
    if words:
        lows = [spread.low for spread in spreads]
        highs = [spread.high for spread in spreads]
        axes.vlines(x, lows, highs, color=COLOURS[0], alpha=0.4, linewidth=6)
        line = "none"
    else:
        band(axes, x, spreads, COLOURS[0])
        line = "-"
    axes.plot(x, medians, linestyle=line, marker="o", color=COLOURS[0])
    at = list(panel.results).index(panel.default)
    axes.plot(at, medians[at], marker="o", color=COLOURS[1], markersize=9)
    for place, median in zip(x, medians, strict=True):
        if math.isinf(median):
            axes.annotate(
                "diverged",
                (place, 0.97),
                xycoords=("data", "axes fraction"),
                rotation="vertical",
                ha="center",
                va="top",
            )
    names = [_text(value) for value in panel.results]
    axes.set_xticks(x, names, rotation=15 if words else 0)  # words would overlap
    axes.set_xlim(-0.4, len(x) - 0.6)
    axes.set_xlabel(panel.setting)
    axes.grid(alpha=0.3)
