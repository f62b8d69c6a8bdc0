"""Tucker cores of a tree: bad gradients, early decisions, types, shardings."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from ngalore_jax.two_sided import TwoSidedState, two_sided
from tests.ngalore_jax import published

GAP, STEPS = 2, 3
STACK = (2, 4, 6)


@functools.cache
def stepper(factor_learning_rate=None):
    """Compiled once for all tests; inner's 2 times 0.5 are 1."""
    tx = two_sided(optax.scale(2.0), 2, GAP, 0.5, None, factor_learning_rate)
    return tx, jax.jit(tx.update, static_argnames="refresh")


def stream():
    rng = np.random.default_rng(3)
    return [{"stack": np.float32(rng.normal(size=STACK))} for _ in range(STEPS)]


def run(stepper, gradients):
    tx, update = stepper
    state = tx.init(gradients[0])
    updates, states = [], [state]
    for gradient in gradients:
        u, state = update(gradient, state)
        updates.append(jax.tree.map(np.asarray, u))
        states.append(state)
    return updates, states


def of_stack(state):
    """Factors of the leaf of that name, one a mode."""
    return [tree["stack"] for tree in state.factors]


def test_inner_sees_one_vector_a_tensor():
    seen = []

    def update(updates, state, params=None):
        seen.append(jax.tree.map(jnp.shape, updates))
        return updates, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    tx = two_sided(inner, 3, GAP, 1.0)
    shapes = {"stack": STACK, "conv": (2, 2, 4, 8)}
    gradients = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    jax.eval_shape(lambda g: tx.update(g, tx.init(g)), gradients)
    assert seen == [{"stack": (2, 1, 9), "conv": (1, 2 * 2 * 3 * 3)}]


def test_updates_are_projections_on_the_factors():
    updates, states = run(stepper(), stream())
    for gradient, update, state in zip(stream(), updates, states[1:]):
        for i in range(2):
            factors = [np.asarray(u[i]) for u in of_stack(state)]
            core = published.core(gradient["stack"][i], factors)
            expected = published.expand(core, factors)
            np.testing.assert_allclose(update["stack"][i], expected, atol=1e-5)
    # Of the first gradient at count 1 too, of the third one at count 2.
    for i, first in enumerate((0, 0, 2)):
        factors, _ = published.tucker(np.float64(stream()[first]["stack"][1]), 2)
        for u, v in zip(of_stack(states[i + 1]), factors, strict=True):
            np.testing.assert_allclose(u[1], v, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("online", [False, True], ids=["refreshed", "online"])
def test_one_bad_tensor_of_a_stack(bad, online):
    """It has a zero gradient and keeps its factors; the others never notice."""
    ours = stepper(0.1 if online else None)
    expected, _ = run(ours, stream())
    gradients = stream()
    if bad == 0:
        gradients[0]["stack"][1] = 0.0
    else:
        gradients[0]["stack"][1, 0, 0] = bad
    updates, states = run(ours, gradients)
    chex.assert_tree_all_finite((updates, states))
    for step in range(STEPS):
        np.testing.assert_allclose(
            updates[step]["stack"][0], expected[step]["stack"][0], atol=1e-5
        )
    assert not np.any(updates[0]["stack"][1])
    for old, new in zip(of_stack(states[0]), of_stack(states[1])):
        np.testing.assert_array_equal(old[1], new[1])
        np.testing.assert_allclose(new[1].T @ new[1], np.eye(2), atol=1e-6)
        assert np.any(old[0] != new[0])
    assert np.any(updates[1]["stack"][1])  # the first factors are usable
    if not online:  # the next refresh finds factors of its own
        np.testing.assert_allclose(
            updates[2]["stack"][1], expected[2]["stack"][1], atol=1e-5
        )


def test_a_refresh_may_be_decided_by_the_caller():
    _, update = stepper()
    first, second, _ = stream()
    _, states = run(stepper(), [first])
    _, late = update(first, states[0], refresh=False)
    chex.assert_trees_all_equal(late.factors, states[0].factors)
    _, early = update(second, states[1], refresh=True)
    factors, _ = published.tucker(np.float64(second["stack"][0]), 2)
    for u, v in zip(of_stack(early), factors, strict=True):
        np.testing.assert_allclose(u[0], v, atol=1e-5)


def test_state_of_bfloat16_leaves_is_float32():
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), stream()[:1])
    exact = jax.tree.map(lambda g: np.asarray(g, np.float32), gradients)
    (update,), states = run(stepper(), gradients)
    (expected,), _ = run(stepper(), exact)
    chex.assert_type(jax.tree.leaves(states[1].factors), jnp.float32)
    chex.assert_type(jax.tree.leaves(update), jnp.bfloat16)
    chex.assert_trees_all_close(
        jax.tree.map(np.float32, update), expected, rtol=2**-7, atol=1e-6
    )


# On eight devices ---------------------------------------------------------------------

# Four kernels of three modes, one of them split. None is kept whole: the slope of its
# factor would be rounding, which AdamW divides by itself.
SHAPE, SPEC, FACTORS = (4, 3, 4, 8), P("x", None, None, "y"), P("x", None, None)


def train(place):
    """Updates of ``reference`` at fixed parameters, and the states."""
    rng = np.random.default_rng(4)
    weights, *gradients = [
        place(np.float32(rng.normal(size=SHAPE))) for _ in range(1 + STEPS)
    ]
    tx = ng.reference(
        0.1,
        2,
        "online_natural_galore",
        20,
        history=2,
        eps=1e-2,  # likewise, for what is zero in a core just decomposed
        weight_decay=0.1,
        weight_mode_axes=lambda _: (1, 2, 3),
    )
    update, states, out = jax.jit(tx.update), [tx.init(weights)], []
    for gradient in gradients:
        updates, state = update(gradient, states[-1], weights)
        states.append(state)
        out.append(updates)
    return out, states


@functools.cache
def on_one_device():
    return train(jnp.asarray)[0]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_eight_devices_have_the_numbers_of_one(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, SPEC)
        updates, states = train(lambda x: jax.device_put(x, sharding))
    for update, expected in zip(updates, on_one_device(), strict=True):
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-5)
    if kind == AxisType.Explicit:
        types = [jax.tree.map(jax.typeof, state) for state in states]
        assert types == types[:1] * len(types)
        is_ours = lambda x: isinstance(x, TwoSidedState)  # noqa: E731
        ours, *_ = filter(is_ours, jax.tree.leaves(states[-1], is_leaf=is_ours))
        assert jax.typeof(updates[-1]).sharding.spec == SPEC
        assert [jax.typeof(u).sharding.spec for u in ours.factors] == [FACTORS] * 3
