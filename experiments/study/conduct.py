"""Does the runs of a study that are not done yet, a core each."""

import dataclasses
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from experiments.cores import visible_gpus
from experiments.study.arms import Arm
from experiments.study.harvest import RunError, delete_weights, harvest, log_of
from experiments.study.processes import Processes
from experiments.study.progress import StudyProgress
from experiments.study.records import Records
from experiments.study.runs import Run
from experiments.study.subject import Shared, Subject
from experiments.study.tuning import Budget, needed
from experiments.training.signals import StopSignals

# Seconds between two looks at whether Ctrl-C has been pressed.
_PATIENCE = 0.5


@dataclasses.dataclass
class Conductor:
    """Runs arms within a budget, until nothing is needed that could be had.

    Attributes:
        arms: What is compared.
        budget: What each of them gets.
        records: What is done; written after every run.
        subject: What runs train.
        shared: What all of them read.
        folder: Of the runs.
        workers: Runs at a time.
        failures: Why runs failed, but for those that diverged.
    """

    arms: Sequence[Arm]
    budget: Budget
    records: Records
    subject: Subject
    shared: Shared
    folder: Path
    workers: int
    failures: dict[Run, str] = dataclasses.field(default_factory=dict)

    def conduct(self, console: Console) -> signal.Signals | None:
        """Does the runs; returns the signal that cut this short, None if none did.

        Runs that are under way then save, and go on when the study is started again.
        """
        one_each = all(arm.config.devices == 1 for arm in self.arms)
        processes = Processes(self.subject.module, visible_gpus() if one_each else ())
        jobs: dict[Future[tuple[int, float]], tuple[Arm, Run]] = {}
        with (
            StopSignals() as signals,
            ThreadPoolExecutor(self.workers) as pool,
            StudyProgress(console, self.workers) as progress,
        ):
            try:
                while signals.caught is None:
                    for arm, run in self._wanted():
                        if (arm, run) not in jobs.values():
                            job = pool.submit(self._train, processes, arm, run)
                            jobs[job] = (arm, run)
                    progress.show(*self._counts())
                    if not jobs:
                        break
                    for job in wait(jobs, _PATIENCE, FIRST_COMPLETED).done:
                        if signals.caught is not None:
                            break
                        self._take(*jobs.pop(job), *job.result(), progress)
            finally:
                # Also where an error ends the study: nothing trains on unseen.
                processes.stop()
            for job, (arm, run) in jobs.items():
                code, seconds = job.result()
                if code == 0:  # the others were cut short and go on next time
                    self._take(arm, run, code, seconds, progress)
        return signals.caught

    def _wanted(self) -> list[tuple[Arm, Run]]:
        """Runs that are needed, not done and not failed."""
        results = self.records.results(self.subject)
        return [
            (arm, run)
            for arm in self.arms
            for run in needed(arm, self.budget, results)
            if run not in results and run not in self.failures
        ]

    def _counts(self) -> tuple[int, int]:
        """Runs done, and all that are known to be needed."""
        results = self.records.results(self.subject)
        done = total = 0
        for arm in self.arms:
            runs = needed(arm, self.budget, results)
            here = sum(run in results for run in runs)
            failed = any(run in self.failures for run in runs)
            # The seeds come after the tuning, unless that fails.
            more = here < len(runs) and not failed
            done += here
            total += max(len(runs), self.budget.runs) if more else len(runs)
        return done, total

    def _train(self, processes: Processes, arm: Arm, run: Run) -> tuple[int, float]:
        """Exit code and seconds of a run, which goes on where it was cut."""
        path = self.folder / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        code = processes.run(
            [
                *arm.arguments,
                *("--learning-rate", repr(run.learning_rate), "--seed", str(run.seed)),
                *(*self.shared.arguments, "--run-dir", str(path), "--auto-resume"),
            ],
            log_of(path),
        )
        return code, time.monotonic() - started

    def _take(
        self, arm: Arm, run: Run, code: int, seconds: float, progress: StudyProgress
    ) -> None:
        """Records a run that has ended."""
        path = self.folder / run.name
        try:
            record = harvest(arm, run, path, code, self.subject, self.shared)
        except RunError as error:
            self.failures[run] = str(error)
            progress.ended(run.name, f"failed: {error}", seconds)
            return
        self.records.add(record)
        delete_weights(path)
        progress.show(*self._counts())
        diverged = record.diverged is not None
        found = "diverged" if diverged else self.subject.shown(record)
        progress.ended(run.name, found, seconds)
