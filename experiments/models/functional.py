"""The Llama as pure functions, which is what transformations of JAX and optax take."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from experiments.models.llama import Llama, LlamaConfig
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
