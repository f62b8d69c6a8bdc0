"""Plots of a bench, a PNG a part."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench.records import Row


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draws what was measured into a folder, and returns the files' names."""
    drawers: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "update": lambda rows: _ratios(rows, "update", "/ optax_galore, steady update"),
        "refresh": lambda rows: _ratios(rows, "refresh", "/ optax_galore, refresh"),
        "step": lambda rows: _ratios(rows, "amortised", "/ adamw, training step"),
        "compile": _compile,
        "energy": _energy,
        "growth": _growth,
    }
    names = []
    for part, drawer in drawers.items():
        figure = drawer([row for row in rows if row.part == part and row.error is None])
        if figure is not None:
            figure.savefig(folder / f"{part}.png", dpi=120)
            names.append(f"{part}.png")
    return names


def _ratios(rows: Sequence[Row], figure_name: str, label: str) -> Figure | None:
    """Ratios with their quartiles, a panel a setting."""
    rows = [row for row in rows if f"{figure_name}_ratio" in row.figures]
    settings = list(dict.fromkeys((row.shapes, row.layout, row.dtype) for row in rows))
    if not settings:
        return None
    figure = Figure(figsize=(4 * len(settings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        mine = [row for row in rows if (row.shapes, row.layout, row.dtype) == setting]
        middle, low, high = (
            [row.figures[f"{figure_name}_ratio{end}"] for row in mine]
            for end in ("", "_low", "_high")
        )
        errors = [
            [m - at for m, at in zip(middle, low, strict=True)],
            [at - m for m, at in zip(middle, high, strict=True)],
        ]
        names = [row.optimizer for row in mine]
        axes.errorbar(middle, names, xerr=errors, fmt="o", capsize=3)
        for ratio, name in zip(middle, names, strict=True):
            axes.annotate(
                f"{ratio:.2f}", (ratio, name), (0, 7), textcoords="offset points"
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.15)
        axes.invert_yaxis()
        axes.set(title=", ".join(setting[1:]), xlabel=f"{setting[0]}: {label}")
    return figure


def _compile(rows: Sequence[Row]) -> Figure | None:
    if not rows:
        return None
    figure, axes = _panel("layers", "seconds to compile the update")
    _logarithmic(axes)
    for key in dict.fromkeys((row.optimizer, row.layout) for row in rows):
        mine = [row.figures for row in rows if (row.optimizer, row.layout) == key]
        axes.plot(
            [figures["layers"] for figures in mine],
            [figures["compile_s"] for figures in mine],
            marker="o",
            linestyle="-" if key[1] == "stacked" else "--",
            label=", ".join(key),
        )
    axes.legend()
    return figure


def _energy(rows: Sequence[Row]) -> Figure | None:
    if not rows:
        return None
    figure, axes = _panel("refresh", "energy caught / exact SVD's, mean of matrices")
    for row in rows:
        axes.plot(
            row.samples["mean over matrices"],
            marker="o",
            label=f"{row.optimizer}, rank {row.figures['rank']:.0f}",
        )
    axes.axhline(0.97, color="black", linewidth=1)
    axes.legend()
    return figure


def _growth(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if "value" in row.figures]
    sweeps = list(dict.fromkeys(_sweep(row) for row in rows))
    if not sweeps:
        return None
    figure = Figure(figsize=(4 * len(sweeps), 6), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for column, sweep in enumerate(sweeps):
        mine = [row.figures for row in rows if _sweep(row) == sweep]
        values = [figures["value"] for figures in mine]
        for axes, key, label in (
            (panels[0][column], "update_ms", "steady update, ms"),
            (panels[1][column], "state_mb", "state, MB"),
        ):
            results = [figures[key] for figures in mine]
            axes.plot(values, results, marker="o", label="measured")
            linear = [results[0] * value / values[0] for value in values]
            axes.plot(values, linear, linestyle=":", color="black", label="linear")
            _logarithmic(axes)
            axes.set(xlabel=sweep, ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend()
    return figure


def _sweep(row: Row) -> str:
    """What grows: "rank 32" -> "rank"."""
    return row.optimizer.split()[0]


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
