"""Microbatches added up inside the subspace: the same steps from less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from tests.ngalore_jax.transforms import gradients, low_rank_state, params

WINDOW, GAP, RANK = 3, 2, 2


def two_bases(gradient, basis, count):
    """One basis at the first refresh, another at every later one."""
    del gradient
    first, second = (
        jnp.linalg.qr(jax.random.normal(jax.random.key(seed), basis.shape))[0]
        for seed in (0, 1)
    )
    return jnp.where(count == 0, first, second)


def natural(**changes):
    settings = dict(
        learning_rate=optax.linear_schedule(0.1, 0.01, 6),
        rank=RANK,
        update_proj_gap=GAP,
        history=3,
        damping=1.0,
        weight_decay=0.1,
        projector=two_bases,
        residual=None,
    )
    return ng.natural_galore(**{**settings, **changes})


def test_a_window_of_microbatches_is_one_step_on_their_mean():
    """Over two refreshes; moments, history, decay and learning rate step once a window.

    The projections are linear, so the mean of them is that of the gradients.
    """
    weights = {**params(), "embed": jnp.ones((5, 4))}
    pieces = gradients(weights, steps=4 * WINDOW)
    whole, parts = natural(), natural(accumulation_steps=WINDOW)
    expected = got = weights
    state, accumulated = whole.init(weights), parts.init(weights)
    update, add = jax.jit(whole.update), jax.jit(parts.update)
    for start in range(0, len(pieces), WINDOW):
        window = pieces[start : start + WINDOW]
        mean = jax.tree.map(lambda *x: sum(x) / WINDOW, *window)
        updates, state = update(mean, state, expected)
        expected = optax.apply_updates(expected, updates)
        for i, piece in enumerate(window):
            updates, accumulated = add(piece, accumulated, got)
            got = optax.apply_updates(got, updates)
            if i < WINDOW - 1:
                assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    assert low_rank_state(accumulated).count == 4 * WINDOW


def test_the_basis_is_the_first_microbatchs():
    g = jnp.outer(jnp.arange(1.0, 5), jnp.ones(6))  # rank one
    tx = ng.low_rank(optax.identity(), rank=1, update_proj_gap=1, accumulation_steps=2)
    updates, state = tx.update(g, tx.init(g))
    assert not jnp.any(updates)
    updates, state = tx.update(jnp.zeros_like(g), state)
    np.testing.assert_allclose(updates, g / 2, rtol=1e-5)
    # The next window's first gradient moves the basis, not the one after it.
    other = jnp.outer(jnp.array([4.0, 3, -2, -1]), jnp.ones(6))
    _, state = tx.update(other, state)
    basis = state.projector
    _, state = tx.update(g, state)
    np.testing.assert_array_equal(state.projector, basis)
    np.testing.assert_allclose(jnp.abs(basis.T @ other), 5.4772 * 1.0, rtol=1e-3)


def test_what_is_kept_has_the_size_of_the_subspace():
    weights = {"w": jnp.zeros((4, 64, 128))}
    sizes = [
        ng.state_bytes(jax.eval_shape(natural(accumulation_steps=k).init, weights))
        for k in (None, WINDOW)
    ]
    more = 4 * 4 * (RANK * 128 + RANK * RANK)
    assert more <= sizes[1] - sizes[0] < more + 32  # and a few counters


@pytest.mark.parametrize("asked", [1, WINDOW])
def test_two_programs_give_the_steps_of_one(asked):
    """A refresh that is asked for in all of a window is one of its beginning."""
    weights = params()
    tx = natural(accumulation_steps=WINDOW)
    state = split = tx.init(weights)
    for i, gradient in enumerate(gradients(weights, steps=3 * WINDOW)):
        updates, state = tx.update(gradient, state, weights)
        due = i % (GAP * WINDOW) < asked
        same, split = tx.update(gradient, split, weights, refresh=due)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(same)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    """Sums are kept in float32 at least; types of state and updates are stable."""
    with jax.enable_x64(dtype == jnp.float64):
        weights = params(dtype)
        tx = natural(accumulation_steps=WINDOW, history_dtype=None)
        state = tx.init(weights)
        out = jax.eval_shape(tx.update, weights, state, weights)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, (weights, state))
        inexact = {
            leaf.dtype
            for leaf in jax.tree.leaves(state)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        }
    assert inexact == {jnp.promote_types(dtype, jnp.float32)}


def test_sharded_like_everything_else():
    """Nothing changes its sharding in a scan; the numbers are those of one device."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = natural(accumulation_steps=2)
    pieces = jax.tree.map(lambda *x: jnp.stack(x), *gradients(params(), steps=4))

    def run(weights, pieces):
        def body(carry, gradient):
            weights, state = carry
            updates, state = tx.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        carry, _ = jax.lax.scan(body, (weights, tx.init(weights)), pieces)
        return carry

    expected, _ = jax.jit(run)(params(), pieces)
    specs = {"stack": P("x", None, None), "bias": P("x")}
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(v, specs[k]) for k, v in params().items()}
        spread = {k: jax.device_put(v, P(None, *specs[k])) for k, v in pieces.items()}
        weights, state = jax.jit(run)(placed, spread)
    for name, spec in specs.items():
        assert weights[name].sharding.spec == spec
        np.testing.assert_allclose(weights[name], expected[name], rtol=1e-4, atol=1e-6)
    (total,) = jax.tree.leaves(low_rank_state(state).inner.total)
    assert total.sharding.spec == P("x", None, None)


def test_mistakes():
    with pytest.raises(TypeError, match="static_args"):
        natural(accumulation_steps=jnp.array(2))
    with pytest.raises(ValueError, match="residual needs the whole gradient"):
        natural(accumulation_steps=2, residual=1.0)
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1"):
        natural(accumulation_steps=0)
