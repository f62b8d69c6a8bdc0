"""Settings of a pretraining run.

The docstrings are the command's ``--help``. `experiments.presets` fills them in.
"""

import dataclasses
from typing import Any, Literal

import tyro

from experiments.configs.run import RunConfig, TrainingConfig, check_at_least
from experiments.configs.text import TextConfig
from experiments.models.llama_config import LlamaConfig

PresetName = Literal[
    "demo",
    "small",
    "llama_9m",
    "llama_20m",
    "llama_35m",
    "llama_40m",
    "llama_60m",
    "llama_71m",
    "llama_100m",
    "llama_130m",
    "llama_250m",
    "llama_350m",
    "llama_1b",
    "llama_3b",
    "llama_7b",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRunConfig(RunConfig):
    """How long, how often, and where it is kept.

    Attributes:
        steps: Optimizer steps.
        eval_every: Steps between evaluations on the validation text.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 10_000
    eval_every: int = 500
    checkpoint_every: int = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretrain a Llama on text with a chosen optimizer.

    Without arguments: a small model on the documentation of this Python installation,
    in minutes on two CPU cores. A preset sets the model's shape and fitting settings;
    whatever else is given takes their place.

    Attributes:
        run: How long, how often, and where it is kept.
        text: What is learnt.
        optimization: How it is learnt. "The matrices" are those of attention and MLP;
            embeddings, norms and output layer are on Adam whatever the method.
        model: Shape and number formats.
        mesh: Devices to spread over.
        preset: A small model for a quick look, or a published Llama size.
    """

    run: tyro.conf.OmitArgPrefixes[PretrainRunConfig]
    text: tyro.conf.OmitArgPrefixes[TextConfig]
    model: LlamaConfig
    preset: PresetName = "demo"

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        super().__post_init__()
        check_at_least(1, self.run, "steps", "eval_every", "checkpoint_every")
        check_at_least(1, self.text, "sequence_length", "validation_tokens")
        check_at_least(1, self.text, "streams", "shuffle_buffer")
        check_at_least(0, self.text, "workers")
        tensor, model = self.mesh.tensor, self.model
        if model.num_heads % tensor or model.kv_heads % tensor:
            raise ValueError(
                f"--mesh.tensor {tensor} must divide the {model.num_heads} query "
                f"heads and {model.kv_heads} key-value heads."
            )

    @property
    def name(self) -> str:
        """Preset and method."""
        return f"{self.preset}-{self.optimization.optimizer}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the config, defaults resolved, as JSON would give it back."""
        config = super().as_dict()
        config["text"]["sequences"] = self.text.treatment
        if self.optimization.optimizer == "relora":
            gap = self.optimization.restart_gap(self.run.steps)
            config["optimization"]["relora_gap"] = gap
        return config

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for one run to go on from another's state.

        The fingerprints of text and tokenizer are for the caller to add.
        """
        config = super().identity() | {"steps": self.run.steps}
        for name in (
            "data",
            "validation_data",
            "workers",
            "token_cache",
            "on_bad_input",
            "tokenizer",
        ):
            del config["text"][name]
        return config

    def decisive(self) -> dict[str, Any]:
        """Returns all that decides what comes of a run, but for its text."""
        return super().decisive() | {"eval_every": self.run.eval_every}
