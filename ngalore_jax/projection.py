"""Refresh, projection and projection back of one batch of matrices.

Shapes, after :meth:`MatrixView.to_matrix`: gradient ``(..., m, n)``, basis
``(..., m, r)``, low-rank gradient and direction ``(..., r, n)``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngalore_jax.matrices import MatrixView, work_dtype
from ngalore_jax.projectors import Projector
from ngalore_jax.residual import Columns, Residual

_HIGHEST = jax.lax.Precision.HIGHEST


def refresh_basis(
    gradient: jax.Array,
    basis: jax.Array,
    count: jax.Array,
    *,
    projector: Projector,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A new basis from matrices, in the work dtype like the old one.

    Returns:
      The basis, the rotation ``P_new^T P_old`` ``(..., r, r)``, and whether the basis
      is new, ``(..., 1, 1)``: a matrix whose gradient is zero, not finite or as large
      as in :func:`finite_or_zero` keeps it.
    """
    matrix = gradient.astype(work_dtype(gradient))
    # A sum, since a maximum over devices need not pass on one device's NaN.
    size = jnp.sum(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    usable = (size < _largest(size.dtype)) & (size > 0)
    new = projector(matrix, basis, count)
    usable &= jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    new = jnp.where(usable, new, basis)
    rotation = jnp.einsum("...mr,...mq->...rq", new, basis, precision=_HIGHEST)
    return new, rotation, usable


def project(
    gradient: jax.Array, basis: jax.Array, *, view: MatrixView, exact: bool
) -> tuple[jax.Array, jax.Array]:
    """``R = P^T G``, and which matrices are usable ``(..., 1, 1)``; zero where not.

    Every entry of ``G`` enters some entry of ``R``, and a NaN or an Inf times
    anything, zero included, is not finite: looking at the smaller ``R`` is enough.

    ``exact`` is for a residual, which is a difference: ``|G|^2 - |R|^2`` a column, and
    ``G - P R``. Accelerators by default round float32 factors to 8 or 11 bits, and the
    compensation would blow up a difference of that size as if it were gradient. A
    bfloat16 ``G`` does not help, since ``P`` is rounded as well. Without a residual
    such rounding is far below the noise of a gradient, and HIGHEST would cost three to
    fifteen times the product.
    """
    matrix = view.to_matrix(gradient).astype(work_dtype(gradient))
    low = jnp.einsum(
        "...mr,...mn->...rn",
        basis,
        matrix,
        precision=_HIGHEST if exact else None,
    )
    finite = _usable(low, axis=(-2, -1))
    return jnp.where(finite, low, 0), finite


def project_back(
    direction: jax.Array,
    basis: jax.Array,
    scale: jax.Array,
    *,
    view: MatrixView,
    exact: bool = False,
) -> jax.Array:
    """``scale P N`` in the leaf's shape and the direction's dtype."""
    matrix = jnp.einsum(
        "...mr,...rn->...mn",
        basis,
        scale * direction,
        precision=_HIGHEST if exact else None,
    )
    return view.from_matrix(matrix)


def project_back_with_residual(
    direction: jax.Array,
    basis: jax.Array,
    gradient: jax.Array,
    low: jax.Array,
    finite: jax.Array,
    energy: jax.Array | optax.MaskedNode,
    norm: jax.Array,
    count: jax.Array,
    scale: jax.Array,
    hyperparameters: tuple[jax.Array, ...],
    *,
    view: MatrixView,
    residual: Residual,
) -> tuple[jax.Array, Any, jax.Array]:
    """``scale (P N + (G - P R) diag(d))``, and the rule's new energy and norm."""
    # The gradient is read in its own layout and selected where it is used: a view of it
    # as matrices, or with zeros for what is not finite, would be written out.
    gradient = gradient.astype(low.dtype)
    total = view.column_sums(jnp.square(gradient))
    weights, energy, norm = residual.column_scale(
        hyperparameters,
        energy,
        norm,
        count,
        Columns(
            total=jnp.where(finite[..., 0], total, 0),
            inside=jnp.sum(jnp.square(low), axis=-2),
            direction=jnp.sum(jnp.square(direction), axis=-2),
        ),
        view.m - view.rank,
    )
    inside = project_back(
        direction - weights[..., None, :] * low, basis, scale, view=view, exact=True
    )
    columns = view.from_columns(scale * weights)
    usable = view.from_columns(jnp.broadcast_to(finite[..., 0], weights.shape))
    return inside + jnp.where(usable, columns * gradient, 0), energy, norm


def next_momentum(
    gradient: jax.Array,
    momentum: jax.Array,
    finite: jax.Array,
    decay: jax.Array,
    *,
    view: MatrixView,
) -> tuple[jax.Array, jax.Array]:
    """Momentum like the leaf, and it with Nesterov's look ahead."""
    shape = (*view.batch_shape, view.n)
    usable = view.from_columns(jnp.broadcast_to(finite[..., 0], shape))
    added = (1 - decay) * jnp.where(usable, gradient.astype(momentum.dtype), 0)
    momentum = decay * momentum + added
    return momentum, decay * momentum + added


def finite_or_zero(gradient: jax.Array) -> jax.Array:
    """The gradient, or zeros if it is not finite or its squares might overflow."""
    return jnp.where(_usable(gradient), gradient, 0)


def _usable(x: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Whether entries are finite, and sums of their squares as well."""
    axes = range(x.ndim) if axis is None else axis
    count = max(math.prod(x.shape[a] for a in axes), 1)
    x = jnp.abs(x.astype(work_dtype(x)))
    # A NaN is not below it.
    below = x < _largest(x.dtype) / math.sqrt(count)
    return jnp.all(below, axis=axis, keepdims=axis is not None)


def _largest(dtype: jnp.dtype) -> float:
    """A norm whose square leaves room for a sum over a history."""
    return 1e-2 * math.sqrt(float(jnp.finfo(dtype).max))
