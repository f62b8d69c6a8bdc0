"""``natural_galore`` and ``galore``: the chains they are, decay, schedules, paper."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from tests.ngalore_jax import reference
from tests.ngalore_jax.transforms import low_rank_state

SHAPES = {"w": (5, 9), "embed": (7, 4), "bias": (5,)}
LABELS = {"w": "matrix", "embed": "other", "bias": "other"}


def params():
    rng = np.random.default_rng(7)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def stream(steps):
    parts = {
        name: reference.gradients(i, steps, *shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return [
        {name: np.float32(part[t]) for name, part in parts.items()}
        for t in range(steps)
    ]


def run(tx, steps=5):
    """Updates at fixed parameters."""
    update, state, out = jax.jit(tx.update), tx.init(params()), []
    for g in stream(steps):
        u, state = update(g, state, params())
        out.append(u)
    return out


@functools.cache
def baseline():
    """``natural_galore`` at learning rate 1, shared by the tests that scale it."""
    return run(ng.natural_galore(1.0, 2, 3))


def by_hand(matrix, learning_rate, decay=None):
    return optax.chain(
        optax.partition({"matrix": matrix, "other": optax.scale_by_adam()}, LABELS),
        decay or optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def test_natural_galore_is_its_chain():
    inner = optax.chain(
        ng.scale_by_natural_gradient(8, 1e-3, history_dtype="int8"),
        ng.scale_by_subspace_adam(),
    )
    expected = by_hand(ng.low_rank(inner, 2, 3, 0.25, residual=ng.orthogonal()), 0.1)
    actual = ng.natural_galore(0.1, rank=2, update_proj_gap=3)
    chex.assert_trees_all_close(run(actual), run(expected), rtol=1e-5, atol=1e-7)


def test_galore_is_its_chain():
    inner = ng.scale_by_subspace_adam()
    expected = by_hand(ng.low_rank(inner, 2, 3, 0.25), 0.1)
    actual = ng.galore(0.1, rank=2, update_proj_gap=3)
    chex.assert_trees_all_close(run(actual), run(expected), rtol=1e-5, atol=1e-7)


def test_every_argument_reaches_its_part():
    inner = optax.chain(
        ng.scale_by_natural_gradient(
            3,
            0.5,
            relative_damping=True,
            at_refresh="keep",
            history_dtype=jnp.bfloat16,
        ),
        ng.scale_by_subspace_adam(0.8, 0.95, 1e-4, at_refresh="reset"),
    )
    names = ng.MatrixDimensionNumbers(0, 1)
    settings = dict(
        projector=ng.eigh(),
        residual=0.5,
        side="larger",
        clip_rank=True,
        weight_dimension_numbers=names,
    )
    matrix = ng.low_rank(inner, 6, 2, 0.7, **settings)
    labels = {**LABELS, "embed": "matrix"}
    expected = optax.chain(
        optax.partition(
            {"matrix": matrix, "other": optax.scale_by_adam(0.8, 0.95, 1e-4)}, labels
        ),
        optax.add_decayed_weights(0.3, only_w),
        optax.scale_by_learning_rate(0.1),
    )
    actual = ng.natural_galore(
        0.1,
        6,
        2,
        0.7,
        3,
        0.5,
        0.8,
        0.95,
        1e-4,
        0.3,
        only_w,
        relative_damping=True,
        history_at_refresh="keep",
        moments_at_refresh="reset",
        history_dtype=jnp.bfloat16,
        **settings,
    )
    chex.assert_trees_all_close(run(actual), run(expected), rtol=1e-4, atol=1e-5)


def only_w(tree):
    return {name: name == "w" for name in tree}


def test_signatures_hold_the_contract():
    natural = inspect.signature(ng.natural_galore).parameters
    defaults = {name: p.default for name, p in natural.items()}
    contract = dict(
        rank=None,
        update_proj_gap=3,
        scale=0.25,
        history=8,
        damping=1e-3,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        mask=None,
        projector=None,
    )
    assert list(natural)[: len(contract) + 1] == ["learning_rate", *contract]
    assert {name: defaults[name] for name in contract} == contract
    galore = inspect.signature(ng.galore).parameters
    assert list(galore)[:4] == ["learning_rate", "rank", "update_proj_gap", "scale"]


ADAM = dict(b1=0.9, b2=0.999, eps=1e-8)
GALORE = dict(rank=128, update_proj_gap=200, residual=None, basis_dtype=None)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (ng.galore, ADAM | GALORE | dict(scale=0.25, weight_decay=0.0)),
        (ng.low_rank, GALORE | dict(scale=1.0, side="smaller", clip_rank=False)),
        (ng.natural_galore, dict(history_dtype="int8", moments_dtype=None)),
        (ng.scale_by_natural_gradient, dict(history=20, damping=1e-3)),
        (ng.scale_by_subspace_adam, ADAM | dict(at_refresh="rotate")),
        (
            ng.orthogonal,
            dict(weight=1.0, decay=0.9, iterations=5, momentum_dtype="int8"),
        ),
        (ng.compensation, dict(weight=1.0, decay=0.999, max_growth=1.01)),
        (ng.fira, dict(weight=1.0, max_growth=1.01)),
    ],
)
def test_defaults(of, expected):
    parameters = inspect.signature(of).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_arguments_of_galore_reach_their_part():
    inner = ng.scale_by_subspace_adam(
        0.8, 0.95, 1e-4, at_refresh="keep", moments_dtype="int8"
    )
    settings = dict(basis_dtype="bfloat16", side="right", residual=ng.orthogonal())
    labels = {"matrix": ng.low_rank(inner, 2, 2, 0.7, **settings)}
    expected = optax.chain(
        optax.partition(
            labels | {"other": optax.scale_by_adam(0.8, 0.95, 1e-4)}, LABELS
        ),
        optax.scale_by_learning_rate(0.1),
    )
    actual = ng.galore(
        *(0.1, 2, 2, 0.7, 0.8, 0.95, 1e-4),
        moments_at_refresh="keep",
        moments_dtype="int8",
        **settings,
    )
    chex.assert_trees_all_close(run(actual), run(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alias", [ng.natural_galore, ng.galore])
def test_a_function_may_choose_leaves_by_their_shape(alias):
    names = ng.MatrixDimensionNumbers()

    def choose(tree):
        return {name: names if x.ndim == 2 else None for name, x in tree.items()}

    tree = {"w": names, "embed": names, "bias": None}
    by_function, by_tree = (
        run(alias(0.1, 2, 2, weight_dimension_numbers=given), 2)
        for given in (choose, tree)
    )
    chex.assert_trees_all_equal(by_function, by_tree)


@pytest.mark.parametrize("alias", [ng.natural_galore, ng.galore])
def test_averages_of_bfloat16_leaves_do_not_stand_still(alias):
    """A decay of 0.999 moves one by less than bfloat16 can tell from nothing."""
    weights = {"bias": jnp.ones(3, jnp.bfloat16)}
    tx = alias(0.125, 2)

    def step(state, _):
        updates, state = tx.update(weights, state, weights)
        return state, updates["bias"]

    state, updates = jax.lax.scan(step, tx.init(weights), length=2000)
    assert updates.dtype == jnp.bfloat16
    chex.assert_trees_all_close(updates, jnp.full_like(updates, -0.125), rtol=1e-2)
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert floats and all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize("mask", [None, {**dict.fromkeys(SHAPES, True), "bias": False}])
def test_weight_decay_is_decoupled_and_acts_in_full_space(mask):
    decayed = run(ng.natural_galore(1.0, 2, 3, weight_decay=0.5, mask=mask), 2)
    for u, v in zip(baseline(), decayed):
        for name, w in params().items():
            expected = 0.0 if mask and not mask[name] else -0.5 * w
            chex.assert_trees_all_close(
                np.asarray(v[name] - u[name]), expected + np.zeros_like(w), atol=1e-6
            )


def test_each_kind_of_leaf_decays_at_its_own_rate():
    rate, other = optax.linear_schedule(1.0, 0.0, 4), 0.25
    plain, decayed = (
        run(
            ng.natural_galore(
                rate, 2, 3, adam_learning_rate=other, weight_decay=decay, mask=only_w
            )
        )
        for decay in (0.0, optax.linear_schedule(0.4, 0.8, 4))
    )
    for t, (u, v) in enumerate(zip(plain, decayed)):
        for name, w in params().items():
            factor = (1 - t / 4) * (0.4 + 0.1 * t) if name == "w" else 0.0
            chex.assert_trees_all_close(v[name], u[name] - factor * w, atol=1e-6)
    everywhere = run(
        ng.galore(1.0, 2, 3, adam_learning_rate=other, weight_decay=0.5), 2
    )
    none = run(ng.galore(1.0, 2, 3, adam_learning_rate=other), 2)
    for u, v in zip(none, everywhere):
        chex.assert_trees_all_close(
            v["bias"], u["bias"] - other * 0.5 * params()["bias"], atol=1e-6
        )


def test_without_a_rank_it_is_a_sixteenth_of_the_smaller_side():
    params = {"w": jnp.zeros((48, 64)), "small": jnp.zeros((3, 8, 10))}
    state = low_rank_state(ng.natural_galore(0.1).init(params))
    assert state.projector["w"].shape == (48, 3)
    assert state.projector["small"].shape == (3, 8, 1)
    larger = low_rank_state(ng.natural_galore(0.1, side="larger").init(params))
    assert larger.projector["w"].shape == (64, 3)


def test_a_mask_may_be_a_function_of_the_parameters():
    tree = {name: len(shape) == 2 for name, shape in SHAPES.items()}
    by_tree = ng.galore(0.1, 2, 3, weight_decay=0.5, mask=tree)
    by_function = ng.galore(
        0.1,
        2,
        3,
        weight_decay=0.5,
        mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    )
    chex.assert_trees_all_equal(run(by_tree, 2), run(by_function, 2))


def test_learning_rates_may_be_schedules():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    scheduled = run(ng.natural_galore(schedule, 2, 3))
    for t, (u, v) in enumerate(zip(scheduled, baseline())):
        scaled = jax.tree.map(lambda x, t=t: (1 - t / 4) * x, v)
        chex.assert_trees_all_close(u, scaled, rtol=1e-5)


@pytest.mark.parametrize("other", [0.3, optax.linear_schedule(0.3, 0.0, 3)])
def test_adam_learning_rate_is_for_the_leaves_that_are_not_projected(other):
    updates = run(ng.natural_galore(0.1, 2, 3, adam_learning_rate=other))
    for t, (u, v) in enumerate(zip(updates, baseline())):
        rate = other(t) if callable(other) else other
        for name, label in LABELS.items():
            factor = 0.1 if label == "matrix" else rate
            chex.assert_trees_all_close(u[name], factor * v[name], rtol=1e-5, atol=1e-7)


def test_leaves_that_are_not_projected_take_adam():
    for name in ("embed", "bias"):
        adam = reference.Adam()
        for g, u in zip(stream(5), baseline()):
            expected = np.float32(-adam(np.float64(g[name])))
            chex.assert_trees_all_close(u[name], expected, rtol=1e-4, atol=1e-6)


def test_a_bad_gradient_of_a_leaf_with_adam_counts_as_zero():
    tx = ng.natural_galore(0.1, 2, 3)
    update = jax.jit(tx.update)
    bad, zeroed = stream(1)[0], stream(1)[0]
    bad["embed"][2, 1] = np.nan
    zeroed["embed"][:] = 0
    state = tx.init(params())
    chex.assert_trees_all_equal(
        update(bad, state, params()), update(zeroed, state, params())
    )


def test_the_paper_preset_is_the_published_method():
    """Nothing follows the basis, eps 1e-6, decay after the update; three refreshes."""
    published = dict(
        update_proj_gap=200, scale=0.25, history=20, damping=1e-3, eps=1e-6
    )
    assert {name: ng.PAPER[name] for name in published} == published
    settings = {**ng.PAPER, "update_proj_gap": 3, "history": 4}
    gradients = {
        "tall": reference.gradients(0, 8, 9, 5),
        "wide": reference.gradients(1, 8, 5, 9),
    }
    weights = {name: g[0] for name, g in gradients.items()}
    matrices = {
        name: reference.Matrix(
            2, 3, 0.25, left=name == "wide", history=4, damping=1e-3, eps=1e-6
        )
        for name in gradients
    }
    with jax.enable_x64(True):
        tx = ng.natural_galore(0.01, 2, weight_decay=0.1, **settings)
        update, state = jax.jit(tx.update), tx.init(weights)
        for t in range(8):
            g = {name: stream[t] for name, stream in gradients.items()}
            updates, state = update(g, state, weights)
            for name, matrix in matrices.items():
                basis = np.asarray(basis_of(state)[name])
                direction = matrix.step(g[name], oriented_like=basis)
                expected = -0.01 * (direction + 0.1 * weights[name])
                actual = np.asarray(updates[name])
                chex.assert_trees_all_close(actual, expected, atol=1e-8)


def basis_of(state):
    (low_rank,) = [
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, ng.LowRankState)
        )
        if isinstance(node, ng.LowRankState)
    ]
    return low_rank.projector


def test_the_preset_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        ng.PAPER["scale"] = 1.0


@pytest.mark.parametrize("alias", [ng.natural_galore, ng.galore])
def test_aliases_pass_errors_on(alias):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        alias(0.1, rank=0)
    with pytest.raises(ValueError, match="at_refresh must be one of"):
        alias(0.1, rank=2, moments_at_refresh="turn")
    for name, value in (("b1", 1.0), ("b2", -0.1), ("eps", -1e-8)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            alias(0.1, rank=2, **{name: value})
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got"):
        alias(0.1, rank=2, weight_decay=-0.1)
    with pytest.raises(ValueError, match="rank=6 is larger than a side"):
        alias(0.1, rank=6).init(params())
