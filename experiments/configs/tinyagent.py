"""Settings of fine-tuning a Llama to plan calls of functions.

The docstrings are the command's ``--help``. `experiments.tinyagent.presets` fills them
in.
"""

import dataclasses
from typing import Literal

import tyro

from experiments.configs.finetuning import FineTuningConfig, FineTuningRunConfig
from experiments.configs.glue import EncoderModelConfig, GluePreset
from experiments.configs.run import check_at_least
from experiments.models.formats import Dtype, Remat

TinyAgentPreset = Literal["paper", "smollm2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What a planner of made requests is told. TinyAgent's data have their prompts.

    Attributes:
        brief: Whether tools' names and parameters alone, not what they do and how plans
            are written.
        shown_examples: Plans of other requests for the same tools.
    """

    brief: bool = False
    shown_examples: int = 3

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        check_at_least(0, self, "shown_examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadePromptConfig(PromptConfig):
    """The same, of a request whose tools are known.

    Attributes:
        other_tools: Tools in the prompt that the request does not need.
    """

    other_tools: int = 3

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        super().__post_init__()
        check_at_least(0, self, "other_tools")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyAgentDataConfig:
    """What is learnt.

    Attributes:
        data: Folder with TinyAgent's training_data.json and testing_data.json, or its
            name on the Hugging Face hub, squeeze-ai-lab/TinyAgent-dataset; or one such
            file. None: requests made by a grammar, for development: what is measured
            with them says little about real ones.
        train_examples: The first so many training examples. None: all; of made ones,
            4,000.
        validation_examples: So many to choose the best epoch by: the last ones of the
            training file, which are not trained on, or made ones, worded as none that
            is trained on.
        max_length: Tokens of prompt and plan together, at most as many as the model
            has positions. Longer examples are left out, counted and named.
        prompt: What a planner of made requests is told.
    """

    data: str | None = None
    train_examples: int | None = None
    validation_examples: int = 1000
    max_length: int = 4096
    prompt: tyro.conf.OmitArgPrefixes[MadePromptConfig] = MadePromptConfig()

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        check_at_least(1, self, "validation_examples")
        check_at_least(16, self, "max_length")
        if self.train_examples is not None:
            check_at_least(1, self, "train_examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestsConfig:
    """What is asked.

    Attributes:
        data: As of `train`; its test split.
        test_examples: The first so many. None: all; of made ones, 200.
        prompt: What a planner of made requests is told, by default as in the run that
            the model is of.
    """

    data: str | None = None
    test_examples: int | None = None
    prompt: tyro.conf.OmitArgPrefixes[MadePromptConfig] = MadePromptConfig()

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if self.test_examples is not None:
            check_at_least(1, self, "test_examples")


@dataclasses.dataclass(frozen=True)
class PlannerModelConfig:
    """What is asked.

    Attributes:
        name: Folder with config.json, model.safetensors (or shards and their index)
            and tokenizer.json of a Llama; a GGUF file of one; or a model's name on the
            Hugging Face hub.
        param_dtype: Format that parameters are stored in.
        dtype: Format of activations and matrix products.
    """

    name: str = "Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct"
    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"


@dataclasses.dataclass(frozen=True)
class TinyAgentModelConfig(PlannerModelConfig):
    """What is fine-tuned; name and formats are as of what is asked.

    Attributes:
        remat: What of each layer the backward pass recomputes, to save memory.
    """

    remat: Remat = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyAgentConfig(FineTuningConfig):
    """Fine-tune a Llama to plan calls of functions, with a chosen optimizer.

    On TinyAgent's data and TinyLlama from the hub, as published:

    python -m experiments.tinyagent train --data squeeze-ai-lab/TinyAgent-dataset

    Attributes:
        run: How long, and where it is kept.
        data: What is learnt.
        optimization: How it is learnt. "The matrices" are those of attention and MLP;
            embeddings and norms are on Adam, or stay as they are (`--others`), the
            output layer is on Adam whatever the method, if it is not the embedding.
        model: What is fine-tuned.
        mesh: Devices to spread over.
        preset: A recipe: "paper" of TinyAgent (arXiv 2409.00608); "smollm2" for
            SmolLM2-135M on two cores, on short prompts, with rates by method.
    """

    run: tyro.conf.OmitArgPrefixes[FineTuningRunConfig]
    data: tyro.conf.OmitArgPrefixes[TinyAgentDataConfig]
    model: TinyAgentModelConfig = TinyAgentModelConfig()
    preset: TinyAgentPreset = "paper"

    @property
    def name(self) -> str:
        """Command and method."""
        return f"tinyagent-{self.optimization.optimizer}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolsDataConfig:
    """What is learnt.

    Attributes:
        data: As of `tinyagent train`.
        train_examples: The first so many training examples. None: all; of made ones,
            4,000.
        validation_examples: So many to choose the best epoch by.
        max_length: Tokens that a request is cut to.
    """

    data: str | None = None
    train_examples: int | None = None
    validation_examples: int = 1000
    max_length: int = 512

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        check_at_least(1, self, "validation_examples")
        check_at_least(8, self, "max_length")
        if self.train_examples is not None:
            check_at_least(1, self, "train_examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolsConfig(FineTuningConfig):
    """Fine-tune an encoder to tell which of the 16 tools a request needs.

    What it has learnt picks the tools, and the examples, of a planner's prompt:
    `--retriever` of evaluate and plan.

    Attributes:
        run: How long, and where it is kept.
        data: What is learnt.
        optimization: How it is learnt. "The matrices" are those of attention and MLP;
            embeddings, norms, biases and head are on Adam whatever the method.
        model: What is fine-tuned.
        mesh: Devices to spread over.
        preset: A recipe of experiments.glue, whose method and model it has.
    """

    run: tyro.conf.OmitArgPrefixes[FineTuningRunConfig]
    data: tyro.conf.OmitArgPrefixes[ToolsDataConfig]
    model: EncoderModelConfig = dataclasses.field(default_factory=EncoderModelConfig)
    preset: GluePreset = "paper"

    @property
    def name(self) -> str:
        """Command and method."""
        return f"tinyagent-tools-{self.optimization.optimizer}"
