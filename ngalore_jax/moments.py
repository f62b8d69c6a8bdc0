"""Adam in a subspace that moves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import sharding, storage
from ngalore_jax.checks import check_at_least, check_choice, check_decay
from ngalore_jax.matrices import work_dtype
from ngalore_jax.subspace import (
    AtRefresh,
    SubspaceChange,
    rotations_of,
    when,
)

_HIGHEST = jax.lax.Precision.HIGHEST
_FIRST, _SECOND = storage.Curve.SQUARE, storage.Curve.FLOAT
# Of the rounding at a refresh; that of a step has small ones.
_ROTATION_SALT = 2**30


def scale_by_subspace_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    at_refresh: AtRefresh = "rotate",
    moments_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.scale_by_adam`` whose moments follow the basis at a refresh.

    With :math:`Q = P_{new}^\top P_{old}` and :math:`\odot` the elementwise product,
    ``"rotate"`` does, before the step in which the basis moved,

    .. math::
      m \leftarrow Q\, m, \qquad v \leftarrow (Q \odot Q)\, v .

    The second rule keeps :math:`v \ge 0` and is exact when the rows of the gradient
    are uncorrelated and the new basis lies in the old one (LDAdam, arXiv 2410.16103,
    rotates a centred variance instead). What a refresh brings in from outside starts at
    zero, though, with a bias correction that counts on: steps are longer after it, the
    more so the more of the basis is new. A learning rate thus belongs to a gap and a
    projector; with :func:`ngalore_jax.gaussian`, ``"reset"`` is the quiet choice.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      at_refresh: ``"rotate"``, ``"keep"`` (the moments stay as they are, as GaLore
        publishes it: identical to ``optax.scale_by_adam``) or ``"reset"`` (moments and
        bias correction start again, those of leaves that are not projected too, since
        one counter serves all).
      moments_dtype: Storage dtype of both moments. None: that of the updates, and the
        numbers of ``optax.scale_by_adam``. Else the step is computed in float32
        (float64 for float64 leaves) and only what is kept is rounded, up or down at
        random so that it is right on average: see :mod:`ngalore_jax.storage`. A float
        dtype of float32's range (``"bfloat16"``), or ``"int8"`` with one scale per
        column, in a curve that keeps small second moments apart from zero.

    Returns:
      A transformation with ``optax.ScaleByAdamState``; with ``"int8"`` each of its two
      moments is one :class:`ngalore_jax.storage.Int8` of two trees. Outside
      :func:`ngalore_jax.low_rank` it is Adam.

    Raises:
      ValueError: If ``at_refresh`` is not one of the three, ``moments_dtype`` is none
        of the above, or a concrete number is outside its range.

    Memory:
      ``2 r n`` elements per matrix; ``2 (r + 2) n`` bytes with ``"int8"``.

    Example:
      >>> import jax, ngalore_jax as ng
      >>> g = jax.ShapeDtypeStruct((8, 512), "float32")
      >>> for dtype in (None, "bfloat16", "int8"):
      ...     tx = ng.scale_by_subspace_adam(moments_dtype=dtype)
      ...     print(ng.state_bytes(jax.eval_shape(tx.init, g)) / (2 * 8 * 512))
      4.00048828125
      2.00048828125
      1.25048828125
    """
    check_choice("at_refresh", at_refresh, AtRefresh)
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_at_least("eps", eps, 0)
    dtype = storage.check_dtype("moments_dtype", moments_dtype)
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: optax.Params) -> optax.OptState:
        if dtype is None:
            return adam.init(params)

        leaves, treedef = jax.tree.flatten(params)

        def zeros(curve: storage.Curve) -> Any:
            def zero(leaf: Any) -> storage.Stored:
                codec = storage.Codec(dtype, curve, storage.block_axes(leaf.ndim))
                return codec.zeros(leaf.shape, work_dtype(leaf), sharding.spec_of(leaf))

            return storage.join(treedef, [zero(leaf) for leaf in leaves])

        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), zeros(_FIRST), zeros(_SECOND)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        subspace_change: SubspaceChange | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if subspace_change is not None and at_refresh != "keep":
            carry = _reset if at_refresh == "reset" else _rotate
            state = when(
                subspace_change.moved, lambda kept: carry(kept, subspace_change), state
            )
        if dtype is None:
            return adam.update(updates, state, params)
        return _update_stored(updates, state, b1, b2, eps)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_stored(
    updates: optax.Updates,
    state: optax.ScaleByAdamState,
    *hyperparameters: jax.typing.ArrayLike,
) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    gradients, treedef = jax.tree.flatten(updates)
    mu, nu = (storage.leaves_of(treedef, part) for part in (state.mu, state.nu))
    count = jnp.asarray(optax.safe_increment(state.count))
    directions = []
    for i, g in enumerate(gradients):
        first, second = _codecs(mu[i], nu[i], g.ndim)
        step = functools.partial(adam_step, first=first, second=second, salt=2 * i)
        spec = sharding.spec_of(g)
        specs = (spec, first.specs(spec), second.specs(spec))
        # As operands: what is pinned must not close over a traced number.
        numbers = tuple(jnp.asarray(x, work_dtype(g)) for x in hyperparameters)
        direction, mu[i], nu[i] = sharding.pinned(step, specs)(
            g, mu[i], nu[i], count, *numbers
        )
        directions.append(direction)
    return treedef.unflatten(directions), optax.ScaleByAdamState(
        count, storage.join(treedef, mu), storage.join(treedef, nu)
    )


def adam_step(
    g: jax.Array,
    mu: storage.Stored,
    nu: storage.Stored,
    count: jax.Array,
    b1: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    *,
    first: storage.Codec,
    second: storage.Codec,
    salt: int,
) -> tuple[jax.Array, storage.Stored, storage.Stored]:
    """Direction in the dtype of ``g``, and both moments, of one leaf.

    ``count`` is the step's number from 1. Only what is stored is rounded, by the random
    numbers of ``count``, ``salt`` and ``salt + 1``.
    """
    work = b1.dtype
    gradient = g.astype(work)
    m = b1 * first.decode(mu, work) + (1 - b1) * gradient
    v = b2 * second.decode(nu, work) + (1 - b2) * jnp.square(gradient)
    root = jnp.sqrt(v / (1 - b2**count))
    direction = m / (1 - b1**count) / (root + eps)
    return (
        direction.astype(g.dtype),
        first.encode(m, storage.random_bits(g.shape, count, salt)),
        second.encode(v, storage.random_bits(g.shape, count, salt + 1)),
    )


def rotate_moments(
    mu: storage.Stored,
    nu: storage.Stored,
    rotation: jax.Array,
    count: jax.Array,
    *,
    first: storage.Codec,
    second: storage.Codec,
    salt: int,
) -> tuple[storage.Stored, storage.Stored]:
    """First and second moment ``(..., r, n)`` after rotation by ``(..., r, r)``.

    Rounded by the random numbers of ``count``, ``salt`` and ``salt + 1``: rounded to
    the nearest, one that falls by less than half a level a refresh would never fall.
    """

    def apply(
        q: jax.Array, stored: storage.Stored, codec: storage.Codec, salt: int
    ) -> storage.Stored:
        x = codec.decode(stored, q.dtype)
        x = jnp.einsum("...qr,...rn->...qn", q, x, precision=_HIGHEST)
        return codec.encode(x, storage.random_bits(x.shape, count, salt))

    return (
        apply(rotation, mu, first, salt),
        apply(jnp.square(rotation), nu, second, salt + 1),
    )


def _rotate(
    state: optax.ScaleByAdamState, change: SubspaceChange
) -> optax.ScaleByAdamState:
    treedef = jax.tree.structure(storage.main_part(state.mu))
    mu, nu = (storage.leaves_of(treedef, part) for part in (state.mu, state.nu))
    for i, q in enumerate(rotations_of(treedef, change)):
        if q is not None:
            first, second = _codecs(mu[i], nu[i], q.ndim)
            salt = _ROTATION_SALT + 2 * i
            rotate = functools.partial(
                rotate_moments, first=first, second=second, salt=salt
            )
            specs = (first.specs_of(mu[i]), second.specs_of(nu[i]))
            mu[i], nu[i] = sharding.pinned(rotate, specs)(mu[i], nu[i], q, state.count)
    return state._replace(mu=storage.join(treedef, mu), nu=storage.join(treedef, nu))


def _reset(
    state: optax.ScaleByAdamState, change: SubspaceChange
) -> optax.ScaleByAdamState:
    # Every projected leaf refreshes at the same step, so they share the new count;
    # a leaf that is not projected starts again with them.
    del change
    return jax.tree.map(jnp.zeros_like, state)


def _codecs(
    mu: storage.Stored, nu: storage.Stored, ndim: int
) -> tuple[storage.Codec, storage.Codec]:
    """Codecs that made the moments of a leaf."""
    return storage.Codec.of(mu, ndim, _FIRST), storage.Codec.of(nu, ndim, _SECOND)
