"""What runs that fine-tune an encoder have in common, whatever their task."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.assembly import fetch_merged
from experiments.configs.finetuning import check_positions
from experiments.configs.glue import EncoderModelConfig
from experiments.configs.run import MeshConfig, TrainingConfig
from experiments.data.example_batches import Encoded, evaluation_batches
from experiments.data.tokenizer import copy_tokenizer_settings
from experiments.models.encoder_checkpoint import (
    Labels,
    read_encoder_config,
    save_encoder,
)
from experiments.models.encoder_config import EncoderConfig
from experiments.training import distributed
from experiments.training.folder import RunFolder
from experiments.training.microbatches import Batch, LossFn
from experiments.training.run import Layout

Apply = Callable[..., jax.Array]
_INPUTS = ("tokens", "lengths", "types")  # of a batch, to the encoder


def encoder_config(
    wanted: EncoderModelConfig, max_length: int, mesh: MeshConfig, folder: Path
) -> EncoderConfig:
    """Returns the shape of the encoder in a folder, with a run's settings.

    Raises:
        ValueError: It has fewer positions than examples may have tokens, or heads that
            the mesh does not divide.
    """
    shape = read_encoder_config(folder)
    shape = dataclasses.replace(
        shape,
        dropout=shape.dropout if wanted.dropout is None else wanted.dropout,
        param_dtype=wanted.param_dtype,
        dtype=wanted.dtype,
        remat=wanted.remat,
    )
    check_positions(max_length, shape.max_length, wanted.name)
    if shape.num_heads % mesh.tensor:
        raise ValueError(
            f"--mesh.tensor {mesh.tensor} must divide the {shape.num_heads} "
            f"heads of {wanted.name}."
        )
    return shape


def example_loss(
    apply: Apply, losses_of: Callable[[jax.Array, jax.Array], jax.Array]
) -> LossFn:
    """Makes the loss of batches as `Encoded.collate` makes them.

    Args:
        apply: The encoder.
        losses_of: An example's loss each, (N,), of (N, C) outputs and of the labels.
    """

    def loss_fn(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(jnp.sum(batch["noise"]))
        outputs = apply(params, **{name: batch[name] for name in _INPUTS}, key=key)
        losses = losses_of(outputs, batch["labels"])
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    return loss_fn


def make_predict(
    apply: Apply, layout: Layout, batch_size: int
) -> Callable[[optax.Params, Encoded], np.ndarray]:
    """Compiles a function of parameters and examples that returns (N, C) outputs."""
    compiled = jax.jit(
        lambda params, inputs: apply(params, **inputs, key=None),
        out_shardings=layout.whole,
    )

    def outputs(params: optax.Params, batch: Batch) -> jax.Array:
        # Labels, which test batches lack, would make it another program.
        inputs = {name: batch[name] for name in _INPUTS}
        return compiled(params, layout.place(inputs))

    def predict(params: optax.Params, encoded: Encoded) -> np.ndarray:
        batches = evaluation_batches(encoded, batch_size, layout.share)
        found = [(rows, outputs(params, batch)) for rows, batch in batches]
        order = np.concatenate([rows for rows, _ in found])
        kept = [np.asarray(some)[: len(rows)] for rows, some in found]
        return np.concatenate(kept)[np.argsort(order)]

    return predict


def save_model(
    params: optax.Params,
    config: TrainingConfig,
    shape: EncoderConfig,
    labels: Labels,
    source: Path,
    folder: RunFolder,
) -> None:
    """Writes a fine-tuned encoder, without adapter, with its source's tokenizer."""
    merged = fetch_merged(params, config)
    if distributed.is_first():
        save_encoder(folder.model, shape, merged, labels)
        shutil.copy(source / "tokenizer.json", folder.model)
        copy_tokenizer_settings(source, folder.model)
