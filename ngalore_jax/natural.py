r"""The natural gradient of a stream of gradients, by its last few members.

=========================  ==========  =========================================
paper (arXiv 2410.16029)   here        shape, for one matrix
=========================  ==========  =========================================
:math:`g_t`                ``g``       ``(r, n)``, the gradient as it comes in
:math:`G` (Eq. 9)          ``history`` ``(s, r, n)``, the last ``s`` gradients
:math:`G^\top G`           ``gram``    ``(s, s)``
:math:`\lambda`            ``damping`` scalar
=========================  ==========  =========================================
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import sharding, storage
from ngalore_jax.checks import check_choice, check_int
from ngalore_jax.matrices import work_dtype
from ngalore_jax.subspace import (
    AtRefresh,
    SubspaceChange,
    rotations_of,
    when,
)

_HIGHEST = jax.lax.Precision.HIGHEST


class NaturalGradientState(NamedTuple):
    """State of :func:`scale_by_natural_gradient`."""

    count: jax.Array  # () int32
    # (s, ..., r, n), a ring buffer over s; in int8 a storage.Int8 of two trees
    history: optax.Updates | storage.Int8
    gram: optax.Updates  # (..., s, s) float32 (float64 for float64 leaves)


def scale_by_natural_gradient(
    history: int = 20,
    damping: jax.typing.ArrayLike = 1e-3,
    *,
    relative_damping: bool = False,
    at_refresh: AtRefresh = "rotate",
    history_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions by the inverse empirical Fisher of the last gradients.

    With the last :math:`s` gradients as the columns of :math:`H`, slot :math:`i`
    holding the current one :math:`g = H e_i`, the damped empirical Fisher is
    :math:`F = \lambda I + H H^\top`, and since
    :math:`(\lambda I + H H^\top) H = H (\lambda I + H^\top H)`,

    .. math::
      K &= H^\top H \quad\text{(one row and column replaced a step)} \\
      (\lambda I + K)\, w &= e_i \\
      F^{-1} g &= H w .

    In words: the part of the gradient that the last :math:`s - 1` gradients did not
    predict, divided by its own energy.

    Departures from the paper: it evaluates Woodbury's form
    :math:`g/\lambda - H (\lambda I + K)^{-1} H^\top g/\lambda` (its Eq. 12), equal in
    exact arithmetic, which subtracts two numbers of size :math:`1/\lambda`. The
    damping here is never below the rounding of :math:`K`,
    :math:`s\,\epsilon \max_j K_{jj}`, so that the Cholesky factor exists (if it does
    not all the same, the step has a Fisher of :math:`g` alone), and
    where :math:`\lambda < 64\,\epsilon\,\mathrm{tr} K`, :math:`w_i` grows by
    :math:`4 \epsilon \sum_j |w_j|`: a gradient that the past predicts to rounding
    keeps its direction.

    Each matrix (the last two axes of a leaf; axes in front are batch) has a Fisher
    of its own. A leaf of fewer dimensions is one vector.

    Args:
      history: Number of gradients kept, the current one included; at least 1.
      damping: :math:`\lambda > 0`, in units of squared gradient norms, or relative.
        Below :math:`s\,\epsilon \max_j K_{jj}` (1e-3 for float32, 20 gradients and
        squared norms of 420) that floor takes its place.
      relative_damping: Whether ``damping`` is in units of the mean of the non-zero
        diagonal of :math:`K`. The direction of the result is then independent of the
        gradient's scale; an absolute damping far above :math:`\|g\|^2` returns
        :math:`g / \lambda`. Its entries are about :math:`1 / (\|g\| \sqrt{rn})`
        in either case, so that an Adam behind it wants an ``eps`` far below that.
      at_refresh: What happens to the history when ``low_rank`` moves the basis:
        ``"rotate"`` carries it over (:math:`H_j \leftarrow P_{new}^\top P_{old} H_j`),
        ``"keep"`` leaves it as it is (the published code), ``"reset"`` empties it.
      history_dtype: Storage dtype of the history: ``"bfloat16"``, ``"int8"`` with one
        scale per column (:mod:`ngalore_jax.storage`), or None for that of the updates.
        The Gram matrix is of the gradients as they are stored.

    Returns:
      A transformation. Inside :func:`ngalore_jax.low_rank` it receives the extra
      argument ``subspace_change``; elsewhere there is none.

    Raises:
      TypeError: If ``history`` is not an int (under ``optax.inject_hyperparams``
        name it in ``static_args``).
      ValueError: If ``history`` is below 1, a concrete ``damping`` is not positive, or
        ``at_refresh`` or ``history_dtype`` is none of the above.

    Memory:
      ``s r n + s^2`` elements per matrix; ``s (r + 2) n`` bytes and ``s^2`` elements
      with ``"int8"``.

    Example:
      >>> import jax.numpy as jnp, ngalore_jax as ng
      >>> tx = ng.scale_by_natural_gradient(history=2, damping=1.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(jnp.rint(updates * 26))  # F^{-1} g = g / (1 + |g|^2)
      [3. 4.]
    """
    check_int("history", history)
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(
            f"damping must be positive, got {damping}: without it the Fisher of a few "
            "gradients has no inverse."
        )
    check_choice("at_refresh", at_refresh, AtRefresh)
    dtype = storage.check_dtype("history_dtype", history_dtype)

    def init(params: optax.Params) -> NaturalGradientState:
        leaves, treedef = jax.tree.flatten(params)
        columns = [_zero_history(p, history, dtype) for p in leaves]
        return NaturalGradientState(
            jnp.zeros([], jnp.int32),
            storage.join(treedef, columns),
            jax.tree.map(lambda p: _zero_gram(p, history), params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        subspace_change: SubspaceChange | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        del params, extra_args
        gradients, treedef = jax.tree.flatten(updates)
        columns = storage.leaves_of(treedef, state.history)
        grams = treedef.flatten_up_to(state.gram)
        if subspace_change is not None and at_refresh != "keep":
            reset = at_refresh == "reset"
            rotations = rotations_of(treedef, subspace_change)
            columns, grams = when(
                subspace_change.moved,
                lambda kept: _carry_over(*kept, rotations=rotations, reset=reset),
                (columns, grams),
            )
        slot = state.count % history
        directions = []
        for i, g in enumerate(gradients):
            codec = storage.Codec.of(columns[i], g.ndim)
            step = functools.partial(
                natural_step, codec=codec, relative_damping=relative_damping
            )
            specs = (
                sharding.spec_of(g),
                codec.specs_of(columns[i]),
                sharding.spec_of(grams[i]),
            )
            direction, columns[i], grams[i] = sharding.pinned(step, specs)(
                g, columns[i], grams[i], slot, jnp.asarray(damping, grams[i].dtype)
            )
            directions.append(direction)
        return treedef.unflatten(directions), NaturalGradientState(
            jnp.asarray(optax.safe_increment(state.count)),
            storage.join(treedef, columns),
            treedef.unflatten(grams),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def natural_step(
    g: jax.Array,
    history: storage.Stored,
    gram: jax.Array,
    slot: jax.Array,
    damping: jax.Array,
    *,
    codec: storage.Codec,
    relative_damping: bool,
) -> tuple[jax.Array, storage.Stored, jax.Array]:
    """Records ``g`` in ``slot`` and solves for its natural gradient.

    Shapes:
      ``g`` ``(..., r, n)``, ``history`` ``(s, ..., r, n)``, ``gram`` ``(..., s, s)``.

    Returns:
      ``F^{-1} g`` in the dtype of ``g``, and the new history and Gram matrix.
    """
    batch, slots = _batch_axes(g), gram.shape[-1]
    stored = codec.encode(g.astype(gram.dtype))
    history = _write(history, stored, slot)
    # K_ij = <H_j, g>, with g as it is stored so that K stays the Gram matrix of H. Sums
    # of products, not dot_general: limited by memory, exact in float32 everywhere, and
    # without the transposed copy of the history that a batch in its middle would cost.
    products = (
        codec.decode(history, gram.dtype) * codec.decode(stored, gram.dtype)[None]
    )
    row = jnp.sum(products, axis=tuple(range(batch + 1, g.ndim + 1)))
    row = jnp.moveaxis(row, 0, -1)
    gram = jax.lax.dynamic_update_index_in_dim(gram, row, slot, axis=batch)
    gram = jax.lax.dynamic_update_index_in_dim(gram, row, slot, axis=batch + 1)
    weights = push_through_weights(gram, slot, damping, relative_damping)
    weights = jnp.expand_dims(weights, tuple(range(batch, g.ndim)))
    # Slot by slot, so that nothing is decoded but what is being added.
    columns = [jax.tree.map(lambda x, i=i: x[i], history) for i in range(slots)]
    direction = functools.reduce(
        jnp.add,
        (
            weights[..., i] * codec.decode(column, gram.dtype)
            for i, column in enumerate(columns)
        ),
    )
    return direction.astype(g.dtype), history, gram


def push_through_weights(
    gram: jax.Array, slot: jax.Array, damping: jax.Array, relative_damping: bool
) -> jax.Array:
    """``w`` ``(..., s)`` of ``(lambda I + K) w = e_slot``, ``K`` ``(..., s, s)``."""
    s = gram.shape[-1]
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    scale = jnp.ones_like(diagonal[..., 0])
    if relative_damping:
        filled = jnp.maximum(jnp.sum(diagonal > 0, axis=-1), 1)
        scale = jnp.sum(diagonal, axis=-1) / filled
    eps = jnp.finfo(gram.dtype).eps
    floor = s * eps * jnp.max(diagonal, axis=-1)
    ridge = jnp.maximum(damping * scale, floor)
    # An all-zero history has nothing to damp: any positive ridge returns zero.
    ridge = jnp.where(ridge > 0, ridge, 1)
    identity = jnp.eye(s, dtype=gram.dtype).reshape((1,) * (gram.ndim - 2) + (s, s))
    factor = jnp.linalg.cholesky(gram + ridge[..., None, None] * identity)
    unit = jnp.broadcast_to(jnp.arange(s) == slot, diagonal.shape).astype(gram.dtype)
    weights = jax.scipy.linalg.cho_solve((factor, True), unit[..., None])[..., 0]
    # Of a Gram matrix that rounding has made indefinite: the current gradient alone.
    alone = unit / (diagonal + ridge[..., None])
    solved = jnp.all(jnp.isfinite(weights), axis=-1, keepdims=True)
    weights = jnp.where(solved, weights, alone)
    # Under so little damping H w can be what rounding leaves of a sum that cancels.
    # A few roundings' worth of g keep it pointing along g.
    rounding = 4 * eps * jnp.sum(jnp.abs(weights), axis=-1)
    weak = ridge < 64 * eps * jnp.sum(diagonal, axis=-1)
    return weights + jnp.where(weak, rounding, 0)[..., None] * unit


def rotate_history(
    history: storage.Stored,
    gram: jax.Array,
    rotation: jax.Array,
    *,
    codec: storage.Codec,
    along: int = -2,
) -> tuple[storage.Stored, jax.Array]:
    """Columns in the new basis, ``H_j <- Q H_j``, and their Gram matrix.

    In place and piece by piece, so that there is never a second history: column after
    column, then slice after slice of axis ``along``, one that no mesh splits.
    """

    def rotate(slot: jax.Array, history: storage.Stored) -> storage.Stored:
        column = codec.decode(_read(history, slot), rotation.dtype)
        rotated = jnp.einsum("...qr,...rn->...qn", rotation, column, precision=_HIGHEST)
        return _write(history, codec.encode(rotated), slot)

    history = jax.lax.fori_loop(0, gram.shape[-1], rotate, history)
    size = storage.main_part(history).shape[along]

    # Kahan's sum: the rounding of a plain one can make K indefinite.
    def add(i: jax.Array, kept: tuple[jax.Array, jax.Array]) -> Any:
        total, excess = kept
        x = codec.decode(codec.slice(history, i, along), gram.dtype)
        x = jnp.squeeze(x, along)
        more = jnp.einsum("s...k,t...k->...st", x, x, precision=_HIGHEST) - excess
        larger = total + more
        return larger, (larger - total) - more

    nothing = jnp.zeros_like(gram)
    gram, _ = jax.lax.fori_loop(0, size, add, (nothing, nothing))
    return history, gram


def _read(history: storage.Stored, slot: jax.Array) -> storage.Stored:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, slot, axis=0, keepdims=False), history
    )


def _write(
    history: storage.Stored, column: storage.Stored, slot: jax.Array
) -> storage.Stored:
    return jax.tree.map(
        lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, slot, axis=0),
        history,
        column,
    )


def _carry_over(
    columns: list[storage.Stored],
    grams: list[jax.Array],
    *,
    rotations: list[jax.Array | None],
    reset: bool,
) -> tuple[list[storage.Stored], list[jax.Array]]:
    """History and Gram of every projected leaf after the subspace has moved."""
    columns, grams = list(columns), list(grams)
    for i, rotation in enumerate(rotations):
        if rotation is None:
            continue
        if reset:
            columns[i], grams[i] = jax.tree.map(jnp.zeros_like, (columns[i], grams[i]))
            continue
        codec = storage.Codec.of(columns[i], rotation.ndim)
        spec = sharding.spec_of(storage.main_part(columns[i]))
        rotate = functools.partial(
            rotate_history, codec=codec, along=-2 if spec[-2] is None else -1
        )
        specs = (codec.specs(spec), sharding.spec_of(grams[i]))
        columns[i], grams[i] = sharding.pinned(rotate, specs)(
            columns[i], grams[i], rotation
        )
    return columns, grams


def _batch_axes(leaf: Any) -> int:
    return max(len(leaf.shape) - 2, 0)


def _zero_history(leaf: Any, history: int, dtype: jnp.dtype | None) -> storage.Stored:
    # Slots first: that is the order in which TPUs want to write one of them, and a
    # branch around the step, as a training loop's check for NaN, would have the whole
    # buffer copied into it and back.
    codec = storage.Codec(dtype, axes=storage.block_axes(len(leaf.shape)))
    spec = sharding.Spec(None, *sharding.spec_of(leaf))
    return codec.zeros((history, *leaf.shape), leaf.dtype, spec)


def _zero_gram(leaf: Any, history: int) -> jax.Array:
    b, spec = _batch_axes(leaf), sharding.spec_of(leaf)
    return sharding.zeros(
        (*leaf.shape[:b], history, history),
        work_dtype(leaf),
        sharding.Spec(*spec[:b], None, None),
    )
