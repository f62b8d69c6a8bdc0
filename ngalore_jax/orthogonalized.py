r"""The gradient outside the subspace, with momentum, as an orthogonal matrix.

The rules of :mod:`ngalore_jax.residual` scale columns and remember next to nothing.
This one keeps a momentum of the whole matrix, in 8 bits, and gives every direction
outside the subspace the same length, as Muon does with all of them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngalore_jax import storage
from ngalore_jax.checks import check_at_least, check_decay

_HIGHEST = jax.lax.Precision.HIGHEST
# Muon's quintic: singular values from 1e-3 to 1 come to about 0.7 to 1.2 in five turns.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# What is smaller, beside the largest entry, is rounding of the difference, or of a
# basis that is stored in fewer bits.
_ROUNDING, _NARROW_ROUNDING = 1e-5, 1e-2


class Orthogonal(NamedTuple):
    """A rule for the gradient outside the subspace, made by :func:`orthogonal`.

    Attributes:
      hyperparameters: Weight and decay. They may be traced, as
        ``optax.inject_hyperparams`` makes them.
      iterations: Newton-Schulz iterations.
      momentum_dtype: Storage dtype of the momentum, None for the work dtype.
    """

    hyperparameters: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]
    iterations: int
    momentum_dtype: jnp.dtype | None


def orthogonal(
    weight: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.9,
    *,
    iterations: int = 5,
    momentum_dtype: jax.typing.DTypeLike | None = "int8",
) -> Orthogonal:
    r"""Orthogonalised momentum outside the subspace.

    .. math::
      M &\leftarrow \beta M + (1 - \beta)\, G \\
      X &= (I - P P^\top)\,(\beta M + (1 - \beta)\, G) \\
      U &= \alpha\,\bigl(P N + c \sqrt{\max(m, n)}\;
        \mathrm{orth}(X)\bigr)

    with :math:`\mathrm{orth}` by Newton-Schulz: all :math:`m - r` singular values of
    :math:`X` become about 1, which makes the entries of the added term about
    :math:`c`, as large as Adam's inside. The sum is Muon's update (momentum with
    Nesterov's look ahead) but for the leading directions, which are left to ``inner``.

    Args:
      weight: :math:`c`, at least 0.
      decay: :math:`\beta`, in [0, 1). Muon's own is 0.95.
      iterations: Newton-Schulz iterations, at least 1.
      momentum_dtype: Storage dtype of :math:`M`: ``"int8"`` with one scale per column
        and rounded up or down at random (:mod:`ngalore_jax.storage`), a float dtype, or
        None for float32.

    Returns:
      A rule for ``low_rank(..., residual=...)``.

    Raises:
      ValueError: If an argument is outside its range.

    Memory:
      ``m n + 2 n`` bytes per matrix in int8; of a square one that is a third of
      GaLore's ``4 (m r + 2 r n)`` at the published rank ``m / 4``.

    References:
      Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon/).
    """
    check_at_least("weight", weight, 0)
    check_decay("decay", decay)
    check_at_least("iterations", iterations, 1)
    dtype = storage.check_dtype("momentum_dtype", momentum_dtype)
    return Orthogonal((weight, decay), iterations, dtype)


def outside_orthogonal(
    momentum: jax.Array, basis: jax.Array, *, iterations: int, narrow: bool = False
) -> jax.Array:
    """``sqrt(max(m, n)) orth((I - P P^T) X)`` of ``X`` ``(..., m, n)``.

    Entries are about 1; a matrix that lies in the subspace comes to zero. The columns
    of a ``narrow`` basis are orthonormal to a percent only, and so much of the leading
    directions would come back as long as any other: they are taken out twice.
    """
    outside = momentum
    for _ in range(2 if narrow else 1):
        inside = jnp.einsum("...mr,...mn->...rn", basis, outside, precision=_HIGHEST)
        outside -= jnp.einsum("...mr,...rn->...mn", basis, inside, precision=_HIGHEST)
    size, whole = (
        jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) for x in (outside, momentum)
    )
    rounding = _NARROW_ROUNDING if narrow else _ROUNDING
    outside = jnp.where(size > rounding * whole, outside, 0)
    return math.sqrt(max(momentum.shape[-2:])) * newton_schulz(outside, iterations)


def newton_schulz(x: jax.Array, iterations: int) -> jax.Array:
    """Sends the singular values of ``(..., m, n)`` to about 1, and zeros to zero."""
    a, b, c = _COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    # By the largest entry first, or squares might overflow or vanish.
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(peak > 0, peak, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)

    def turn(_: int, x: jax.Array) -> jax.Array:
        gram = jnp.einsum("...mn,...kn->...mk", x, x)
        return a * x + (b * gram + c * gram @ gram) @ x

    x = jax.lax.fori_loop(0, iterations, turn, x)
    return x if wide else jnp.swapaxes(x, -1, -2)
