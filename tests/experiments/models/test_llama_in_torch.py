"""Logits equal those of transformers, where it is installed.

`uv run --group torch pytest tests/experiments/models/test_llama_in_torch.py`
"""

import jax
import numpy as np
import pytest

from experiments.models.functional import functional_llama
from experiments.models.llama_checkpoint import (
    load_llama,
    read_llama_config,
    save_llama,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 99, (2, 37)).astype(np.int32)
_STRETCHED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}


def in_torch(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "rope_parameters": _STRETCHED},
    ],
    ids=["full", "grouped, tied", "one head, stretched"],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_random_llama_agrees_with_transformers(more, shard, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=3,
            initializer_range=0.3,
            **more,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard == "20KB")
    expected = in_torch(model)
    assert np.abs(expected).max() > 0.5
    config = read_llama_config(tmp_path)
    init_params, apply = functional_llama(config)
    params = load_llama(tmp_path, config, jax.jit(init_params)(jax.random.key(0)))
    np.testing.assert_allclose(jax.jit(apply)(params, TOKENS), expected, atol=1e-4)
    # And what is saved here is read there.
    save_llama(tmp_path / "saved", config, params)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(in_torch(again), expected, atol=1e-5)
