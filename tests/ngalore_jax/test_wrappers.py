"""Every public transform inside the transforms of optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from tests.ngalore_jax.transforms import (
    LEARNING_RATE,
    NAMES,
    STEPS,
    TRANSFORMS,
    compiled_step,
    gradients,
    make,
    params,
    run,
)

every_transform = pytest.mark.parametrize("name", NAMES)
# The two left out differ from natural_galore in arguments that a wrapper never sees.
every_structure = pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"low_rank(natural+adam)", "natural_galore(PAPER)"})
)


def assert_close(actual, expected):
    """Equal up to what another fusion of the same float32 operations changes."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


# inner is a tuple of functions and projector a function, which inject_hyperparams
# would take for schedules; the others shape the state.
STATIC = ("inner", "rank", "history", "update_proj_gap", "projector")


@every_transform
def test_inject_hyperparams_makes_numbers_of_the_state(name):
    """Injected constants change nothing; an injected learning rate may follow a rule:
    1, 2, 3 ... times the constant one gives updates likewise.
    """
    factory, kwargs = TRANSFORMS[name]
    scheduled = "learning_rate" in kwargs
    if scheduled:
        schedule = lambda count: (count + 1) * LEARNING_RATE  # noqa: E731
        kwargs = {**kwargs, "learning_rate": schedule}
    static = [key for key in STATIC if key in kwargs]
    tx, weights = optax.inject_hyperparams(factory, static)(**kwargs), params()
    state, update = tx.init(weights), jax.jit(tx.update)
    assert {k for k, v in kwargs.items() if isinstance(v, float)} <= {
        *state.hyperparams
    }
    for step, gradient in enumerate(gradients(weights)):
        updates, state = update(gradient, state, weights)
        factor = step + 1 if scheduled else 1
        expected = jax.tree.map(lambda u, k=factor: k * u, run(name).updates[step])
        assert_close(updates, expected)
    if not scheduled:
        assert_close(state.inner_state, run(name).states[-1])


@every_structure
def test_multi_steps_accumulates_before_it(name):
    tx, weights = optax.MultiSteps(make(name), 2), params()
    state, update = tx.init(weights), jax.jit(tx.update)
    noise = gradients(weights, seed=3)
    for step, gradient in enumerate(gradients(weights)):
        for sign in (1, -1):
            noisy = jax.tree.map(lambda g, z, s=sign: g + s * z, gradient, noise[step])
            updates, state = update(noisy, state, weights)
            if sign == 1:
                chex.assert_trees_all_equal(
                    updates, jax.tree.map(jnp.zeros_like, updates)
                )
        # The mean of the two minibatches is the gradient up to rounding, which a
        # normalised step shows larger.
        chex.assert_trees_all_close(
            updates, run(name).updates[step], rtol=1e-3, atol=1e-4
        )
    assert int(state.gradient_step) == STEPS


@every_structure
def test_apply_if_finite_skips_the_step(name):
    tx, weights = optax.apply_if_finite(make(name), 2), params()
    state, update = tx.init(weights), jax.jit(tx.update)
    stream = gradients(weights)
    for step in range(STEPS - 1):
        updates, state = update(stream[step], state, weights)
        assert_close(updates, run(name).updates[step])
        # Before a steady step, before the refresh and after it.
        before = state.inner_state
        broken = {**stream[step], "bias": stream[step]["bias"].at[0].set(jnp.nan)}
        updates, state = update(broken, state, weights)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
        chex.assert_trees_all_equal(state.inner_state, before)
    assert int(state.total_notfinite) == STEPS - 1


@every_structure
def test_chain_with_clipping_masked_and_partition(name):
    """Each leaf sees the clipped gradient, and one wrapper leaves the other be."""
    weights = {**params(), "frozen": jnp.ones((4, 4)), "plain": jnp.ones((4, 4))}
    labels = dict(stack="ours", bias="ours", frozen="frozen", plain="plain")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            optax.partition(
                {"ours": make(name), "frozen": optax.set_to_zero()},
                {k: v for k, v in labels.items() if k != "plain"}
                | {"plain": optax.MaskedNode()},
            ),
            {k: v != "plain" for k, v in labels.items()},
        ),
    )
    state, update = tx.init(weights), jax.jit(tx.update)
    frozen, clip = jnp.ones((4, 4)), jax.jit(optax.clip_by_global_norm(1.0).update)
    alone, kept, still = make(name).init(params()), params(), jnp.zeros(())
    for gradient in gradients(params()):
        whole = {**gradient, "frozen": frozen, "plain": frozen}
        updates, state = update(whole, state, weights)
        clipped, _ = clip(whole, optax.EmptyState())
        ours = {k: clipped[k] for k in gradient}
        alone, kept, expected = compiled_step(name)(alone, kept, ours, still)
        assert_close({k: updates[k] for k in gradient}, expected)
        np.testing.assert_array_equal(updates["frozen"], np.zeros((4, 4)))
        assert_close(updates["plain"], clipped["plain"])
        assert np.all(clipped["plain"] < 0.5)


@pytest.mark.parametrize("at_refresh", ["rotate", "reset"])
def test_masked_and_partition_inside_low_rank(at_refresh):
    """Each leaf as if it was alone, over refreshes."""
    weights = {"a": jnp.zeros((6, 8)), "b": jnp.zeros((2, 5, 9)), "c": jnp.zeros(4)}
    inside = optax.chain(
        ng.scale_by_natural_gradient(3, 0.1, at_refresh=at_refresh),
        ng.scale_by_subspace_adam(at_refresh=at_refresh),
    )

    def updates_of(inner, names="abc"):
        tx = ng.low_rank(inner, 2, update_proj_gap=2)
        state, found = tx.init({name: weights[name] for name in names}), []
        for gradient in gradients(weights, steps=5):
            updates, state = tx.update({n: gradient[n] for n in names}, state)
            found.append(updates)
        return found

    masked = updates_of(optax.masked(inside, {"a": True, "b": False, "c": True}))
    parts = {"natural": inside, "as it is": optax.identity()}
    labels = {"a": "natural", "b": "as it is", "c": "natural"}
    assert_close(updates_of(optax.partition(parts, labels)), masked)
    for inner, names in ((inside, "ac"), (optax.identity(), "b")):
        some = [{name: updates[name] for name in names} for updates in masked]
        assert_close(some, updates_of(inner, names))
