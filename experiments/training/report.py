"""report.md of a run, with its loss curve."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

_CURVE = "loss.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished run has to say.

    Attributes:
        title: Heading.
        facts: Name and value of each line of the table.
        command: Command that made the run.
        next_steps: What to try next: a reason and a command each.
    """

    title: str
    facts: dict[str, str]
    command: str
    next_steps: Sequence[tuple[str, str]]

    def write(self, run_dir: Path, rows: Sequence[dict[str, Any]]) -> Path:
        """Writes report.md and loss.png into `run_dir` and returns the former."""
        plot_losses(rows, self.title, run_dir / _CURVE)
        table = "\n".join(f"| {name} | {value} |" for name, value in self.facts.items())
        steps = "\n".join(f"* {why}: `{how}`" for why, how in self.next_steps)
        path = run_dir / "report.md"
        path.write_text(
            f"# {self.title}\n\n"
            f"Made by `{self.command}`; every setting is in `config.json`.\n\n"
            f"| | |\n|---|---|\n{table}\n\n"
            f"![training and validation loss by step]({_CURVE})\n\n"
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


def plot_losses(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws training and validation loss by step into a PNG file.

    Args:
        rows: Rows of metrics.jsonl.
        title: Heading.
        path: The file.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["step"] for row in rows],
        [row["loss"] for row in rows],
        color="tab:blue",
        alpha=0.4,
        label="training",
    )
    evaluated = [row for row in rows if "validation_loss" in row]
    axes.plot(
        [row["step"] for row in evaluated],
        [row["validation_loss"] for row in evaluated],
        color="tab:orange",
        marker="o",
        label="validation",
    )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def megabytes(count: int) -> str:
    """Writes a number of bytes in MB (10^6 bytes)."""
    return f"{count / 1e6:.2f} MB"
