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

from experiments.command import Command
from experiments.glue.job import prepare
from experiments.glue.presets import PROGRAM, parse
from experiments.glue.report import make_report
from experiments.glue.subject import GLUE
from experiments.glue.table import show
from experiments.glue.table_config import parse_args
from experiments.study.session import Session, start

COMMAND = Command("experiments.glue", parse, prepare, make_report)


@dataclasses.dataclass(frozen=True)
class _Choice:
    task: str = ""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    choice, _ = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    return start(make_session, args) if choice.task == "all" else COMMAND.main(args)


def make_session(args: Sequence[str]) -> Session:
    """Reads what the table is to be of."""
    config, arms = parse_args(args)
    return Session(
        "glue",
        GLUE,
        arms,
        config.budget,
        config.folder,
        config.workers,
        command=f"{PROGRAM} {shlex.join(args)}",
        report=show,
    )


if __name__ == "__main__":
    sys.exit(main())
