"""One optimizer step and one evaluation, as pure functions to compile."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.training.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
# (params, batch) -> (sum of weighted losses, sum of weights), float32 scalars. Sums,
# not a mean, because pieces of a batch may differ in weight.
LossFn = Callable[[optax.Params, Batch], tuple[jax.Array, jax.Array]]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    microbatches: int = 1,
    shardings: TrainState | None = None,
) -> StepFn:
    """Compiles `(state, batch) -> (state, metrics)`; the old state is given up.

    Args:
        loss_fn: Weighted sum of losses and sum of weights of a batch.
        optimizer: Applied to the gradient of the weighted mean loss.
        schedule: Learning rate by step, for the metrics only.
        microbatches: Pieces the leading axis of every batch array is cut into; their
            gradients are added up in float32, so that memory follows the piece.
        shardings: Sharding of every leaf of the state, kept from step to step; on
            auto mesh axes the compiler would choose others, and compile again for
            them. None: one device, where there is no choice.

    Returns:
        The compiled step. Metrics are float32 scalars: `loss` (weighted mean),
        `gradient_norm`, `update_norm`, `learning_rate`, `tokens` (sum of weights).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss_sum, weight_sum, gradient_sum = accumulate_gradients(
            loss_fn, state.params, batch, microbatches
        )
        # A batch without any weight has loss 0 and gradient 0, not 0 / 0.
        divisor = jnp.maximum(weight_sum, 1e-6)
        gradients = jax.tree.map(
            lambda g, p: (g.astype(jnp.float32) / divisor).astype(p.dtype),
            gradient_sum,
            state.params,
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": loss_sum / divisor,
            "gradient_norm": _norm(gradients),
            "update_norm": _norm(updates),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": weight_sum,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def accumulate_gradients(
    loss_fn: LossFn, params: optax.Params, batch: Batch, microbatches: int
) -> tuple[jax.Array, jax.Array, optax.Updates]:
    """Returns sums over a batch: losses, weights, gradient.

    The gradient has the parameters' dtypes for one piece and float32 for several.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss_sum, weight_sum), gradient_sum = value_and_grad(params, batch)
        return loss_sum, weight_sum, gradient_sum

    def add(carry: Any, piece: Batch) -> tuple[Any, None]:
        (loss, weight), gradient = value_and_grad(params, piece)
        return jax.tree.map(lambda c, x: c + x, carry, (loss, weight, gradient)), None

    zero = jnp.zeros((), jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    # Strided, not contiguous, pieces: each keeps the batch axis' sharding.
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0
        ),
        batch,
    )
    sums, _ = jax.lax.scan(add, (zero, zero, zeros), pieces)
    return sums


def make_evaluate(
    loss_fn: LossFn, place: Callable[[Batch], Batch]
) -> Callable[[optax.Params, Iterable[Batch]], float]:
    """Compiles a function that returns the weighted mean loss over given batches.

    Args:
        loss_fn: Weighted sum of losses and sum of weights of a batch.
        place: Puts a batch of host arrays on the devices.
    """
    compiled = jax.jit(loss_fn)

    def evaluate(params: optax.Params, batches: Iterable[Batch]) -> float:
        sums = [compiled(params, place(batch)) for batch in batches]
        # Added on the host in float64: thousands of float32 sums lose digits.
        losses, weights = zip(*jax.device_get(sums), strict=True)
        return float(sum(map(float, losses)) / sum(map(float, weights)))

    return evaluate


def next_token_loss(
    apply: Callable[[optax.Params, jax.Array], jax.Array],
) -> LossFn:
    """Makes the loss of a language model.

    Args:
        apply: `(params, tokens (B, T) int32) -> logits (B, T, V) float32`.

    Returns:
        A loss function of batches `{"tokens": (B, T + 1) int32, "weights": (B, T)
        float32}`; position t predicts token t + 1 with weight t.
    """

    def loss_fn(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens, weights = batch["tokens"], batch["weights"]
        logits = apply(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * weights), jnp.sum(weights)

    return loss_fn


def _norm(tree: optax.Updates) -> jax.Array:
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares))
