"""Complete settings by name, and their reading from the command line."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.configs.command_line import parse_with_preset
from experiments.configs.optimizer import Method, OptimizerConfig, OptimizerName
from experiments.configs.pretrain import PresetName, PretrainConfig, PretrainRunConfig
from experiments.configs.text import TextConfig
from experiments.models.llama import PRESETS as MODELS

# GaLore's rank, and steps. Published: 60M, 130M, 350M, 1B (arXiv 2403.03507, table 2)
# and 7B (its table 3); the ranks between are about a quarter of the hidden size.
_RANK_AND_STEPS: dict[str, tuple[int, int]] = {
    "demo": (32, 400),
    "small": (64, 400),
    "llama_9m": (32, 10_000),
    "llama_20m": (64, 10_000),
    "llama_35m": (96, 10_000),
    "llama_40m": (104, 10_000),
    "llama_60m": (128, 10_000),
    "llama_71m": (128, 10_000),
    "llama_100m": (160, 20_000),
    "llama_130m": (256, 20_000),
    "llama_250m": (192, 40_000),
    "llama_350m": (256, 60_000),
    "llama_1b": (512, 100_000),
    "llama_3b": (640, 120_000),
    "llama_7b": (1024, 150_000),
}
# Of GaLore's published run of 7B, which differs from its smaller ones.
_GALORE_7B = {"learning_rate": 5e-3, "update_proj_gap": 500, "clip_norm": 1.0}


def demo(optimizer: OptimizerName = "natural_galore") -> PretrainConfig:
    """``python -m experiments.pretrain``: minutes on two CPU cores, no download."""
    return _for_two_cores("demo", optimizer)


def small(optimizer: OptimizerName = "natural_galore") -> PretrainConfig:
    """A second scale: 5.5 M parameters in the matrices, the demo has 0.8 M."""
    return _for_two_cores("small", optimizer)


def _for_two_cores(name: PresetName, optimizer: OptimizerName) -> PretrainConfig:
    return PretrainConfig(
        preset=name,
        model=MODELS[name],
        text=TextConfig(sequence_length=128, validation_tokens=32_768),
        optimization=_optimization(
            name, optimizer, update_proj_gap=10, adam_learning_rate=8e-3
        ),
        run=PretrainRunConfig(
            steps=_RANK_AND_STEPS[name][1],
            batch_size=16,
            eval_every=50,
            checkpoint_every=100,
        ),
    )


def llama(
    name: PresetName, optimizer: OptimizerName = "natural_galore"
) -> PretrainConfig:
    """A published size: sequences of 256, 512 a batch.

    Meant for an accelerator and C4 with a given tokenizer; the defaults train on
    what this machine has.
    """
    return PretrainConfig(
        preset=name,
        model=MODELS[name],
        text=TextConfig(sequence_length=256),
        optimization=_optimization(name, optimizer, update_proj_gap=200),
        run=PretrainRunConfig(steps=_RANK_AND_STEPS[name][1], batch_size=512),
    )


def _optimization(
    name: PresetName, optimizer: OptimizerName, **settings: Any
) -> OptimizerConfig:
    """GaLore's rank, or what serves Natural GaLore and takes no more memory."""
    if (name, optimizer) == ("llama_7b", "galore"):
        settings |= _GALORE_7B
    config = OptimizerConfig(
        optimizer=optimizer, rank=_RANK_AND_STEPS[name][0], **settings
    )
    if optimizer != "natural_galore":
        return config
    return dataclasses.replace(
        config,
        rank=MODELS[name].hidden_size // 16,
        update_proj_gap=3,
        history=8,
        residual="orthogonal",
    )


def preset(
    name: PresetName, optimizer: OptimizerName = "natural_galore"
) -> PretrainConfig:
    """Returns the settings of a preset for an optimizer."""
    match name:
        case "demo":
            return demo(optimizer)
        case "small":
            return small(optimizer)
        case _:
            return llama(name, optimizer)


@dataclasses.dataclass(frozen=True)
class _Choice:
    preset: PresetName = "demo"
    optimizer: Method = "natural_galore"


def parse(args: Sequence[str] | None = None) -> PretrainConfig:
    """Reads a config from command-line arguments (None: those of the process).

    A mistake in them is explained on stderr and ends the process with code 2.
    """
    return parse_with_preset(_Choice, preset, args, "python -m experiments.pretrain")
