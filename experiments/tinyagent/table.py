"""A table of evaluations: `python -m experiments.tinyagent table FILES`.

Nothing is run: the JSON files of `evaluate` are all that is read.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console

from experiments.data.text_files import TextError
from experiments.study.plots import legend_of, looks
from experiments.tinyagent.evaluation import MEASURES, written
from experiments.tinyagent.presets import PROGRAM

_SHARES = [name for name in MEASURES if name != "distance"]


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Make table.md and table.png of evaluations.

    Attributes:
        files: JSON files of `evaluate`. Those of one method on the same data are its
            seeds.
        out: Folder to write into.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("runs/tinyagent")


Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    config = tyro.cli(TableConfig, args=args, prog=f"{PROGRAM} table")
    console = Console(highlight=False)
    try:
        tables = gather([_read(path) for path in config.files])
        config.out.mkdir(parents=True, exist_ok=True)
        text = markdown(tables)
        (config.out / "table.md").write_text(text, "utf-8")
        plot(tables).savefig(config.out / "table.png", dpi=130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Table: {config.out / 'table.md'}", markup=False, soft_wrap=True)
    return 0


def gather(found: Sequence[Mapping[str, Any]]) -> dict[str, Rows]:
    """Returns evaluations by data and method, the untrained model first.

    Raises:
        TextError: There is none, or two of one method are not seeds of one run.
    """
    if not found:
        raise TextError("no evaluation: give the JSON files of `evaluate`.")
    tables: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in sorted(found, key=_order):
        tables.setdefault(one["data"], {}).setdefault(_method(one), []).append(one)
    for rows in tables.values():
        for method, (first, *others) in rows.items():
            seen = [_seed(first)]
            for one in others:
                if _apart_from_seed(one) != _apart_from_seed(first):
                    raise TextError(
                        f"evaluations of {method!r} differ in more than the seed "
                        f"({first['command']}; {one['command']}): give them tables of "
                        "their own."
                    )
                if _seed(one) in seen:
                    raise TextError(f"two evaluations of {method!r} are of one seed.")
                seen.append(_seed(one))
    return tables


def markdown(tables: Mapping[str, Rows]) -> str:
    """Writes a table for each data, and what its figures are."""
    parts = ["# Function calling"]
    for data, rows in tables.items():
        heads = " | ".join(MEASURES)
        lines = [f"| method | {heads} |", "|---|" + "---:|" * len(MEASURES)]
        for method, some in rows.items():
            cells = " | ".join(_cell(name, some) for name in MEASURES)
            lines.append(f"| {method} | {cells} |")
        counts = sorted({one["count"] for some in rows.values() for one in some})
        requests = " or ".join(map(str, counts))
        trained = [one["trained"] for some in rows.values() for one in some]
        learnt = {one["data"] for one in trained if one is not None}
        told = [f"{requests} requests, {data}"]
        told += [f"trained on requests {one}" for one in sorted(learnt)]
        parts += [f"{'; '.join(told)}:", "\n".join(lines)]
    meanings = [f"* {name}: {what}" for name, what in MEASURES.items()]
    parts += [
        "Medians over seeds, lowest to highest in brackets.\n\n" + "\n".join(meanings),
        "![shares by method](table.png)",
        "\n".join(["Made by:", "", *(f"    {one}" for one in _commands(tables))]),
    ]
    return "\n\n".join(parts) + "\n"


def plot(tables: Mapping[str, Rows]) -> Figure:
    """Draws the shares of each method, a panel for each data."""
    figure = Figure(figsize=(9, 3.6 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    look = looks(list(dict.fromkeys(name for rows in tables.values() for name in rows)))
    for panel, (data, rows) in zip(panels, tables.items(), strict=True):
        for place, (method, some) in enumerate(rows.items()):
            for at, name in enumerate(_SHARES):
                values = [100 * one["scores"][name] for one in some]
                middle = statistics.median(values)
                panel.bar(
                    at + (place - (len(rows) - 1) / 2) * 0.8 / len(rows),
                    middle,
                    0.7 / len(rows),
                    yerr=[[middle - min(values)], [max(values) - middle]],
                    color=look[method].color,
                    label=method if at == 0 else None,
                )
        panel.set_xticks(range(len(_SHARES)), _SHARES)
        panel.set(title=data, ylabel="share (%)", ylim=(0, 105))
        panel.grid(axis="y", alpha=0.3)
    shown, place = legend_of(panels), {"loc": "outside upper center", "ncols": 2}
    figure.legend(shown.values(), shown.keys(), **place)
    return figure


def _cell(name: str, some: Sequence[Mapping[str, Any]]) -> str:
    values = [one["scores"][name] for one in some]
    middle = written(name, statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({written(name, min(values))} to {written(name, max(values))})"


def _commands(tables: Mapping[str, Rows]) -> list[str]:
    every = (one for rows in tables.values() for some in rows.values() for one in some)
    return list(dict.fromkeys(one["command"] for one in every))


def _method(one: Mapping[str, Any]) -> str:
    trained, settings = one["trained"], one["settings"]
    if trained is not None:
        method = trained["method"]
        rank = "" if method in ("adamw", "muon") else f" rank {trained['rank']},"
        return f"{method},{rank} lr {trained['learning_rate']:g}"
    told = "names of tools alone" if settings["brief"] else "tools and rules told"
    shown = settings["shown_examples"]
    return f"before fine-tuning, {told}{f', {shown} examples shown' if shown else ''}"


def _seed(one: Mapping[str, Any]) -> int | None:
    return None if one["trained"] is None else one["trained"]["seed"]


def _apart_from_seed(one: Mapping[str, Any]) -> dict[str, Any]:
    trained, asked = one["trained"], {**one["settings"], "count": one["count"]}
    if trained is None:
        return {**asked, "model": one["model"]}
    return {**asked, **trained, "seed": None}


def _order(one: Mapping[str, Any]) -> tuple[str, bool, str, int]:
    return one["data"], one["trained"] is not None, _method(one), _seed(one) or 0


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if not {"command", "data", "scores", "trained", "settings"} <= found.keys():
            raise ValueError("it lacks what `evaluate` writes")
    except (OSError, ValueError, AttributeError) as error:
        raise TextError(f"{path} is no evaluation: {error}.") from error
    return found
