"""A table of rows by number, sharded."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import placement
from experiments.models.formats import Formats, normal


class Embedding(nnx.Module):
    """Rows of tokens, positions or types; also the output layer when tied."""

    def __init__(
        self, name: str, shape: tuple[int, int], config: Formats, *, rngs: nnx.Rngs
    ) -> None:
        self.name = name
        self.dtype = config.dtype
        self.embedding = nnx.Param(normal(rngs.params(), shape, config))

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Return the rows of the tokens in the compute dtype."""
        table_VxD = self.embedding[...].astype(self.dtype)
        return placement.look_up(table_VxD, tokens_BxT, self.name)

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Return the scores of every token in float32."""
        table_VxD = self.embedding[...].astype(self.dtype)
        kernel_DxV = placement.gather_matrix(table_VxD, self.name).T
        return placement.multiply(x_BxTxD, kernel_DxV, self.name, jnp.float32)
