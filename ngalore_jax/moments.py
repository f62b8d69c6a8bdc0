"""Adam in a subspace that moves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import sharding
from ngalore_jax.subspace import AtRefresh, SubspaceChange, check_at_refresh, when

_HIGHEST = jax.lax.Precision.HIGHEST


def scale_by_subspace_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    at_refresh: AtRefresh = "rotate",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.scale_by_adam`` whose moments follow the basis at a refresh.

    With :math:`Q = P_{new}^\top P_{old}` and :math:`\odot` the elementwise product,
    ``"rotate"`` does, before the step in which the basis moved,

    .. math::
      m \leftarrow Q\, m, \qquad v \leftarrow (Q \odot Q)\, v .

    The second rule keeps :math:`v \ge 0` and is exact when the rows of the gradient
    are uncorrelated (LDAdam, arXiv 2410.16103, rotates a centred variance instead).

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      at_refresh: ``"rotate"``, ``"keep"`` (the moments stay as they are, as GaLore
        publishes it: identical to ``optax.scale_by_adam``) or ``"reset"`` (moments and
        bias correction start again, those of leaves that are not projected too, since
        one counter serves all).
      mu_dtype: Dtype of the first moment; None for that of the updates.

    Returns:
      A transformation with ``optax.ScaleByAdamState``. Outside
      :func:`ngalore_jax.low_rank` it is Adam.

    Raises:
      ValueError: If ``at_refresh`` is not one of the three.

    Memory:
      ``2 r n`` elements a matrix.
    """
    check_at_refresh("at_refresh", at_refresh)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

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
            moved, rotation = subspace_change
            carry = _reset if at_refresh == "reset" else _rotate
            state = when(moved, lambda kept: carry(kept, rotation), state)
        return adam.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def rotate_moments(
    mu: jax.Array, nu: jax.Array, rotation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and second moment ``(..., r, n)`` after rotation by ``(..., r, r)``."""

    def apply(q: jax.Array, x: jax.Array) -> jax.Array:
        rotated = jnp.einsum(
            "...qr,...rn->...qn", q, x.astype(q.dtype), precision=_HIGHEST
        )
        return rotated.astype(x.dtype)

    return apply(rotation, mu), apply(jnp.square(rotation), nu)


def _rotate(
    state: optax.ScaleByAdamState, rotation: optax.Updates
) -> optax.ScaleByAdamState:
    treedef = jax.tree.structure(state.mu)
    mu, nu = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
    for i, q in enumerate(treedef.flatten_up_to(rotation)):
        if q is not None:
            specs = (sharding.spec_of(mu[i]), sharding.spec_of(nu[i]))
            mu[i], nu[i] = sharding.pinned(rotate_moments, specs)(mu[i], nu[i], q)
    return state._replace(mu=treedef.unflatten(mu), nu=treedef.unflatten(nu))


def _reset(
    state: optax.ScaleByAdamState, rotation: optax.Updates
) -> optax.ScaleByAdamState:
    # Every projected leaf refreshes at the same step, so they share the new count;
    # a leaf that is not projected starts again with them.
    del rotation
    return jax.tree.map(jnp.zeros_like, state)
