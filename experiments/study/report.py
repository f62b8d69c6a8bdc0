"""Makes tables and plots again: `python -m experiments.study.report FOLDER ...`.

Nothing is run: study.json in each folder is all that is read. For studies that were
edited, merged or checked out.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from experiments.study.plots import draw
from experiments.study.records import Records
from experiments.study.sensitivity_report import sensitivity_markdown
from experiments.study.summary import summarize
from experiments.study.table import study_markdown

PROGRAM = "python -m experiments.study.report"
_KINDS = ("study", "sensitivity")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Make table and plots of studies again, from their study.json alone.

    Attributes:
        folders: Folders of studies, shown one below the other.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.folders:
            raise ValueError("name the folders of one or more studies.")


def show_report(records: Records, console: Console) -> None:
    """Writes table and plots beside the records and prints the table."""
    folder = records.path.parent
    summaries = summarize(records)
    if not summaries:
        console.print("Nothing to report: no run on the first seed has ended.")
        return
    if records.kind == "sensitivity":
        text = sensitivity_markdown(records, summaries, folder)
    else:
        text = study_markdown(records, summaries, draw(summaries, folder))
    path = folder / f"{records.kind}.md"
    path.write_text(text, "utf-8")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Report: {path}", markup=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    config = tyro.cli(ReportConfig, args=args, prog=PROGRAM)
    console = Console(highlight=False)
    try:
        for folder in config.folders:
            show_report(Records.read(folder / "study.json", _KINDS), console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
