r"""The gradient outside the subspace, put back.

What projection drops, ``G - P R``, is a full-rank matrix that needs no state to
carry. A residual rule gives it one weight per column:

.. math::
  U = \alpha \left(P N + (G - P R)\, \mathrm{diag}(d)\right)

and :func:`ngalore_jax.low_rank` evaluates that as
``P (N - R diag(d)) + G diag(d)``: one product with ``P``, no second ``(m, n)``
temporary. A rule sees column energies only, never the matrices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax.checks import check_at_least, check_decay, check_number

# Share of a column's energy below which what a rule divides by is rounding.
_NOISE_FLOOR = 1e-6


class ResidualState(NamedTuple):
    """What a rule remembers of each projected leaf; ``MaskedNode()`` if nothing."""

    # (..., n) float32 (float64 for float64 leaves)
    energy: optax.Updates
    norm: optax.Updates  # (...) likewise, the norm of the term added last
    momentum: Any  # like the leaf; in int8 a storage.Int8 of two trees


class Columns(NamedTuple):
    """Squared column norms of a batch of matrices, ``(..., n)`` each."""

    total: jax.Array  # of G
    inside: jax.Array  # of R
    direction: jax.Array  # of N


class Residual(NamedTuple):
    """A rule for the weight of the gradient outside the subspace.

    Attributes:
      column_scale: ``(hyperparameters, energy, norm, count, columns, codimension) ->
        (d, energy, norm)`` for a batch of matrices. ``energy`` ``(..., n)`` and
        ``norm`` ``(...)`` are the rule's state, zero at first; ``count`` the int32
        step; ``columns`` a :class:`~ngalore_jax.residual.Columns`; ``codimension`` is
        ``m - r``. ``d`` has shape ``(..., n)``.
      hyperparameters: Its numbers. They may be traced, as
        ``optax.inject_hyperparams`` makes them.
      keeps_energy: Whether the rule has the state ``energy``. If not, it is handed an
        ``optax.MaskedNode()`` and returns it.
    """

    column_scale: Callable[..., tuple[jax.Array, Any, jax.Array]]
    hyperparameters: tuple[jax.typing.ArrayLike, ...]
    keeps_energy: bool = True


def compensation(
    weight: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.999,
    max_growth: jax.typing.ArrayLike = 1.01,
) -> Residual:
    r"""Compensation of Alice (arXiv 2502.07752), with Fira's growth limiter.

    .. math::
      e_j &= \|G_{:j}\|^2 - \|R_{:j}\|^2 \\
      p &\leftarrow \beta p + (1 - \beta)\, e, \qquad \hat p = p / (1 - \beta^t) \\
      C &= \sqrt{m - r}\; (G - P R)\, \mathrm{diag}(\hat p)^{-1/2} \\
      \phi &\leftarrow \min(\|C\|, \gamma \phi), \qquad
      d = c\, \phi / \|C\| \cdot \sqrt{(m - r) / \hat p}

    where :math:`\phi` starts at the first :math:`\|C\|` that is not zero, and a step
    without gradient leaves it as it is. The entries of :math:`C` are about 1, so
    ``weight`` compares to Adam's step inside the subspace. Departures from the paper:
    :math:`p` is bias-corrected (it starts 30 times too small otherwise), and 1e-6 of
    the column's own energy is added to it, so that rounding of a gradient that lies in
    the subspace is not amplified.

    Args:
      weight: :math:`c`, at least 0. The paper uses 0.4.
      decay: :math:`\beta`, in [0, 1).
      max_growth: :math:`\gamma`, how much the norm of the added term may grow in a
        step, as a factor above 1.

    Returns:
      A rule for ``low_rank(..., residual=...)``.

    Raises:
      ValueError: If a number is outside its range.

    Memory:
      ``n + 1`` elements per matrix.

    References:
      Gong et al., 2025 (arXiv 2502.07752), section 4.3; Chen et al., Fira, 2024
      (arXiv 2410.01623), equation 8.
    """
    check_at_least("weight", weight, 0)
    check_decay("decay", decay)
    check_number("max_growth", max_growth, lambda x: x > 1, "above 1")

    return Residual(_compensate, (weight, decay, max_growth))


def fira(
    weight: jax.typing.ArrayLike = 1.0, max_growth: jax.typing.ArrayLike = 1.01
) -> Residual:
    r"""Fira's residual: each column is scaled as the optimizer scaled its inside.

    .. math::
      \varphi_j &= \|N_{:j}\| / \|R_{:j}\| \\
      C &= (G - P R)\, \mathrm{diag}(\varphi) \\
      \phi &\leftarrow \min(\|C\|, \gamma \phi), \qquad
      d = c\, \phi / \|C\| \cdot \varphi

    with :math:`\phi` as in :func:`compensation`. A column without gradient in the
    subspace gets none outside. With the natural gradient inside, :math:`R` is what came
    before it. Departure from the paper: an :math:`R_{:j}` below 1e-3 of the column's
    norm counts as that, so that Adam's answer to rounding is not amplified.

    Args:
      weight: :math:`c`, at least 0. The paper uses 1.
      max_growth: :math:`\gamma`, as of :func:`compensation`.

    Returns:
      A rule for ``low_rank(..., residual=...)``.

    Raises:
      ValueError: If a number is outside its range.

    Memory:
      1 element per matrix.

    References:
      Chen et al., Fira, 2024 (arXiv 2410.01623), equations 6 to 8.
    """
    check_at_least("weight", weight, 0)
    check_number("max_growth", max_growth, lambda x: x > 1, "above 1")

    return Residual(_fira, (weight, max_growth), keeps_energy=False)


def _compensate(
    hyperparameters: tuple[jax.Array, jax.Array, jax.Array],
    energy: jax.Array,
    norm: jax.Array,
    count: jax.Array,
    columns: Columns,
    codimension: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weight, decay, max_growth = hyperparameters
    outside = jnp.maximum(columns.total - columns.inside, 0)
    energy = decay * energy + (1 - decay) * outside
    corrected = energy / (1 - decay ** (count + 1))
    squared = _quotient(codimension, corrected + _NOISE_FLOOR * columns.total)
    shrink, norm = _limit(jnp.sum(outside * squared, axis=-1), norm, max_growth)
    return weight * shrink[..., None] * jnp.sqrt(squared), energy, norm


def _fira(
    hyperparameters: tuple[jax.Array, jax.Array],
    energy: optax.MaskedNode,
    norm: jax.Array,
    count: jax.Array,
    columns: Columns,
    codimension: int,
) -> tuple[jax.Array, optax.MaskedNode, jax.Array]:
    del count, codimension
    weight, max_growth = hyperparameters
    outside = jnp.maximum(columns.total - columns.inside, 0)
    inside = jnp.maximum(columns.inside, _NOISE_FLOOR * columns.total)
    squared = _quotient(columns.direction, inside)
    shrink, norm = _limit(jnp.sum(outside * squared, axis=-1), norm, max_growth)
    return weight * shrink[..., None] * jnp.sqrt(squared), energy, norm


def _limit(
    squared_norm: jax.Array, norm: jax.Array, max_growth: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factor that lets a term grow by no more than it may, and its new norm."""
    added = jnp.sqrt(squared_norm)
    limit = jnp.where(norm > 0, max_growth * norm, added)
    limited = jnp.minimum(added, limit)
    # A step without a gradient says nothing about how large the term may be.
    return _quotient(limited, added), jnp.where(added > 0, limited, norm)


def _quotient(x: jax.typing.ArrayLike, y: jax.Array) -> jax.Array:
    """``x / y``, and 0 where ``y`` is 0 or so small that the quotient overflows."""
    quotient = x / jnp.where(y > 0, y, 1)
    return jnp.where((y > 0) & ~jnp.isinf(quotient), quotient, 0)
