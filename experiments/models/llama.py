"""Llama in Flax NNX: RMSNorm, RoPE, grouped-query attention, SwiGLU, scanned layers.

The layers are one module whose parameters are stacked on a leading axis and run by
one ``lax.scan``, so that time to compile does not grow with depth. Kernels are
two-dimensional per layer, which is the matrix that a low-rank optimizer sees::

    embed_tokens/embedding                            (V, D)
    layers/input_norm/scale                           (L, D)
    layers/attention/{q,k,v}_proj/kernel              (L, D, H*K), (L, D, G*K) twice
    layers/attention/o_proj/kernel                    (L, H*K, D)
    layers/post_attention_norm/scale                  (L, D)
    layers/mlp/{gate,up}_proj/kernel                  (L, D, F)
    layers/mlp/down_proj/kernel                       (L, F, D)
    norm/scale                                        (D,)
    lm_head/kernel  (not with tied embeddings)        (D, V)

An adapter gives the layers' projections two factors beside their kernels or in place
of them; :mod:`experiments.models.lora` says which.

Names and layouts are those of Hugging Face's Llama with kernels transposed, RoPE's
half-rotation included. Shape suffixes of the code: B batch, T position, D hidden,
H query heads, G key-value heads, K head width (K2 half of it), F feed-forward width,
V vocabulary, L layers.

References:
  Touvron et al., LLaMA (arXiv 2302.13971); Su et al., RoFormer (arXiv 2104.09864);
  Ainslie et al., GQA (arXiv 2305.13245).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import placement
from experiments.models.embedding import Embedding
from experiments.models.formats import REMAT_POLICIES
from experiments.models.llama_config import PRESETS, LlamaConfig
from experiments.models.lora import Adapter
from experiments.models.projection import Projection

__all__ = ["PRESETS", "Llama", "LlamaConfig", "parameter_count"]


class Cache(NamedTuple):
    """Keys and values of the positions so far, ``(B, S, G, K)`` of a layer each."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, within segments."""

    def __init__(
        self, config: LlamaConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        d, kv = config.hidden_size, config.kv_heads * config.head_size
        projection = functools.partial(
            Projection, config=config, adapter=adapter, rngs=rngs
        )
        self.q_proj = projection("q_proj", d, d)
        self.k_proj = projection("k_proj", d, kv)
        self.v_proj = projection("v_proj", d, kv)
        self.o_proj = projection("o_proj", d, d)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        angles_BxTxK2: jax.Array,
        allowed_Bx1xTxT: jax.Array | None,
    ) -> jax.Array:
        """Attend to the positions up to each one, those allowed if not None."""
        y_BxTxHxK = jax.nn.dot_product_attention(
            *self._heads(x_BxTxD, angles_BxTxK2), mask=allowed_Bx1xTxT, is_causal=True
        )
        return self.o_proj(y_BxTxHxK.reshape(x_BxTxD.shape))

    def extend(
        self,
        x_BxTxD: jax.Array,
        angles_BxTxK2: jax.Array,
        positions_BxT: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Put positions into the cache and attend to all in it up to each one."""
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = self._heads(x_BxTxD, angles_BxTxK2)
        rows_Bx1 = jnp.arange(len(positions_BxT))[:, None]
        cache = Cache(
            placement.pin_heads(cache.keys.at[rows_Bx1, positions_BxT].set(k_BxTxGxK)),
            placement.pin_heads(
                cache.values.at[rows_Bx1, positions_BxT].set(v_BxTxGxK)
            ),
        )
        slots_S = jnp.arange(cache.keys.shape[1])
        seen_BxTxS = slots_S[None, None] <= positions_BxT[..., None]
        y_BxTxHxK = jax.nn.dot_product_attention(
            q_BxTxHxK, *cache, mask=seen_BxTxS[:, None]
        )
        return self.o_proj(y_BxTxHxK.reshape(x_BxTxD.shape)), cache

    def _heads(
        self, x_BxTxD: jax.Array, angles_BxTxK2: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, both rotated, and values."""
        x_BxTxD = self.q_proj.place_input(x_BxTxD)
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = (
            placement.split_heads(y, self.config.head_size)
            for y in (self.q_proj(x_BxTxD), self.k_proj(x_BxTxD), self.v_proj(x_BxTxD))
        )
        return (
            rotate(q_BxTxHxK, angles_BxTxK2),
            rotate(k_BxTxGxK, angles_BxTxK2),
            v_BxTxGxK,
        )


class Mlp(nnx.Module):
    """SwiGLU feed-forward block."""

    def __init__(
        self, config: LlamaConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        d, f = config.hidden_size, config.intermediate_size
        projection = functools.partial(
            Projection, config=config, adapter=adapter, rngs=rngs
        )
        self.gate_proj = projection("gate_proj", d, f)
        self.up_proj = projection("up_proj", d, f)
        self.down_proj = projection("down_proj", f, d)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Apply ``down(silu(gate(x)) * up(x))``."""
        x_BxTxD = self.gate_proj.place_input(x_BxTxD)
        h_BxTxF = jax.nn.silu(self.gate_proj(x_BxTxD)) * self.up_proj(x_BxTxD)
        return self.down_proj(h_BxTxF)


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: LlamaConfig, adapter: Adapter | None, *, rngs: nnx.Rngs
    ) -> None:
        self.input_norm = _norm(config, rngs)
        self.attention = Attention(config, adapter, rngs=rngs)
        self.post_attention_norm = _norm(config, rngs)
        self.mlp = Mlp(config, adapter, rngs=rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        angles_BxTxK2: jax.Array,
        allowed_Bx1xTxT: jax.Array | None,
    ) -> jax.Array:
        """Add the attention and feed-forward updates to the residual stream."""
        h_BxTxD = self.input_norm(x_BxTxD).astype(x_BxTxD.dtype)
        x_BxTxD = x_BxTxD + self.attention(h_BxTxD, angles_BxTxK2, allowed_Bx1xTxT)
        return self._feed_forward(x_BxTxD)

    def extend(
        self,
        x_BxTxD: jax.Array,
        angles_BxTxK2: jax.Array,
        positions_BxT: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Do so after what the cache holds; as of `Attention.extend`."""
        h_BxTxD = self.input_norm(x_BxTxD).astype(x_BxTxD.dtype)
        y_BxTxD, cache = self.attention.extend(
            h_BxTxD, angles_BxTxK2, positions_BxT, cache
        )
        return self._feed_forward(x_BxTxD + y_BxTxD), cache

    def _feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
        h_BxTxD = self.post_attention_norm(x_BxTxD).astype(x_BxTxD.dtype)
        return placement.pin_positions(x_BxTxD + self.mlp(h_BxTxD))


class Llama(nnx.Module):
    """Decoder-only language model: tokens to next-token logits."""

    def __init__(
        self,
        config: LlamaConfig,
        adapter: Adapter | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise every matrix from N(0, 0.02^2) and every norm scale to one.

        Args:
          config: The shape.
          adapter: Of the layers' projections; embeddings and output layer have none.
          rngs: Source of the initial values.
        """
        self.config = config
        table = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding("embed_tokens", table, config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, adapter, rngs=rngs)

        self.layers = stacked_layers(rngs)
        self.norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.lm_head = Projection(
                "lm_head", config.hidden_size, config.vocab_size, config, rngs=rngs
            )

    def __call__(
        self, tokens_BxT: jax.Array, segments_BxT: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits of the token after each position.

        Args:
          tokens_BxT: int32 ``(B, T)``. Under a mesh B is split over its batch axes.
          segments_BxT: int32 ``(B, T)``, a number for each document that is packed into
            a sequence; attention stays within equal numbers. Rotary positions are
            relative, so each document is read as if it stood alone. None: attention is
            over the whole sequence.

        Returns:
          float32 logits ``(B, T, V)``, B split like the tokens and T over the tensor
          axis, if it divides T. A token that is not below V makes those of its sequence
          NaN.
        """
        config = self.config
        angles_1xTxK2 = rope_angles(jnp.arange(tokens_BxT.shape[1])[None], config)
        allowed_Bx1xTxT = None
        if segments_BxT is not None:
            segments_BxT = placement.pin_batch(segments_BxT)
            same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None, :]
            allowed_Bx1xTxT = same_BxTxT[:, None]
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(x_BxTxD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            module = nnx.merge(graphdef, layer)
            return module(x_BxTxD, angles_1xTxK2, allowed_Bx1xTxT), None

        if config.remat != "none":
            run_layer = jax.checkpoint(
                run_layer, prevent_cse=False, policy=REMAT_POLICIES[config.remat]
            )
        x_BxTxD, _ = jax.lax.scan(run_layer, self.embed_tokens(tokens_BxT), stacked)
        return placement.pin_positions(self._logits(x_BxTxD))

    def extend(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        last_B: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Return logits of the token after one of the given ones, and a longer cache.

        Args:
          tokens_BxT: int32 ``(B, T)``, after those in the cache.
          positions_BxT: int32 ``(B, T)``, their positions in their sequences, below the
            cache's S. What is at a position already is replaced; later positions are
            not seen.
          last_B: int32 ``(B,)``, which of the T has its logits returned.
          cache: Of all layers, ``(L, B, S, G, K)`` each.

        Returns:
          float32 logits ``(B, V)``, and the cache with the tokens.
        """
        angles_BxTxK2 = rope_angles(positions_BxT, self.config)
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(
            x_BxTxD: jax.Array, layer: tuple[nnx.State, Cache]
        ) -> tuple[jax.Array, Cache]:
            state, cache = layer
            module = nnx.merge(graphdef, state)
            return module.extend(x_BxTxD, angles_BxTxK2, positions_BxT, cache)

        x_BxTxD, cache = jax.lax.scan(
            run_layer, self.embed_tokens(tokens_BxT), (stacked, cache)
        )
        x_Bx1xD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)
        return self._logits(x_Bx1xD)[:, 0], cache

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = self.norm(x_BxTxD).astype(x_BxTxD.dtype)
        if self.config.tie_embeddings:
            return self.embed_tokens.logits(x_BxTxD)
        return self.lm_head(x_BxTxD, out_dtype=jnp.float32)


def rope_angles(positions_BxT: jax.Array, config: LlamaConfig) -> jax.Array:
    """Return the rotary angles: position times frequency, float32 ``(B, T, K / 2)``.

    Pair i of a head turns by ``t / factor * theta ** (-2 i / K)`` at position t.
    """
    width = config.head_size
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    turns_K2 = config.rope_theta**-exponents / config.rope_factor
    return positions_BxT[..., None].astype(jnp.float32) * turns_K2[None, None]


def rotate(x_BxTxHxK: jax.Array, angles_BxTxK2: jax.Array) -> jax.Array:
    """Turn each pair ``(x[i], x[i + K / 2])`` of a head by its position's angle.

    Args:
      x_BxTxHxK: Queries or keys.
      angles_BxTxK2: From :func:`rope_angles`; B may be one for all.

    Returns:
      The rotated heads in x's dtype, computed in float32.
    """
    angles = angles_BxTxK2[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxHxK.dtype)


def parameter_count(config: LlamaConfig) -> int:
    """Count the parameters of the model, which is not built."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Make an RMSNorm that computes, and returns, float32."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_eps,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
