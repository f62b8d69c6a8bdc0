"""The shape of a Llama, and the shapes of the published runs."""

import dataclasses

from experiments.models.formats import Dtype, Remat, check_choices, check_positive


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and number formats of a Llama.

    Attributes:
      vocab_size: Number of tokens.
      hidden_size: Width of the residual stream, a multiple of twice num_heads.
      intermediate_size: Width inside the feed-forward block.
      num_heads: Query heads.
      num_layers: Transformer layers.
      num_kv_heads: Key and value heads, a divisor of num_heads. None: as many
        (multi-head attention).
      rope_theta: Base of the rotary wavelengths.
      rope_factor: Positions are divided by it, which stretches what the model was
        trained on over longer sequences.
      norm_eps: Added to the mean square in RMSNorm.
      tie_embeddings: Whether the output layer is the embedding, transposed.
      param_dtype: Format that parameters are stored in. float32 beside a bfloat16
        dtype is mixed precision with a float32 master copy: layers are cast, then
        gathered, where they are used. bfloat16 here does without the master copy.
      dtype: Format of activations and matrix products. Norms, rotations, attention's
        softmax and logits are float32 in either.
      remat: What of each layer the backward pass recomputes. "none"; "layer": all of
        it, from its input; "dots": all but the results of matrix products.

    Raises:
      ValueError: If a size is not positive or sizes do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    num_kv_heads: int | None = None
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Check that the sizes make a model."""
        check_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_layers",
            "kv_heads",
            "rope_theta",
            "rope_factor",
            "norm_eps",
        )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads="
                f"{2 * self.num_heads}: rotary embedding needs heads of an even width"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}"
            )
        check_choices(self)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


def _preset(
    hidden: int, intermediate: int, heads: int, layers: int, vocab: int = 32_000
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_layers=layers,
    )


# Shapes of the published runs; "demo" and "small" train on two CPU cores.
PRESETS: dict[str, LlamaConfig] = {
    "demo": _preset(128, 352, 4, 4, vocab=2048),
    "small": _preset(256, 688, 4, 7, vocab=2048),
    "llama_9m": _preset(128, 352, 4, 4),
    "llama_20m": _preset(256, 688, 4, 4),
    "llama_35m": _preset(384, 1024, 8, 6),
    "llama_40m": _preset(416, 1024, 8, 8),
    "llama_60m": _preset(512, 1376, 8, 8),
    "llama_71m": _preset(512, 1368, 8, 12),
    "llama_100m": _preset(640, 1708, 10, 12, vocab=32_100),
    "llama_130m": _preset(768, 2048, 12, 12),
    "llama_250m": _preset(768, 2560, 16, 24),
    "llama_350m": _preset(1024, 2736, 16, 24),
    "llama_1b": _preset(2048, 5461, 32, 24),
    "llama_3b": _preset(2560, 6848, 32, 32),
    "llama_7b": _preset(4096, 11008, 32, 32),
}
