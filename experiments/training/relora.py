"""ReLoRA: low-rank updates that add up to one of a higher rank.

At the end of every ``gap`` steps the factors of every adapter are merged into its
kernel and start afresh::

    W <- W + scale A B,   A <- U(-1 / sqrt(m), 1 / sqrt(m)),   B <- 0

which changes no output beyond rounding, and lets the next ``gap`` steps add another
matrix of rank r to W. Merging is part of the update that the transformation returns,
and whether it is due is decided by its count: to a training loop, a checkpoint and a
resumed run it is an optimizer like others. (The norm of that update is no step's: it
holds the change of W, which that of A and B undoes.)

Departures from the paper. It prunes the 99 % smallest entries of the factors' moments;
here their optimizer starts afresh, for what it knows is about factors that are no more,
and Adam's bias correction takes moments that start at zero for what they are. Only
the factors' learning rate is jagged; embeddings, norms and output layer, which nothing
happens to, keep the plain schedule. There is no full-rank start, as in arXiv
2403.03507's comparison.

References:
  Lialin et al., ReLoRA (arXiv 2307.05695), section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.models.lora import (
    Module,
    draw_a,
    is_adapted,
    labels,
    weight_change,
)


class ReLoRAState(NamedTuple):
    """State of :func:`relora`."""

    count: jax.Array  # () int32, updates done
    inner: optax.OptState  # of the factors; the initial one after a restart


def relora(
    inner: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    gap: int,
    scale: float,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains LoRA's factors, and merges and restarts them every `gap` updates.

    Args:
        inner: Turns the factors' gradients into directions to descend against; begins
            anew at every restart, so schedules have no place in it.
        learning_rate: Of the factors, by updates done: :func:`jagged`, as published.
        gap: Updates between two restarts, at least 1.
        scale: Factor on `A B`, as the model's adapter has it.
        seed: Seed of the draws of A.

    Returns:
        A transformation of parameters that are all in modules of `kernel`, `lora_a`
        and `lora_b`. Its updates move kernels at a restart only.

    Raises:
        ValueError: If `gap` is below 1; at init, if a parameter is in no such module;
            at update, if the parameters are not given.

    Memory:
        The inner state of the factors. An update has zeros for the kernels, which a
        restart replaces by their change.
    """
    if gap < 1:
        raise ValueError(f"gap={gap} must be at least 1 update between two restarts.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> ReLoRAState:
        labels(params)  # raises where a parameter would not be trained
        return ReLoRAState(jnp.zeros((), jnp.int32), inner.init(_factors(params)))

    def update(
        updates: optax.Updates,
        state: ReLoRAState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReLoRAState]:
        if params is None:
            raise ValueError(
                "relora merges factors into kernels: call update(updates, state, "
                "params) with the parameters."
            )
        factors = _factors(params)
        directions, inner_state = inner.update(
            _factors(updates), state.inner, factors, **extra_args
        )
        rate = learning_rate(state.count)
        steps = jax.tree.map(lambda d: (-rate * d).astype(d.dtype), directions)
        count = optax.safe_increment(state.count)
        due = count % gap == 0

        modules, treedef = jax.tree.flatten(params, is_leaf=is_adapted)
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), count), len(modules)
        )
        new_updates = [
            jax.lax.cond(
                due, functools.partial(restart, scale), _go_on, module, step, key
            )
            for module, step, key in zip(
                modules, treedef.flatten_up_to(steps), keys, strict=True
            )
        ]
        inner_state = jax.tree.map(
            lambda fresh, old: jnp.where(due, fresh, old),
            inner.init(factors),
            inner_state,
        )
        return treedef.unflatten(new_updates), ReLoRAState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def restart(scale: float, module: Module, step: Module, key: jax.Array) -> Module:
    """Returns the update that takes a step, merges, and starts the factors afresh.

    Args:
        scale: Factor on `A B`.
        module: `kernel`, `lora_a` and `lora_b`; what else it has stays as it is.
        step: The factors' update.
        key: For the new A.
    """
    stepped = module | optax.apply_updates(_factors_of(module), step)
    a, b = module["lora_a"], module["lora_b"]
    fresh = draw_a(key, a.shape, a.dtype)
    if not jax.typeof(a).sharding.mesh.empty:
        fresh = jax.sharding.reshard(fresh, jax.typeof(a).sharding)
    change = weight_change(stepped, scale).astype(module["kernel"].dtype)
    return _zeros(module) | {"kernel": change, "lora_a": fresh - a, "lora_b": -b}


def jagged(schedule: optax.Schedule, gap: int, warmup: int) -> optax.Schedule:
    """Returns a schedule that rises from near zero again after every restart.

    Args:
        schedule: Learning rate by updates done.
        gap: Updates between two restarts.
        warmup: Updates of each rise, which is linear: the one after a restart has
            `1 / (warmup + 1)` of its rate. The first `gap` updates are left alone.
    """

    def rate(count: jax.Array) -> jax.Array:
        share = jnp.minimum(1.0, (count % gap + 1) / (warmup + 1))
        return schedule(count) * jnp.where(count < gap, 1.0, share)

    return rate


def _go_on(module: Module, step: Module, _: jax.Array) -> Module:
    return _zeros(module) | step


def _zeros(module: Module) -> Module:
    """Updates of nothing: also of a bias, which may be masked and then stays so."""
    return jax.tree.map(jnp.zeros_like, module)


def _factors(tree: optax.Params) -> optax.Params:
    return jax.tree.map(_factors_of, tree, is_leaf=is_adapted)


def _factors_of(module: Module) -> Module:
    return {name: module[name] for name in ("lora_a", "lora_b")}
