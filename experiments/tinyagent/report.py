"""What a finished run of fine-tuning has to say."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.configs.tinyagent import TinyAgentConfig, ToolsConfig
from experiments.tinyagent.dataset import TESTING
from experiments.tinyagent.evaluation import MADE_UP
from experiments.training.folder import RunFolder
from experiments.training.report import Report, sizes
from experiments.training.state import TrainState


def make_report(
    config: TinyAgentConfig | ToolsConfig,
    folder: RunFolder,
    state: TrainState,
    rows: Sequence[dict[str, Any]],
    command: str,
) -> Report:
    """Gathers it from a run's rows, of which one has an evaluation."""
    evaluated = [row for row in rows if "validation_loss" in row]
    losses = [row["validation_loss"] for row in evaluated]
    # Null in JSON where it was not finite.
    at = min(
        range(len(losses)), key=lambda i: math.inf if losses[i] is None else losses[i]
    )
    best = evaluated[at]
    found = {name: best[name] for name in best if name.startswith("validation_")}
    unit = "tokens" if isinstance(config, TinyAgentConfig) else "examples"
    seconds, count = (sum(row[name] for row in rows) for name in ("seconds", unit))
    method = config.optimization.optimizer
    words = [method, f"learning rate {config.learning_rate:g}"]
    if method not in ("adamw", "muon"):
        words.insert(1, f"rank {config.optimization.rank}")
    facts = {
        "optimizer": ", ".join(words),
        "data": config.data.data or MADE_UP,
        "best epoch": f"{1 + at} of {config.run.epochs}",
        **{
            name.removeprefix("validation_"): (
                f"{math.nan if value is None else value:.4f}"
            )
            for name, value in found.items()
        },
        **sizes(state),
        "time": f"{seconds:,.0f} s ({count / seconds:,.0f} {unit} learnt a second)",
        "model": str(folder.model),
        "checkpoint": str(folder.checkpoints / str(best["step"])),
    }
    program, *_ = command.partition(" train" if unit == "tokens" else " tools")
    model = f"--model.name {shlex.quote(str(folder.model))}"
    if config.data.data is not None:
        data = Path(config.data.data)
        # Of one file all is learnt.
        tested = data.with_name(TESTING) if data.is_file() else data
        model += f" --data {shlex.quote(str(tested))}"
    request = '"Invite Alice to lunch tomorrow at noon"'
    if unit == "tokens":
        next_steps = (
            ("How well it plans", f"{program} evaluate {model}"),
            (
                "A request planned and carried out",
                f"{program} plan {request} "
                f"--model.name {shlex.quote(str(folder.model))}",
            ),
        )
    else:
        next_steps = (
            (
                "Prompts with the tools that it picks",
                f"{program} evaluate --model.name PLANNER "
                f"--retriever {shlex.quote(str(folder.model))}",
            ),
        )
    return Report(
        title=f"Plans with {method}" if unit == "tokens" else f"Tools with {method}",
        facts=facts,
        command=command,
        next_steps=next_steps,
        unit="nats per token" if unit == "tokens" else "nats per tool",
        scores=[
            name.removeprefix("validation_") for name in found if "loss" not in name
        ],
    )
