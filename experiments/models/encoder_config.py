"""The shape of a BERT or RoBERTa encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from experiments.models.formats import Dtype, Remat, check_choices, check_positive

Family = Literal["bert", "roberta"]
Activation = Literal["gelu", "gelu_new", "relu"]

# Their names in a config.json, and those here.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "position_rows",
    "type_vocab_size": "token_types",
    "pad_token_id": "pad_token",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and number formats of an encoder.

    Attributes:
      family: Whose tensor names a checkpoint has, and whose positions the tokens: the
        first one of RoBERTa is at the padding token's number plus one, BERT's at 0.
      vocab_size: Number of tokens.
      hidden_size: Width of the residual stream, a multiple of num_heads.
      intermediate_size: Width inside the feed-forward block.
      num_heads: Attention heads.
      num_layers: Transformer layers.
      position_rows: Rows of the table of positions, RoBERTa's unused ones included.
      token_types: Rows of the table of token types: 2 tells a pair's texts apart.
      pad_token: Number of the padding token.
      norm_eps: Added to the variance in LayerNorm.
      activation: Inside the feed-forward block; gelu is the exact one.
      dropout: Share of activations and attention weights dropped while training.
      param_dtype: Format that parameters are stored in.
      dtype: Format of activations and matrix products. Norms, attention's softmax and
        logits are float32 in either.
      remat: What of each layer the backward pass recomputes; as of `LlamaConfig`.

    Raises:
      ValueError: If a size is not positive or sizes do not fit each other.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    position_rows: int = 512
    token_types: int = 2
    pad_token: int = 0
    norm_eps: float = 1e-12
    activation: Activation = "gelu"
    dropout: float = 0.1
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
            "token_types",
            "norm_eps",
            "max_length",
        )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads="
                f"{self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        check_choices(self, family=Family, activation=Activation)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def first_position(self) -> int:
        """Row of the table of positions that the first token has."""
        return self.pad_token + 1 if self.family == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.position_rows - self.first_position

    @classmethod
    def from_hugging_face(cls, facts: Mapping[str, Any]) -> "EncoderConfig":
        """Returns what a config.json of transformers describes.

        Raises:
          ValueError: It is not a BERT's or RoBERTa's, misses a size, or describes what
            is not built here.
        """
        family = facts.get("model_type")
        if family not in get_args(Family):
            raise ValueError(
                f"model_type {family!r} is not among {', '.join(get_args(Family))}"
            )
        positions = facts.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not absolute")
        missing = [name for name in _NAMES if name not in facts]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        rates = {
            facts[name]
            for name in (
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "classifier_dropout",
            )
            if facts.get(name) is not None
        }
        if len(rates) > 1:
            raise ValueError(f"it has more than one rate of dropout, {sorted(rates)}")
        sizes = {ours: facts[theirs] for theirs, ours in _NAMES.items()}
        return cls(family=family, dropout=rates.pop() if rates else 0.1, **sizes)

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the config.json that transformers reads."""
        facts = {theirs: getattr(self, ours) for theirs, ours in _NAMES.items()}
        return facts | {
            "model_type": self.family,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }
