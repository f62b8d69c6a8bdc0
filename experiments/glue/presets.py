"""Recipes of fine-tuning by name, and their reading from the command line."""

import dataclasses
from collections.abc import Sequence

from experiments.configs.command_line import parse_with_preset
from experiments.configs.finetuning import FineTuningRunConfig
from experiments.configs.glue import (
    EncoderModelConfig,
    GlueConfig,
    GlueDataConfig,
    GluePreset,
)
from experiments.configs.optimizer import Method, OptimizerConfig, OptimizerName

PROGRAM = "python -m experiments.glue"

# Of the matrices, where 3e-4 is not it.
_MINILM_RATES: dict[OptimizerName, float] = {"adamw": 1e-4, "lora": 1e-3}


def preset(name: GluePreset, method: OptimizerName) -> GlueConfig:
    """Returns the settings of a recipe for a method."""
    run, model, data = FineTuningRunConfig(), EncoderModelConfig(), GlueDataConfig()
    optimization = OptimizerConfig(
        optimizer=method,
        learning_rate=2e-5,
        adam_learning_rate=None,
        others="freeze" if method == "lora" else "train",
        warmup_fraction=0.0,
        decay="linear",
        final_fraction=0.0,
        rank=4,
        update_proj_gap=500,
        scale=4.0,
    )
    match name:
        case "paper":
            pass
        case "galore":
            run = FineTuningRunConfig(epochs=30, batch_size=16)
            optimization = dataclasses.replace(optimization, learning_rate=3e-5)
        case "minilm":
            model = EncoderModelConfig(name="sentence-transformers/all-MiniLM-L6-v2")
            data = GlueDataConfig(max_length=64)
            optimization = dataclasses.replace(
                optimization,
                learning_rate=_MINILM_RATES.get(method, 3e-4),
                adam_learning_rate=1e-3,
                others="freeze",
                update_proj_gap=20,
            )
    return GlueConfig(
        preset=name, run=run, model=model, data=data, optimization=optimization
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What sets the defaults of everything else."""

    preset: GluePreset = "paper"
    optimizer: Method = "natural_galore"


def parse(args: Sequence[str] | None = None) -> GlueConfig:
    """Reads a config from command-line arguments (None: those of the process).

    A mistake in them is explained on stderr and ends the process with code 2.
    """
    return parse_with_preset(Choice, preset, args, PROGRAM)
