"""The orthogonal residual: formulas in float64, spectrum, storage, meshes, edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from ngalore_jax import storage
from tests.ngalore_jax import reference
from tests.ngalore_jax.residual_runs import only_residual, run
from tests.ngalore_jax.transforms import low_rank_state

EXACT = ng.orthogonal(1.5, 0.8, momentum_dtype=None)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_equals_the_formulas(shape):
    """Over two refreshes, which do not touch the momentum."""
    stream = reference.gradients(0, 6, *shape)
    updates, states = run(only_residual(EXACT, scale=0.5), stream)
    expected = reference.Orthogonal(1.5, 0.8)
    for g, u, state in zip(stream, updates, states, strict=True):
        if shape[0] > shape[1]:
            g, u = g.T, u.T
        p = np.asarray(state.projector, np.float64)
        chex.assert_trees_all_close(u, 0.5 * expected(g, p), rtol=1e-3, atol=1e-3)
        assert [x.shape for x in jax.tree.leaves(state.residual)] == [shape]


def test_every_direction_outside_has_about_the_same_length():
    updates, states = run(only_residual(EXACT), reference.gradients(0, 4, 8, 24))
    for u, state in zip(updates, states, strict=True):
        p = np.asarray(state.projector, np.float64)
        assert np.linalg.norm(p.T @ u) < 1e-2 * np.linalg.norm(u)
        values = np.linalg.svd(u, compute_uv=False) / (1.5 * np.sqrt(24))
        assert np.all((values[:6] > 0.6) & (values[:6] < 1.3))
        assert np.all(values[6:] < 1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_leading_directions_stay_out_also_with_a_basis_in_few_bits(dtype):
    """Columns that are orthonormal to a percent only let a percent of them through."""
    dice = np.random.default_rng(0)
    left, right = dice.normal(size=(64, 4)), dice.normal(size=(4, 4, 96))
    stream = list(10 * left @ right + dice.normal(size=(4, 64, 96)))
    tx = only_residual(EXACT, rank=4, basis_dtype=dtype)
    updates, states = run(tx, stream)
    for u, state in zip(updates, states, strict=True):
        codec = storage.Codec(jnp.dtype(dtype), axes=(-1,))
        p, _ = np.linalg.qr(codec.decode(state.projector, jnp.float32))
        assert np.linalg.norm(p.T @ u) < 1e-2 * np.linalg.norm(u)
    # And a gradient that lies in the subspace leaves nothing but rounding.
    updates, _ = run(tx, list(left @ right))
    assert not np.any(updates)


def test_with_adam_inside_it_is_the_sum_of_both():
    stream = reference.gradients(0, 4, 5, 9)

    def with_residual(residual):
        adam = ng.scale_by_subspace_adam()
        return run(ng.low_rank(adam, 2, 3, 0.25, residual=residual), stream)[0]

    outside = run(only_residual(EXACT, scale=0.25), stream)[0]
    expected = [a + b for a, b in zip(with_residual(None), outside, strict=True)]
    chex.assert_trees_all_close(with_residual(EXACT), expected, atol=1e-5)


def test_momentum_in_int8_follows_the_exact_one():
    stream = reference.gradients(0, 60, 6, 40)
    exact = run(only_residual(ng.orthogonal(momentum_dtype=None)), stream)[1]
    small = run(only_residual(ng.orthogonal()), stream)[1]
    kept = small[-1].residual.momentum
    assert (kept.values.dtype, kept.values.shape) == (jnp.int8, (6, 40))
    assert kept.scale.shape == (40,)  # a block is a column of the projected side
    levels = np.asarray(kept.values, np.float64)
    decoded = levels * np.abs(levels) * np.asarray(kept.scale, np.float64)
    target = np.asarray(exact[-1].residual.momentum, np.float64)
    # Some three roundings, of 1 % of an entry each, are remembered. To the nearest, or
    # with the same numbers every step, they would add up to more.
    assert np.linalg.norm(decoded - target) < 0.022 * np.linalg.norm(target)
    half = run(only_residual(ng.orthogonal(momentum_dtype="bfloat16")), stream)[1]
    kept = half[-1].residual.momentum
    assert kept.dtype == jnp.bfloat16
    difference = np.asarray(kept, np.float64) - target
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(target)


def test_state_is_a_byte_an_element():
    w = jax.ShapeDtypeStruct((4, 64, 256), "float32")
    tx = only_residual(ng.orthogonal())
    size = ng.state_report(jax.eval_shape(tx.init, w))["residual"]
    assert size == 4 * (64 * 256 + 2 * 256)


def test_a_matrix_without_a_finite_gradient_coasts():
    """On its momentum, as with a zero gradient; the other one in the stack steps."""
    stream = [np.stack([g, g[::-1]]) for g in reference.gradients(0, 4, 5, 9)]
    zero, bad = [[g.copy() for g in stream] for _ in range(2)]
    zero[2][0], bad[2][0, 1, 1] = 0.0, np.nan
    expected, _ = run(only_residual(EXACT), zero)
    updates, states = run(only_residual(EXACT), bad)
    chex.assert_tree_all_finite((updates, states[-1]))
    chex.assert_trees_all_close(updates, expected, atol=1e-5)
    whole, _ = run(only_residual(EXACT), stream)
    chex.assert_trees_all_close(updates[2][1], whole[2][1], atol=1e-5)


def test_nothing_is_outside_a_subspace_that_is_all_of_the_space():
    """No update of rounding, blown up to full size, and no state for it."""
    tx = only_residual(ng.orthogonal(), rank=5)
    updates, states = run(tx, reference.gradients(0, 4, 5, 9))
    assert not np.any(updates)
    assert not jax.tree.leaves(states[-1].residual)


def test_what_lies_in_the_subspace_leaves_nothing_outside():
    """As a gradient of low rank does, but for rounding of one part in a million."""
    dice = np.random.default_rng(0)
    left, right = dice.normal(size=(64, 2)), dice.normal(size=(4, 2, 96))
    updates, _ = run(only_residual(EXACT), list(left @ right))
    assert not np.any(updates)
    # A thousandth of it outside is no rounding.
    stream = list(left @ right + 1e-3 * dice.normal(size=(4, 64, 96)))
    updates, _ = run(only_residual(EXACT), stream)
    assert np.std(updates[-1]) > 1


def test_no_gradient_no_update():
    updates, _ = run(only_residual(ng.orthogonal()), [np.zeros((5, 9))] * 2)
    assert np.all(np.array(updates) == 0)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P(None, None, "x"), P(None, "x"), P("x")], ids=str)
def test_on_eight_devices(kind, spec):
    """The numbers of one device; the momentum lies as the leaf does."""
    stream = [g.astype(np.float32) for g in reference.gradients(0, 4, 8, 8, 16)]
    tx = ng.natural_galore(0.1, 2, 2, history_dtype=None, residual=EXACT)

    def train(place):
        update, params = jax.jit(tx.update), place(np.zeros((8, 8, 16), np.float32))
        state, updates = tx.init(params), []
        for g in stream:
            u, state = update(place(g), state)
            updates.append(np.asarray(u))
        return updates, state

    expected, _ = train(jnp.asarray)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        updates, state = train(lambda x: jax.device_put(x, sharding))
    momentum = low_rank_state(state).residual.momentum
    assert momentum.sharding.is_equivalent_to(sharding, 3)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-4)


def test_int8_momentum_lies_as_the_leaf_does():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    w = jax.ShapeDtypeStruct(
        (8, 16), "float32", sharding=NamedSharding(mesh, P(None, "x"))
    )
    with jax.set_mesh(mesh):
        state = jax.eval_shape(only_residual(ng.orthogonal()).init, w)
    values, scale = state.residual.momentum
    assert values.sharding.spec == P(None, "x") and scale.sharding.spec == P("x")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(weight=-1.0), "weight must be at least 0, got -1.0"),
        (dict(decay=1.0), "decay must be in .0, 1., got 1.0"),
        (dict(iterations=0), "iterations must be at least 1, got 0"),
        (dict(momentum_dtype="int4"), "momentum_dtype must be None"),
    ],
)
def test_wrong_arguments_say_what_is_needed(arguments, match):
    with pytest.raises(ValueError, match=match):
        ng.orthogonal(**arguments)
