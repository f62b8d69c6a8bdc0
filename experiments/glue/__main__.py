"""Fine-tunes an encoder on GLUE: `python -m experiments.glue --help`.

Flow of a run on a task: config -> examples -> tokens -> batches -> the loop that
pretraining has -> metrics.jsonl -> scores after each epoch -> checkpoint -> predictions
and report. Of the table, `--task all`: arms -> runs that are needed and not recorded, a
process each -> study.json -> glue.md and its plot.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from experiments.command import Command
from experiments.glue.job import prepare
from experiments.glue.presets import parse
from experiments.glue.report import make_report
from experiments.glue.subject import GLUE
from experiments.glue.table import show
from experiments.glue.table_config import parse_args
from experiments.study.session import Session

COMMAND = Command("experiments.glue", parse, prepare, make_report)


@dataclasses.dataclass(frozen=True)
class _Choice:
    task: str = ""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    choice, _ = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    return make_table(args) if choice.task == "all" else COMMAND.main(args)


def make_table(args: Sequence[str]) -> int:
    """Does the runs of the table that are not done yet; returns the exit code."""
    try:
        config, arms = parse_args(args)
        session = Session(
            "glue",
            GLUE,
            arms,
            config.budget,
            config.folder,
            config.workers,
            command=f"python -m experiments.glue {shlex.join(args)}",
            report=show,
        )
        return session.carry_out(Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
