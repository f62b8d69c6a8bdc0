"""A random BERT or RoBERTa in the hub's layout, and what it computes, in NumPy.

Shares no code with `experiments`: names of tensors and formulas are transformers'.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

WORDS = tuple(
    "the a cat dog sat ran on under mat tree red blue is was good bad very not".split()
)
LAYERS, WIDTH, HEADS, INSIDE = 2, 16, 4, 24
_SPECIAL = {
    "bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    "roberta": ("<pad>", "<s>", "</s>", "<unk>"),
}


def facts(family: str, **more: Any) -> dict[str, Any]:
    """What config.json says."""
    return {
        "model_type": family,
        "vocab_size": 4 + len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": INSIDE,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 40,
        "type_vocab_size": 2 if family == "bert" else 1,
        "pad_token_id": 0 if family == "bert" else 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        **more,
    }


def random_tensors(family: str, classes: int | None, seed: int = 0) -> dict[str, Any]:
    """Weights of a checkpoint by name; None of classes: of the encoder alone."""
    rng, config = np.random.default_rng(seed), facts(family)
    prefix = "" if classes is None else f"{family}."
    sides: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.word_embeddings.weight": (config["vocab_size"], WIDTH),
        f"{prefix}embeddings.position_embeddings.weight": (40, WIDTH),
        f"{prefix}embeddings.token_type_embeddings.weight": (
            config["type_vocab_size"],
            WIDTH,
        ),
    }

    def linear(name: str, inside: int, outside: int) -> None:
        sides[f"{name}.weight"], sides[f"{name}.bias"] = (outside, inside), (outside,)

    def norm(name: str) -> None:
        sides[f"{name}.weight"], sides[f"{name}.bias"] = (WIDTH,), (WIDTH,)

    norm(f"{prefix}embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"{prefix}encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            linear(f"{at}.attention.self.{name}", WIDTH, WIDTH)
        linear(f"{at}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", WIDTH, INSIDE)
        linear(f"{at}.output.dense", INSIDE, WIDTH)
        norm(f"{at}.output.LayerNorm")
    if family == "bert":
        linear(f"{prefix}pooler.dense", WIDTH, WIDTH)
    if classes is not None:
        head = ("classifier", "classifier.dense", "classifier.out_proj")
        linear(head[0] if family == "bert" else head[2], WIDTH, classes)
        if family == "roberta":
            linear(head[1], WIDTH, WIDTH)
    return {
        name: rng.normal(0.5 if "LayerNorm.weight" in name else 0.1, 0.4, shape).astype(
            np.float32
        )
        for name, shape in sides.items()
    }


def write_encoder(
    folder: Path, family: str, classes: int | None = 3, seed: int = 0
) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts(family)))
    save_file(random_tensors(family, classes, seed), folder / "model.safetensors")
    pad, start, end, unknown = _SPECIAL[family]
    first = [pad, start] if family == "bert" else [start, pad]
    vocabulary = {word: n for n, word in enumerate([*first, end, unknown, *WORDS])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=unknown)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    between = "$B:1" if family == "bert" else f"{end} $B"
    last = f"{end}:1" if family == "bert" else end
    pair = f"{start} $A {end} {between} {last}"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=pair,
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def scores(folder: Path, tokens: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Scores of one sequence without padding, in float64."""
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    w = {
        k: v.astype(np.float64)
        for k, v in load_file(folder / "model.safetensors").items()
    }
    at = f"{family}."

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), HEADS, -1).swapaxes(0, 1)

    first = 0 if family == "bert" else config["pad_token_id"] + 1
    positions = np.arange(first, first + len(tokens))
    x = norm(
        w[f"{at}embeddings.word_embeddings.weight"][tokens]
        + w[f"{at}embeddings.position_embeddings.weight"][positions]
        + w[f"{at}embeddings.token_type_embeddings.weight"][types],
        f"{at}embeddings.LayerNorm",
    )
    for layer in range(LAYERS):
        here = f"{at}encoder.layer.{layer}"
        q, k, v = (
            heads(linear(x, f"{here}.attention.self.{name}"))
            for name in ("query", "key", "value")
        )
        a = q @ k.swapaxes(1, 2) / math.sqrt(WIDTH // HEADS)
        a = np.exp(a - a.max(-1, keepdims=True))
        y = (a / a.sum(-1, keepdims=True)) @ v
        y = linear(
            y.swapaxes(0, 1).reshape(len(x), WIDTH), f"{here}.attention.output.dense"
        )
        x = norm(x + y, f"{here}.attention.output.LayerNorm")
        h = linear(x, f"{here}.intermediate.dense")
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(x + linear(h, f"{here}.output.dense"), f"{here}.output.LayerNorm")
    if family == "bert":
        return linear(np.tanh(linear(x[0], f"{at}pooler.dense")), "classifier")
    return linear(np.tanh(linear(x[0], "classifier.dense")), "classifier.out_proj")
