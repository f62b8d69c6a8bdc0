"""The choice of an optimizer: same leaves, same rest, each method as it says."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from experiments.configs.optimizer import DEFAULT_LEARNING_RATE, OptimizerConfig
from experiments.training.optimizer import (
    adamw_state_bytes,
    build_optimizer,
    learning_rate_schedule,
    matrix_labels,
    per_layer,
)

# Of kernels; those of adapters' factors are in test_optimizer_adapters.py.
METHODS = tuple(
    name for name in DEFAULT_LEARNING_RATE if OptimizerConfig(name).adapter is None
)
STEPS = 20
ADAM_RATE = 0.05


def make_params(seed: int = 0) -> optax.Params:
    """Leaves named and shaped as the Llama's; two stacked layers."""
    shapes = {
        "embed_tokens": {"embedding": (12, 8)},
        "layers": {
            "attention": {"q_proj": {"kernel": (2, 8, 8)}},
            "input_norm": {"scale": (2, 8)},
            "mlp": {"up_proj": {"kernel": (2, 8, 10)}},
        },
        "lm_head": {"kernel": (8, 12)},
        "norm": {"scale": (8,)},
    }
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def config_of(name: str, **settings) -> OptimizerConfig:
    defaults = {"rank": 3, "update_proj_gap": 2, "history": 3}
    return OptimizerConfig(
        optimizer=name, adam_learning_rate=ADAM_RATE, **(defaults | settings)
    )


def identity(params: optax.Params) -> optax.Params:
    return params


@functools.cache
def third_updates(config: OptimizerConfig, transform=identity) -> optax.Updates:
    """Updates of the third step, where the parameters are `transform`ed ones."""
    optimizer = build_optimizer(config, learning_rate=1e-2, steps=STEPS)
    params = transform(make_params())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for seed in (1, 2, 3):
        updates, state = update(transform(make_params(seed)), state, params)
    return updates


def unstack(tree: optax.Params) -> optax.Params:
    """The kernels of each layer as leaves of their own."""
    q = tree["layers"]["attention"]["q_proj"]["kernel"]
    up = tree["layers"]["mlp"]["up_proj"]["kernel"]
    return {
        f"layer{i}": {"q": {"kernel": q[i]}, "up": {"kernel": up[i]}} for i in range(2)
    }


def up_kernel(tree: optax.Params) -> jax.Array:
    return tree["layers"]["mlp"]["up_proj"]["kernel"]


def test_only_hidden_kernels_are_matrices():
    labels = matrix_labels(make_params())
    assert labels == {
        "embed_tokens": {"embedding": "other"},
        "layers": {
            "attention": {"q_proj": {"kernel": "matrix"}},
            "input_norm": {"scale": "other"},
            "mlp": {"up_proj": {"kernel": "matrix"}},
        },
        "lm_head": {"kernel": "other"},
        "norm": {"scale": "other"},
    }


@pytest.mark.parametrize("name", METHODS)
def test_all_but_the_matrices_take_adam_at_its_own_rate(name):
    updates = third_updates(config_of(name, weight_decay=0.1))
    adam = optax.adam(learning_rate_schedule(config_of(name), ADAM_RATE, STEPS))
    state = adam.init(make_params())
    for seed in (1, 2, 3):
        expected, state = adam.update(make_params(seed), state)

    def rest(tree):
        layers = {"input_norm": tree["layers"]["input_norm"]}
        return tree | {"layers": layers}

    chex.assert_trees_all_close(rest(updates), rest(expected), rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_matrices_decay_by_weight_decay_times_learning_rate(name):
    plain = up_kernel(third_updates(config_of(name)))
    decayed = up_kernel(third_updates(config_of(name, weight_decay=0.1)))
    rate = float(learning_rate_schedule(config_of(name), 1e-2, STEPS)(2))
    decaying = up_kernel(make_params())
    if name == "reference":  # decays what it has updated
        decaying += plain
    decay = -0.1 * rate * decaying
    np.testing.assert_allclose(decayed - plain, decay, atol=1e-6)


def test_methods_differ_on_the_matrices():
    seen = [up_kernel(third_updates(config_of(name))) for name in METHODS]
    for i, first in enumerate(seen):
        for second in seen[i + 1 :]:
            assert not np.allclose(first, second, rtol=1e-2)


@pytest.mark.parametrize("name", METHODS)
def test_stacked_layers_are_trained_as_separate_matrices(name):
    stacked = unstack(third_updates(config_of(name)))
    separate = third_updates(config_of(name), unstack)
    chex.assert_trees_all_close(stacked, separate, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["galore", "optax_galore"])
def test_galore_updates_have_the_rank_asked_for(name):
    kernel = up_kernel(third_updates(config_of(name)))
    assert np.linalg.matrix_rank(kernel, tol=1e-6).tolist() == [3, 3]


@pytest.mark.parametrize("name", ["galore", "natural_galore"])
def test_the_residual_and_its_rule_reach(name):
    dropped = up_kernel(third_updates(config_of(name)))
    assert np.linalg.matrix_rank(dropped, tol=1e-7).tolist() == [3, 3]
    full = [
        up_kernel(third_updates(config_of(name, residual=rule, residual_weight=2.0)))
        for rule in ("compensation", "fira", "orthogonal")
    ]
    assert all(min(np.linalg.matrix_rank(u, tol=1e-7)) > 3 for u in full)
    for one, other in itertools.combinations(full, 2):
        assert not np.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "settings"), [("muon", {}), ("galore", dict(residual="orthogonal"))]
)
def test_the_momentum_reaches(name, settings):
    one, other = (
        up_kernel(third_updates(config_of(name, momentum=momentum, **settings)))
        for momentum in (0.5, 0.9)
    )
    assert not np.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("galore", dict(projector="svd")),
        ("galore", dict(projector="gaussian")),
        ("galore", dict(projector="switching")),
        ("galore", dict(projector="averaged")),
        ("galore", dict(moments_at_refresh="keep")),
        ("natural_galore", dict(history_at_refresh="keep")),
        ("natural_galore", dict(relative_damping=True, damping=1.0)),
        ("natural_galore", dict(fisher="model")),
        ("natural_galore", dict(fisher="averages")),
        ("natural_galore", dict(projector="gaussian", fisher="model")),
        ("natural_galore_paper", dict(history=1)),
    ],
)
def test_settings_reach_the_update(name, settings):
    plain = up_kernel(third_updates(config_of(name)))
    other = up_kernel(third_updates(config_of(name, **settings)))
    assert not np.allclose(plain, other, rtol=1e-2)


def test_the_moments_of_trials_are_stored_as_asked():
    def size(**settings):
        config = config_of("natural_galore", fisher="averages", **settings)
        optimizer = build_optimizer(config, learning_rate=1e-2, steps=STEPS)
        return ng.state_bytes(jax.eval_shape(optimizer.init, make_params()))

    # Two moments at rank 3 of two layers of (8, 8) and (8, 10).
    assert size() - size(moments_dtype="bfloat16") == 2 * 2 * 2 * 3 * (8 + 10)


def test_the_paper_preset_is_the_librarys():
    tx = ng.natural_galore(
        learning_rate_schedule(config_of("natural_galore_paper"), 1e-2, STEPS),
        **{**ng.PAPER, **dict(rank=3, update_proj_gap=2, history=3)},
    )
    params = {"kernel": up_kernel(make_params())}
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in (1, 2, 3):
        updates, state = update({"kernel": up_kernel(make_params(seed))}, state)
    actual = up_kernel(third_updates(config_of("natural_galore_paper")))
    np.testing.assert_allclose(actual, updates["kernel"], rtol=1e-3, atol=1e-6)


def test_online_factors_follow_the_schedule():
    config = config_of("reference", reference_mode="online_galore")
    schedule = learning_rate_schedule(config, 1e-2, STEPS)
    tx = ng.reference(
        schedule,
        rank=3,
        mode="online_galore",
        factor_learning_rate=lambda step: schedule(step) / 1e-2 / 2,
    )
    kernel = lambda seed: {"kernel": up_kernel(make_params(seed))}  # noqa: E731
    state, update = tx.init(kernel(0)), jax.jit(tx.update)
    for seed in (1, 2, 3):
        expected, state = update(kernel(seed), state)
    actual = up_kernel(third_updates(config))
    np.testing.assert_allclose(actual, expected["kernel"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_states_are_saved_as_arrays_with_elements(name):
    # Orbax refuses arrays of size zero.
    optimizer = build_optimizer(config_of(name), learning_rate=1e-2, steps=STEPS)
    state = jax.eval_shape(optimizer.init, make_params())
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


def test_clipping_bounds_the_gradient():
    # Adam hides a gradient's scale, so the first moment is looked at.
    optimizer = build_optimizer(
        config_of("adamw", clip_norm=1e-3), learning_rate=1e-2, steps=STEPS
    )
    params = make_params()
    _, state = optimizer.update(make_params(1), optimizer.init(params), params)
    moments = [
        moment
        for path, moment in jax.tree.leaves_with_path(state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * 1e-3, rtol=1e-4)


def test_adamw_bytes_are_twice_the_parameters_and_need_no_arrays():
    params = make_params()
    abstract = jax.eval_shape(lambda: params)
    size = ng.state_bytes(params)
    assert 2 * size < adamw_state_bytes(abstract) <= 2 * size + 8


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_a_linear_schedule_falls_by_as_much_every_step(warmup):
    config = OptimizerConfig(
        warmup_fraction=warmup, decay="linear", final_fraction=0.25
    )
    schedule = learning_rate_schedule(config, 1.0, 100)
    rates = [float(schedule(step)) for step in range(101)]
    first = round(100 * warmup)
    assert rates[first] == pytest.approx(1) and rates[100] == pytest.approx(0.25)
    np.testing.assert_allclose(np.diff(rates[first:]), -0.75 / (100 - first), rtol=1e-3)
    assert rates[0] > 0


def test_others_can_stay_as_they_are_but_for_the_head():
    config = config_of("adamw", others="freeze")
    updates = third_updates(config)
    trained = third_updates(config_of("adamw"))
    for name in ("embed_tokens", "norm"):
        assert not any(jax.tree.leaves(jax.tree.map(jnp.any, updates[name])))
    chex.assert_trees_all_close(updates["lm_head"], trained["lm_head"], rtol=1e-6)
    kernel = updates["layers"]["attention"]
    chex.assert_trees_all_close(kernel, trained["layers"]["attention"], rtol=1e-6)
    assert not jnp.any(updates["layers"]["input_norm"]["scale"])
    params = {"head": {"dense": {"kernel": 0.0, "bias": 0.0}}, "norm": {"bias": 0.0}}
    labels = matrix_labels(params, "freeze")
    assert labels == {
        "head": {"dense": {"kernel": "other", "bias": "other"}},
        "norm": {"bias": "frozen"},
    }


def test_without_a_rate_of_its_own_adam_takes_the_matrices():
    config = dataclasses.replace(config_of("adamw"), adam_learning_rate=None)
    updates = third_updates(config)
    expected = third_updates(
        dataclasses.replace(config_of("adamw"), adam_learning_rate=1e-2)
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_schedule_rises_and_falls_to_its_end():
    config = OptimizerConfig(warmup_fraction=0.1, final_fraction=0.1)
    schedule = learning_rate_schedule(config, 1.0, 100)
    rates = [float(schedule(step)) for step in range(101)]
    assert 0 < rates[0] < 0.2
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=1e-3)
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_schedule_of_a_single_step(fraction):
    config = OptimizerConfig(warmup_fraction=fraction)
    assert float(learning_rate_schedule(config, 1.0, 1)(0)) == pytest.approx(1.0)


def test_per_layer_merges_what_it_split():
    def double(updates, state, params=None):
        assert all(leaf.ndim <= 2 for leaf in jax.tree.leaves((updates, params)))
        return jax.tree.map(lambda x: 2 * x, updates), state

    tree = {"stack": jnp.arange(24.0).reshape(2, 3, 4), "flat": jnp.ones((3, 4))}
    transform = per_layer(optax.GradientTransformation(lambda p: p, double))
    updates, state = transform.update(tree, transform.init(tree), tree)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(3, 4)] * 3
    np.testing.assert_array_equal(updates["stack"], 2 * tree["stack"])
    np.testing.assert_array_equal(updates["flat"], 2 * tree["flat"])


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_moments_of_bfloat16_parameters_are_float32(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    tx = build_optimizer(config_of(name), learning_rate=1e-2, steps=STEPS)
    state = tx.init(params)
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
    updates, _ = tx.update(params, state, params)
    chex.assert_trees_all_equal_dtypes(updates, params)
