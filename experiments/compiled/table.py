"""Costs of compiled programs as a table, on a terminal and in Markdown."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.compiled.program import Costs

Result = Mapping[str, Any]  # fields of Costs and "hbm", or "failed" with the reason
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
_HEADINGS = (
    "compiled in, s",
    "code, MB",
    "arguments, GB",
    "temporaries, GB",
    "of HBM",
    *(f"{kind}, GB" for kind in _COLLECTIVES),
    "other traffic, GB",
    "products, TFLOP",
    "products / model's",
)


def show(title: str, results: Mapping[str, Result], console: Console) -> None:
    """Prints one column a program."""
    table = Table(title=title, caption=_notes(results), caption_justify="left")
    table.add_column("a chip, a step")
    for name in results:
        table.add_column(name, justify="right")
    done = {name: r for name, r in results.items() if "failed" not in r}
    for index, heading in enumerate(_HEADINGS):
        cells = (_cells(done[name])[index] if name in done else "" for name in results)
        table.add_row(heading, *cells)
    console.print(table)
    for name, result in results.items():
        if name not in done:
            console.print(f"{name}: {result['failed']}", markup=False, soft_wrap=True)


def markdown(results: Mapping[str, Result]) -> str:
    """Returns one row a program."""
    lines = [
        f"| program | {' | '.join(_HEADINGS)} |",
        f"|---{'|---:' * len(_HEADINGS)}|",
    ]
    for name, result in results.items():
        if "failed" in result:
            cells = (result["failed"], *("",) * (len(_HEADINGS) - 1))
        else:
            cells = _cells(result)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    hbm = result["hbm"]
    costs = Costs(**{name: value for name, value in result.items() if name != "hbm"})
    rest = sum(size for kind, size in costs.sent.items() if kind not in _COLLECTIVES)
    return (
        f"{costs.compile_seconds:.0f}",
        f"{costs.code / 1e6:.0f}",
        f"{costs.arguments / 1e9:.2f}",
        f"{costs.temporaries / 1e9:.2f}",
        "?" if hbm is None else f"{costs.memory / hbm:.0%}",
        *(f"{costs.sent.get(kind, 0) / 1e9:.3f}" for kind in _COLLECTIVES),
        f"{rest / 1e9:.3f}",
        f"{costs.flops / 1e12:.2f}",
        f"{costs.flops / costs.model_flops:.2f}",
    )


def _notes(results: Mapping[str, Result]) -> str:
    notes = (
        "Traffic is what a chip sends, as rings do it; loop bodies count as often as "
        "they run."
    )
    unknown = [name for name, result in results.items() if result.get("unknown_loops")]
    if unknown:
        notes += (
            f" {', '.join(unknown)}: loops that do not say how often they run count "
            "once (a refresh's iterations: one where it starts from the old basis)."
        )
    return notes
