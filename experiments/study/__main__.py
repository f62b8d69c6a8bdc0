"""Compares optimizers fairly: `python -m experiments.study --help`.

Flow: arms -> runs that are needed and not recorded -> experiments.pretrain, a process
each -> study.json -> study.md and plots.
"""

import shlex
import sys
from collections.abc import Sequence

from experiments.study.config import PROGRAM, parse_args
from experiments.study.pretraining import PRETRAINING
from experiments.study.report import show_report
from experiments.study.session import Session, start


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    return start(make_session, args)


def make_session(args: Sequence[str]) -> Session:
    """Reads what a study is to be of."""
    config, arms = parse_args(args)
    return Session(
        "study",
        PRETRAINING,
        arms,
        config.budget,
        config.folder,
        config.workers,
        command=f"{PROGRAM} {shlex.join(args)}".strip(),
        report=show_report,
    )


if __name__ == "__main__":
    sys.exit(main())
