"""Products of bfloat16 factors on the CPU, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import placement

SHAPE = 2, 16, 24  # of x
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
W = np.random.default_rng(1).normal(size=(24, 40)).astype(np.float32)
G = np.random.default_rng(2).normal(size=(2, 16, 40)).astype(np.float32)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def computed(x=X, dtype=None):
    """The product and its two gradients."""

    @jax.jit
    def all_three(x, w, g):
        y, back = jax.vjp(lambda x, w: placement.multiply(x, w, "up_proj", dtype), x, w)
        return y, *back(g.astype(y.dtype))

    return all_three(x, W.astype(x.dtype), G)


@pytest.mark.parametrize("precision", ["bfloat16", "BF16_BF16_F32"])
def test_factors_are_rounded_and_sums_are_not(precision):
    with jax.default_matmul_precision(precision):
        y, of_x, of_w = computed()
    x, w, g = rounded(X), rounded(W), rounded(G)
    np.testing.assert_allclose(y, x @ w, atol=1e-5)
    np.testing.assert_allclose(of_x, g @ w.T, atol=1e-5)
    np.testing.assert_allclose(of_w, np.einsum("btm,btn->mn", x, g), atol=1e-5)
    assert np.abs(y - X @ W).max() > 1e-3  # else nothing was rounded


def test_it_is_for_float32_where_it_is_asked_for():
    exact = [X @ W, G @ W.T, np.einsum("btm,btn->mn", X, G)]
    for ours, theirs in zip(computed(), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    narrow = computed(jnp.asarray(X, jnp.bfloat16), jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        asked = computed(jnp.asarray(X, jnp.bfloat16), jnp.float32)
    for ours, theirs in zip(asked, narrow, strict=True):
        np.testing.assert_array_equal(ours, theirs)
