"""A batch worked off in pieces, to save the memory of activations.

The gradients of the pieces add up as matrices (:func:`update_at_once`), or in the
optimizer, inside its subspace (:func:`update_by_piece`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = dict[str, Any]
# (params, batch) -> (sum of weighted losses, sum of weights), float32 scalars. Sums,
# not a mean, because pieces of a batch may differ in weight.
LossFn = Callable[[optax.Params, Batch], tuple[jax.Array, jax.Array]]


class Sums(NamedTuple):
    """What a batch adds up to; gradients like the parameters, the rest scalars."""

    loss: jax.Array
    weight: jax.Array
    gradient: optax.Updates


class Updated(NamedTuple):
    """What a step leaves; all but the first two and the last are float32 scalars."""

    params: optax.Params
    opt_state: optax.OptState
    loss: jax.Array  # sum over the batch, as weight
    weight: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    finite: jax.Array  # () bool


def split(batch: Batch, count: int) -> Batch:
    """Cuts `(B, ...)` arrays into `(count, B / count, ...)`.

    Pieces are strided, not contiguous: each keeps the batch axis' sharding.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0
        ),
        batch,
    )


def accumulate_gradients(
    loss_fn: LossFn, params: optax.Params, batch: Batch, microbatches: int
) -> Sums:
    """Returns the sums over a batch.

    The gradient has the parameters' dtypes for one piece and float32 for several.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, weight), gradient = value_and_grad(params, batch)
        return Sums(loss, weight, gradient)

    def add(sums: Sums, piece: Batch) -> tuple[Sums, None]:
        (loss, weight), gradient = value_and_grad(params, piece)
        return jax.tree.map(jnp.add, sums, Sums(loss, weight, gradient)), None

    zero = jnp.zeros((), jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    sums, _ = jax.lax.scan(add, Sums(zero, zero, zeros), split(batch, microbatches))
    return sums


def update_at_once(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    opt_state: optax.OptState,
    batch: Batch,
    microbatches: int,
    **extra_args: Any,
) -> Updated:
    """Updates by the gradient of the whole batch, unless it or the loss is not finite.

    Then parameters and state stay as they are, bit for bit.
    """
    sums = accumulate_gradients(loss_fn, params, batch, microbatches)
    # A batch without any weight has loss 0 and gradient 0, not 0 / 0.
    divisor = jnp.maximum(sums.weight, 1e-6)
    gradients = jax.tree.map(
        lambda g, p: (g.astype(jnp.float32) / divisor).astype(p.dtype),
        sums.gradient,
        params,
    )
    gradient_norm = _norm(gradients)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(gradient_norm)

    def update(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, params, opt_state, _ = carry
        updates, opt_state = optimizer.update(
            gradients, opt_state, params, **extra_args
        )
        params = optax.apply_updates(params, updates)
        return jnp.array(False), params, opt_state, _norm(updates)

    # A loop of one turn or none; `where` on every leaf would keep the old state alive
    # beside the new one.
    _, params, opt_state, update_norm = jax.lax.while_loop(
        lambda carry: carry[0],
        update,
        (finite, params, opt_state, jnp.float32(0)),
    )
    return Updated(
        params, opt_state, sums.loss, sums.weight, gradient_norm, update_norm, finite
    )


def update_by_piece(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    opt_state: optax.OptState,
    batch: Batch,
    microbatches: int,
) -> Updated:
    """Hands each piece's gradient to an optimizer that adds them up itself.

    Their mean is the gradient of the batch's weighted mean loss: `batch["weights"]`
    tells the whole weight beforehand. A piece whose loss or gradient is not finite
    counts as a zero gradient, since the pieces before it are in the state already.
    The gradient's norm is the root mean square of those of the pieces.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    share = microbatches / jnp.maximum(jnp.sum(batch["weights"]), 1e-6)

    def add(done: Updated, piece: Batch) -> tuple[Updated, None]:
        (loss, weight), gradient = value_and_grad(done.params, piece)
        gradient = jax.tree.map(
            lambda g: (g.astype(jnp.float32) * share).astype(g.dtype), gradient
        )
        gradient_norm = _norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
        updates, opt_state = optimizer.update(gradient, done.opt_state, done.params)
        return Updated(
            optax.apply_updates(done.params, updates),
            opt_state,
            done.loss + loss,
            done.weight + weight,
            done.gradient_norm + jnp.square(gradient_norm) / microbatches,
            done.update_norm + _norm(updates),
            done.finite & finite,
        ), None

    zero = jnp.zeros((), jnp.float32)
    start = Updated(params, opt_state, zero, zero, zero, zero, jnp.array(True))
    done, _ = jax.lax.scan(add, start, split(batch, microbatches))
    return done._replace(gradient_norm=jnp.sqrt(done.gradient_norm))


def _norm(tree: optax.Updates) -> jax.Array:
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares))
