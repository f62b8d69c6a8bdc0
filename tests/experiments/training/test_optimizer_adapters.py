"""Methods whose matrices are adapters: what is trained, frozen, and kept as state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from experiments.configs.optimizer import OptimizerConfig
from experiments.presets import parse
from experiments.training.optimizer import (
    adamw_state_bytes,
    build_optimizer,
    learning_rate_schedule,
    matrix_labels,
    matrix_schedule,
)

METHODS = ("lora", "relora", "low_rank")
EVERY = pytest.mark.parametrize("name", METHODS)
STEPS, RANK, RATE, ADAM_RATE = 20, 2, 1e-2, 0.05


def shapes(name: str) -> dict:
    """Leaves of two stacked layers with an adapter, and the rest of a model."""
    factors = {"lora_a": (2, 8, RANK), "lora_b": (2, RANK, 10)}
    kernel = {} if name == "low_rank" else {"kernel": (2, 8, 10)}
    return {
        "embed_tokens": {"embedding": (12, 8)},
        "layers": {"input_norm": {"scale": (2, 8)}, "up_proj": kernel | factors},
        "lm_head": {"kernel": (8, 12)},
    }


def make_params(name: str, seed: int = 0) -> optax.Params:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes(name),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def config_of(name: str, **settings) -> OptimizerConfig:
    return OptimizerConfig(
        name, rank=RANK, adam_learning_rate=ADAM_RATE, relora_gap=8, **settings
    )


def third_updates(name: str, **settings) -> optax.Updates:
    optimizer = build_optimizer(
        config_of(name, **settings), learning_rate=RATE, steps=STEPS
    )
    params = make_params(name)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for seed in (1, 2, 3):
        updates, state = update(make_params(name, seed), state, params)
    return updates


def reference_adam(gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """The last update of Adam on these gradients, in float64."""
    mean = square = 0.0
    count = len(gradients)
    for gradient in (np.asarray(x, np.float64) for x in gradients):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
    mean, square = mean / (1 - 0.9**count), square / (1 - 0.999**count)
    return -rate * mean / (np.sqrt(square) + 1e-8)


@EVERY
def test_factors_and_the_rest_take_adam_each_at_its_rate_and_kernels_rest(name):
    updates = third_updates(name)
    seen = [make_params(name, seed) for seed in (1, 2, 3)]
    for path, update in jax.tree.leaves_with_path(updates):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if where == "layers/up_proj/kernel":
            np.testing.assert_array_equal(update, 0)
            continue
        peak = RATE if "lora_" in where else ADAM_RATE
        rate = float(learning_rate_schedule(config_of(name), peak, STEPS)(2))
        gradients = [dict(jax.tree.leaves_with_path(tree))[path] for tree in seen]
        np.testing.assert_allclose(
            update, reference_adam(gradients, rate), rtol=1e-4, err_msg=where
        )


@EVERY
def test_factors_decay_by_weight_decay_times_learning_rate(name):
    plain, decayed = third_updates(name), third_updates(name, weight_decay=0.1)
    rate = float(learning_rate_schedule(config_of(name), RATE, STEPS)(2))
    params = make_params(name)["layers"]["up_proj"]
    for leaf in ("lora_a", "lora_b"):
        change = decayed["layers"]["up_proj"][leaf] - plain["layers"]["up_proj"][leaf]
        np.testing.assert_allclose(change, -0.1 * rate * params[leaf], atol=1e-6)


@EVERY
def test_state_is_two_moments_of_what_is_trained(name):
    optimizer = build_optimizer(config_of(name), learning_rate=RATE, steps=STEPS)
    params = jax.eval_shape(lambda: make_params(name))
    state = jax.eval_shape(optimizer.init, params)
    trained = 12 * 8 + 2 * 8 + 8 * 12 + 2 * RANK * (8 + 10)
    counters = ng.state_bytes([x for x in jax.tree.leaves(state) if x.ndim == 0])
    assert ng.state_bytes(state) == 2 * 4 * trained + counters
    assert counters <= 5 * 4


@EVERY
def test_adamw_bytes_are_those_of_the_model_without_adapters(name):
    base = jax.eval_shape(lambda: make_params(name))
    base["layers"]["up_proj"] = {
        "kernel": jax.ShapeDtypeStruct((2, 8, 10), jnp.float32)
    }
    assert adamw_state_bytes(make_params(name)) == adamw_state_bytes(base)
    assert adamw_state_bytes(base) == 2 * ng.state_bytes(base) + 4


def test_factors_and_frozen_kernels_are_left_to_the_method():
    labels = matrix_labels(make_params("lora"))
    assert labels == {
        "embed_tokens": {"embedding": "other"},
        "layers": {
            "input_norm": {"scale": "other"},
            "up_proj": dict.fromkeys(("kernel", "lora_a", "lora_b"), "matrix"),
        },
        "lm_head": {"kernel": "other"},
    }


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_a_model_without_adapters_is_refused(name):
    optimizer = build_optimizer(config_of(name), learning_rate=RATE, steps=STEPS)
    params = {"layers": {"up_proj": {"kernel": jnp.ones((8, 10))}}}
    with pytest.raises(ValueError, match="'layers/up_proj/kernel' has no factors"):
        optimizer.init(params)


def test_relora_restarts_by_the_run_s_length_and_its_schedule_says_so():
    config = parse("--optimizer relora --steps 400".split())
    assert config.as_dict()["optimization"]["relora_gap"] == 100
    rates = [
        float(matrix_schedule(config.optimization, 1.0, 400)(step))
        for step in range(400)
    ]
    smooth = learning_rate_schedule(config.optimization, 1.0, 400)
    share = [rate / float(smooth(step)) for step, rate in enumerate(rates)]
    np.testing.assert_allclose(share[:100], 1)
    for start in (100, 200, 300):
        rise = [(step + 1) / 11 for step in range(10)]
        np.testing.assert_allclose(share[start : start + 10], rise, rtol=1e-5)
        np.testing.assert_allclose(share[start + 10 : start + 100], 1)
    given = parse("--optimizer relora --relora-gap 7".split()).optimization
    assert given.restart_gap(400) == 7
    assert given.restart_gap(3) == 7
    assert config.optimization.restart_gap(3) == 1


def test_adapters_have_the_published_ranks_and_alpha():
    for name in METHODS:
        config = parse(["--preset", "llama_130m", "--optimizer", name])
        adapter = config.optimization.adapter
        assert adapter.rank == 256
        assert adapter.scale == (1.0 if name == "low_rank" else 0.125)
    assert parse(["--optimizer", "adamw"]).optimization.adapter is None


def test_a_gap_below_one_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--optimizer relora --relora-gap 0".split())
    assert "relora_gap=0 must be at least 1" in capsys.readouterr().err
