"""Compares optimizers fairly: `python -m experiments.study --help`.

Every method gets the same number of learning rates on the first seed; its best one
then runs on the other seeds. Each run is `experiments.pretrain` in a process of its
own, kept in a folder of its own, so that a study that was stopped goes on where it
was. Results: `study.json`, `study.md` and `study.png` in the study's folder.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import ngalore_jax as ng
from experiments.assembly import parts_of
from experiments.configs import DEFAULT_LEARNING_RATE, OptimizerName, PresetName
from experiments.presets import parse
from experiments.training.folder import RunFolder
from experiments.training.metrics import read_metrics
from experiments.training.report import megabytes


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Tune every method's learning rate alike, then compare over seeds.

    Arguments that are not among these go to every run: --steps 100, --rank 4 ...

    Attributes:
        preset: Model and run settings, as of experiments.pretrain.
        methods: Optimizers to compare.
        factors: Learning rates tried, as factors on each method's default.
        seeds: The first one is tuned on; the median is over all of them.
        workers: Runs at a time, one CPU core each.
        study_dir: Folder of the study. None: runs/study-PRESET.
    """

    preset: PresetName = "demo"
    methods: tuple[OptimizerName, ...] = ("adamw", "muon", "galore", "natural_galore")
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = len(os.sched_getaffinity(0))
    study_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The study's folder, its default resolved."""
        return self.study_dir or Path("runs") / f"study-{self.preset}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of the study."""

    method: OptimizerName
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Folder name, which says what the run is."""
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


Curve = list[dict[str, Any]]  # a run's evaluations, rows of its metrics


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    config, extra = tyro.cli(
        StudyConfig,
        args=args,
        prog="python -m experiments.study",
        return_unknown_args=True,
    )
    console = Console(highlight=False)
    first, *others = config.seeds
    tuning = [
        Run(method, factor * DEFAULT_LEARNING_RATE[method], first)
        for method in config.methods
        for factor in config.factors
    ]
    total = len(tuning) + len(config.methods) * len(others)
    with Progress(console=console) as progress:
        task = progress.add_task("runs", total=total)

        def run_all(runs: list[Run]) -> dict[Run, Curve]:
            # Here, one after the other: tyro's parser is not for threads.
            commands = {run: _command(config, run, extra) for run in runs}
            with ThreadPoolExecutor(config.workers) as pool:
                jobs = {run: pool.submit(_train, *commands[run]) for run in runs}
                curves = {}
                for run, job in jobs.items():
                    curves[run] = job.result()
                    progress.advance(task)
                    progress.console.print(
                        f"{run.name}: {_final_loss(curves[run]):.4f}"
                    )
                return curves

        curves = run_all(tuning)
        best = {
            method: min(
                (run for run in tuning if run.method == method),
                key=lambda run: _final_loss(curves[run]),
            )
            for method in config.methods
        }
        curves |= run_all(
            [
                dataclasses.replace(run, seed=seed)
                for run in best.values()
                for seed in others
            ]
        )
    results = [
        _result(config, run, curves) | {"state_bytes": _state_bytes(config, run, extra)}
        for run in best.values()
    ]
    tried = [
        {**dataclasses.asdict(run), "validation_loss": _final_loss(curves[run])}
        for run in tuning
    ]
    path = _write(config, results, tried)
    console.print(path.read_text("utf-8"), markup=False)
    return 0


def _command(
    config: StudyConfig, run: Run, extra: Sequence[str]
) -> tuple[RunFolder, list[str]]:
    """Folder of a run and the arguments that make it.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    folder = RunFolder(config.folder / run.name)
    arguments = ["--preset", config.preset, "--optimizer", run.method]
    arguments += ["--learning-rate", str(run.learning_rate), "--seed", str(run.seed)]
    arguments += ["--run-dir", str(folder.path), *extra]
    settings = parse(arguments).as_dict()
    if folder.config.exists():
        kept = json.loads(folder.config.read_text("utf-8"))
        if any(kept.get(name) != value for name, value in settings.items()):
            raise ValueError(
                f"{folder.path} holds a run with other settings: give the study a "
                "folder of its own with --study-dir, or delete that one."
            )
        # A run that did not end is made again: it may lack a checkpoint.
        arguments.append("--overwrite")
    return folder, arguments


def _train(folder: RunFolder, arguments: Sequence[str]) -> Curve:
    """Evaluations of a run, which is made unless it is there already."""
    if not folder.report.exists():
        _pretrain(folder.path.name, arguments)
    rows = read_metrics(folder.metrics)
    return [row for row in rows if "validation_loss" in row]


def _pretrain(name: str, arguments: Sequence[str]) -> None:
    """Runs experiments.pretrain in a process with one core."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", *arguments],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}: {done.stderr}")


def _result(config: StudyConfig, best: Run, curves: dict[Run, Curve]) -> dict[str, Any]:
    """What the study has to say about a method."""
    runs = [dataclasses.replace(best, seed=seed) for seed in config.seeds]
    losses = [_final_loss(curves[run]) for run in runs]
    return {
        "method": best.method,
        "learning_rate": best.learning_rate,
        "losses": losses,
        "median": statistics.median(losses),
        "curve": [
            {
                "step": rows[0]["step"],
                "validation_loss": statistics.median(
                    r["validation_loss"] for r in rows
                ),
            }
            for rows in zip(*(curves[run] for run in runs), strict=True)
        ],
    }


def _state_bytes(config: StudyConfig, run: Run, extra: Sequence[str]) -> int:
    """Bytes of a run's optimizer state, from abstract parameters."""
    settings = parse(["--preset", config.preset, "--optimizer", run.method, *extra])
    parts = parts_of(settings)
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    return ng.state_bytes(jax.eval_shape(parts.optimizer.init, params))


def _write(
    config: StudyConfig, results: list[dict[str, Any]], tried: list[dict[str, Any]]
) -> Path:
    """Writes study.json, study.png and study.md, and returns the last one."""
    seeds = ", ".join(map(str, config.seeds))
    lines = [
        f"| method | best learning rate of {len(config.factors)} | validation loss, "
        f"median of seeds {seeds} | lowest to highest | optimizer state |",
        "|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: result["median"]):
        losses = result["losses"]
        lines.append(
            f"| {result['method']} | {result['learning_rate']:g} "
            f"| {result['median']:.4f} | {min(losses):.4f} to {max(losses):.4f} "
            f"| {megabytes(result['state_bytes'])} |"
        )
    facts = {"config": dataclasses.asdict(config), "results": results, "tried": tried}
    (config.folder / "study.json").write_text(
        json.dumps(facts, indent=2, default=str) + "\n", "utf-8"
    )
    _plot(results, config.folder / "study.png")
    path = config.folder / "study.md"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws each method's median validation loss by step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        curve = result["curve"]
        axes.plot(
            [point["step"] for point in curve],
            [point["validation_loss"] for point in curve],
            marker="o",
            label=f"{result['method']}, learning rate {result['learning_rate']:g}",
        )
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _final_loss(curve: Curve) -> float:
    return curve[-1]["validation_loss"]


if __name__ == "__main__":
    sys.exit(main())
