"""A Llama out of a GGUF file, llama.cpp's format, with its tokenizer.

Weights may be quantized, and come out in float32. llama.cpp turns neighbours of a head
in rotary embedding, transformers its halves, so rows of query and key change places.
"""

from pathlib import Path
from typing import Any

import numpy as np
import optax
import tokenizers
from flax import traverse_util

from experiments.models.huggingface import CheckpointError
from experiments.models.llama_config import LlamaConfig

# A parameter of ours, the tensor; {layer} is the number of a layer.
_TENSORS = {
    "embed_tokens/embedding": "token_embd.weight",
    "layers/input_norm/scale": "blk.{layer}.attn_norm.weight",
    "layers/attention/q_proj/kernel": "blk.{layer}.attn_q.weight",
    "layers/attention/k_proj/kernel": "blk.{layer}.attn_k.weight",
    "layers/attention/v_proj/kernel": "blk.{layer}.attn_v.weight",
    "layers/attention/o_proj/kernel": "blk.{layer}.attn_output.weight",
    "layers/post_attention_norm/scale": "blk.{layer}.ffn_norm.weight",
    "layers/mlp/gate_proj/kernel": "blk.{layer}.ffn_gate.weight",
    "layers/mlp/up_proj/kernel": "blk.{layer}.ffn_up.weight",
    "layers/mlp/down_proj/kernel": "blk.{layer}.ffn_down.weight",
    "norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}
_CONTROL = 3  # a token's type: never found in texts


def read_gguf(
    path: Path,
) -> tuple[LlamaConfig, optax.Params, tokenizers.Tokenizer, dict[str, Any]]:
    """Returns a model's shape, its float32 parameters, its tokenizer and its facts.

    The facts are those that transformers' config.json has besides: the tokens that
    begin and end a text, and the number of positions.

    Raises:
      CheckpointError: The file cannot be read, or is of another kind of model.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}.") from error
    kind = facts.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{path} is of a {kind}, only a llama can be read.")
    try:
        config = _config(facts, tied="output.weight" not in tensors)
        params = _params(config, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error}.") from error
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}.") from error
    names = {
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "max_position_embeddings": "llama.context_length",
    }
    kept = {ours: facts[theirs] for ours, theirs in names.items() if theirs in facts}
    return config, params, _tokenizer(path, facts), kept


def _config(facts: dict[str, Any], *, tied: bool) -> LlamaConfig:
    def fact(name: str) -> Any:
        return facts[f"llama.{name}"]

    scaling = facts.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"rotary scaling {scaling!r} is not supported")
    heads = fact("attention.head_count")
    return LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=fact("embedding_length"),
        intermediate_size=fact("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=facts.get("llama.attention.head_count_kv", heads),
        num_layers=fact("block_count"),
        rope_theta=facts.get("llama.rope.freq_base", 10_000.0),
        rope_factor=facts.get("llama.rope.scaling.factor", 1.0)
        if scaling == "linear"
        else 1.0,
        norm_eps=float(f"{fact('attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings=tied,
    )


def _params(config: LlamaConfig, tensors: dict[str, Any]) -> optax.Params:
    from gguf.quants import dequantize

    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}

    def read(path: str, name: str) -> np.ndarray:
        tensor = tensors[name]
        found = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        module = path.split("/")[-2]
        if module in heads:
            rows, columns = found.shape
            halves = found.reshape(heads[module], -1, 2, columns).swapaxes(1, 2)
            found = halves.reshape(rows, columns)
        return found.T if path.endswith("/kernel") else found

    flat = {}
    for path, name in _TENSORS.items():
        if path.startswith("lm_head") and config.tie_embeddings:
            continue
        if "{layer}" in name:
            layers = range(config.num_layers)
            flat[path] = np.stack([read(path, name.format(layer=i)) for i in layers])
        else:
            flat[path] = read(path, name)
    return traverse_util.unflatten_dict(flat, sep="/")


def _tokenizer(path: Path, facts: dict[str, Any]) -> tokenizers.Tokenizer:
    """Bytes merged to tokens, digits apart, as SmolLM's are."""
    kind = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"{path} has a tokenizer of kind {kind}, not SmolLM's.")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    before = tokenizers.pre_tokenizers
    found.pre_tokenizer = before.Sequence(
        [
            before.Digits(individual_digits=True),
            before.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = tokenizers.decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    found.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    return found
