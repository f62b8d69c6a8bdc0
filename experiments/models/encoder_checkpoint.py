"""An encoder in and out of a folder, under BERT's and RoBERTa's names."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from experiments.models import huggingface
from experiments.models.encoder_config import EncoderConfig, Family
from experiments.models.huggingface import CheckpointError, Entry, Table

# A module of ours, theirs; {layer} is the number of a layer.
_NORMS = {
    "embed_norm": "embeddings.LayerNorm",
    "layers/attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "layers/mlp_norm": "encoder.layer.{layer}.output.LayerNorm",
}
_LINEAR = {
    "layers/attention/q_proj": "encoder.layer.{layer}.attention.self.query",
    "layers/attention/k_proj": "encoder.layer.{layer}.attention.self.key",
    "layers/attention/v_proj": "encoder.layer.{layer}.attention.self.value",
    "layers/attention/o_proj": "encoder.layer.{layer}.attention.output.dense",
    "layers/mlp/up_proj": "encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down_proj": "encoder.layer.{layer}.output.dense",
}
_EMBEDDINGS = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_types": "embeddings.token_type_embeddings",
}
# What the names of tensors begin with that are of one task alone.
_OF_TASK = "classifier"
# Outside of the encoder itself, and absent from a checkpoint that is pretrained alone.
_HEAD: dict[Family, dict[str, str]] = {
    "bert": {"head/dense": "{prefix}pooler.dense", "head/out_proj": "classifier"},
    "roberta": {
        "head/dense": "classifier.dense",
        "head/out_proj": "classifier.out_proj",
    },
}


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the outputs of a head stand for.

    Attributes:
      task: Name of what was learnt.
      names: Of the outputs, in their order.
    """

    task: str
    names: tuple[str, ...]

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns what a config.json says of them."""
        return {
            "finetuning_task": self.task,
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def are_told_by(self, facts: Mapping[str, Any]) -> bool:
        """Whether a config.json tells this task, and these outputs in this order."""
        told = self.to_hugging_face()
        return all(facts.get(k) == told[k] for k in ("finetuning_task", "id2label"))


def table(family: Family, prefix: str, *, old_norms: bool = False) -> Table:
    """Returns where each parameter is in a checkpoint.

    Args:
      family: Whose names.
      prefix: In front of those of the encoder itself: "bert." or "roberta.", or
        nothing where the checkpoint is of the encoder alone.
      old_norms: Whether norms have a gamma and a beta, as in the first of BERT's.
    """
    scale, bias = ("gamma", "beta") if old_norms else ("weight", "bias")
    entries = [
        Entry(f"{ours}/embedding", f"{prefix}{theirs}.weight")
        for ours, theirs in _EMBEDDINGS.items()
    ]
    for ours, theirs in _NORMS.items():
        entries.append(Entry(f"{ours}/scale", f"{prefix}{theirs}.{scale}"))
        entries.append(Entry(f"{ours}/bias", f"{prefix}{theirs}.{bias}"))
    for ours, theirs in _LINEAR.items():
        entries.append(Entry(f"{ours}/kernel", f"{prefix}{theirs}.weight"))
        entries.append(Entry(f"{ours}/bias", f"{prefix}{theirs}.bias"))
    for ours, theirs in _HEAD[family].items():
        theirs = theirs.replace("{prefix}", prefix)
        entries.append(Entry(f"{ours}/kernel", f"{theirs}.weight", optional=True))
        entries.append(Entry(f"{ours}/bias", f"{theirs}.bias", optional=True))
    return entries


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Returns the shape of the encoder in a folder.

    Raises:
      CheckpointError: There is no config.json, or not that of such an encoder.
    """
    try:
        return EncoderConfig.from_hugging_face(huggingface.read_config(folder))
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / huggingface.CONFIG}: {error}.") from error


def load_encoder(
    folder: Path,
    config: EncoderConfig,
    params: optax.Params,
    labels: Labels | None = None,
    report: Callable[[str], None] = print,
) -> optax.Params:
    """Returns `params` with the values of a checkpoint; as of `huggingface.load`.

    The head keeps what it has of `params` where the checkpoint has none, or one of
    another task; BERT's pooler, which is pretrained, is loaded in any case.

    Args:
      folder: With config.json and weights.
      config: What is in it, as of `read_encoder_config`.
      params: As of `huggingface.load`.
      labels: What the head is to tell. None: what the checkpoint's does.
      report: Takes a line for the user where the checkpoint's head is left out.
    """
    names = huggingface.tensor_names(folder)
    prefix = f"{config.family}."
    if not any(name.startswith(prefix) for name in names):
        prefix = ""
    old_norms = f"{prefix}embeddings.LayerNorm.gamma" in names
    entries = table(config.family, prefix, old_norms=old_norms)
    if labels is not None and not labels.are_told_by(huggingface.read_config(folder)):
        entries = [one for one in entries if not one.tensor.startswith(_OF_TASK)]
        if any(name.startswith(_OF_TASK) for name in names):
            report(
                f"{folder / huggingface.CONFIG} does not say that the model's head is "
                f"of {labels.task} (finetuning_task, id2label): a new one is trained."
            )
    return huggingface.load(folder, entries, params)


def save_encoder(
    folder: Path, config: EncoderConfig, params: optax.Params, labels: Labels
) -> None:
    """Writes an encoder as transformers' model for the classification of sequences."""
    name = {"bert": "Bert", "roberta": "Roberta"}[config.family]
    huggingface.save(
        folder,
        table(config.family, f"{config.family}."),
        params,
        config.to_hugging_face()
        | labels.to_hugging_face()
        | {"architectures": [f"{name}ForSequenceClassification"]},
    )
