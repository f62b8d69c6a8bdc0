"""The gradient outside the subspace: formulas, limiter, edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from ngalore_jax.residual import Columns
from tests.ngalore_jax import reference
from tests.ngalore_jax.residual_runs import only_residual, run


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_equals_the_formulas(shape):
    """Over three refreshes: neither energies nor the count start again there."""
    stream = reference.gradients(0, 8, *shape)
    rule = ng.compensation(1.5, decay=0.9, max_growth=1.05)
    updates, states = run(only_residual(rule, scale=0.5), stream)
    expected = reference.Compensation(1.5, decay=0.9, max_growth=1.05)
    for g, u, state in zip(stream, updates, states):
        if shape[0] > shape[1]:
            g, u = g.T, u.T
        p = np.asarray(state.projector, np.float64)
        r = p.T @ g
        term = expected(g, p @ r, r, p.shape[0] - 2)
        chex.assert_trees_all_close(u, 0.5 * term, atol=1e-3)
        energy = np.float32(expected.p)
        chex.assert_trees_all_close(state.residual.energy, energy, rtol=1e-3)
        chex.assert_trees_all_close(
            state.residual.norm, np.float32(expected.norm), rtol=1e-3
        )


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_fira_scales_each_column_as_its_inside_was(shape):
    """Over two refreshes, with Adam inside, against the formulas in float64."""
    stream = reference.gradients(0, 6, *shape)
    inner = ng.scale_by_subspace_adam(at_refresh="keep")

    def with_residual(residual):
        tx = ng.low_rank(inner, 2, 3, 0.5, projector=ng.svd(), residual=residual)
        return run(tx, stream)

    inside, states = with_residual(None)
    both, with_fira = with_residual(ng.fira(1.5, max_growth=1.05))
    expected = reference.Fira(1.5, max_growth=1.05)
    for g, within, u, state, kept in zip(stream, inside, both, states, with_fira):
        if shape[0] > shape[1]:
            g, within, u = g.T, within.T, u.T
        p = np.asarray(state.projector, np.float64)
        n = p.T @ within / 0.5
        term = expected(g, p, p.T @ g, n)
        chex.assert_trees_all_close(u - within, 0.5 * term, atol=1e-4)
        norm = np.float32(expected.norm)
        chex.assert_trees_all_close(kept.residual.norm, norm, rtol=1e-4)
        assert len(jax.tree.leaves(kept.residual)) == 1  # the norm and nothing else


def test_fira_adds_nothing_where_the_inside_is_silent():
    updates, _ = run(only_residual(ng.fira()), reference.gradients(0, 3, 5, 9))
    assert np.all(np.array(updates) == 0)


def test_fira_leaves_a_column_without_inside_alone():
    """Column 1 lies outside the first direction as a whole; column 0 does in part."""
    g = np.zeros((4, 6))
    g[0, 0], g[1, 0], g[1, 1] = 3.0, 1e-3, 0.1
    first = np.eye(4)[:, :1]
    tx = ng.low_rank(
        ng.scale_by_subspace_adam(),
        1,
        projector=lambda gradient, basis, count: jnp.asarray(first, basis.dtype),
        residual=ng.fira(),
    )
    updates, states = run(tx, [g, g])
    chex.assert_tree_all_finite((updates, states))
    for u in updates:
        assert u[1, 0] > 0
        assert np.all(u[:, 1] == 0)


def test_fira_does_not_amplify_by_rounding():
    """An inside of one part in 1e5 of a column counts as one in 1e3."""
    rule, at = ng.fira(), jnp.asarray(0, jnp.int32)
    columns = Columns(jnp.ones(2), jnp.array([1e-10, 0.5]), jnp.ones(2))
    arguments = (optax.MaskedNode(), jnp.zeros(()), at, columns, 4)
    weight, _, _ = rule.column_scale(rule.hyperparameters, *arguments)
    chex.assert_trees_all_close(weight, jnp.array([1e3, 2**0.5]), rtol=1e-3)


def test_entries_of_the_first_term_are_about_the_weight():
    """Bias correction: without it they would be thirty times larger."""
    (u,), _ = run(only_residual(2.0, 4), reference.gradients(0, 1, 12, 300))
    root_mean_square = np.sqrt(np.mean(u**2))
    # E of norm sqrt(p) a column, times sqrt(8), in columns of 12 entries.
    chex.assert_trees_all_close(root_mean_square, 2 * np.sqrt(8 / 12), rtol=1e-3)


def test_the_added_term_lies_outside_the_subspace():
    updates, states = run(only_residual(1.0), reference.gradients(0, 5, 6, 9))
    for u, state in zip(updates, states):
        inside = np.asarray(state.projector, np.float64).T @ u
        assert np.linalg.norm(inside) < 1e-4 * np.linalg.norm(u)


def test_the_limiter_lets_the_norm_grow_by_one_percent_a_step():
    stream = reference.gradients(0, 12, 5, 9)
    # A tenfold jump of the gradient is a jump of the term while energies lag behind.
    stream = [g * (10.0 if t >= 4 else 1.0) for t, g in enumerate(stream)]
    updates, _ = run(only_residual(1.0, gap=100), stream)
    norms = np.array([np.linalg.norm(u) for u in updates])
    growth = norms[1:] / norms[:-1]
    assert np.max(growth) < 1.01 + 1e-4
    chex.assert_trees_all_close(growth[3:7], np.full(4, 1.01), atol=1e-4)
    free, _ = run(only_residual(ng.compensation(1.0, max_growth=1e9), gap=100), stream)
    assert np.linalg.norm(free[4]) > 1.5 * np.linalg.norm(free[3])


def test_a_smaller_norm_is_let_through_and_becomes_the_limit():
    stream = reference.gradients(0, 6, 5, 9)
    stream = [g * (1.0 if t in (0, 1, 3) else 0.1) for t, g in enumerate(stream)]
    updates, _ = run(only_residual(1.0, gap=100), stream)
    norms = [np.linalg.norm(u) for u in updates]
    assert norms[2] < 0.5 * norms[1]
    chex.assert_trees_all_close(norms[3], 1.01 * norms[2], rtol=1e-4)


def test_a_step_without_gradient_adds_nothing_and_keeps_the_limit():
    stream = reference.gradients(0, 4, 5, 9)
    stream[2] = np.zeros((5, 9))
    updates, states = run(only_residual(1.0, gap=100), stream)
    assert np.all(updates[2] == 0)
    chex.assert_trees_all_equal(states[2].residual.norm, states[1].residual.norm)
    assert 0 < np.linalg.norm(updates[3]) < 1.011 * np.linalg.norm(updates[1])


def adam_with(residual, rank):
    return ng.low_rank(
        ng.scale_by_subspace_adam(),
        rank,
        3,
        0.25,
        projector=ng.svd(),
        residual=residual,
    )


def test_zero_codimension_and_zero_weight_equal_no_residual():
    stream = reference.gradients(0, 7, 4, 9)
    for residual, rank in ((2.0, 4), (0.0, 2)):
        updates, states = run(adam_with(residual, rank), stream)
        expected, none = run(adam_with(None, rank), stream)
        chex.assert_trees_all_close(updates, expected, atol=1e-5)
        assert not jax.tree.leaves(none[-1].residual)
        assert bool(jax.tree.leaves(states[-1].residual)) == (rank < 4)


def test_a_gradient_inside_the_subspace_is_not_amplified():
    rng = np.random.default_rng(0)
    span = rng.normal(size=(8, 2))
    stream = [span @ rng.normal(size=(2, 20)) for _ in range(10)]
    updates, _ = run(only_residual(1.0, gap=5), stream)
    for u in updates:
        assert np.sqrt(np.mean(u**2)) < 1e-2


def test_an_energy_that_is_rounding_does_not_set_the_weight():
    """One bit of difference between the column norms, from low-precision products."""
    total = jnp.ones(3)
    inside = 1 - jnp.array([0.5, 2.0**-24, 0.0])
    rule, step = ng.compensation(1.0), jnp.asarray(0, jnp.int32)
    columns = Columns(total, inside, direction=jnp.ones(3))
    weight, _, _ = rule.column_scale(
        rule.hyperparameters, jnp.zeros(3), jnp.zeros(()), step, columns, 4
    )
    chex.assert_trees_all_close(weight[0], jnp.sqrt(4 / 0.5), rtol=1e-4)
    assert np.max(weight) < 1.01 * np.sqrt(4 / 1e-6)


def test_columns_without_gradient_get_none():
    stream = reference.gradients(0, 5, 4, 9)
    for g in stream:
        g[:, 3] = 0
    updates, states = run(only_residual(1.0), stream)
    for u, state in zip(updates, states):
        chex.assert_tree_all_finite((u, state))
        assert np.all(u[:, 3] == 0)


def test_a_column_whose_gradient_ends_does_no_harm():
    """Its energy falls through the numbers whose inverse overflows."""
    stream = reference.gradients(0, 140, 64, 70)
    for g in stream[1:]:
        g[:, 3] = 0
    updates, states = run(only_residual(ng.compensation(1.0, 0.5)), stream)
    for u, state in zip(updates[1:], states[1:]):
        chex.assert_tree_all_finite((u, state))
        assert np.all(u[:, 3] == 0)


def test_a_number_is_the_weight_of_compensation():
    stream = reference.gradients(0, 4, 5, 9)
    by_number, _ = run(only_residual(0.4), stream)
    by_rule, _ = run(only_residual(ng.compensation(0.4)), stream)
    twice, _ = run(only_residual(ng.compensation(0.8)), stream)
    chex.assert_trees_all_equal(by_number, by_rule)
    chex.assert_trees_all_close(twice, [2 * u for u in by_number], atol=1e-5)


def test_a_rule_of_ones_own():
    """``d = 1`` puts the whole gradient back: with no inside that leaves G - P R."""

    def column_scale(numbers, energy, norm, count, columns, codimension):
        del count, codimension
        return numbers[0] * jnp.ones_like(columns.inside), energy, norm

    stream = reference.gradients(0, 4, 5, 9)
    updates, states = run(only_residual(ng.Residual(column_scale, (1.0,))), stream)
    for g, u, state in zip(stream, updates, states):
        p = np.asarray(state.projector, np.float64)
        chex.assert_trees_all_close(u, g - p @ (p.T @ g), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(weight=-1.0), "weight must be at least 0, got -1.0"),
        (dict(decay=1.0), "decay must be in .0, 1., got 1.0"),
        (dict(decay=-0.1), "decay must be in"),
        (dict(max_growth=1.0), "max_growth must be above 1, got 1.0"),
    ],
)
def test_wrong_arguments_say_what_is_needed(arguments, match):
    with pytest.raises(ValueError, match=match):
        ng.compensation(**arguments)
    if "decay" not in arguments:
        with pytest.raises(ValueError, match=match):
            ng.fira(**arguments)
