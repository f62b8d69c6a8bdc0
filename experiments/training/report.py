"""report.md of a run, with its loss curve."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ngalore_jax as ng
from experiments.training.optimizer import adamw_state_bytes
from experiments.training.state import TrainState

_CURVE = "loss.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished run has to say.

    Attributes:
        title: Heading.
        facts: Name and value of each line of the table.
        command: Command that made the run.
        next_steps: What to try next: a reason and a command each.
        unit: Of the losses.
        scores: Names of validation metrics to draw beside the losses.
    """

    title: str
    facts: dict[str, str]
    command: str
    next_steps: Sequence[tuple[str, str]]
    unit: str = "nats per token"
    scores: Sequence[str] = ()

    def write(self, run_dir: Path, rows: Sequence[dict[str, Any]]) -> Path:
        """Writes report.md and loss.png into `run_dir` and returns the former."""
        figure = plot(rows, self.title, self.unit, self.scores)
        figure.savefig(run_dir / _CURVE, dpi=120)
        table = "\n".join(f"| {name} | {value} |" for name, value in self.facts.items())
        steps = "\n".join(f"* {why}: `{how}`" for why, how in self.next_steps)
        path = run_dir / "report.md"
        path.write_text(
            f"# {self.title}\n\n"
            f"Made by `{self.command}`; every setting is in `config.json`.\n\n"
            f"| | |\n|---|---|\n{table}\n\n"
            f"![{', '.join(['training and validation loss', *self.scores])} by step]"
            f"({_CURVE})\n\n"
            f"## What to try next\n\n{steps}\n",
            "utf-8",
        )
        return path

    def show(self, console: Console) -> None:
        """Prints the table and what to try next."""
        table = Table(title=self.title, show_header=False)
        for name, value in self.facts.items():
            table.add_row(name, value)
        console.print(table)
        console.print("What to try next:")
        for why, how in self.next_steps:
            # Unwrapped and without markup, so that it can be copied.
            console.print(f"  {why}:\n    {how}", soft_wrap=True, markup=False)


def plot(
    rows: Sequence[dict[str, Any]], title: str, unit: str, scores: Sequence[str] = ()
) -> Figure:
    """Draws training and validation loss by step, and beside them scores if any.

    Args:
        rows: Rows of metrics.jsonl.
        title: Heading.
        unit: Of the losses.
        scores: Names of validation metrics.
    """
    panels = 2 if scores else 1
    figure = Figure(figsize=(7 if panels == 1 else 11, 4), layout="constrained")
    axes, *others = figure.subplots(1, panels, squeeze=False)[0]
    axes.plot(
        [row["step"] for row in rows],
        [row["loss"] for row in rows],
        color="tab:blue",
        alpha=0.4,
        label="training",
    )
    evaluated = [row for row in rows if "validation_loss" in row]
    steps = [row["step"] for row in evaluated]

    def draw(where: Axes, name: str, **style: Any) -> None:
        values = [row[f"validation_{name}"] for row in evaluated]
        where.plot(steps, values, marker="o", **style)

    draw(axes, "loss", color="tab:orange", label="validation")
    axes.set(title=title, ylabel=f"loss ({unit})")
    for panel in others:
        for name in scores:
            draw(panel, name, label=name)
        panel.set(title="validation scores")
    for panel in (axes, *others):
        panel.set(xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def sizes(state: TrainState) -> dict[str, str]:
    """Returns the facts about the size of `state`, which may be abstract."""
    ours, adamw = ng.state_bytes(state.opt_state), adamw_state_bytes(state.params)
    return {
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}",
        "optimizer state": megabytes(ours),
        "of which": ", ".join(
            f"{part} {megabytes(size)}"
            for part, size in ng.state_report(state.opt_state).items()
            if size
        ),
        "AdamW's would be": f"{megabytes(adamw)} ({adamw / ours:.1f} times)",
    }


def megabytes(count: int) -> str:
    """Writes a number of bytes in MB (10^6 bytes)."""
    return f"{count / 1e6:.2f} MB"
