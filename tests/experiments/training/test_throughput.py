"""FLOPs a token against the compiled model's, and MFU against stated peaks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig, parameter_count
from experiments.models.llama_config import PRESETS
from experiments.models.lora import Adapter
from experiments.training import throughput
from experiments.training.chips import known_chip
from experiments.training.step import next_token_loss
from experiments.training.throughput import Throughput, flops_per_token

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_heads=4,
    num_kv_heads=2,
    num_layers=1,  # XLA counts the body of the layers' loop once
)


def test_flops_are_those_of_the_compiled_forward_pass():
    batch, length = 4, 128
    init_params, apply = functional_llama(CONFIG)
    params = jax.eval_shape(init_params, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    counted = jax.jit(apply).lower(params, tokens).compile().cost_analysis()["flops"]
    # A third of the step is forward. XLA adds norms, rotations and the softmax.
    ours = flops_per_token(CONFIG, length) / 3 * batch * length
    assert ours < counted < 1.06 * ours


@pytest.mark.parametrize("adapter", [Adapter("lora", 16), Adapter("low_rank", 16)])
def test_flops_with_an_adapter_are_those_of_its_training_step(adapter):
    batch, length = 4, 128
    init_params, apply = functional_llama(CONFIG, adapter)
    loss_fn = next_token_loss(apply)
    abstract = jax.eval_shape(init_params, jax.random.key(0))
    data = {
        "tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32),
        "weights": jax.ShapeDtypeStruct((batch, length), jnp.float32),
    }
    gradient = jax.jit(jax.grad(lambda params, batch: loss_fn(params, batch)[0]))
    counted = gradient.lower(abstract, data).cost_analysis()["flops"]
    ours = flops_per_token(CONFIG, length, adapter) * batch * length
    # Beside norms, rotations and the softmax, the narrow x A is made twice.
    assert ours < counted < 1.1 * ours


@pytest.mark.parametrize("name", ["llama_60m", "llama_7b"])
def test_flops_are_six_a_weight_and_attention(name):
    config = PRESETS[name]
    embedding = config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    weights = parameter_count(config) - embedding - norms
    attention = 12 * config.num_layers * config.hidden_size * 256
    assert flops_per_token(config, 256) == 6 * weights + attention


def test_a_tied_output_layer_is_a_product_all_the_same():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    assert flops_per_token(tied, 64) == flops_per_token(CONFIG, 64)


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H200", "H200", 989e12),
    ],
)
def test_chips_are_known_by_the_kind_jax_gives(kind, name, peak):
    chip = known_chip(kind)
    assert (chip.name, chip.peak_flops) == (name, peak)


def test_a_row_has_the_rate_and_where_the_chip_is_known_mfu(monkeypatch):
    assert known_chip("cpu") is None
    here = Throughput.of(CONFIG, 64, devices=8)
    assert here(tokens=300, seconds=1.5) == {"tokens_per_second": 200}

    class Device:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(throughput.jax, "devices", lambda: [Device()])
    there = Throughput.of(CONFIG, 64, devices=2)
    tokens = 2 * 197e12 / flops_per_token(CONFIG, 64)  # in a second, at the peak
    assert there(tokens, seconds=2.0)["mfu"] == pytest.approx(0.5)
