"""Zero, NaN, Inf and huge gradients: what they do, and what they leave alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from tests.ngalore_jax import reference

GAP, STEPS = 3, 8
STACKED, OTHER, BIAS = (3, 5, 7), (6, 4), (5,)
BAD = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 1e20}


def inner():
    return optax.chain(
        ng.scale_by_natural_gradient(3, 0.1), ng.scale_by_subspace_adam()
    )


@pytest.fixture(scope="module")
def stepper():
    tx = ng.low_rank(inner(), 2, GAP, residual=2.0)
    return tx, jax.jit(tx.update)


def stream():
    """Gradient trees; a fresh copy each time, for the tests to spoil."""
    parts = {
        name: reference.gradients(i, STEPS, *shape)
        for i, (name, shape) in enumerate(
            {"stacked": STACKED, "other": OTHER, "bias": BIAS}.items()
        )
    }
    return [
        {name: np.float32(part[t]) for name, part in parts.items()}
        for t in range(STEPS)
    ]


def run(stepper, gradients):
    tx, update = stepper
    state = tx.init(jax.tree.map(jnp.zeros_like, gradients[0]))
    updates, states = [], [state]
    for g in gradients:
        u, state = update(g, state)
        updates.append(jax.tree.map(np.asarray, u))
        states.append(state)
    return updates, states


@pytest.mark.parametrize("step", [0, 3, 4], ids=["first", "refresh", "between"])
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_matrix_of_a_stack(stepper, kind, step):
    clean, bad, zeroed = stream(), stream(), stream()
    zeroed[step]["stacked"][1] = 0.0
    if kind == "zero":
        bad[step]["stacked"][1] = 0.0
    else:  # one entry, and none of the rows that the first basis reads
        bad[step]["stacked"][1, 4, 3] = BAD[kind]
    updates, states = run(stepper, bad)
    chex.assert_tree_all_finite((updates, states))
    expected, expected_states = run(stepper, clean)

    # The bad matrix counts as a zero gradient, from here on, bit for bit.
    as_zero, as_zero_states = run(stepper, zeroed)
    chex.assert_trees_all_equal(updates, as_zero)
    chex.assert_trees_all_equal(states, as_zero_states)

    # It keeps its basis at that step ...
    bases = [np.asarray(s.projector["stacked"][1]) for s in states]
    chex.assert_trees_all_equal(bases[step + 1], bases[step])
    # ... and finds one again at the next refresh.
    after = GAP * (step // GAP + 1)
    g = bad[after]["stacked"][1]
    assert np.any(bases[after + 1] != bases[step])
    if step == 0:  # a cold start, as good as the first would have been
        captured = reference.captured_energy(bases[after + 1], g)
        assert captured > 0.97 * reference.best_energy(g, 2)

    # The other matrices of the stack and the other leaves never notice.
    for t in range(STEPS):
        for index in (0, 2):
            chex.assert_trees_all_close(
                updates[t]["stacked"][index],
                expected[t]["stacked"][index],
                atol=1e-6,
            )
        for name in ("other", "bias"):
            chex.assert_trees_all_close(updates[t][name], expected[t][name], atol=1e-6)
    for index in (0, 2):
        chex.assert_trees_all_close(
            states[-1].projector["stacked"][index],
            expected_states[-1].projector["stacked"][index],
            atol=1e-6,
        )


def test_the_update_of_a_bad_matrix(stepper):
    """Zero at count 0; later Adam's momentum moves on, inside the old subspace."""
    for step in (0, 4):
        gradients = stream()
        gradients[step]["stacked"][1, 0, 0] = np.nan
        updates, states = run(stepper, gradients)
        u = np.float64(updates[step]["stacked"][1])
        if step == 0:
            assert np.all(u == 0)
            continue
        basis = np.asarray(states[step].projector["stacked"][1], np.float64)
        chex.assert_trees_all_close(basis @ (basis.T @ u), u, atol=1e-5)
        assert np.linalg.norm(u) > 0.1


@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
def test_a_bad_leaf_that_is_not_projected(stepper, kind):
    bad, zeroed = stream(), stream()
    bad[2]["bias"][1] = BAD[kind]
    zeroed[2]["bias"][:] = 0.0
    chex.assert_trees_all_equal(run(stepper, bad), run(stepper, zeroed))


def test_everything_zero_from_the_start(stepper):
    zeros = [jax.tree.map(np.zeros_like, g) for g in stream()]
    updates, states = run(stepper, zeros)
    for u in updates:
        chex.assert_trees_all_equal(u, jax.tree.map(np.zeros_like, u))
    chex.assert_trees_all_equal(states[-1].projector, states[0].projector)
    chex.assert_tree_all_finite(states[-1])


@pytest.mark.parametrize(
    "projector", [ng.subspace_iteration(), ng.svd(), ng.eigh(), ng.gaussian()]
)
@pytest.mark.parametrize("kind", BAD)
def test_every_projector_keeps_the_old_basis(projector, kind):
    tx = ng.low_rank(optax.identity(), 2, 1, projector=projector)
    update = jax.jit(tx.update)
    g = np.float32(reference.gradients(0, 1, 2, 5, 7)[0])
    _, state = update(g, tx.init(g))
    bad = g.copy()
    bad[0] = BAD[kind]
    u, after = update(bad, state)
    chex.assert_trees_all_equal(after.projector[0], state.projector[0])
    chex.assert_trees_all_equal(u[0], jnp.zeros((5, 7)))
    chex.assert_tree_all_finite((u, after))
    assert np.linalg.norm(u[1]) > 1


@pytest.mark.parametrize("moments_dtype", [None, "int8"])
def test_a_huge_gradient_does_not_stop_galore_for_good(moments_dtype):
    tx = ng.galore(1e-3, rank=2, update_proj_gap=2, moments_dtype=moments_dtype)
    update = jax.jit(tx.update)
    gradients = stream()
    state = tx.init(gradients[0])
    gradients[3] = jax.tree.map(lambda g: g * np.float32(1e20), gradients[3])
    for g in gradients:
        u, state = update(g, state)
        chex.assert_tree_all_finite((u, state))
    for leaf in jax.tree.leaves(u):
        assert jnp.max(jnp.abs(leaf)) > 1e-5


def test_ordinary_gradients_in_float16_are_not_huge():
    tx = ng.galore(1e-3, rank=2)
    g = jax.tree.map(lambda x: np.float16(100 * x), stream()[0])
    u, _ = tx.update(g, tx.init(g))
    for leaf in jax.tree.leaves(u):
        assert jnp.max(jnp.abs(leaf)) > 1e-4


@pytest.mark.parametrize("policy", ["keep", "rotate", "reset"])
def test_bad_at_a_refresh_leaves_the_moments_of_that_matrix_finite(policy):
    tx = ng.low_rank(
        optax.chain(
            ng.scale_by_natural_gradient(3, 0.1, at_refresh=policy),
            ng.scale_by_subspace_adam(at_refresh=policy),
        ),
        2,
        2,
    )
    update = jax.jit(tx.update)
    gradients = [np.float32(g) for g in reference.gradients(0, 4, 5, 7)]
    gradients[2][:] = np.nan
    state = tx.init(gradients[0])
    for g in gradients:
        u, state = update(g, state)
        chex.assert_tree_all_finite((u, state))


def test_apply_if_finite_skips_the_whole_step_instead():
    tx = optax.apply_if_finite(ng.low_rank(inner(), 2, GAP), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    gradients = stream()
    _, state = update(gradients[0], tx.init(gradients[0]))
    gradients[1]["bias"][0] = np.nan
    u, after = update(gradients[1], state)
    chex.assert_trees_all_equal(u, jax.tree.map(jnp.zeros_like, u))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
