"""Sequences continued token by token, with the keys and values of what was read kept.

A batch of prompts is read at once (prefill), each then continued from its own end: rows
are padded on the right, and what a row has not come to yet it does not see. Tokens come
in pieces of some steps, between which the host looks whether all rows are done.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models.functional import functional_extend
from experiments.models.llama import Cache, LlamaConfig

_PIECE = 16  # steps between two looks


@dataclasses.dataclass(frozen=True)
class Continued:
    """What was written.

    Attributes:
      tokens: Of each prompt's continuation, to its end.
      seconds: It took.
      compiled: Whether compiling was a part of it: batches of another size, or longer
        ones, are another program.
    """

    tokens: list[list[int]]
    seconds: float
    compiled: bool


class Generator:
    """Continues prompts."""

    def __init__(self, config: LlamaConfig, params: optax.Params) -> None:
        """Take a model's shape and parameters, sharded as to train under a mesh."""
        self._params = params
        self._sizes: set[tuple[int, int, int]] = set()  # that are compiled
        extend = functional_extend(config)

        @functools.partial(jax.jit, static_argnames="slots")
        def prefill(
            params: optax.Params,
            tokens_BxT: jax.Array,
            lengths_B: jax.Array,
            slots: int,
        ) -> tuple[jax.Array, Cache]:
            shape = tokens_BxT.shape
            positions_BxT = jnp.broadcast_to(jnp.arange(shape[1]), shape)
            cache = empty_cache(config, shape[0], slots)
            return extend(params, tokens_BxT, positions_BxT, lengths_B - 1, cache)

        @functools.partial(jax.jit, donate_argnames="cache")
        def more(
            params: optax.Params,
            logits_BxV: jax.Array,
            positions_B: jax.Array,
            cache: Cache,
            temperature: jax.Array,
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
            def step(
                carry: tuple[jax.Array, jax.Array, Cache], key: jax.Array
            ) -> tuple[tuple[jax.Array, jax.Array, Cache], jax.Array]:
                logits_BxV, positions_B, cache = carry
                tokens_B = choose(logits_BxV, temperature, key)
                first_B = jnp.zeros_like(positions_B)
                logits_BxV, cache = extend(
                    params, tokens_B[:, None], positions_B[:, None], first_B, cache
                )
                return (logits_BxV, positions_B + 1, cache), tokens_B

            carry, tokens_NxB = jax.lax.scan(
                step, (logits_BxV, positions_B, cache), jax.random.split(key, _PIECE)
            )
            return tokens_NxB.T, *carry

        self._prefill, self._more = prefill, more

    def prefill(
        self, tokens_BxT: np.ndarray, lengths_B: np.ndarray, slots: int
    ) -> tuple[jax.Array, Cache]:
        """Return logits ``(B, V)`` after prompts, and a cache of so many positions."""
        return self._prefill(self._params, tokens_BxT, lengths_B, slots=slots)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        end: Callable[[list[int]], int | None],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Continued:
        """Continue each prompt until it is done, or for so many tokens.

        Args:
          prompts: Tokens, at least one each.
          most: Tokens to write at most, of each.
          end: How many tokens of a continuation are those to its end; None: it has
            none yet. It is asked after every 16 tokens, so that what it is given may go
            on behind the end, and is cut there.
          temperature: 0: the likeliest token each time. Else logits are divided by it,
            and tokens drawn.
          seed: Of the draws.

        Raises:
          ValueError: There is no prompt, or one is empty.
        """
        if not prompts or not all(prompts):
            raise ValueError("a prompt has no token: give each at least one.")
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        width = _padded(int(lengths_B.max()))
        pieces = -(-most // _PIECE)
        tokens_BxT = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens_BxT, prompts, strict=True):
            row[: len(prompt)] = prompt
        key = jax.random.key(seed)
        written: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        begun = time.perf_counter()
        slots = width + pieces * _PIECE
        logits, cache = self.prefill(tokens_BxT, lengths_B, slots)
        positions = jnp.asarray(lengths_B)
        for piece in range(pieces):
            new, logits, positions, cache = self._more(
                self._params,
                logits,
                positions,
                cache,
                temperature,
                jax.random.fold_in(key, piece),
            )
            for row, tokens in enumerate(np.asarray(new).tolist()):
                if ended[row]:
                    continue
                written[row] += tokens
                length = end(written[row])
                if length is not None:
                    written[row], ended[row] = written[row][:length], True
            if all(ended):
                break
        seconds = time.perf_counter() - begun
        size = (len(prompts), width, slots)
        compiled = size not in self._sizes
        self._sizes.add(size)
        return Continued([row[:most] for row in written], seconds, compiled)


def _padded(length: int) -> int:
    """What prompts are padded to, so that few programs are compiled."""
    step = 64 if length <= 512 else 512
    return -(-length // step) * step


def choose(logits_BxV: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
    """Return a token of each row, ``(B,)`` int32: the likeliest, or at random."""
    warm = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.random.categorical(key, logits_BxV / warm)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BxV, -1)).astype(
        jnp.int32
    )


def empty_cache(config: LlamaConfig, batch_size: int, slots: int) -> Cache:
    """Make room for so many positions of so many sequences, all layers."""
    shape = (
        config.num_layers,
        batch_size,
        slots,
        config.kv_heads,
        config.head_size,
    )
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
