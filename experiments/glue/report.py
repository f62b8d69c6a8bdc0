"""What a finished run on a task of GLUE has to say."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from experiments.configs.glue import GlueConfig
from experiments.data.glue import TASKS
from experiments.glue.subject import best_epoch, of_validation
from experiments.training.folder import RunFolder
from experiments.training.report import Report, sizes
from experiments.training.state import TrainState


def make_report(
    config: GlueConfig,
    folder: RunFolder,
    state: TrainState,
    rows: Sequence[dict[str, Any]],
    command: str,
) -> Report:
    """Gathers it from a run's rows, of which one has an evaluation."""
    task, method = TASKS[config.data.task], config.optimization.optimizer
    score = f"validation_{task.metrics[0]}"
    evaluated = [row for row in rows if score in row]
    at = best_epoch([row[score] for row in evaluated])
    best = evaluated[at]
    found = of_validation(best)
    seconds = sum(row["seconds"] for row in rows)
    examples = sum(row["examples"] for row in rows)
    words = [method, f"learning rate {config.learning_rate:g}"]
    if method not in ("adamw", "muon"):
        words.insert(1, f"rank {config.optimization.rank}")
    facts = {
        "optimizer": ", ".join(words),
        "best epoch": f"{1 + at} of {config.run.epochs}",
        **{
            # Null in JSON where it was not finite.
            name: f"{math.nan if value is None else value:.4f}"
            for name, value in found.items()
        },
        **sizes(state),
        "time": f"{seconds:,.0f} s ({examples / seconds:,.0f} examples/s)",
        "test predictions": ", ".join(
            str(folder.predictions / split.submission) for split in task.test
        ),
        "model": str(folder.model),
        "checkpoint": str(folder.checkpoints / str(best["step"])),
    }
    other = "adamw" if method != "adamw" else "natural_galore"
    program, *_ = command.partition(" --")
    here = ["--preset", config.preset, "--model.name", config.model.name]
    if config.data.data is not None:
        here += ["--data", str(config.data.data)]
    given = shlex.join(here)
    return Report(
        title=f"{task.folder} with {method}",
        facts=facts,
        command=command,
        next_steps=(
            (
                f"The same with {other}, to compare",
                f"{program} --task {config.data.task} --method {other} {given}",
            ),
            ("The table of all tasks and methods", f"{program} --task all {given}"),
        ),
        unit="nats per example" if task.classes else "squared error",
        scores=[name for name in found if "loss" not in name],
    )
