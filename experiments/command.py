"""The commands that train: one line of settings to an exit code, errors explained."""

import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from experiments.configs.run import TrainingConfig
from experiments.errors import may_pass, of_memory
from experiments.training import distributed
from experiments.training.folder import RunFolder
from experiments.training.loop import Outcome
from experiments.training.metrics import read_metrics
from experiments.training.record import first_line
from experiments.training.report import Report
from experiments.training.run import Job, Layout, run
from experiments.training.state import TrainState

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
PASSING = 75  # sysexits.h's "temporary failure"; the launch recipes start again


def explain_memory(error: jax.errors.JaxRuntimeError, remedy: str) -> int:
    """Says what to try where memory is too small, and returns the exit code.

    Raises:
        JaxRuntimeError: The one given, if it is another.
    """
    if not of_memory(error):
        raise error
    print(
        f"error: the devices' memory is too small ({first_line(error)}). Try {remedy}.",
        file=sys.stderr,
    )
    return 1


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that trains.

    Attributes:
        module: Its name, as of `python -m`.
        parse: Reads its arguments.
        prepare: Makes its job of a config; reads what is to be learnt.
        report: What a finished run has to say: of its config, folder, last state, rows
            of metrics and command line. One of the rows has an evaluation.
    """

    module: str
    parse: Callable[[Sequence[str]], TrainingConfig]
    prepare: Callable[[Any, RunFolder, Layout, Console], Job]
    report: Callable[
        [Any, RunFolder, TrainState, Sequence[dict[str, Any]], str], Report
    ]

    @property
    def program(self) -> str:
        """What a user types, in front of the arguments."""
        # Set by `uv run`, whose python it was.
        uv = "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
        return f"{uv}python -m {self.module}"

    def main(self, args: Sequence[str] | None = None) -> int:
        """Runs the command and returns its exit code.

        1: an error that a second start would meet again. 2: arguments that are wrong.
        75: an error that may pass (:func:`experiments.errors.may_pass`).
        """
        args = list(sys.argv[1:] if args is None else args)
        try:
            config = self.parse(args)
            if config.mesh.distributed:
                distributed.join()
            console = Console(highlight=False, quiet=not distributed.is_first())
            folder = RunFolder(config.run_dir, config.run.checkpoint_dir)
            outcome = self.train(config, folder, console)
            self._tell(outcome, config, folder, console, args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return PASSING if may_pass(error) else 1
        except jax.errors.JaxRuntimeError as error:
            if may_pass(error):
                traceback.print_exc()
                return PASSING
            return explain_memory(
                error,
                "more --microbatches, --model.remat layer, --model.dtype bfloat16 or a "
                "larger --mesh.fsdp",
            )
        except KeyboardInterrupt:
            print("Interrupted with nothing new to save.", file=sys.stderr)
            return INTERRUPTED
        return outcome.exit_code

    def train(
        self, config: TrainingConfig, folder: RunFolder, console: Console
    ) -> Outcome:
        """Trains in `folder`, from scratch or from its newest checkpoint."""
        return run(
            config,
            folder,
            lambda layout: self.prepare(config, folder, layout, console),
            console,
        )

    def _tell(
        self,
        outcome: Outcome,
        config: TrainingConfig,
        folder: RunFolder,
        console: Console,
        args: Sequence[str],
    ) -> None:
        """Reports a run that has ended, or says how to go on."""
        if outcome.stopped_by is not None:
            console.print(
                f"Saved step {int(outcome.state.step)} of {outcome.steps} in "
                f"{folder.checkpoints}. Go on with:\n  {self._resume_line(args)}",
                soft_wrap=True,
                markup=False,
            )
        elif distributed.is_first():
            rows = read_metrics(folder.metrics)
            if not any("validation_loss" in row for row in rows):
                console.print(
                    "The run is at its end; its metrics are not in this folder."
                )
                return
            report = self.report(config, folder, outcome.state, rows, self.line(args))
            path = report.write(folder.path, rows)
            report.show(console)
            console.print(f"Report: {path}", soft_wrap=True)

    def line(self, args: Sequence[str]) -> str:
        """Returns the command line with these arguments, ready to be pasted."""
        return f"{self.program} {shlex.join(args)}".strip()

    def _resume_line(self, args: Sequence[str]) -> str:
        dropped = ("--overwrite", "--resume", "--auto-resume")
        kept = [arg for arg in args if arg not in dropped]
        return self.line([*kept, "--resume"])
