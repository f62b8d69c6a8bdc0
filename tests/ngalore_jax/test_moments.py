"""Adam in a moving subspace."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from tests.ngalore_jax import reference

HYPER = dict(b1=0.8, b2=0.95, eps=1e-6)
ROTATION = np.float32([[0.6, -0.7], [0.3, 0.5]])


def stream(steps=5):
    parts = {"w": (2, 5), "stacked": (3, 2, 5), "bias": (4,)}
    parts = {
        name: reference.gradients(i, steps, *shape)
        for i, (name, shape) in enumerate(parts.items())
    }
    return [
        {name: np.float32(part[t]) for name, part in parts.items()}
        for t in range(steps)
    ]


def change(moved):
    q = jnp.asarray(ROTATION)
    stacked = jnp.stack([q, q.T, -q])
    return ng.SubspaceChange(moved, {"w": q, "stacked": stacked, "bias": None})


def after_steps(tx, steps=4):
    state = tx.init(jax.tree.map(jnp.zeros_like, stream()[0]))
    for g in stream()[:steps]:
        _, state = tx.update(g, state)
    return state


@pytest.mark.parametrize("policy", ["keep", "rotate", "reset"])
def test_outside_low_rank_it_is_adam(policy):
    ours = ng.scale_by_subspace_adam(**HYPER, at_refresh=policy)
    theirs = optax.scale_by_adam(**HYPER)
    state = theirs.init(stream()[0])
    chex.assert_trees_all_equal_structs(ours.init(stream()[0]), state)
    for g in stream():
        u, after = ours.update(g, state)
        v, state = theirs.update(g, state)
        chex.assert_trees_all_equal((u, after), (v, state))


@pytest.mark.parametrize("moved", [True, False])
def test_keep_is_adam_at_a_refresh_too(moved):
    ours = ng.scale_by_subspace_adam(**HYPER, at_refresh="keep")
    state = after_steps(ours)
    actual = ours.update(stream()[4], state, subspace_change=change(moved))
    expected = optax.scale_by_adam(**HYPER).update(stream()[4], state)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("moved", [False, jnp.asarray(False)])
@pytest.mark.parametrize("policy", ["rotate", "reset"])
def test_nothing_happens_where_nothing_moved(policy, moved):
    ours = ng.scale_by_subspace_adam(**HYPER, at_refresh=policy)
    state = after_steps(ours)
    actual = ours.update(stream()[4], state, subspace_change=change(moved))
    expected = optax.scale_by_adam(**HYPER).update(stream()[4], state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("moved", [True, jnp.asarray(True)])
def test_rotate_turns_both_moments_before_the_step(moved):
    ours = ng.scale_by_subspace_adam(**HYPER)
    state = after_steps(ours)
    updates, after = ours.update(stream()[4], state, subspace_change=change(moved))
    q = np.float64(ROTATION)

    def check(m, v, g, q, update):
        adam = reference.Adam(**HYPER)
        adam.t, adam.m, adam.v = 4, np.float64(m), np.float64(v)
        adam.move(lambda x: q @ x, lambda x: (q * q) @ x, "rotate")
        expected = np.float32(adam(np.float64(g)))
        chex.assert_trees_all_close(update, expected, rtol=1e-4)

    check(state.mu["w"], state.nu["w"], stream()[4]["w"], q, updates["w"])
    for i, qi in enumerate([q, q.T, -q]):
        parts = (state.mu, state.nu, stream()[4], updates)
        m, v, g, u = (part["stacked"][i] for part in parts)
        check(m, v, g, qi, u)
    assert int(after.count) == 5
    assert np.min(after.nu["w"]) >= 0
    # A leaf that is not projected has nothing to rotate.
    plain, _ = optax.scale_by_adam(**HYPER).update(stream()[4], state)
    chex.assert_trees_all_close(updates["bias"], plain["bias"], rtol=1e-6)


@pytest.mark.parametrize("moved", [True, jnp.asarray(True)])
def test_reset_starts_moments_and_bias_correction_again(moved):
    ours = ng.scale_by_subspace_adam(**HYPER, at_refresh="reset")
    actual = ours.update(stream()[4], after_steps(ours), subspace_change=change(moved))
    theirs = optax.scale_by_adam(**HYPER)
    fresh = theirs.update(stream()[4], theirs.init(stream()[0]))
    chex.assert_trees_all_close(actual, fresh, rtol=1e-6)
    assert int(actual[1].count) == 1


def test_rotation_by_an_orthogonal_basis_change_keeps_a_momentum():
    """Seen in full space, ``P m``, the first moment does not move with its basis."""
    rng = np.random.default_rng(0)
    space = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    turned = space @ np.linalg.qr(rng.normal(size=(2, 2)))[0]
    ours = ng.scale_by_subspace_adam(0.9, 0.999)
    g = np.float32(space.T @ rng.normal(size=(6, 5)))
    _, state = ours.update(g, ours.init(g))
    rotation = jnp.asarray(turned.T @ space, jnp.float32)
    _, after = ours.update(
        jnp.zeros_like(g), state, subspace_change=ng.SubspaceChange(True, rotation)
    )
    chex.assert_trees_all_close(
        turned @ np.float64(after.mu), 0.9 * space @ np.float64(state.mu), atol=1e-6
    )


def test_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match=r"at_refresh must be one of .*got 'turn'"):
        ng.scale_by_subspace_adam(at_refresh="turn")
