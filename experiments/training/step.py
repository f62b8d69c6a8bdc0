"""One optimizer step and one evaluation, as pure functions to compile."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from experiments.training.microbatches import (
    Batch,
    LossFn,
    update_at_once,
    update_by_piece,
)
from experiments.training.state import TrainState

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    microbatches: int = 1,
    by_piece: bool = False,
    unit: str = "tokens",
    shardings: TrainState | None = None,
    refresh: bool | None = None,
) -> StepFn:
    """Compiles `(state, batch) -> (state, metrics)`; the old state is given up.

    A step whose loss or gradient is not finite is skipped: parameters and optimizer
    state stay as they are, bit for bit, and only `step` counts on.

    Args:
        loss_fn: Weighted sum of losses and sum of weights of a batch.
        optimizer: Applied to the gradient of the weighted mean loss.
        schedule: Learning rate by step, for the metrics only.
        microbatches: Pieces the leading axis of every batch array is cut into; their
            gradients are added up in float32, so that memory follows the piece.
        by_piece: The optimizer adds up the gradients of `microbatches` itself, one
            update each. A piece that is not finite is then skipped, not the step.
        unit: What weights count; names their sum.
        shardings: Sharding of every leaf of the state, kept from step to step; on
            auto mesh axes the compiler would choose others, and compile again for
            them. None: one device, where there is no choice.
        refresh: Compiles the step without (False) or with (True) a refresh of the
            subspaces alone, as `ngalore_jax.low_rank` says; other optimizers have
            none. None: the optimizer's count decides. Not with `by_piece`.

    Returns:
        The compiled step. Metrics are float32 scalars: `loss` (weighted mean),
        `gradient_norm`, `update_norm` (0 if skipped), `learning_rate` (by `step`, so
        ahead of the optimizer's by the steps skipped), `unit` (sum of weights),
        `skipped` (1 if anything was, else 0).
    """
    optimizer = optax.with_extra_args_support(optimizer)
    update = update_by_piece if by_piece else update_at_once
    extra_args = {} if refresh is None else {"refresh": refresh}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        done = update(
            loss_fn,
            optimizer,
            state.params,
            state.opt_state,
            batch,
            microbatches,
            **extra_args,
        )
        metrics = {
            "loss": done.loss / jnp.maximum(done.weight, 1e-6),
            "gradient_norm": done.gradient_norm,
            "update_norm": done.update_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            unit: done.weight,
            "skipped": 1 - done.finite.astype(jnp.float32),
        }
        return TrainState(done.params, done.opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_update(
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    refresh: bool | None = None,
) -> Callable[[TrainState, optax.Updates], TrainState]:
    """Compiles the optimizer's share of a step alone: `(state, gradients) -> state`.

    To look at what it costs; arguments as of :func:`make_train_step`.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    extra_args = {} if refresh is None else {"refresh": refresh}

    def step(state: TrainState, gradients: optax.Updates) -> TrainState:
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, **extra_args
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1)

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


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
    apply: Callable[..., jax.Array],
) -> LossFn:
    """Makes the loss of a language model.

    Args:
        apply: `(params, tokens (B, T) int32) -> logits (B, T, V) float32`; takes a
            third argument, segments like the tokens, if batches have them.

    Returns:
        A loss function of batches `{"tokens": (B, T + 1) int32, "weights": (B, T)
        float32}`; position t predicts token t + 1 with weight t. With `"segments":
        (B, T + 1) int32` a position attends to those of its own segment only.
    """

    def loss_fn(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens, weights = batch["tokens"], batch["weights"]
        segments = [batch["segments"][:, :-1]] if "segments" in batch else []
        logits = apply(params, tokens[:, :-1], *segments)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * weights), jnp.sum(weights)

    return loss_fn
