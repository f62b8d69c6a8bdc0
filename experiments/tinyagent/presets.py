"""Recipes of fine-tuning by name, and their reading from the command line."""

import dataclasses
from collections.abc import Sequence

from experiments.configs.command_line import parse_with_preset
from experiments.configs.finetuning import FineTuningRunConfig
from experiments.configs.glue import GluePreset
from experiments.configs.optimizer import Method, OptimizerConfig, OptimizerName
from experiments.configs.tinyagent import (
    MadePromptConfig,
    TinyAgentConfig,
    TinyAgentDataConfig,
    TinyAgentModelConfig,
    TinyAgentPreset,
    ToolsConfig,
    ToolsDataConfig,
)
from experiments.glue import presets as glue_presets

PROGRAM = "python -m experiments.tinyagent"


def preset(name: TinyAgentPreset, method: OptimizerName) -> TinyAgentConfig:
    """Returns the settings of a recipe for a method."""
    # Prompts of thousands of tokens: few at a time.
    run = FineTuningRunConfig(rows_at_once=4)
    model = TinyAgentModelConfig(dtype="bfloat16", remat="layer")
    data = TinyAgentDataConfig()
    optimization = OptimizerConfig(
        optimizer=method,
        learning_rate=7e-5,
        adam_learning_rate=None,
        others="freeze" if method == "lora" else "train",
        warmup_fraction=0.1,
        decay="linear",
        final_fraction=0.0,
        rank=16,
        lora_alpha=16.0,
        update_proj_gap=200,
        scale=4.0,
    )
    match name:
        case "paper":
            pass
        case "smollm2":
            run = FineTuningRunConfig(epochs=1, batch_size=8)
            model = TinyAgentModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct")
            data = TinyAgentDataConfig(
                train_examples=1600,
                validation_examples=64,
                max_length=512,
                prompt=MadePromptConfig(brief=True, shown_examples=0),
            )
            rates = {"adamw": 1e-4, "lora": 1e-3}
            optimization = dataclasses.replace(
                optimization,
                learning_rate=rates.get(method, 3e-4),
                others="train" if method == "adamw" else "freeze",
                update_proj_gap=20,
            )
    return TinyAgentConfig(
        preset=name, run=run, model=model, data=data, optimization=optimization
    )


def tools_preset(name: GluePreset, method: OptimizerName) -> ToolsConfig:
    """Returns the settings of a recipe of GLUE, to learn the tools of requests."""
    recipe = glue_presets.preset(name, method)
    return ToolsConfig(
        preset=name,
        run=recipe.run,
        model=recipe.model,
        data=ToolsDataConfig(max_length=recipe.data.max_length),
        optimization=recipe.optimization,
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
    preset: TinyAgentPreset = "paper"
    optimizer: Method = "natural_galore"


def parse(args: Sequence[str] | None = None) -> TinyAgentConfig:
    """Reads a config from command-line arguments (None: those of the process).

    A mistake in them is explained on stderr and ends the process with code 2.
    """
    return parse_with_preset(_Choice, preset, args, f"{PROGRAM} train")


def parse_tools(args: Sequence[str] | None = None) -> ToolsConfig:
    """Reads the same of what tells tools."""
    return parse_with_preset(
        glue_presets.Choice, tools_preset, args, f"{PROGRAM} tools"
    )
