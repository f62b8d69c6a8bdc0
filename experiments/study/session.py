"""One call of a command that trains: text, records, runs, report."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console

from experiments.command import INTERRUPTED
from experiments.files import alone
from experiments.study.arms import Arm
from experiments.study.conduct import Conductor
from experiments.study.records import Records
from experiments.study.subject import Subject
from experiments.study.tuning import Budget


def start(make: Callable[[Sequence[str]], "Session"], args: Sequence[str]) -> int:
    """Carries out what a command line asks for; returns the shell's exit code.

    What `make`, which reads the arguments, or the session complains of is printed.
    """
    try:
        return make(args).carry_out(Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@dataclasses.dataclass(frozen=True)
class Session:
    """What a command line asks for.

    Attributes:
        kind: As of `Records`.
        subject: What runs train.
        arms: What is compared.
        budget: What each of them gets.
        folder: Where study.json lies, or will.
        workers: Runs at a time.
        command: The command line.
        report: Shows the records.

    Raises:
        ValueError: No workers.
    """

    kind: str
    subject: Subject
    arms: Sequence[Arm]
    budget: Budget
    folder: Path
    workers: int
    command: str
    report: Callable[[Records, Console], None]

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1.")

    def carry_out(self, console: Console) -> int:
        """Does what is not done yet, reports, and returns the shell's exit code.

        Raises:
            OSError: The folder cannot be written, another command is at work in it, or
                there is no such text.
            ValueError: The text cannot be read, or the folder's study.json is another
                study's.
        """
        with alone(self.folder / "runs", "give another --study-dir"):
            return self._work(console)

    def _work(self, console: Console) -> int:
        # Here shapes are looked at, no more: an accelerator is for the runs alone.
        jax.config.update("jax_platforms", "cpu")
        runs = self.folder / "runs"
        records = self._records()
        try:
            configs = [arm.config for arm in self.arms]
            shared = self.subject.prepare(configs, runs / "text", console)
        except KeyboardInterrupt:
            return INTERRUPTED
        records.check(self.arms, self.subject, shared)
        conductor = Conductor(
            self.arms,
            self.budget,
            records,
            self.subject,
            shared,
            runs,
            self.workers,
        )
        stopped_by = conductor.conduct(console)
        if records.runs:
            records.write()
            self.report(records, console)
        for run, message in conductor.failures.items():
            print(f"error: {run.name}: {message}", file=sys.stderr)
        if stopped_by is not None:
            console.print("Saved. Start the same command again to go on.")
            return 128 + stopped_by
        return 1 if conductor.failures else 0

    def _records(self) -> Records:
        """The folder's records, which are told of this command."""
        path = self.folder / "study.json"
        if path.exists():
            records = Records.read(path, (self.kind,))
        else:
            records = Records(path, self.kind)
        first, *_ = seeds = self.budget.seeds
        if records.seeds and records.seeds[0] != first:
            raise ValueError(
                f"{path} is tuned on seed {records.seeds[0]}, not {first}: give that "
                "one first, or another --study-dir."
            )
        records.seeds += [seed for seed in seeds if seed not in records.seeds]
        if self.command not in records.commands:
            records.commands.append(self.command)
        return records
