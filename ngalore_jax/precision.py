"""Transformations whose state is wider than what they are given."""

from typing import Any

import jax
import optax

from ngalore_jax import sharding
from ngalore_jax.matrices import work_dtype


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` with a state of float32 at least: a bfloat16 average stands still.

    It is one that needs no parameters. Updates have the dtypes of the gradients.
    """

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(
            jax.tree.map(
                lambda x: sharding.zeros(x.shape, work_dtype(x), sharding.spec_of(x)),
                params,
            )
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        wide = jax.tree.map(lambda x: x.astype(work_dtype(x)), updates)
        return inner.update(wide, state)

    return dtypes_kept(optax.GradientTransformation(init, update))


def dtypes_kept(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """``inner``, whose float32 state or schedules would make updates float32."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
