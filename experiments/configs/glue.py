"""Settings of a fine-tuning run on a task of GLUE.

The docstrings are the command's ``--help``. `experiments.glue.presets` fills them in.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.configs.finetuning import FineTuningConfig, FineTuningRunConfig
from experiments.configs.run import check_at_least
from experiments.data.glue import TaskName
from experiments.models.formats import Dtype, Remat

GluePreset = Literal["paper", "galore", "minilm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueDataConfig:
    """What is learnt.

    Attributes:
        task: A task of GLUE; "all" makes the table of methods and tasks instead, whose
            settings `--task all --help` shows.
        data: Folder in GLUE's official layout, MRPC/train.tsv and so on. None: the
            Hugging Face hub's.
        train_examples: The first so many training examples. None: all.
        max_length: Tokens that an example is cut to, the longer of two texts first.
        on_bad_input: Whether a malformed row of the training examples stops the run, or
            is skipped and counted. QQP's published train.tsv has some.
    """

    task: TaskName = "mrpc"
    data: Path | None = None
    train_examples: int | None = None
    max_length: int = 512
    on_bad_input: Literal["error", "skip"] = "error"


@dataclasses.dataclass(frozen=True)
class EncoderModelConfig:
    """What is fine-tuned.

    Attributes:
        name: Folder with config.json, model.safetensors and tokenizer.json of a BERT
            or RoBERTa, or its name on the Hugging Face hub.
        dropout: Share of activations dropped while training. None: as its config says.
        param_dtype: Format that parameters are stored in.
        dtype: Format of activations and matrix products.
        remat: What of each layer the backward pass recomputes, to save memory.
    """

    name: str = "FacebookAI/roberta-base"
    dropout: float | None = None
    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueConfig(FineTuningConfig):
    """Fine-tune an encoder on a task of GLUE with a chosen optimizer.

    A classification (or regression) head is put onto the first token. On RoBERTa-base
    and MRPC from the hub, as published:

    python -m experiments.glue --task mrpc --method natural_galore --rank 4

    Attributes:
        run: How long, and where it is kept.
        data: What is learnt.
        optimization: How it is learnt. "The matrices" are those of attention and MLP;
            embeddings, norms, biases and head are on Adam whatever the method.
        model: What is fine-tuned.
        mesh: Devices to spread over.
        preset: A recipe: "paper" of Natural GaLore's table (arXiv 2410.16029), at the
            middle one of its learning rates, 1e-5, 2e-5 and 3e-5, which the table
            tries; "galore" of GaLore's script; "minilm" for MiniLM on two cores, with
            rates by method.
    """

    run: tyro.conf.OmitArgPrefixes[FineTuningRunConfig]
    data: tyro.conf.OmitArgPrefixes[GlueDataConfig]
    model: EncoderModelConfig = EncoderModelConfig()
    preset: GluePreset = "paper"

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        super().__post_init__()
        check_at_least(8, self.data, "max_length")
        if self.data.train_examples is not None:
            check_at_least(1, self.data, "train_examples")

    @property
    def name(self) -> str:
        """Task and method."""
        return f"glue-{self.data.task}-{self.optimization.optimizer}"

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for one run to go on from another's state."""
        config = super().identity()
        del config["data"]["on_bad_input"]
        return config
