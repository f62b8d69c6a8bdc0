"""A Llama in and out of a folder in the layout of transformers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optax

from experiments.models import huggingface
from experiments.models.huggingface import CheckpointError, Entry, Table
from experiments.models.llama_config import LlamaConfig

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# A parameter of ours, the tensor; {layer} is the number of a layer.
_TENSORS = {
    "embed_tokens/embedding": "model.embed_tokens.weight",
    "layers/input_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/attention/q_proj/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/attention/k_proj/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/attention/v_proj/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/attention/o_proj/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/post_attention_norm/scale": (
        "model.layers.{layer}.post_attention_layernorm.weight"
    ),
    "layers/mlp/gate_proj/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/mlp/up_proj/kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/mlp/down_proj/kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}


def table(config: LlamaConfig) -> Table:
    """Returns where each parameter is in a checkpoint."""
    return [
        Entry(ours, theirs)
        for ours, theirs in _TENSORS.items()
        if not (config.tie_embeddings and ours.startswith("lm_head"))
    ]


def read_llama_config(folder: Path) -> LlamaConfig:
    """Returns the shape of the Llama in a folder.

    Raises:
      CheckpointError: There is no config.json, or it is of a model that differs.
    """
    facts = huggingface.read_config(folder)
    try:
        return _from_hugging_face(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / huggingface.CONFIG}: {error}.") from error


def load_llama(folder: Path, config: LlamaConfig, params: optax.Params) -> optax.Params:
    """Returns `params` with the values of a checkpoint; as of `huggingface.load`."""
    return huggingface.load(folder, table(config), params)


def save_llama(
    folder: Path,
    config: LlamaConfig,
    params: optax.Params,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a Llama as transformers' model for causal language modelling.

    Args:
      folder: Which is made.
      config: The shape.
      params: Nested dictionaries of arrays.
      facts: For config.json besides, as the numbers of special tokens.
    """
    huggingface.save(
        folder, table(config), params, to_hugging_face(config) | dict(facts)
    )


def to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
    """Returns what config.json says of a model."""
    stretched = config.rope_factor != 1
    scaling = {"rope_type": "linear", "factor": config.rope_factor}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if stretched else None,
        "dtype": config.param_dtype,
    }


def _from_hugging_face(facts: Mapping[str, Any]) -> LlamaConfig:
    """Raises KeyError or ValueError on what is missing or not as in a Llama here."""
    wanted = {
        "model_type": ("llama",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }
    for name, choices in wanted.items():
        given = facts.get(name, choices[0])
        if given not in choices:
            raise ValueError(f"{name} is {given!r}, only {choices[0]!r} is supported")
    # transformers 5 has both in one place.
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"rotary scaling {kind!r} is not supported, only 'linear' is")
    given = {ours: facts[theirs] for theirs, ours in _NAMES.items() if theirs in facts}
    config = LlamaConfig(
        **given,
        rope_theta=rope.get("rope_theta", facts.get("rope_theta", 10_000.0)),
        rope_factor=rope.get("factor", 1.0) if kind == "linear" else 1.0,
    )
    if facts.get("head_dim") not in (None, config.head_size):
        raise ValueError(
            f"head_dim is {facts['head_dim']}, only hidden_size / num_attention_heads "
            f"= {config.head_size} is supported"
        )
    return config
