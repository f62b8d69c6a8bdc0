"""What is to be reached, and whether it was.

A target that spans several settings is reached if the worst of them is.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from experiments.bench.records import Row

# Fitted exponents of what is linear scatter by the noise of the times.
_LINEAR = 1.05
# Flat: seconds scatter, the number of instructions hardly does.
_FLAT_SECONDS, _FLAT_INSTRUCTIONS = 1.25, 1.05


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target and what came of it.

    Attributes:
        what: What is looked at.
        limit: What to reach, in words.
        value: The worst figure; None where nothing was measured.
        where: The setting it was found in.
        reached: Whether it is; None where nothing was measured.
    """

    what: str
    limit: str
    value: float | None = None
    where: str = ""
    reached: bool | None = None

    @property
    def word(self) -> str:
        """The verdict in words."""
        words = {None: "not measured", True: "reached", False: "not reached"}
        return words[self.reached]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Judges the rows of a bench by the targets of this project."""
    return [
        _worst(
            "steady update, galore / optax_galore",
            rows,
            _is("update", "galore"),
            "update_ratio",
            at_most=0.9,
        ),
        _worst(
            "steady update, natural_galore / optax_galore",
            rows,
            _is("update", "natural_galore"),
            "update_ratio",
            at_most=1.2,
        ),
        *(
            _worst(
                f"refresh, {name} / optax_galore",
                rows,
                _is("refresh", name),
                "refresh_ratio",
                at_most=0.1,
            )
            for name in ("galore", "natural_galore")
        ),
        _worst(
            "energy caught by later refreshes / exact SVD's, mean",
            rows,
            _is("energy", "default projector"),
            "captured_mean",
            at_least=0.97,
        ),
        *(
            _worst(
                f"training step, refresh spread, {name} / adamw",
                rows,
                _is("step", name),
                "amortised_ratio",
                at_most=limit,
            )
            for name, limit in (("galore", 1.0), ("natural_galore", 1.05))
        ),
        *_compile_verdicts(rows),
        _worst(
            "state bytes, natural_galore / galore",
            rows,
            _is("state", "natural_galore"),
            "state_ratio",
            at_most=1.15,
        ),
        *_memory_verdicts(rows),
        *(
            _worst(
                f"growth of {name} by history, rank, layers: exponent",
                rows,
                lambda row: row.part == "growth",
                f"exponent_of_{name}",
                at_most=_LINEAR,
            )
            for name in ("time", "bytes")
        ),
    ]


def _compile_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Deepest over shallowest, of stacked layers."""
    stacked = [row for row in rows if row.part == "compile" and row.layout == "stacked"]
    verdicts = []
    for figure, limit in (
        ("compile_s", _FLAT_SECONDS),
        ("instructions", _FLAT_INSTRUCTIONS),
    ):
        found = []
        for name in ("galore", "natural_galore"):
            mine = [row for row in stacked if row.optimizer == name]
            found += [row for row in mine if row.error is not None]
            depths = {row.figures["layers"]: row for row in mine if row.figures}
            if len(depths) > 1:
                first, last = depths[min(depths)], depths[max(depths)]
                ratio = last.figures[figure] / first.figures[figure]
                found.append(dataclasses.replace(last, figures={"ratio": ratio}))
        what = f"{figure} of stacked layers, most layers / fewest"
        verdicts.append(_worst(what, found, _any, "ratio", at_most=limit))
    return verdicts


def _memory_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of a training step on this device; compile_tpu tells of TPU slices."""
    memory = {row.optimizer: row for row in rows if row.part == "memory"}
    verdicts = []
    for other in ("adamw", "optax_galore"):
        found = []
        if mine := memory.get("natural_galore"):
            found = [mine]
            if mine.error is None and other in memory:
                reference = memory[other].figures.get("memory_mb", math.inf)
                ratio = mine.figures["memory_mb"] / reference
                found = [dataclasses.replace(mine, figures={"ratio": ratio})]
        what = f"memory of a training step, natural_galore / {other}"
        verdicts.append(_worst(what, found, _any, "ratio", at_most=1.0))
    return verdicts


def _any(row: Row) -> bool:
    return True


def _is(part: str, *names: str) -> Callable[[Row], bool]:
    return lambda row: row.part == part and row.optimizer in names


def _worst(
    what: str,
    rows: Sequence[Row],
    counts: Callable[[Row], bool],
    figure: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Verdict:
    """Judges the worst of a figure; exactly one bound is given.

    A row that failed is worse than any figure.
    """
    limit = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
    wanted = [row for row in rows if counts(row)]
    failed = [row for row in wanted if row.error is not None]
    if failed:
        where = f"{_where(failed[0])}: {failed[0].error}"
        return Verdict(what, limit, where=where, reached=False)
    found = [(row.figures[figure], row) for row in wanted if figure in row.figures]
    if not found:
        return Verdict(what, limit)
    values = [value for value, _ in found]
    # Either of the two gives the place of a NaN, which reaches nothing.
    index = int(np.argmin(values) if at_most is None else np.argmax(values))
    worst, row = found[index]
    reached = worst >= at_least if at_most is None else worst <= at_most
    return Verdict(what, limit, worst, _where(row), bool(reached))


def _where(row: Row) -> str:
    return " ".join(filter(None, (row.optimizer, row.shapes, row.layout, row.dtype)))
