"""Kills a pretraining run again and again: `python -m experiments.kill_test --help`.

A tiny run is made twice: undisturbed, and killed by SIGKILL at random moments, as often
as asked, each time started again with `--auto-resume`. Both must end with the same
parameters, optimizer state and metrics, bit for bit.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from etils import epath
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import pretrain
from experiments.training.folder import RunFolder
from experiments.training.metrics import read_metrics

_STEPS_A_KILL = 6
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's name for a folder it is writing
_SPEEDS = ("tokens_per_second", "examples_per_second", "mfu")
_TIMINGS = ("seconds", *_SPEEDS)  # differ from run to run
_TINY = (
    "--sequence-length 16 --batch-size 8 --eval-every 10 --checkpoint-every 3 "
    "--rank 4 --update-proj-gap 4 --history 3 --validation-tokens 200 "
    "--model.vocab-size 300 --model.hidden-size 16 --model.intermediate-size 24 "
    "--model.num-heads 2 --model.num-layers 2"
)

Where = Literal["save", "training", "start"]


@dataclasses.dataclass(frozen=True)
class KillTestConfig:
    """Kill a run and see whether it ends as the undisturbed one does.

    Attributes:
        kills: How often. A third of them, at least, hits a save under way.
        seed: Seed of the moments.
        work_dir: Empty folder for the two runs. None: a temporary one.
        json: File for the results.
    """

    kills: int = 20
    seed: int = 0
    work_dir: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill."""

    where: Where
    saved: int  # step of the newest complete checkpoint; 0 without any
    lost: int  # steps done since that, by the process that was killed


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 if the runs are equal."""
    config = tyro.cli(KillTestConfig, args=args, prog="python -m experiments.kill_test")
    work = config.work_dir
    if work is not None and work.exists() and any(work.iterdir()):
        print(f"error: {work} is not empty: give another --work-dir.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        results = compare_runs(config, work or Path(temporary))
    if config.json is not None:
        config.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    table = Table("kill test", "")
    for name, value in results.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0 if results["equal"] else 1


def compare_runs(config: KillTestConfig, work: Path) -> dict[str, Any]:
    """Makes both runs in `work` and returns what the command prints."""
    steps = _STEPS_A_KILL * (config.kills + 2)
    write_texts(work / "texts")
    undisturbed, killed = (RunFolder(work / name) for name in ("undisturbed", "killed"))
    # Nothing may have asked JAX for a device before the last fork, nor may there be
    # threads, which progress that refreshes itself would have.
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("kills", total=config.kills)
        progress.refresh()
        life = Life(undisturbed, work, steps)
        life.watch(lambda: life.step > 0)
        usual = life.age
        life.end()
        kills: list[Kill] = []
        dice = random.Random(config.seed)
        while len(kills) < config.kills:
            # Spread over the run; the first comes before there is a checkpoint.
            life = Life(killed, work, steps)
            wait_for_a_moment(life, dice, kills, _STEPS_A_KILL * len(kills), usual)
            kills.append(life.kill())
            progress.advance(task)
            progress.refresh()
        Life(killed, work, steps).end()
    count = Counter(kill.where for kill in kills)
    return {
        "kills": len(kills),
        "of which in a save": count["save"],
        "of which between saves": count["training"],
        "of which in a start": count["start"],
        "of which before the first checkpoint": sum(not kill.saved for kill in kills),
        "steps": steps,
        "steps done twice": sum(kill.lost for kill in kills),
        "of which after one kill at most": max(kill.lost for kill in kills),
        "damaged checkpoints": len(list(killed.checkpoints.glob("damaged-*"))),
        "equal": equal(undisturbed, killed, steps),
    }


def wait_for_a_moment(
    life: "Life", dice: random.Random, kills: list[Kill], step: int, usual: float
) -> None:
    """Waits until a process should be killed.

    Args:
        life: The process.
        dice: Chooses the moment.
        kills: Those before. A third of all, at least, are meant to hit a save.
        step: The run has to come this far, or a little farther, unless the process is
            killed while it starts.
        usual: Seconds that a start takes.
    """
    if 3 * sum(kill.where == "save" for kill in kills) < len(kills):
        life.watch(lambda: life.step >= step - dice.randrange(3) and life.saving())
        time.sleep(dice.uniform(0, 0.02))
    elif kills and dice.random() < 0.5:
        moment = dice.uniform(0, usual)
        life.watch(lambda: life.age > moment or life.step > step)
    else:
        life.watch(lambda: life.step > step)
        time.sleep(dice.uniform(0, 0.03))


class Life:
    """One process of a run, forked from this one, which has imported everything."""

    def __init__(self, folder: RunFolder, work: Path, steps: int) -> None:
        """Starts it; the run goes on if it has been started before."""
        self._folder = folder
        self._log = work / "log.txt"
        self.saved_before = self.saved
        self._metrics_before = self._metrics_changed()
        self._born = time.time()
        sys.stdout.flush()
        self._process = os.fork()
        if self._process == 0:
            code = 70  # nothing of the parent's may run here, whatever happens
            try:
                code = run(folder, work, self._log, steps)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.time() - self._born

    @property
    def step(self) -> int:
        """Newest step that it has done, by its rows of metrics; 0 before the first."""
        if self._metrics_changed() == self._metrics_before:
            return 0
        rows = self._folder.metrics.read_bytes().count(b"\n")
        return rows if rows > self.saved_before else 0

    @property
    def saved(self) -> int:
        """Step of the newest complete checkpoint."""
        names = [path.name for path in _entries(self._folder)]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def saving(self) -> bool:
        """Whether it is writing a checkpoint."""
        # What an earlier one has left lies there until the first step.
        return self.step > 0 and any(
            _UNFINISHED in path.name for path in _entries(self._folder)
        )

    def watch(self, due: Callable[[], bool]) -> None:
        """Waits until `due`.

        Raises:
            RuntimeError: It ended before.
        """
        while not due():
            ended, status = os.waitpid(self._process, os.WNOHANG)
            if ended:
                raise RuntimeError(self._how_it_ended(status))
            time.sleep(0.001)

    def kill(self) -> Kill:
        """Kills it."""
        os.kill(self._process, signal.SIGKILL)
        _, status = os.waitpid(self._process, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(self._how_it_ended(status))
        where = "save" if self.saving() else "training" if self.step else "start"
        return Kill(where, self.saved, max(self.step - self.saved, 0))

    def end(self) -> None:
        """Waits for its end.

        Raises:
            RuntimeError: It failed.
        """
        _, status = os.waitpid(self._process, 0)
        if status:
            raise RuntimeError(self._how_it_ended(status))

    def _metrics_changed(self) -> int | None:
        path = self._folder.metrics
        return path.stat().st_mtime_ns if path.exists() else None

    def _how_it_ended(self, status: int) -> str:
        output = self._log.read_text("utf-8", errors="replace")
        return f"the run ended with status {status}; its output ends:\n{output[-2000:]}"


def run(folder: RunFolder, work: Path, log: Path, steps: int) -> int:
    """Runs the command in this process, its output in a file; returns its exit code."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    # Starts, not steps, would otherwise be most of the time.
    jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    paths = ["--data", f"{work}/texts/*.txt", "--run-dir", str(folder.path)]
    more = ["--steps", str(steps), "--auto-resume"]
    return pretrain.main([*paths, *_TINY.split(), *more])


def equal(one: RunFolder, other: RunFolder, step: int) -> bool:
    """Whether two runs end with the same state, position and metrics, bit for bit."""
    (arrays, record), (other_arrays, other_record) = load(one, step), load(other, step)
    return (
        rows(one) == rows(other)
        and record == other_record
        and len(arrays) == len(other_arrays)
        and all(
            x.dtype == y.dtype and x.tobytes() == y.tobytes()
            for x, y in zip(arrays, other_arrays, strict=True)
        )
    )


def load(folder: RunFolder, step: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Arrays of the state in a checkpoint, and what must be equal of its record."""
    with ocp.CheckpointManager(folder.checkpoints.resolve()) as manager:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore()
            ),
        )
    record = restored["record"]["content"]
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(restored["state"])]
    return arrays, {name: record[name] for name in ("positions", "fingerprint")}


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Rows of the metrics without what the clock says."""
    table = read_metrics(folder.metrics)
    return [{k: v for k, v in row.items() if k not in _TIMINGS} for row in table]


def write_texts(folder: Path) -> None:
    """Writes sixty documents over a small vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefgh", k=dice.randint(2, 6))) for _ in range(99)]
    for number in range(60):
        text = " ".join(dice.choices(words, k=150))
        (folder / f"{number}.txt").write_text(text, "utf-8")


def _entries(folder: RunFolder) -> list[epath.Path]:
    return list(folder.checkpoints.iterdir()) if folder.checkpoints.exists() else []


if __name__ == "__main__":
    sys.exit(main())
