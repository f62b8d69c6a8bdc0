"""Bases of the subspace: one function of (gradient, old basis, count) each.

A projector is called at a refresh, inside the compiled step, for one batch of
matrices:

    projector(gradient, basis, count) -> basis

with ``gradient`` ``(..., m, n)`` float32 (float64 for float64 leaves), ``basis``
``(..., m, r)`` the old basis (:func:`first_basis` before the first refresh) and
``count`` the int32 step. It returns orthonormal columns; whatever it makes of a zero or
non-finite gradient is not used: :func:`ngalore_jax.low_rank` keeps the old basis then.
The gradient comes at its own scale, so squares of it may overflow or vanish. Each
matrix must be treated alone: on a mesh every device calls the projector for its own
part of a batch.

====================== ============================ ==============================
projector              cost of a refresh (FLOP)     follows the old basis
====================== ============================ ==============================
``subspace_iteration`` ``4 m n r + O(m r^2)``       yes, column by column
``svd``                ``O(m n min(m, n))``         no (signs and order may change)
``eigh``               ``2 m^2 n + O(m^3)``         no
``gaussian``           ``O(m r^2)``                 no, on purpose
====================== ============================ ==============================
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ngalore_jax.checks import check_at_least

Projector = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_HIGHEST = jax.lax.Precision.HIGHEST
# From a Gaussian, this many further iterations reach the leading subspace well
# enough; later refreshes start from the basis that training already uses.
_COLD_START_ITERATIONS = 7
# Length of what is added to each old column, for the directions it is blind to.
_EXPLORATION = 1e-3
# Share of the old basis in each iterate: of a gradient whose rank is below r, what it
# does not reach stays as it was.
_PERSISTENCE = 1e-6


def first_basis(m: int, r: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The basis before the first refresh, ``(m, r)``: a count sketch.

    Row ``i`` has one entry, of random sign, in column ``i mod r``. Columns are
    orthonormal, and all rows of a gradient are seen by a matrix that keeps this basis
    for a while because its first gradient was zero. The zeros tell it from every basis
    that a refresh makes.
    """
    signs = jax.random.rademacher(jax.random.key(0), (m, 1), dtype)
    row, column = jnp.arange(m)[:, None], jnp.arange(r)[None, :]
    rows_of_column = ((m - 1 - column) // r + 1).astype(dtype)
    return jnp.where(row % r == column, signs / jnp.sqrt(rows_of_column), 0)


def subspace_iteration(iterations: int = 1, seed: int = 0) -> Projector:
    r"""Warm-started subspace iteration, the default projector.

    .. math::
      P \leftarrow P + 10^{-3} m^{-1/2}\, \Omega, \qquad
      P \leftarrow \mathrm{qr}\left(G (G^\top P)\right), \quad R_{jj} > 0

    with :math:`\Omega` a standard Gaussian, drawn from the seed and the step, so that
    a gradient orthogonal to the old basis is found too. Each iterate has 1e-6 of the
    old basis added, beside a largest entry of about 1: directions whose singular value
    is below some 1/500 of the largest stay where they are. The sign convention on the
    triangular factor makes the columns continuous from one refresh to the next. A
    matrix that has had no refresh yet starts from the Gaussian alone, with seven
    further iterations. Nothing larger than ``(r, r)`` is factorised and the rest is
    matrix products (``orthonormal``), which keeps it cheap to compile and to run.

    Args:
      iterations: Iterations at each refresh, at least 1.
      seed: Seed of the Gaussians, which matrices of one shape share.

    Returns:
      A projector.

    Raises:
      ValueError: If ``iterations`` is below 1.

    References:
      Halko et al., Finding structure with randomness, 2011 (arXiv 0909.4061),
      algorithm 4.4.
    """
    check_at_least("iterations", iterations, 1)

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        m, r = basis.shape[-2:]
        key = jax.random.fold_in(jax.random.key(seed), count)
        batch_ones = (1,) * (basis.ndim - 2)
        fresh = jax.random.normal(key, (m, r), basis.dtype).reshape(*batch_ones, m, r)
        first = first_basis(m, r, basis.dtype).reshape(*batch_ones, m, r)
        # Within the rounding of a bfloat16 or int8 store; zeros are exact.
        is_first = jnp.abs(basis - first) <= 2**-6 * jnp.abs(first)
        cold = jnp.all(is_first, axis=(-2, -1), keepdims=True)
        basis = jnp.where(cold, fresh, basis + _EXPLORATION / math.sqrt(m) * fresh)

        def iterate(i: jax.Array, basis: jax.Array) -> jax.Array:
            small = jnp.einsum(
                "...mn,...mr->...nr", gradient, basis, precision=_HIGHEST
            )
            image = jnp.einsum(
                "...mn,...nr->...mr", gradient, _unit(small), precision=_HIGHEST
            )
            image = _unit(image) / math.sqrt(m) + _PERSISTENCE * basis
            return jnp.where(cold | (i < iterations), orthonormal(image), basis)

        extra = jnp.where(jnp.any(cold), _COLD_START_ITERATIONS, 0)
        return jax.lax.fori_loop(0, iterations + extra, iterate, basis)

    return refresh


def svd() -> Projector:
    """Exact leading left singular vectors, as GaLore (arXiv 2403.03507) takes them.

    Slow on accelerators, and slow to compile for them: the factorisation is of the
    whole ``(m, n)`` matrix. For references and small models.
    """

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        del count
        left, _, _ = jnp.linalg.svd(_unit(gradient), full_matrices=False)
        return left[..., : basis.shape[-1]]

    return refresh


def eigh() -> Projector:
    """Leading eigenvectors of the ``m x m`` Gram matrix ``G G^T``.

    The same subspace as :func:`svd` with the condition number squared: directions
    below about 3e-4 of the largest singular value are noise in float32.
    """

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        del count
        gradient = _unit(gradient)
        gram = jnp.einsum("...mn,...kn->...mk", gradient, gradient, precision=_HIGHEST)
        _, vectors = jnp.linalg.eigh(gram)
        return vectors[..., ::-1][..., : basis.shape[-1]]

    return refresh


def gaussian(seed: int = 0) -> Projector:
    """A random subspace, uniform over all of them, drawn anew at each refresh.

    The columns are those of a Gaussian matrix, orthonormalised. The draw depends on
    the seed, the step and the matrix's shape only, so matrices of one shape share it.

    Args:
      seed: Seed of the draws.
    """

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        del gradient
        key = jax.random.fold_in(jax.random.key(seed), count)
        drawn = orthonormal(jax.random.normal(key, basis.shape[-2:], basis.dtype))
        return jnp.broadcast_to(drawn, basis.shape)

    return refresh


def orthonormal(x: jax.Array) -> jax.Array:
    r"""Orthonormal columns spanning those of ``x`` ``(..., m, r)``, oriented like them.

    Shifted Cholesky QR: three times

    .. math::
      L L^\top = X^\top X + \sigma I, \qquad X \leftarrow X L^{-\top},

    with :math:`\sigma` at the rounding of :math:`X^\top X` in the first turn and 0
    after it. To rounding it is the Q of a QR factorisation with a positive diagonal of
    R, for condition numbers up to some 1e6 in float32. It is matrix products and
    factorisations of ``r x r``, where Householder's method goes column by column.

    References:
      Fukaya et al., Shifted Cholesky QR, 2020 (arXiv 1809.11085), algorithm 4.2.
    """
    r = x.shape[-1]
    identity = jnp.eye(r, dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (r, r))
    shift = 10 * r * jnp.finfo(x.dtype).eps

    def turn(i: jax.Array, x: jax.Array) -> jax.Array:
        gram = jnp.einsum("...mr,...mq->...rq", x, x, precision=_HIGHEST)
        largest = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)
        sigma = jnp.where(i == 0, shift, 0) * largest[..., None, None]
        inverse = jax.lax.linalg.triangular_solve(
            jnp.linalg.cholesky(gram + sigma * identity),
            jnp.broadcast_to(identity, gram.shape),
            left_side=True,
            lower=True,
        )
        return jnp.einsum("...mr,...qr->...mq", x, inverse, precision=_HIGHEST)

    return jax.lax.fori_loop(0, 3, turn, x)  # a loop is compiled once


def _unit(matrix: jax.Array) -> jax.Array:
    """The matrix scaled so that its largest entry is 1; zeros stay zeros."""
    peak = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return matrix / jnp.where(peak > 0, peak, 1)
