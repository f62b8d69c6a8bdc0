"""BERT and RoBERTa in Flax NNX, and a head on the first token, layers scanned.

As of the Llama, the layers are one module whose parameters are stacked::

    embed_tokens/embedding, embed_positions/embedding, embed_types/embedding
    embed_norm/{scale,bias}
    layers/attention/{q,k,v,o}_proj/{kernel,bias}     (L, D, D), (L, D)
    layers/attention_norm/{scale,bias}                (L, D)
    layers/mlp/up_proj/{kernel,bias}                  (L, D, F), (L, F)
    layers/mlp/down_proj/{kernel,bias}                (L, F, D), (L, D)
    layers/mlp_norm/{scale,bias}                      (L, D)
    head/dense/{kernel,bias}                          (D, D), (D,)
    head/out_proj/{kernel,bias}                       (D, C), (C,)

The head is RoBERTa's for classification; with BERT its dense layer is what BERT calls
the pooler, which is pretrained. :mod:`experiments.models.encoder_checkpoint` knows the
names of all of these in a checkpoint. Shape suffixes: B batch, T position, D hidden,
H heads, K head width, F feed-forward width, L layers, C classes.

References:
  Devlin et al., BERT (arXiv 1810.04805); Liu et al., RoBERTa (arXiv 1907.11692).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.models import placement
from experiments.models.embedding import Embedding
from experiments.models.encoder_config import EncoderConfig
from experiments.models.formats import REMAT_POLICIES
from experiments.models.lora import Adapter
from experiments.models.projection import Projection

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_Key = jax.Array | None  # a PRNG key while training, else None


class Attention(nnx.Module):
    """Attention of every position to all of its sequence that are not padding."""

    def __init__(
        self, config: EncoderConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        d = config.hidden_size
        projection = functools.partial(
            Projection, config=config, adapter=adapter, bias=True, rngs=rngs
        )
        self.q_proj = projection("q_proj", d, d)
        self.k_proj = projection("k_proj", d, d)
        self.v_proj = projection("v_proj", d, d)
        self.o_proj = projection("o_proj", d, d)

    def __call__(
        self, x_BxTxD: jax.Array, lengths_B: jax.Array, key: _Key
    ) -> jax.Array:
        """Attend to the first ``lengths_B`` positions of each sequence."""
        x_BxTxD = self.q_proj.place_input(x_BxTxD)
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (
            placement.split_heads(y, self.config.head_size)
            for y in (self.q_proj(x_BxTxD), self.k_proj(x_BxTxD), self.v_proj(x_BxTxD))
        )
        scores_BxHxTxT = jnp.einsum("bqhk,bshk->bhqs", q_BxTxHxK, k_BxTxHxK)
        scores_BxHxTxT = scores_BxHxTxT.astype(jnp.float32)
        scores_BxHxTxT *= self.config.head_size**-0.5
        seen_BxT = jnp.arange(x_BxTxD.shape[1])[None] < lengths_B[:, None]
        scores_BxHxTxT = jnp.where(seen_BxT[:, None, None], scores_BxHxTxT, -jnp.inf)
        weights_BxHxTxT = jax.nn.softmax(scores_BxHxTxT).astype(x_BxTxD.dtype)
        weights_BxHxTxT = dropout(weights_BxHxTxT, self.config.dropout, key)
        y_BxTxHxK = jnp.einsum("bhqs,bshk->bqhk", weights_BxHxTxT, v_BxTxHxK)
        return self.o_proj(y_BxTxHxK.reshape(x_BxTxD.shape))


class Mlp(nnx.Module):
    """Feed-forward block."""

    def __init__(
        self, config: EncoderConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        d, f = config.hidden_size, config.intermediate_size
        projection = functools.partial(
            Projection, config=config, adapter=adapter, bias=True, rngs=rngs
        )
        self.activation = config.activation
        self.up_proj = projection("up_proj", d, f)
        self.down_proj = projection("down_proj", f, d)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Apply ``down(activation(up(x)))``."""
        h_BxTxF = self.up_proj(self.up_proj.place_input(x_BxTxD))
        return self.down_proj(_ACTIVATIONS[self.activation](h_BxTxF))


class Layer(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(
        self, config: EncoderConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        self.rate = config.dropout
        self.attention = Attention(config, adapter, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = Mlp(config, adapter, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(
        self, x_BxTxD: jax.Array, lengths_B: jax.Array, key: _Key
    ) -> jax.Array:
        """Add and normalise the attention's update, then the feed-forward block's."""
        inside, attended, fed = _split(key, 3)
        y_BxTxD = self.attention(x_BxTxD, lengths_B, inside)
        x_BxTxD = x_BxTxD + dropout(y_BxTxD, self.rate, attended)
        x_BxTxD = self.attention_norm(x_BxTxD).astype(y_BxTxD.dtype)
        y_BxTxD = dropout(self.mlp(x_BxTxD), self.rate, fed)
        x_BxTxD = self.mlp_norm(x_BxTxD + y_BxTxD).astype(y_BxTxD.dtype)
        return placement.pin_positions(x_BxTxD)


class Head(nnx.Module):
    """Scores of a sequence, from its first token: ``(B, D) -> (B, C)``."""

    def __init__(self, config: EncoderConfig, classes: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        projection = functools.partial(Projection, config=config, bias=True, rngs=rngs)
        self.dense = projection("dense", config.hidden_size, config.hidden_size)
        self.out_proj = projection("out_proj", config.hidden_size, classes)

    def __call__(self, x_BxD: jax.Array, key: _Key) -> jax.Array:
        """Return the scores in float32."""
        before, between = _split(key, 2)
        if self.config.family == "roberta":
            x_BxD = dropout(x_BxD, self.config.dropout, before)
        h_Bx1xD = jnp.tanh(self.dense(x_BxD[:, None]))
        h_Bx1xD = dropout(h_Bx1xD, self.config.dropout, between)
        return self.out_proj(h_Bx1xD, out_dtype=jnp.float32)[:, 0]


class Encoder(nnx.Module):
    """Encoder of token sequences, with a head on the first token."""

    def __init__(
        self,
        config: EncoderConfig,
        classes: int,
        adapter: Adapter | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise matrices from N(0, 0.02^2), norms to one and biases to zero.

        Args:
          config: The shape.
          classes: Scores that the head gives.
          adapter: Of the layers' projections; embeddings and head have none.
          rngs: Source of the initial values.
        """
        self.config = config
        for name, rows in (
            ("embed_tokens", config.vocab_size),
            ("embed_positions", config.position_rows),
            ("embed_types", config.token_types),
        ):
            shape = (rows, config.hidden_size)
            setattr(self, name, Embedding(name, shape, config, rngs=rngs))
        self.embed_norm = _norm(config, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, adapter, rngs=rngs)

        self.layers = stacked_layers(rngs)
        self.head = Head(config, classes, rngs=rngs)

    def encode(
        self,
        tokens_BxT: jax.Array,
        lengths_B: jax.Array,
        types_BxT: jax.Array,
        key: _Key = None,
    ) -> jax.Array:
        """Return the last layer's output.

        Args:
          tokens_BxT: int32 ``(B, T)``; T at most ``config.max_length``. Under a mesh B
            is split over its batch axes.
          lengths_B: int32 ``(B,)``, at least 1; what follows in a sequence is padding.
          types_BxT: int32 ``(B, T)``, below ``config.token_types``.
          key: For dropout. None: nothing is dropped.

        Returns:
          ``(B, T, D)`` in the compute dtype; of no meaning at padding.

        Raises:
          ValueError: If T is above ``config.max_length``.
        """
        config, length = self.config, tokens_BxT.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"sequences of {length} tokens are longer than the encoder's "
                f"{config.max_length} positions"
            )
        embedded, *layer_keys = _split(key, config.num_layers + 1)
        positions_BxT = jnp.broadcast_to(
            config.first_position + jnp.arange(length), tokens_BxT.shape
        )
        x_BxTxD = (
            self.embed_tokens(tokens_BxT)
            + self.embed_types(types_BxT)
            + self.embed_positions(positions_BxT)
        )
        x_BxTxD = self.embed_norm(x_BxTxD).astype(x_BxTxD.dtype)
        x_BxTxD = dropout(x_BxTxD, config.dropout, embedded)
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(
            x_BxTxD: jax.Array, layer: tuple[nnx.State, _Key]
        ) -> tuple[jax.Array, None]:
            state, key = layer
            return nnx.merge(graphdef, state)(x_BxTxD, lengths_B, key), None

        if config.remat != "none":
            run_layer = jax.checkpoint(
                run_layer, prevent_cse=False, policy=REMAT_POLICIES[config.remat]
            )
        keys = None if key is None else jnp.stack(layer_keys)
        x_BxTxD, _ = jax.lax.scan(run_layer, x_BxTxD, (stacked, keys))
        return x_BxTxD

    def __call__(
        self,
        tokens_BxT: jax.Array,
        lengths_B: jax.Array,
        types_BxT: jax.Array,
        key: _Key = None,
    ) -> jax.Array:
        """Return the head's float32 scores ``(B, C)``; arguments as of `encode`."""
        below, above = _split(key, 2)
        x_BxTxD = self.encode(tokens_BxT, lengths_B, types_BxT, below)
        return self.head(placement.pin_batch(x_BxTxD)[:, 0], above)


def functional_encoder(
    config: EncoderConfig, classes: int, adapter: Adapter | None = None
) -> tuple[Callable[[jax.Array], optax.Params], Callable[..., jax.Array]]:
    """Returns `key -> params` and `params, tokens, lengths, types, key=None -> scores`.

    Parameters are nested dictionaries of arrays; the rest is as of `Encoder.__call__`.
    """

    def build(key: jax.Array | int) -> Encoder:
        return Encoder(config, classes, adapter, rngs=nnx.Rngs(key))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(0)))

    def init_params(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(
        params: optax.Params,
        tokens: jax.Array,
        lengths: jax.Array,
        types: jax.Array,
        key: _Key = None,
    ) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, lengths, types, key)

    return init_params, apply


def functional_encode(config: EncoderConfig, classes: int) -> Callable[..., jax.Array]:
    """Returns `params, tokens, lengths, types -> (B, T, D)`, as of `Encoder.encode`."""
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Encoder(config, classes, rngs=nnx.Rngs(0)))
    )

    def encode(params: optax.Params, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).encode(*inputs)

    return encode


def dropout(x: jax.Array, rate: float, key: _Key) -> jax.Array:
    """Zero a share ``rate`` of the entries, scale up the others; none without key."""
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(
        key, 1 - rate, x.shape, out_sharding=placement.told_sharding(x)
    )
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _split(key: _Key, count: int) -> list[_Key]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Make a LayerNorm that computes, and returns, float32."""
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.norm_eps,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
