"""Recipes of fine-tuning by name, and their reading from the command line."""

import dataclasses
from collections.abc import Sequence

from experiments.configs.command_line import parse_with_preset
from experiments.configs.glue import (
    GlueConfig,
    GlueDataConfig,
    GlueModelConfig,
    GluePreset,
    GlueRunConfig,
)
from experiments.configs.optimizer import Method, OptimizerConfig, OptimizerName

PROGRAM = "python -m experiments.glue"


def preset(name: GluePreset, method: OptimizerName) -> GlueConfig:
    """Returns the settings of a recipe for a method."""
    match name:
        case "paper":
            run, model = GlueRunConfig(epochs=3, batch_size=32), GlueModelConfig()
            rates = {"learning_rate": 2e-5, "adam_learning_rate": None}
        case "galore":
            run, model = GlueRunConfig(epochs=30, batch_size=16), GlueModelConfig()
            rates = {"learning_rate": 3e-5, "adam_learning_rate": None}
        case "minilm":
            run = GlueRunConfig(epochs=3, batch_size=32)
            model = GlueModelConfig(name="sentence-transformers/all-MiniLM-L6-v2")
            rates = {"learning_rate": 1e-4, "adam_learning_rate": 1e-4}
    return GlueConfig(
        preset=name,
        run=run,
        model=model,
        data=GlueDataConfig(),
        optimization=OptimizerConfig(
            optimizer=method,
            others="freeze" if method == "lora" else "train",
            warmup_fraction=0.0,
            decay="linear",
            final_fraction=0.0,
            rank=4,
            update_proj_gap=500,
            scale=4.0,
            **rates,
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
    preset: GluePreset = "paper"
    optimizer: Method = "natural_galore"


def parse(args: Sequence[str] | None = None) -> GlueConfig:
    """Reads a config from command-line arguments (None: those of the process).

    A mistake in them is explained on stderr and ends the process with code 2.
    """
    return parse_with_preset(_Choice, preset, args, PROGRAM)
