"""A Llama that writes plans."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import jax
import optax

from experiments.configs.run import MeshConfig, check_at_least
from experiments.configs.tinyagent import PlannerModelConfig
from experiments.models.functional import functional_llama
from experiments.models.generation import Generator
from experiments.tinyagent.job import llama_config
from experiments.tinyagent.plan import END_OF_PLAN
from experiments.tinyagent.source import LlamaSource, open_llama
from experiments.training.mesh import make_mesh
from experiments.training.state import create_state


@dataclasses.dataclass(frozen=True)
class WritingConfig:
    """How plans are written.

    Attributes:
        max_new_tokens: Tokens of a plan, at most.
        temperature: 0: the likeliest token each time. Else logits are divided by it,
            and tokens drawn.
        seed: Of the draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        check_at_least(1, self, "max_new_tokens")
        check_at_least(0, self, "temperature", "seed")


@dataclasses.dataclass(frozen=True)
class Written:
    """Plans of a batch.

    Attributes:
      texts: As written, up to their end.
      tokens_per_second: Written, of all together; None where compiling was a part of
        the time.
    """

    texts: list[str]
    tokens_per_second: float | None


class Planner:
    """Writes plans, a batch at a time."""

    def __init__(self, generator: Generator, source: LlamaSource) -> None:
        """Take a model and what it is made of."""
        self._generator, self._end = generator, source.end
        self._tokenizer, self.fingerprint = source.tokenizer, source.fingerprint
        self._positions = source.positions

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        model: PlannerModelConfig,
        mesh: MeshConfig,
        report: Callable[[str], None],
    ) -> Iterator[Self]:
        """Loads a model onto the mesh, which is entered.

        Raises:
          ValueError: It cannot be read, or the mesh does not fit it.
          OSError: A file cannot be read.
        """
        if mesh.distributed:
            raise ValueError(
                "--mesh.distributed is for training: one process writes plans."
            )
        source = open_llama(model.name, report)
        shape = llama_config(model, mesh, source)
        init_params, _ = functional_llama(shape)
        with contextlib.ExitStack() as stack:
            found = None
            if mesh.data * mesh.fsdp * mesh.tensor > 1:
                found = make_mesh(mesh.data, mesh.fsdp, mesh.tensor, explicit=False)
                stack.enter_context(jax.set_mesh(found))
            state = create_state(
                init_params,
                optax.identity(),
                seed=0,
                mesh=found,
                pretrained=source.load,
            )
            yield cls(Generator(shape, state.params), source)

    def check(self, prompts: Sequence[str], config: WritingConfig) -> None:
        """Refuses prompts whose plans may go beyond the model's positions.

        Raises:
          ValueError: One is too long.
        """
        lengths = (len(self._tokenizer.encode(prompt).ids) for prompt in prompts)
        self._check(lengths, config)

    def write(
        self, prompts: Sequence[str], config: WritingConfig, batch_size: int
    ) -> Written:
        """Continues at most `batch_size` prompts; fewer are filled up to as many.

        Raises:
          ValueError: There is no prompt; also what `check` raises.
        """
        asked = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        self._check(map(len, asked), config)
        found = self._generator(
            asked + asked[:1] * (batch_size - len(asked)),
            config.max_new_tokens,
            self._end_of,
            config.temperature,
            config.seed,
        )
        written = found.tokens[: len(asked)]
        speed = None if found.compiled else sum(map(len, written)) / found.seconds
        return Written([self._text(tokens) for tokens in written], speed)

    def _check(self, lengths: Iterable[int], config: WritingConfig) -> None:
        longest, most = max(lengths, default=0), config.max_new_tokens
        if self._positions is not None and longest + most > self._positions:
            raise ValueError(
                f"a prompt of {longest} tokens and --max-new-tokens {most} are more "
                f"than the model's {self._positions} positions: give a smaller "
                "--max-new-tokens, a shorter prompt (--brief, fewer --shown-examples) "
                "or another model."
            )

    def _end_of(self, tokens: list[int]) -> int | None:
        """How many tokens are written to the plan's marker or the text's end."""
        if self._end in tokens:
            return tokens.index(self._end) + 1
        if END_OF_PLAN not in self._tokenizer.decode(tokens):
            return None
        shorter = range(len(tokens))
        there = (END_OF_PLAN in self._tokenizer.decode(tokens[:n]) for n in shorter)
        return next((n for n, found in enumerate(there) if found), len(tokens))

    def _text(self, tokens: list[int]) -> str:
        """What is written to the end, markers of the tokenizer left out."""
        text, marker, _ = self._tokenizer.decode(tokens).partition(END_OF_PLAN)
        return text + marker
