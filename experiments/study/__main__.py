"""Compares optimizers fairly: `python -m experiments.study --help`.

Flow: arms -> runs that are needed and not recorded -> experiments.pretrain, a process
each -> study.json -> study.md and plots.
"""

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.study.config import PROGRAM, parse_args
from experiments.study.pretraining import PRETRAINING
from experiments.study.report import show_report
from experiments.study.session import Session


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        config, arms = parse_args(args)
        session = Session(
            "study",
            PRETRAINING,
            arms,
            config.budget,
            config.folder,
            config.workers,
            command=f"{PROGRAM} {shlex.join(args)}".strip(),
            report=show_report,
        )
        return session.carry_out(Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
