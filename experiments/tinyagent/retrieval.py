"""Which tools and examples a request's prompt gets, by an encoder that has learnt it.

As TinyAgent's ToolRAG (arXiv 2409.00608): a classifier of 16 labels picks tools, and
the examples are those whose requests are nearest by embedding. Here one encoder,
trained by `tools`, does both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from sklearn.neighbors import NearestNeighbors

from experiments.configs.tinyagent import PromptConfig
from experiments.data.example_batches import encode, evaluation_batches
from experiments.data.glue import Examples
from experiments.data.hub import model_folder
from experiments.data.tokenizer import load_model_tokenizer
from experiments.models import huggingface
from experiments.models.encoder import functional_encode, functional_encoder
from experiments.models.encoder_checkpoint import load_encoder, read_encoder_config
from experiments.models.huggingface import CheckpointError
from experiments.tinyagent.dataset import Example
from experiments.tinyagent.examples import Pool, write_prompt
from experiments.tinyagent.sandbox import TOOLS

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Retriever:
    """An encoder with a head of 16 labels, and its tokenizer.

    Attributes:
      read: Returns probabilities (N, 16) and embeddings (N, D) of length 1 of tokenized
        requests: of tokens, lengths and types.
      tokenizer: Of the encoder.
      max_length: Tokens that a request is cut to.
      token_types: Of the encoder.
    """

    read: Callable[..., tuple[jax.Array, jax.Array]]
    tokenizer: tokenizers.Tokenizer
    max_length: int
    token_types: int

    @classmethod
    def load(cls, folder: Path, report: Callable[[str], None]) -> Self:
        """Reads a model that `tools` has trained.

        Raises:
          ValueError: It is damaged, or of another kind.
        """
        folder = model_folder(str(folder), report)
        labels = huggingface.read_config(folder).get("id2label", {})
        if len(labels) != len(TOOLS):
            raise CheckpointError(
                f"{folder} tells {len(labels)} classes, not the {len(TOOLS)} tools: "
                "give the model folder of a run of `tools`."
            )
        config = read_encoder_config(folder)
        init_params, apply = functional_encoder(config, len(TOOLS))
        encode_states = functional_encode(config, len(TOOLS))
        params = load_encoder(folder, config, init_params(jax.random.key(0)))

        @jax.jit
        def read(
            tokens: jax.Array, lengths: jax.Array, types: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            states = encode_states(params, tokens, lengths, types)
            there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
            mean = jnp.mean(states, axis=1, where=there[..., None])
            norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
            scores = apply(params, tokens, lengths, types)
            return jax.nn.sigmoid(scores), mean / norm

        tokenizer = load_model_tokenizer(folder)
        return cls(read, tokenizer, min(config.max_length, 512), config.token_types)

    def look(self, requests: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities (N, 16) and embeddings (N, D) of requests."""
        encoded = encode(
            self.tokenizer,
            Examples([(request,) for request in requests], None),
            max_length=self.max_length,
            token_types=self.token_types,
        )
        order, found = [], []
        for rows, batch in evaluation_batches(encoded, _BATCH):
            some = self.read(batch["tokens"], batch["lengths"], batch["types"])
            found.append([np.asarray(one)[: len(rows)] for one in some])
            order.append(rows)
        back = np.argsort(np.concatenate(order))
        probabilities, embeddings = (
            np.concatenate(parts)[back] for parts in zip(*found, strict=True)
        )
        return probabilities, embeddings

    def rewrite(
        self, examples: Sequence[Example], config: PromptConfig
    ) -> list[Example]:
        """Returns made examples with prompts of the tools and examples found for them.

        Tools are those above one half, or the likeliest one; `shown_examples` examples
        are the nearest made ones to train on that need no other tools.
        """
        pool = Pool()
        chances, embeddings = self.look([one.request for one in examples])
        _, known = self.look(pool.requests)
        nearest = NearestNeighbors(metric="cosine").fit(known)
        order = nearest.kneighbors(embeddings, len(known), return_distance=False)
        found = []
        for one, row, near in zip(examples, chances, order, strict=True):
            assert one.today is not None, "a prompt of another's making"
            tools = chosen(row)
            alike = [n for n in near.tolist() if pool.tools[n] <= set(tools)]
            shown = pool.on(one.today, alike[: config.shown_examples])
            system = write_prompt(tools, one.today, shown, brief=config.brief)
            found.append(dataclasses.replace(one, system=system))
        return found


def chosen(chances: np.ndarray) -> list[str]:
    """Returns the tools whose chances are above one half, or the likeliest one."""
    found = [name for name, chance in zip(TOOLS, chances, strict=True) if chance > 0.5]
    return found or [TOOLS[int(np.argmax(chances))]]
