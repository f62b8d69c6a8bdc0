"""Plots of a study: an arm has the same colour in all of them."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from experiments.study.summary import Spread, Summary

# Told apart by people of any colour vision (Okabe and Ito 2008), their yellow left
# out, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
# Where a point's name may stand: right, left, above, below, further off.
_PLACES = ((9, 0), (-9, 0), (0, 13), (0, -13), (9, 13), (9, -13), (-9, 13), (-9, -13))


class Look(NamedTuple):
    """How an arm is drawn: the line and marker change where colours run out."""

    color: str
    line: str
    marker: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Returns the looks of arms, which do not depend on how well they do."""
    styles = zip(_LINES, _MARKERS, strict=True)
    every = (
        Look(color, line, marker)
        for line, marker in itertools.cycle(styles)
        for color in COLOURS
    )
    return dict(zip(sorted(arms), every, strict=False))


def legend_of(panels: Iterable[Axes]) -> dict[str, Any]:
    """Returns what a legend shows, by name, of all panels of a figure."""
    return {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }


def draw(summaries: Sequence[Summary], folder: Path) -> list[str]:
    """Draws a study's plots into a folder, and returns the files' names.

    Arms of which no run at the best rate converged are left out.
    """
    summaries = [one for one in summaries if math.isfinite(one.final.median)]
    if not summaries:
        return []
    figures = {
        "loss_tokens.png": _curves(summaries, "tokens", "million tokens", 1e6),
        "loss_seconds.png": _curves(
            summaries, "seconds", "minutes of training steps", 60
        ),
        "loss_state.png": _state(summaries),
        "memory.png": _memory(summaries),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
    return list(figures)


def _curves(
    summaries: Sequence[Summary], column: str, label: str, unit: float
) -> Figure:
    """Median loss with the band from lowest to highest, the end at a closer look."""
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    look = looks([summary.arm for summary in summaries])
    for summary in summaries:
        spreads = [summary.losses(step) for step in summary.steps]
        x = [value / unit for value in summary.column(column)]
        color, line, _ = look[summary.arm]
        band(axes, x, spreads, color)
        medians = [spread.median for spread in spreads]
        name = f"{summary.arm}  {summary.final.median:.3f}"
        axes.plot(x, medians, line, color=color, linewidth=1.8, label=name)
    axes.set(xlabel=label, ylabel="validation loss (nats per token)")
    axes.set_ylim(*_later(summaries))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="median at the end", frameon=False)
    return figure


def band(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], color: str) -> None:
    """Fills from the lowest to the highest."""
    axes.fill_between(
        x,
        [spread.low for spread in spreads],
        [spread.high for spread in spreads],
        color=color,
        alpha=0.18,
        linewidth=0,
    )


def _later(summaries: Sequence[Summary]) -> tuple[float, float]:
    """Limits of losses after a third of the steps: before, all curves look alike."""
    shown = [
        loss
        for summary in summaries
        for step in summary.steps
        if step >= summary.steps[-1] / 3
        for loss in (summary.losses(step).low, summary.losses(step).median)
        if math.isfinite(loss)
    ]
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def _state(summaries: Sequence[Summary]) -> Figure:
    """Final loss by the state that a method needs for the matrices."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    look = looks([summary.arm for summary in summaries])
    points = []
    for summary in summaries:
        color, _, marker = look[summary.arm]
        x = summary.records[0].state_bytes["matrices"] / 1e6
        low, median, high = summary.final.low, summary.final.median, summary.final.high
        errors = [[median - low], [high - median if math.isfinite(high) else 0.0]]
        axes.errorbar(
            x, median, errors, fmt=marker, color=color, markersize=7, capsize=3
        )
        points.append((summary.arm, x, median, color))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.18, y=0.12)
    axes.set(
        xlabel="optimizer state of the matrices (MB)",
        ylabel="validation loss at the end (nats per token)",
    )
    axes.grid(alpha=0.3)
    _label(axes, points)
    return figure


def _memory(summaries: Sequence[Summary]) -> Figure:
    """State of the matrices, a bar an arm, the arm of the lowest loss on top."""
    figure = Figure(figsize=(8.5, 0.9 + 0.3 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    look = looks([summary.arm for summary in summaries])
    bars = axes.barh(
        [f"{summary.arm}  {summary.final.median:.3f}" for summary in summaries],
        [summary.records[0].state_bytes["matrices"] / 1e6 for summary in summaries],
        color=[look[summary.arm].color for summary in summaries],
    )
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="optimizer state of the matrices (MB); beside the name, the loss")
    return figure


def _label(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes names beside points, where they cover no point and no other name."""
    figure = axes.get_figure()
    figure.draw_without_rendering()
    taken = [
        axes.transData.transform((x, y)) + shift
        for _, x, y, _ in points
        for shift in itertools.product((-7, 0, 7), (-7, 0, 7))
    ]
    boxes = []
    for name, x, y, color in points:
        text = axes.annotate(
            name, (x, y), _PLACES[0], textcoords="offset points", color=color
        )
        for place in _PLACES:
            text.xyann = place
            text.set_va("center")
            text.set_ha(
                "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            on_points = any(box.contains(*spot) for spot in taken)
            on_names = any(box.overlaps(other) for other in boxes)
            if inside and not on_points and not on_names:
                break
        boxes.append(box)
