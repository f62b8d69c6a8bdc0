"""The examples of a split: TinyAgent's, or made-up ones with prompts of our own."""

import datetime
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.configs.tinyagent import (
    MadePromptConfig,
    RequestsConfig,
    TinyAgentDataConfig,
)
from experiments.data.text_files import TextError
from experiments.tinyagent import generator
from experiments.tinyagent.dataset import TESTING, TRAINING, Example, find, read_dataset
from experiments.tinyagent.generator import Made, SplitName
from experiments.tinyagent.plan import Plan
from experiments.tinyagent.prompt import describe, instructions
from experiments.tinyagent.sandbox import TOOLS, Desk

_MADE_TRAIN, _MADE_TEST = 4000, 200
_POOL = 500
_NAMED = 5  # of what is left out, on the screen


class Training(NamedTuple):
    """Examples to learn from.

    Attributes:
      train: To train on.
      validation: To choose the best epoch by.
      left_out: Why each of the others is left out, by name.
    """

    train: list[Example]
    validation: list[Example]
    left_out: dict[str, str]


def load_training(
    config: TinyAgentDataConfig, report: Callable[[str], None]
) -> Training:
    """Returns the examples to learn from; `report` takes lines for the user.

    Raises:
      ValueError: They cannot be read, or there are too few.
      OSError: A file cannot be read.
    """
    held = config.validation_examples
    if config.data is None:
        train = make(config.prompt, "train")
        validation = make(config.prompt, "validation")
        return Training(
            list(itertools.islice(train, config.train_examples or _MADE_TRAIN)),
            list(itertools.islice(validation, held)),
            {},
        )
    path = find(config.data, TRAINING, report)
    examples, bad = _read(path, report)
    if len(examples) <= held:
        raise TextError(
            f"{path} has {len(examples)} examples, and {held} of them are to validate: "
            "give fewer --validation-examples."
        )
    train = examples[:-held][: config.train_examples]
    return Training(train, examples[-held:], bad)


def load_test(
    config: RequestsConfig, report: Callable[[str], None]
) -> tuple[list[Example], dict[str, str]]:
    """Returns the examples to answer, and why each of the others is left out, by name.

    Raises:
      ValueError: They cannot be read.
      OSError: A file cannot be read.
    """
    if config.data is None:
        made = make(config.prompt, "test")
        return list(itertools.islice(made, config.test_examples or _MADE_TEST)), {}
    examples, bad = _read(find(config.data, TESTING, report), report)
    return examples[: config.test_examples], bad


def make(
    config: MadePromptConfig, split: SplitName, seed: int = 0
) -> Iterator[Example]:
    """Yields made-up examples without end, with prompts as the config has them."""
    pool = Pool(seed)
    dice = random.Random(f"prompts {split} {seed}")
    for number, made in enumerate(generator.examples(split, seed)):
        tools = _tools(made, config.other_tools, dice)
        alike = pool.alike(made, config.shown_examples, dice)
        system = write_prompt(tools, made.today, alike, brief=config.brief)
        yield Example(
            f"{split}-{number}",
            system,
            made.request,
            made.plan,
            str(made.plan),
            made.today,
        )


class Pool:
    """Made-up training examples to show in prompts, on the prompt's own day.

    Attributes:
      requests: As said on any day; an example's number is its place.
      tools: Which each of them needs.
    """

    def __init__(self, seed: int = 0) -> None:
        """Make them."""
        self._seed = seed
        made = list(itertools.islice(generator.examples("train", seed), _POOL))
        self.requests = [one.request for one in made]
        self.tools = [tools_of(one.plan) for one in made]

    def on(self, today: datetime.date, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Returns requests and plans of some, dates counted from a day."""
        made = [generator.example("train", self._seed, n, today) for n in numbers]
        return [(one.request, str(one.plan)) for one in made]

    def alike(
        self, made: Made, count: int, dice: random.Random
    ) -> list[tuple[str, str]]:
        """Returns some other requests for no tools but those that this one needs."""
        needed = tools_of(made.plan)
        found = [
            number
            for number, tools in enumerate(self.tools)
            if tools <= needed and self.requests[number] != made.request
        ]
        return self.on(made.today, dice.sample(found, min(count, len(found))))


def tools_of(plan: Plan) -> set[str]:
    """Returns the tools that a plan calls."""
    return {step.tool for step in plan.steps}


def write_prompt(
    tools: Sequence[str],
    today: datetime.date,
    examples: Sequence[tuple[str, str]],
    *,
    brief: bool,
) -> str:
    """Returns the system prompt with some tools, and examples of requests and plans."""
    return instructions(
        describe(Desk().tools, tools, brief=brief),
        today=today,
        examples=examples,
        rules=not brief,
    )


def tell_left_out(
    left_out: dict[str, str], count: int, why: str, report: Callable[[str], None]
) -> None:
    """Reports how many of so many examples are left out, and some by name."""
    if left_out:
        report(f"{len(left_out):,} of {count:,} examples are {why} and left out:")
    for name, reason in itertools.islice(left_out.items(), _NAMED):
        report(f"  {name}: {reason}")
    if len(left_out) > _NAMED:
        report("  ... the others are in the JSON file that this command writes")


def _read(
    path: Path, report: Callable[[str], None]
) -> tuple[list[Example], dict[str, str]]:
    examples, bad = read_dataset(path)
    tell_left_out(bad, len(examples) + len(bad), "malformed", report)
    return examples, bad


def _tools(made: Made, others: int, dice: random.Random) -> list[str]:
    """Those that a request needs and some others, in any order."""
    needed = tools_of(made.plan)
    rest = [name for name in TOOLS if name not in needed]
    found = [*sorted(needed), *dice.sample(rest, min(others, len(rest)))]
    dice.shuffle(found)
    return found
