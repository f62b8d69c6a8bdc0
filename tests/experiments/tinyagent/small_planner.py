"""A random Llama whose tokens are bytes, in the hub's layout."""

import json

import jax
import tokenizers

from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig
from experiments.models.llama_checkpoint import save_llama

START, END = "<s>", "</s>"


def byte_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([START, END, *alphabet])}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens([START, END])
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, vocabulary[START])]
    )
    return found


CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
)


def write_planner(folder, seed=0):
    """Writes config.json, model.safetensors and tokenizer.json."""
    init_params, _ = functional_llama(CONFIG)
    params = jax.jit(init_params)(jax.random.key(seed))
    save_llama(folder, CONFIG, params, {"bos_token_id": 0, "eos_token_id": [1]})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 258
    return folder
