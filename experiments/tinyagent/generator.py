"""Made-up requests with their plans, in TinyAgent's format, by a grammar.

For development and tests: every number made with them is to say so. A request is one
errand, or two in one sentence. An errand is a way to say it and the calls that do it;
`split` parts the ways to say it, so that held-out requests are worded as none is that
was learnt from.
"""

import dataclasses
import datetime
import itertools
import random
from collections.abc import Iterator
from typing import Literal

from experiments.tinyagent.errands import ERRANDS, Calls
from experiments.tinyagent.plan import Plan

SplitName = Literal["train", "validation", "test"]

_FIRST_DAY = datetime.datetime(2024, 1, 1)
_BETWEEN = (" and ", ", and then ", "; also, ")


@dataclasses.dataclass(frozen=True)
class Made:
    """A request and what does it.

    Attributes:
      request: As a user would say it.
      today: The day on which it is said.
      plan: Its calls.
      template: The ways to say it, one or two.
    """

    request: str
    today: datetime.date
    plan: Plan
    template: tuple[str, ...]


def examples(split: SplitName, seed: int) -> Iterator[Made]:
    """Yields requests without end; of one seed always the same ones.

    One in three is of two errands.
    """
    return (example(split, seed, number) for number in itertools.count())


def example(
    split: SplitName, seed: int, number: int, today: datetime.date | None = None
) -> Made:
    """Returns one of the requests, on its own day or (not None) on another one."""
    dice = random.Random(f"{split} {seed} {number}")
    day = _FIRST_DAY + datetime.timedelta(days=dice.randrange(3 * 365))
    if today is not None:
        day = datetime.datetime.combine(today, datetime.time())
    count = 2 if dice.random() < 1 / 3 else 1
    calls, said, template = Calls(day), [], []
    for name in dice.sample(sorted(ERRANDS), count):
        make, _ = ERRANDS[name]
        way = dice.choice(_ways(name, split))
        said.append(way.format(**make(dice, calls)))
        template.append(way)
    request = dice.choice(_BETWEEN).join(said)
    mark = "?" if request.startswith(("how ", "where ")) and count == 1 else "."
    text = request[0].upper() + request[1:] + mark
    return Made(text, day.date(), Plan(tuple(calls.steps)), tuple(template))


def _ways(name: str, split: SplitName) -> tuple[str, ...]:
    _, ways = ERRANDS[name]
    return {"train": ways[:-2], "validation": ways[-2:-1], "test": ways[-1:]}[split]
