"""An encoder in and out of a folder, under BERT's and RoBERTa's names."""

from pathlib import Path

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
# Outside of the encoder itself, and absent from a checkpoint that is pretrained alone.
_HEAD: dict[Family, dict[str, str]] = {
    "bert": {"head/dense": "{prefix}pooler.dense", "head/out_proj": "classifier"},
    "roberta": {
        "head/dense": "classifier.dense",
        "head/out_proj": "classifier.out_proj",
    },
}


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
    folder: Path, config: EncoderConfig, params: optax.Params
) -> optax.Params:
    """Returns `params` with the values of a checkpoint; as of `huggingface.load`.

    The head keeps what it has of `params` where the checkpoint has none.
    """
    names = huggingface.tensor_names(folder)
    prefix = f"{config.family}."
    if not any(name.startswith(prefix) for name in names):
        prefix = ""
    old_norms = f"{prefix}embeddings.LayerNorm.gamma" in names
    return huggingface.load(
        folder, table(config.family, prefix, old_norms=old_norms), params
    )


def save_encoder(folder: Path, config: EncoderConfig, params: optax.Params) -> None:
    """Writes an encoder as transformers' model for the classification of sequences."""
    classes = params["head"]["out_proj"]["bias"].size
    name = {"bert": "Bert", "roberta": "Roberta"}[config.family]
    huggingface.save(
        folder,
        table(config.family, f"{config.family}."),
        params,
        config.to_hugging_face()
        | {
            "architectures": [f"{name}ForSequenceClassification"],
            "id2label": {str(i): f"LABEL_{i}" for i in range(classes)},
            "label2id": {f"LABEL_{i}": i for i in range(classes)},
        },
    )
