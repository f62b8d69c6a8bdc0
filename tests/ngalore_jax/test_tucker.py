"""The Tucker projection of tensors against loops over unfoldings in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngalore_jax import tucker
from tests.ngalore_jax import published

# A mode of size 2 below the rank, and one longer than all others together.
SHAPES = {"wide": (4, 7), "tall": (7, 2), "square": (5, 5), "conv": (2, 3, 4, 5)}
RANK = 3


def batch(shape, size=2):
    """Tensors close to a small core, a batch of them."""
    rng = np.random.default_rng(sum(shape))
    tensors = rng.normal(size=(size, *shape))
    for k, n in enumerate(shape):
        decaying = rng.normal(size=(n, n)) * 0.5 ** np.arange(n)
        tensors = published.times(tensors, decaying, k + 1)
    return tensors


def ranks(shape):
    return tuple(min(RANK, n) for n in shape)


@functools.cache
def decomposed(name):
    with jax.enable_x64(True):
        decompose = jax.jit(tucker.decompose, static_argnums=1)
        factors = decompose(jnp.asarray(batch(SHAPES[name])), ranks(SHAPES[name]))
        return [np.asarray(u) for u in factors]


every_shape = pytest.mark.parametrize("name", SHAPES)


@every_shape
def test_factors_are_those_of_an_independent_decomposition(name):
    shape = SHAPES[name]
    for i, tensor in enumerate(batch(shape)):
        expected, _ = published.tucker(tensor, RANK, sweeps=10, tolerance=0.0)
        for u, v in zip(decomposed(name), expected, strict=True):
            # Vectors that complete a basis are anybody's: see the next tests.
            columns = min(u.shape[-1], tensor.size // u.shape[-2])
            np.testing.assert_allclose(u[i, :, :columns], v[:, :columns], atol=1e-6)


@every_shape
def test_factors_are_orthonormal(name):
    for u, n, r in zip(decomposed(name), SHAPES[name], ranks(SHAPES[name])):
        assert u.shape == (2, n, r)
        np.testing.assert_allclose(u.mT @ u, np.stack([np.eye(r)] * 2), atol=1e-12)


@every_shape
def test_the_reconstruction_is_as_good_as_the_published_one(name):
    """Which stops where an error changes by less than 1e-4."""
    for i, tensor in enumerate(batch(SHAPES[name])):
        factors = [u[i] for u in decomposed(name)]
        rest = tensor - published.expand(published.core(tensor, factors), factors)
        error = np.linalg.norm(rest) / np.linalg.norm(tensor)
        _, expected = published.tucker(tensor, RANK)
        assert expected - 1e-3 < error < expected + 1e-6


def test_sweeps_improve_on_the_start():
    """On noise, where the unfoldings alone tell little."""
    tensor = np.random.default_rng(0).normal(size=SHAPES["conv"])
    start = [published.left_vectors(tensor, k, 2) for k in range(4)]
    factors = jax.jit(tucker.decompose, static_argnums=1)(tensor, (2,) * 4)
    captured = np.linalg.norm(published.core(tensor, [np.float64(u) for u in factors]))
    assert captured > 1.02 * np.linalg.norm(published.core(tensor, start))


@every_shape
def test_core_and_expansion(name):
    tensors = batch(SHAPES[name])
    with jax.enable_x64(True):
        factors = tuple(jnp.asarray(u) for u in decomposed(name))
        cores = tucker.core(jnp.asarray(tensors), factors)
        expanded = tucker.expand(cores, factors)
    for i, tensor in enumerate(tensors):
        own = [u[i] for u in decomposed(name)]
        expected = published.core(tensor, own)
        np.testing.assert_allclose(cores[i], expected, atol=1e-12)
        np.testing.assert_allclose(
            expanded[i], published.expand(expected, own), atol=1e-12
        )


@pytest.mark.parametrize("name", ["wide", "conv"])
def test_the_slope_of_the_online_loss(name):
    """At factors that are not orthonormal."""
    rng = np.random.default_rng(5)
    tensors = batch(SHAPES[name])
    factors = [u + 0.1 * rng.normal(size=u.shape) for u in decomposed(name)]
    with jax.enable_x64(True):
        slopes = tucker.loss_gradient(
            jnp.asarray(tensors), tuple(jnp.asarray(u) for u in factors)
        )
    for i, tensor in enumerate(tensors):
        expected = published.online_slope(tensor, [u[i] for u in factors])
        for slope, target in zip(slopes, expected, strict=True):
            np.testing.assert_allclose(slope[i], target, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_unit_tensors_at_any_scale(size):
    """Whose squares float32 cannot hold; a zero tensor beside them stays zero."""
    tensors = np.stack([*batch((3, 4)), np.zeros((3, 4))]).astype(np.float32)
    unit = tucker.unit(jnp.float32(size) * tensors, 2)
    norms = np.linalg.norm(tensors, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(unit, tensors / np.maximum(norms, 1e-9), rtol=1e-5)
