"""Matrix products of bfloat16 factors, summed in float32, on the CPU.

`JAX_DEFAULT_MATMUL_PRECISION=bfloat16` asks for such products of float32 arrays, which
TPUs and GPUs then take. XLA's CPU compiler goes on in float32. It has fast ones where
the CPU has AMX, but only of bfloat16 operands with a float32 result, and of which the
first one lies in memory row by row.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def is_asked_for(x: jax.Array) -> bool:
    """Whether products of `x` are to be of bfloat16 factors, and need this to be so."""
    asked = jax.config.jax_default_matmul_precision in ("bfloat16", "BF16_BF16_F32")
    return asked and x.dtype == jnp.float32 and jax.default_backend() == "cpu"


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns ``x w`` of ``(N, m)`` and ``(m, n)``, all float32; one device."""
    return _dot(x, w, contracted=(1, 0))


def _forward(
    x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, w), (x, w)


def _backward(
    saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    # Without the layout the transpose is a view, of which products are slow; without
    # the barrier it is taken of float32.
    rounded = jax.lax.optimization_barrier(x.astype(jnp.bfloat16))
    columns = with_layout_constraint(rounded.T, Layout((0, 1)))
    return _dot(g, w, contracted=(1, 1)), _dot(columns, g, contracted=(1, 0))


product.defvjp(_forward, _backward)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    of_a, of_b = contracted
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        (((of_a,), (of_b,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
