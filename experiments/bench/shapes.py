"""The hidden matrices of a Llama, in two layouts, and gradients for them.

Embeddings, output layer and norms are left out: every optimizer here treats them as
Adam does.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.models.formats import Dtype
from experiments.models.functional import functional_llama
from experiments.models.llama_config import LlamaConfig

Layout = Literal["list", "stacked"]
Shapes = Any  # nested dictionaries and lists of jax.ShapeDtypeStruct


def matrices(
    config: LlamaConfig,
    layout: Layout,
    dtype: Dtype = "float32",
    layers: int | None = None,
) -> Shapes:
    """Returns the abstract kernels of a model's layers.

    Args:
        config: Shape of the model.
        layout: "stacked": leaves (L, m, n). "list": a list of L trees of leaves (m, n).
        dtype: Of every leaf.
        layers: Layers in place of the model's own number.
    """
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers)
    init_params, _ = functional_llama(config)
    params = jax.eval_shape(init_params, jax.random.key(0))
    stacked = {name: params["layers"][name] for name in ("attention", "mlp")}
    if layout == "stacked":
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), stacked)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], dtype), stacked)
    return [one] * config.num_layers


def sides(shapes: Shapes) -> list[tuple[int, int, int]]:
    """Returns number of matrices, smaller and larger side of every leaf."""
    return [
        (math.prod(leaf.shape[:-2]), min(leaf.shape[-2:]), max(leaf.shape[-2:]))
        for leaf in jax.tree.leaves(shapes)
    ]


def random_gradients(shapes: Shapes, seed: int = 0) -> Any:
    """Draws matrices whose singular values fall like 1 / i, entries about 1e-3.

    Args:
        shapes: Abstract leaves (..., m, n).
        seed: Seed of the draws; leaves differ.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.jit(_random_gradient, static_argnums=1)
    return treedef.unflatten(
        [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    )


def random_params(shapes: Shapes, seed: int = 1) -> Any:
    """Draws Gaussian matrices, entries about 1e-2."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [
            (0.01 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    )


def _random_gradient(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    *batch, m, n = leaf.shape
    k = min(m, n)
    left_key, right_key = jax.random.split(key)
    falling = 1 / jnp.arange(1, k + 1).reshape(*(1 for _ in batch), 1, k)
    left = jax.random.normal(left_key, (*batch, m, k)) * falling
    right = jax.random.normal(right_key, (*batch, k, n))
    return (1e-3 * left @ right).astype(leaf.dtype)
