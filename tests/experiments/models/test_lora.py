"""Adapters against float64 NumPy, and the Llama that has them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig
from experiments.models.lora import Adapter, merge, through_factors
from experiments.training.step import next_token_loss

RANK = 4
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    num_layers=3,
)
KINDS = pytest.mark.parametrize("kind", ["lora", "low_rank"])
SIDES = {  # of a layer's matrices
    "q_proj": (32, 32),
    "k_proj": (32, 16),
    "v_proj": (32, 16),
    "o_proj": (32, 32),
    "gate_proj": (32, 48),
    "up_proj": (32, 48),
    "down_proj": (48, 32),
}


def adapter(kind: str) -> Adapter:
    return Adapter(kind, RANK, alpha=6.0)


@functools.cache
def initial(config: LlamaConfig, of: Adapter | None) -> optax.Params:
    init_params, _ = functional_llama(config, of)
    return jax.jit(init_params)(jax.random.key(7))


@functools.cache
def random_params(config: LlamaConfig, of: Adapter | None) -> optax.Params:
    """Weights large enough for every part to matter."""
    rng = np.random.default_rng(0)
    init_params, _ = functional_llama(config, of)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0, 0.3, w.shape), w.dtype),
        jax.eval_shape(init_params, jax.random.key(0)),
    )


def tokens(shape: tuple[int, int] = (2, 10)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 61, shape, np.int32)


def modules(params: optax.Params) -> dict[str, dict[str, jax.Array]]:
    return params["layers"]["attention"] | params["layers"]["mlp"]


def loss_of(config: LlamaConfig, of: Adapter | None) -> Callable[..., jax.Array]:
    _, apply = functional_llama(config, of)
    loss = next_token_loss(apply)
    batch = {"tokens": tokens(), "weights": np.ones((2, 9), np.float32)}
    return lambda params: loss(params, batch)[0]


@functools.cache
def compiled(of: Adapter | None) -> Callable[..., tuple[jax.Array, optax.Updates]]:
    """Logits and gradients of parameters, one program for each adapter."""
    _, apply = functional_llama(CONFIG, of)
    gradient = jax.grad(loss_of(CONFIG, of))
    with jax.default_matmul_precision("highest"):
        return (
            jax.jit(lambda params: (apply(params, tokens()), gradient(params)))
            .lower(random_params(CONFIG, of))
            .compile()
        )


# ------------------------------------------------------------------------- at init


def test_lora_starts_as_the_base_model_bit_for_bit():
    base, adapted = initial(CONFIG, None), initial(CONFIG, adapter("lora"))
    for name, module in modules(adapted).items():
        m, n = SIDES[name]
        np.testing.assert_array_equal(module["kernel"], modules(base)[name]["kernel"])
        assert not np.any(module["lora_b"]) and module["lora_b"].shape == (3, RANK, n)
        a = np.asarray(module["lora_a"], np.float64)
        assert a.shape == (3, m, RANK) and np.abs(a).max() <= 1 / np.sqrt(m)
        np.testing.assert_allclose(a.std(), 1 / np.sqrt(3 * m), rtol=0.15)
        assert np.abs(np.corrcoef(a.reshape(3, -1)) - np.eye(3)).max() < 0.4
    rest = jax.tree.map(lambda x: x, adapted)
    for module in modules(rest).values():
        del module["lora_a"], module["lora_b"]
    jax.tree.map(np.testing.assert_array_equal, rest, base)
    logits, _ = compiled(adapter("lora"))(adapted)
    np.testing.assert_array_equal(logits, compiled(None)(base)[0])


def test_a_factorised_layer_has_the_stated_parameters_and_starts_as_wide():
    of = Adapter("low_rank", 16)
    params = initial(dataclasses.replace(CONFIG, hidden_size=64), of)
    assert "kernel" in params["lm_head"] and "embedding" in params["embed_tokens"]
    sides = {"k_proj": (64, 32), "v_proj": (64, 32), "down_proj": (48, 64)}
    for name, module in modules(params).items():
        m, n = sides.get(name, (64, 48 if name in ("gate_proj", "up_proj") else 64))
        assert set(module) == {"lora_a", "lora_b"}
        assert sum(w.size for w in module.values()) == 3 * 16 * (m + n)
        a, b = (np.asarray(module[f"lora_{x}"], np.float64) for x in "ab")
        np.testing.assert_allclose((a @ b).std(), 0.02, rtol=0.1)
        np.testing.assert_allclose(a.std(), b.std(), rtol=0.1)
        assert abs(np.corrcoef(a[0, :32, 0], b[0, 0, :32])[0, 1]) < 0.5


# -------------------------------------------------------------------------- maths


@KINDS
def test_product_equals_a_float64_reference(kind):
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s) for s in ((2, 3, 7), (7, RANK), (RANK, 5)))
    given = (jnp.asarray(w, jnp.float32) for w in (x, a, b))
    y = through_factors(*given, adapter(kind).scale, "up_proj")
    scale = 6.0 / RANK if kind == "lora" else 1.0
    np.testing.assert_allclose(y, scale * x @ a @ b, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_merge_changes_no_logits(kind):
    of = adapter(kind)
    params = random_params(CONFIG, of)
    merged = merge(params, of.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(initial(CONFIG, None))
    for name, module in modules(params).items():
        a, b = (np.asarray(module[f"lora_{x}"], np.float64) for x in "ab")
        expected = of.scale * a @ b
        if kind == "lora":
            expected += module["kernel"]
        kernel = modules(merged)[name]["kernel"]
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5)
    before, _ = compiled(of)(params)
    after, _ = compiled(None)(merged)
    np.testing.assert_allclose(after, before, atol=2e-4 * np.abs(before).max())


@KINDS
def test_gradients_are_those_of_the_merged_kernel(kind):
    """dA = s G B^T and dB = s A^T G, where G is the merged kernel's gradient."""
    of = adapter(kind)
    params = random_params(CONFIG, of)
    _, found = compiled(of)(params)
    _, whole = compiled(None)(merge(params, of.scale))
    for name, module in modules(params).items():
        g = np.asarray(modules(whole)[name]["kernel"], np.float64)
        a, b = (np.asarray(module[f"lora_{x}"], np.float64) for x in "ab")
        expected = {
            "lora_a": of.scale * g @ b.swapaxes(1, 2),
            "lora_b": of.scale * a.swapaxes(1, 2) @ g,
        }
        for leaf, value in expected.items():
            error = np.linalg.norm(modules(found)[name][leaf] - value)
            assert error < 1e-4 * np.linalg.norm(value)
        if kind == "lora":
            assert not np.any(modules(found)[name]["kernel"])
    rest = ("embed_tokens", "lm_head", "norm")
    for ours, theirs in zip(
        jax.tree.leaves([found[x] for x in rest]),
        jax.tree.leaves([whole[x] for x in rest]),
        strict=True,
    ):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_neither_gradient_nor_copy_of_a_frozen_kernel_takes_memory(remat):
    """The layers' scans hand on no array of a kernel's shape, there or back."""
    config = dataclasses.replace(CONFIG, remat=remat)

    def handed_on(of: Adapter | None) -> int:
        gradient = jax.grad(loss_of(config, of))
        jaxpr = jax.make_jaxpr(gradient)(random_params(config, of))
        return sum(
            var.aval.shape in {(3, *sides) for sides in SIDES.values()}
            for equation in jaxpr.eqns
            if equation.primitive.name == "scan"
            for var in equation.outvars
        )

    assert handed_on(adapter("lora")) == 0
    assert handed_on(None) == 7


def test_bfloat16_factors_are_close_to_float32():
    of = adapter("lora")
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config, of)
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, apply = functional_llama(config, of)
    half = jax.jit(apply)(params, tokens())
    full, _ = compiled(of)(jax.tree.map(lambda w: w.astype(jnp.float32), params))
    error = np.abs(half - full).max() / np.abs(full).max()
    assert 1e-4 < error < 0.05  # below 1e-4 it would not have run in bfloat16


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"alpha": -1.0}, "alpha must be positive, got -1.0"),
        ({"kind": "dora"}, "kind must be one of lora, low_rank, got 'dora'"),
    ],
)
def test_what_makes_no_adapter_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(adapter("lora"), **change)


@KINDS
def test_a_rank_above_a_side_is_refused(kind):
    with pytest.raises(ValueError, match=r"rank=17 .* 32 x 16 matrix of 'k_proj'.* 16"):
        functional_llama(CONFIG, Adapter(kind, 17))
