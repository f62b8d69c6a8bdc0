"""Gradients of several microbatches added up inside the subspace.

A window of ``k`` microbatches shares one basis: a refresh comes from the first one's
gradient. Their projections are averaged at ``(..., r, n)`` instead of ``(..., m, n)``,
and the inner transform, which runs once a window, is told of the refresh then.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax.matrices import work_dtype
from ngalore_jax.subspace import SubspaceChange


class AccumulationState(NamedTuple):
    """State of the inner transform and what it has not seen yet."""

    mini_step: jax.Array  # () int32, microbatches of this window seen
    total: optax.Updates  # (..., r, n), sum of the projected gradients, work dtype
    moved: jax.Array  # () bool, whether this window began with a refresh
    rotation: optax.Updates  # (..., r, r) of that refresh, None for other leaves
    inner: optax.OptState


def start(
    inner: optax.GradientTransformation,
    steps: int | None,
    lows: optax.Params,
    rotations: optax.Updates,
) -> optax.OptState:
    """State before the first microbatch, from trees like the updates.

    ``steps`` None is no accumulation: ``inner``'s own state.
    """
    if steps is None:
        return inner.init(lows)
    return AccumulationState(
        mini_step=jnp.zeros([], jnp.int32),
        total=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=work_dtype(x)), lows),
        moved=jnp.zeros([], bool),
        rotation=rotations,
        inner=inner.init(lows),
    )


def add(
    inner: optax.GradientTransformationExtraArgs,
    steps: int | None,
    lows: optax.Updates,
    state: Any,
    change: SubspaceChange,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """Takes one microbatch: zeros, and ``inner``'s directions after the last one."""
    if steps is None:
        return inner.update(lows, state, subspace_change=change, **extra_args)
    first = state.mini_step == 0
    total = jax.tree.map(lambda total, low: total + low, state.total, lows)
    moved = jnp.where(first, change.moved, state.moved)
    rotation = jax.tree.map(
        lambda old, new: jnp.where(first, new, old), state.rotation, change.rotation
    )

    def run(inner_state: optax.OptState) -> tuple[Any, ...]:
        mean = jax.tree.map(lambda x, low: (x / steps).astype(low.dtype), total, lows)
        directions, inner_state = inner.update(
            mean,
            inner_state,
            subspace_change=SubspaceChange(moved, rotation),
            **extra_args,
        )
        return directions, jax.tree.map(jnp.zeros_like, total), inner_state

    def wait(inner_state: optax.OptState) -> tuple[Any, ...]:
        return jax.tree.map(jnp.zeros_like, lows), total, inner_state

    last = state.mini_step == steps - 1
    directions, total, inner_state = jax.lax.cond(last, run, wait, state.inner)
    mini_step = (state.mini_step + 1) % steps
    return directions, AccumulationState(mini_step, total, moved, rotation, inner_state)


def accumulate(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """``inner`` once every ``steps`` updates, for leaves that are not projected."""
    inner = optax.with_extra_args_support(inner)

    def no_rotations(tree: optax.Params) -> optax.Updates:
        return jax.tree.map(lambda _: None, tree)

    def init(params: optax.Params) -> optax.OptState:
        return start(inner, steps, params, no_rotations(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        change = SubspaceChange(False, no_rotations(updates))
        return add(inner, steps, updates, state, change, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
