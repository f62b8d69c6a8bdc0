"""What a config stands for: mesh, model, optimizer and the step that is compiled.

Shared by all who run a step, compile it or weigh its state, so that they mean the same
one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from experiments.configs.pretrain import PretrainConfig
from experiments.configs.run import TrainingConfig
from experiments.models.functional import functional_llama
from experiments.models.lora import without_adapter
from experiments.training.distributed import fetch
from experiments.training.mesh import make_mesh
from experiments.training.microbatches import Batch, LossFn
from experiments.training.optimizer import (
    build_optimizer,
    matrix_labels,
    matrix_schedule,
    takes_explicit_axes,
)
from experiments.training.state import TrainState
from experiments.training.step import StepFn, make_train_step, next_token_loss


class Parts(NamedTuple):
    """What a state is made of, and what it is trained by."""

    init_params: Callable[[jax.Array], optax.Params]
    loss_fn: LossFn
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule  # learning rate of the matrices
    unit: str = "tokens"  # what the loss is a mean over


def parts_of(config: PretrainConfig) -> Parts:
    """Returns what a config pretrains."""
    init_params, apply = functional_llama(config.model, config.optimization.adapter)
    return make_parts(config, config.run.steps, init_params, next_token_loss(apply))


def fetch_merged(params: optax.Params, config: TrainingConfig) -> Any:
    """Returns parameters on the first process's host, a run's adapter folded in.

    All processes call it; elsewhere the leaves are None.
    """
    return without_adapter(params, config.optimization.adapter, fetch)


def make_parts(
    config: TrainingConfig,
    steps: int,
    init_params: Callable[[jax.Array], optax.Params],
    loss_fn: LossFn,
    unit: str = "tokens",
) -> Parts:
    """Returns a model and its loss with the optimizer of a run of so many steps."""
    optimizer = build_optimizer(
        config.optimization,
        learning_rate=config.learning_rate,
        steps=steps,
        accumulation_steps=config.accumulation_steps,
    )
    schedule = matrix_schedule(config.optimization, config.learning_rate, steps)
    if config.optimization.others == "freeze":
        loss_fn = _of_trained(loss_fn)
    return Parts(init_params, loss_fn, optimizer, schedule, unit)


def _of_trained(loss_fn: LossFn) -> LossFn:
    """Returns the loss whose gradient is zero, and not computed, where all is frozen.

    That of a table of embeddings is as large as the table.
    """

    def loss(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        labels = matrix_labels(params, others="freeze")
        params = jax.tree.map(
            lambda p, label: jax.lax.stop_gradient(p) if label == "frozen" else p,
            params,
            labels,
        )
        return loss_fn(params, batch)

    return loss


def mesh_of(
    config: TrainingConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh of a config; `devices` are as of `make_mesh`."""
    return make_mesh(
        config.mesh.data,
        config.mesh.fsdp,
        config.mesh.tensor,
        explicit=takes_explicit_axes(config.optimization),
        devices=devices,
    )


def refreshes_of(config: TrainingConfig) -> tuple[bool | None, ...]:
    """Returns the `refresh` of each program that the step can be taken apart into.

    False and True: steady step and refresh. None alone: the optimizer has no refresh
    that it can be told of, or adds up microbatches, when its own count decides.
    """
    told = ("galore", "natural_galore", "natural_galore_paper", "reference")
    is_told = config.optimization.optimizer in told
    return (False, True) if is_told and config.accumulation_steps is None else (None,)


def step_of(
    config: TrainingConfig,
    parts: Parts,
    shardings: TrainState | None,
    refresh: bool | None = None,
) -> StepFn:
    """Returns the training step of a config; the last two are `make_train_step`'s."""
    return make_train_step(
        parts.loss_fn,
        parts.optimizer,
        parts.schedule,
        microbatches=config.microbatches,
        by_piece=config.accumulation_steps is not None,
        unit=parts.unit,
        shardings=shardings,
        refresh=refresh,
    )
