"""The Llama as pure functions, which is what transformations of JAX and optax take."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from experiments.models.llama import Llama, LlamaConfig


def functional_llama(
    config: LlamaConfig,
) -> tuple[Callable[[jax.Array], optax.Params], Callable[..., jax.Array]]:
    """Returns `key -> params` and `params, tokens, segments=None -> logits`.

    Parameters are nested dictionaries of arrays; the rest is as of `Llama.__call__`.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def init_params(key: jax.Array) -> optax.Params:
        model = Llama(config, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def apply(
        params: optax.Params, tokens: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, segments)

    return init_params, apply
