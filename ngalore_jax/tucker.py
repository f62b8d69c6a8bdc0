r"""Tucker projection of one batch of tensors: factors, core, and back.

A tensor ``G`` ``(..., n_1, ..., n_d)`` has one factor ``U_k`` ``(..., n_k, r_k)`` a
mode; axes in front of the modes are batch. With :math:`\times_k` the product along
mode :math:`k`,

.. math::
  C &= G \times_1 U_1^\top \cdots \times_d U_d^\top
    \quad\text{(core, } r_1 \times \cdots \times r_d\text{)} \\
  \hat G &= C \times_1 U_1 \cdots \times_d U_d \quad\text{(expansion)} .

For a matrix (:math:`d = 2`) this is :math:`C = U_1^\top G\, U_2` and
:math:`\hat G = U_1 C\, U_2^\top`.

References:
  De Lathauwer et al., On the best rank-1 and rank-(R1, ..., RN) approximation of
  higher-order tensors, SIAM J. Matrix Anal. Appl. 21(4), 2000: HOSVD as the start, then
  higher-order orthogonal iteration (HOOI).
"""

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, ...]

_HIGHEST = jax.lax.Precision.HIGHEST
# Each sweep lowers the error of the reconstruction, soon by nothing that matters.
_SWEEPS = 10


def decompose(tensor: jax.Array, ranks: tuple[int, ...]) -> Factors:
    """Factors of the best core that HOSVD and ten sweeps of HOOI find.

    Args:
      tensor: ``(..., n_1, ..., n_d)``, one mode a rank.
      ranks: ``r_k <= n_k``.

    Returns:
      Factors ``(..., n_k, r_k)`` with orthonormal columns, the largest entry of each
      column positive.
    """
    start = tuple(_leading_vectors(tensor, k, ranks) for k in range(len(ranks)))
    if len(ranks) == 2:
        return start  # singular vectors: the best there are, where sweeps stand still

    def sweep(_: int, factors: Factors) -> Factors:
        for k in range(len(ranks)):
            others = core(tensor, factors, skip=k)
            new = _leading_vectors(others, k, ranks)
            factors = (*factors[:k], new, *factors[k + 1 :])
        return factors

    return jax.lax.fori_loop(0, _SWEEPS, sweep, start)


def core(tensor: jax.Array, factors: Factors, skip: int | None = None) -> jax.Array:
    """``(..., r_1, ..., r_d)`` from ``(..., n_1, ..., n_d)``; mode ``skip`` stays."""
    sides, cores = _letters(len(factors))
    used = [k for k in range(len(factors)) if k != skip]
    out = "".join(cores[k] if k in used else sides[k] for k in range(len(factors)))
    terms = ",".join(f"...{sides[k]}{cores[k]}" for k in used)
    return jnp.einsum(
        f"...{sides},{terms}->...{out}",
        tensor,
        *(factors[k] for k in used),
        precision=_HIGHEST,
    )


def expand(core: jax.Array, factors: Factors) -> jax.Array:
    """``(..., n_1, ..., n_d)`` from ``(..., r_1, ..., r_d)``."""
    sides, cores = _letters(len(factors))
    terms = ",".join(f"...{n}{r}" for n, r in zip(sides, cores))
    return jnp.einsum(
        f"...{cores},{terms}->...{sides}", core, *factors, precision=_HIGHEST
    )


def loss_gradient(tensor: jax.Array, factors: Factors) -> Factors:
    r"""Derivative by the factors of :math:`\|G - \hat G\|^2`, for any factors."""

    def loss(factors: Factors) -> jax.Array:
        # Over the batch too: a tensor's factors enter no other tensor's term.
        return jnp.sum(jnp.square(tensor - expand(core(tensor, factors), factors)))

    return jax.grad(loss)(factors)


def unit(tensor: jax.Array, modes: int) -> jax.Array:
    """Tensors of norm 1 over the last ``modes`` axes; zeros stay zeros."""
    axes = tuple(range(-modes, 0))
    # By the largest entry first, or squares might overflow or vanish.
    peak = jnp.max(jnp.abs(tensor), axis=axes, keepdims=True)
    tensor = tensor / jnp.where(peak > 0, peak, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(tensor), axis=axes, keepdims=True))
    return tensor / jnp.where(norm > 0, norm, 1)


def _leading_vectors(tensor: jax.Array, k: int, ranks: tuple[int, ...]) -> jax.Array:
    """Leading left singular vectors of the unfolding along mode ``k``."""
    first = tensor.ndim - len(ranks)
    unfolded = jnp.moveaxis(tensor, first + k, first)
    unfolded = unfolded.reshape(*unfolded.shape[: first + 1], -1)
    # A mode longer than all others together: its remaining vectors are any that are
    # orthogonal to those.
    complete = ranks[k] > min(unfolded.shape[-2:])
    vectors, _, _ = jnp.linalg.svd(unfolded, full_matrices=complete)
    vectors = vectors[..., : ranks[k]]
    largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    return vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))


def _letters(modes: int) -> tuple[str, str]:
    """Einsum's letters for the sides and for the ranks."""
    return "abcdefghijklm"[:modes], "nopqrstuvwxyz"[:modes]
