"""The Llama as pure functions, which is what transformations of JAX and optax take."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from experiments.models.llama import Cache, Llama, LlamaConfig
from experiments.models.lora import Adapter


def functional_llama(
    config: LlamaConfig, adapter: Adapter | None = None
) -> tuple[Callable[[jax.Array], optax.Params], Callable[..., jax.Array]]:
    """Returns `key -> params` and `params, tokens, segments=None -> logits`.

    Parameters are nested dictionaries of arrays; the rest is as of `Llama.__call__`.
    """

    def build(key: jax.Array | int) -> Llama:
        return Llama(config, adapter, rngs=nnx.Rngs(key))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(0)))

    def init_params(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(
        params: optax.Params, tokens: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, segments)

    return init_params, apply


def functional_extend(config: LlamaConfig) -> Callable[..., tuple[jax.Array, Cache]]:
    """Returns `params, tokens, positions, last, cache -> logits, cache`.

    As of `Llama.extend`.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def extend(params: optax.Params, *inputs: Any) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphdef, params).extend(*inputs)

    return extend
