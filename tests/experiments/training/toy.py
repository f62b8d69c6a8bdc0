"""A small network with leaves named as the Llama's, quick to compile."""

import jax
import jax.numpy as jnp

from experiments.models.placement import gather_matrix, look_up, pin_batch

VOCAB = 32


def init_toy(key):
    """A residual network with leaves named as the Llama's, quick to compile."""
    draw = jax.nn.initializers.normal(0.3)
    return {
        "embed_tokens": {"embedding": draw(key, (VOCAB, 16))},
        "layers": {"up_proj": {"kernel": draw(key, (2, 16, 24))}},
        "lm_head": {"kernel": draw(key, (24, VOCAB))},
    }


def apply_toy(params, tokens):
    x = look_up(params["embed_tokens"]["embedding"], tokens, "embed_tokens")
    kernels = params["layers"]["up_proj"]["kernel"]
    h = [jnp.tanh(x @ gather_matrix(kernels[layer], "up_proj")) for layer in range(2)]
    return pin_batch(
        (h[0] * h[1]) @ gather_matrix(params["lm_head"]["kernel"], "lm_head")
    )
