"""Subspaces and Fishers that were tried beside the library's, built from its parts.

What helped went into `ngalore_jax`; these are kept so that what did not can be measured
again. The Fishers say nothing about sharding: on a mesh they need auto axes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ngalore_jax as ng
from ngalore_jax.natural import push_through_weights
from ngalore_jax.projectors import Projector, orthonormal
from ngalore_jax.subspace import when

_HIGHEST = jax.lax.Precision.HIGHEST
# Decays of the averages that stand for a history.
AVERAGES = (0.5, 0.9, 0.97)


def switching(random_share: float = 0.25, seed: int = 0) -> Projector:
    """Leading directions by subspace iteration, and random ones from their complement.

    The last columns, `random_share` of the rank and at least one, are drawn anew at
    each refresh, as Alice's subspace switching does (arXiv 2502.07752, algorithm 3).
    """
    leading = ng.subspace_iteration(seed=seed)

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        m, r = basis.shape[-2:]
        drawn = max(1, int(random_share * r))
        found = leading(gradient, basis, count)
        key = jax.random.fold_in(jax.random.key(seed + 1), count)
        noise = jax.random.normal(key, (m, drawn), basis.dtype) / math.sqrt(m)
        noise = jnp.broadcast_to(noise, (*basis.shape[:-1], drawn))
        return orthonormal(jnp.concatenate([found[..., : r - drawn], noise], axis=-1))

    return refresh


def averaged(weight: float = 0.1) -> Projector:
    """Leading directions of an average of covariances, by Oja's rule.

    `P <- qr(weight * G (G^T P) sqrt(r) / |G (G^T P)| + (1 - weight) P)`: with a refresh
    every few steps, the gradients of some `1 / weight` refreshes have a say.
    """
    first = ng.subspace_iteration()

    def refresh(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        small = jnp.einsum("...mn,...mr->...nr", gradient, basis, precision=_HIGHEST)
        image = jnp.einsum("...mn,...nr->...mr", gradient, small, precision=_HIGHEST)
        norm = jnp.linalg.norm(image, axis=(-2, -1), keepdims=True)
        image *= math.sqrt(basis.shape[-1]) / jnp.where(norm > 0, norm, 1)
        moved = orthonormal(weight * image + (1 - weight) * basis)
        return jnp.where(count == 0, first(gradient, basis, count), moved)

    return refresh


class AveragesState(NamedTuple):
    """State of :func:`scale_by_averaged_history`."""

    averages: optax.Updates  # (k, ..., r, n) float32 a leaf


def scale_by_averaged_history(
    damping: float = 1e-3, decays: tuple[float, ...] = AVERAGES
) -> optax.GradientTransformationExtraArgs:
    """The natural gradient with averages of the past in place of its members.

    The history is the gradient and an exponential average of the ones before for each
    decay b, times the root of the number of steps that it stands for,
    (1 + b) / (1 - b). They follow the basis at a refresh. Memory: `k r n` elements a
    matrix.
    """
    b = jnp.asarray(decays, jnp.float32)
    span = jnp.sqrt((1 + b) / (1 - b))

    def init(params: optax.Params) -> AveragesState:
        def zeros(p: jax.Array) -> jax.Array:
            return jnp.zeros((len(decays), *p.shape), jnp.float32)

        return AveragesState(jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates,
        state: AveragesState,
        params: optax.Params | None = None,
        *,
        subspace_change: ng.SubspaceChange | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AveragesState]:
        del params, extra_args
        gradients, treedef = jax.tree.flatten(updates)
        averages = treedef.flatten_up_to(state.averages)
        if subspace_change is not None:
            averages = _rotated(averages, treedef, subspace_change)
        out = []
        for i, g in enumerate(gradients):
            past = _along_first(span, averages[i])
            columns = jnp.concatenate([g[None], past])
            gram = jnp.einsum(
                "s...rn,t...rn->...st", columns, columns, precision=_HIGHEST
            )
            weights = push_through_weights(
                gram, jnp.int32(0), jnp.float32(damping), False
            )
            out.append(jnp.einsum("...s,s...rn->...rn", weights, columns))
            averages[i] = _along_first(b, averages[i]) + _along_first(
                1 - b, jnp.broadcast_to(g, averages[i].shape)
            )
        return treedef.unflatten(out), AveragesState(treedef.unflatten(averages))

    return optax.GradientTransformationExtraArgs(init, update)


class ModelFisherState(NamedTuple):
    """State of :func:`scale_by_model_fisher`."""

    count: jax.Array  # () int32
    history: optax.Updates  # (s, ..., r, n) float32 a leaf


def scale_by_model_fisher(
    history: int = 20, damping: float = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """The natural gradient with one Fisher for all matrices instead of one for each.

    A member of the history is the gradient of the whole model, so all matrices share
    the weights of its combination. The history follows the basis at a refresh.
    """

    def init(params: optax.Params) -> ModelFisherState:
        def zeros(p: jax.Array) -> jax.Array:
            return jnp.zeros((history, *p.shape), jnp.float32)

        return ModelFisherState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(zeros, params),
        )

    def update(
        updates: optax.Updates,
        state: ModelFisherState,
        params: optax.Params | None = None,
        *,
        subspace_change: ng.SubspaceChange | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ModelFisherState]:
        del params, extra_args
        gradients, treedef = jax.tree.flatten(updates)
        columns = treedef.flatten_up_to(state.history)
        if subspace_change is not None:
            columns = _rotated(columns, treedef, subspace_change)
        slot = state.count % history
        columns = [h.at[slot].set(g) for h, g in zip(columns, gradients, strict=True)]
        gram = sum(
            jnp.einsum("s...,t...->st", h, h, precision=_HIGHEST)
            for h in (h.reshape(history, -1) for h in columns)
        )
        weights = push_through_weights(gram, slot, jnp.float32(damping), False)
        out = [jnp.einsum("s,s...->...", weights, h) for h in columns]
        return treedef.unflatten(out), ModelFisherState(
            state.count + 1, treedef.unflatten(columns)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _rotated(
    stacks: list[jax.Array], treedef: Any, change: ng.SubspaceChange
) -> list[jax.Array]:
    """Leaves `(k, ..., r, n)` after the bases have moved, if they have."""
    rotations = treedef.flatten_up_to(change.rotation)
    return when(
        change.moved,
        lambda kept: [
            jnp.einsum("...qr,k...rn->k...qn", q, x, precision=_HIGHEST)
            for q, x in zip(rotations, kept, strict=True)
        ],
        stacks,
    )


def _along_first(factors: jax.Array, x: jax.Array) -> jax.Array:
    return factors.reshape(-1, *(1,) * (x.ndim - 1)) * x
