"""A pretrained Llama with its tokenizer: a folder, the hub's, or a GGUF file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import tokenizers
from flax import traverse_util

from experiments.data.hub import model_folder
from experiments.data.tokenizer import load_model_tokenizer
from experiments.models import huggingface
from experiments.models.gguf_checkpoint import read_gguf
from experiments.models.huggingface import CheckpointError
from experiments.models.llama_checkpoint import load_llama, read_llama_config
from experiments.models.llama_config import LlamaConfig

_FACTS = ("bos_token_id", "eos_token_id", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class LlamaSource:
    """What a model is made of.

    Attributes:
      config: Its shape.
      tokenizer: Its tokenizer; it neither pads nor cuts.
      facts: What config.json says besides: tokens that begin and end a text, positions.
      load: Returns parameters like the given ones with the model's values.
      fingerprint: SHA-256 of its files, in hex.
      folder: Where they are; None for a GGUF file.
    """

    config: LlamaConfig
    tokenizer: tokenizers.Tokenizer
    facts: dict[str, Any]
    load: Callable[[optax.Params], optax.Params]
    fingerprint: str
    folder: Path | None = None

    @property
    def end(self) -> int:
        """Number of the token that ends a text.

        Raises:
          CheckpointError: The model has none.
        """
        found = self.facts.get("eos_token_id")
        first = found[0] if isinstance(found, list) and found else found
        if not isinstance(first, int):
            raise CheckpointError(
                f"the model's eos_token_id is {found!r}: config.json must have one."
            )
        return first

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have, None where config.json does not say.

        Linear scaling stretches them, as transformers has it.

        Raises:
          CheckpointError: It says no number.
        """
        found = self.facts.get("max_position_embeddings")
        if found is None:
            return None
        if not isinstance(found, int) or found < 1:
            raise CheckpointError(
                f"the model's max_position_embeddings is {found!r}: config.json must "
                "have a positive number or none."
            )
        return int(found * self.config.rope_factor)


def open_llama(name: str, report: Callable[[str], None]) -> LlamaSource:
    """Opens a model.

    Args:
      name: A folder in the layout of transformers, a GGUF file, or a name on the hub.
      report: Takes lines for the user.

    Raises:
      ValueError: There is no such model, or it is damaged or of another kind.
    """
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        config, params, tokenizer, facts = read_gguf(path)
        found = traverse_util.flatten_dict(params)

        def place(like: optax.Params) -> optax.Params:
            flat = traverse_util.flatten_dict(like)
            # An adapter's factors, which the file has not, stay as they are.
            for name, value in found.items():
                dtype, sharding = flat[name].dtype, flat[name].sharding
                flat[name] = jax.device_put(value.astype(dtype), sharding)
            return traverse_util.unflatten_dict(flat)

        return LlamaSource(config, tokenizer, facts, place, huggingface.sha256([path]))
    folder = model_folder(name, report)
    config, facts = read_llama_config(folder), huggingface.read_config(folder)
    return LlamaSource(
        config,
        load_model_tokenizer(folder),
        {key: facts[key] for key in _FACTS if key in facts},
        lambda params: load_llama(folder, config, params),
        huggingface.fingerprint(folder),
        folder,
    )
