"""The Llama that tests on meshes split: grouped heads, every side divided by eight."""

from typing import Any

import jax

from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    num_layers=2,
)


def abstract_params(config: LlamaConfig) -> Any:
    """Shapes and dtypes of its parameters, in nested dictionaries."""
    init_params, _ = functional_llama(config)
    return jax.eval_shape(init_params, jax.random.key(0))
