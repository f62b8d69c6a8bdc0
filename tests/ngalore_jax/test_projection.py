"""How exactly the gradient is projected: only as a residual needs it."""

import jax
import jax.numpy as jnp
import pytest

import ngalore_jax as ng

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("residual", "precision"), [(None, None), (1.0, HIGHEST)], ids=["dropped", "added"]
)
def test_products_with_the_basis_are_exact_where_they_are_subtracted(
    residual, precision, dtype
):
    """``P^T G`` and ``P N``: |G|^2 - |R|^2 must not be what an accelerator rounds."""
    tx = ng.low_rank(ng.scale_by_subspace_adam(), 2, residual=residual)
    g = jnp.ones((8, 16), dtype)
    jaxpr = jax.make_jaxpr(lambda g, s: tx.update(g, s, refresh=False))(g, tx.init(g))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [e.params["precision"] for e in products] == [precision] * 2
