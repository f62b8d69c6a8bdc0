"""Part growth: time and bytes of natural_galore by history, rank and layers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.bench.config import Bench
from experiments.bench.optimizers import natural_rank, peer_of_run
from experiments.bench.programs import Updates
from experiments.bench.records import Row, Task, timed_figures
from experiments.bench.shapes import matrices, random_gradients, random_params
from experiments.bench.timing import interleaved

# A few layers are enough where they are not what grows.
_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a sweep."""

    rank: int
    history: int
    layers: int


def tasks(bench: Bench) -> list[Task]:
    """Returns the work of the part: a task for each of three sweeps."""
    if "growth" not in bench.config.parts:
        return []
    return [
        Task(
            "growth",
            f"growth: {name}",
            functools.partial(measure, bench, name, points),
        )
        for name, points in _sweeps(bench).items()
        if points
    ]


def measure(bench: Bench, sweep: str, points: Mapping[int, Point]) -> list[Row]:
    """Times the steady update of stacked layers at every point, in turn.

    Args:
        bench: Settings.
        sweep: Name of what grows.
        points: By its value.

    Returns:
        A row a point, and one with the exponents: the slopes of straight lines through
        the logarithms of time and bytes by that of the value. Small values may cost
        the same whatever they are, so the exponent of the last two is there as well.
    """
    updates = {str(value): _updates(bench, point) for value, point in points.items()}
    timings = interleaved(
        {
            value: functools.partial(one.run, refresh=False, alone=True)
            for value, one in updates.items()
        },
        repeats=bench.config.slow_repeats,
        seed=bench.config.seed,
    )
    rows, measured = [], []
    for value, one in updates.items():
        if value in timings.errors:
            error = timings.errors[value]
            rows.append(_row(bench, f"{sweep} {value}", error=error))
            continue
        seconds = timings.seconds[value]
        figures = {"value": float(value)} | timed_figures("update", seconds, None)
        figures["state_mb"] = one.state_bytes / 1e6
        measured.append(figures)
        rows.append(_row(bench, f"{sweep} {value}", figures, seconds))
    if len(measured) > 1:
        rows.append(_row(bench, f"{sweep}, all", _exponents(measured)))
    return rows


def _exponents(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Exponents of a sweep: of all points, and of the last two."""

    def of(key: str, points: Sequence[Mapping[str, float]]) -> float:
        values = [figures["value"] for figures in points]
        return slope(values, [figures[key] for figures in points])

    return {
        "exponent_of_time": of("update_ms", measured),
        "last_exponent_of_time": of("update_ms", measured[-2:]),
        "exponent_of_bytes": of("state_mb", measured),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the exponent of the power of x that fits y best.

    Example:
        >>> round(slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _sweeps(bench: Bench) -> dict[str, dict[int, Point]]:
    config, run = bench.config, bench.run(bench.config.preset, "natural_galore")
    start = Point(natural_rank(bench, config.preset), run.optimization.history, _LAYERS)
    side = min(run.model.hidden_size, run.model.intermediate_size)
    ranks = [rank for rank in config.growth_ranks if rank <= side]
    grown = {
        "history": config.growth_histories,
        "rank": ranks,
        "layers": config.growth_layers,
    }
    return {
        name: {n: dataclasses.replace(start, **{name: n}) for n in values}
        for name, values in grown.items()
    }


def _updates(bench: Bench, point: Point) -> Updates:
    run = bench.run(bench.config.preset, "natural_galore", point.rank)
    settings = dataclasses.replace(run.optimization, history=point.history)
    run = dataclasses.replace(run, optimization=settings)
    shapes = matrices(run.model, "stacked", layers=point.layers)
    updates = Updates(
        peer_of_run("natural_galore", run),
        random_gradients(shapes, bench.config.seed),
        random_params(shapes, bench.config.seed + 1),
    )
    updates.compile(refresh=False)
    return updates


def _row(
    bench: Bench,
    name: str,
    figures: dict[str, float] | None = None,
    seconds: list[float] | None = None,
    error: str | None = None,
) -> Row:
    return Row(
        part="growth",
        shapes=bench.config.preset,
        optimizer=name,
        layout="stacked",
        figures=figures or {},
        samples={} if seconds is None else {"update": seconds},
        error=error,
    )
