"""A file of made-up examples: `python -m experiments.tinyagent make --help`."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from experiments.configs.run import check_at_least
from experiments.configs.tinyagent import MadePromptConfig
from experiments.tinyagent import examples
from experiments.tinyagent.dataset import write_dataset
from experiments.tinyagent.evaluation import MADE_UP
from experiments.tinyagent.generator import SplitName
from experiments.tinyagent.presets import PROGRAM


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Write made-up requests with their plans, in the layout of TinyAgent's dataset.

    For development and tests: every number made with them is to say so.

    Attributes:
        out: JSON file to write.
        count: Examples.
        split: Each has ways to say things of its own.
        seed: Of one seed always the same examples.
        prompt: What the planner is told in them.
        overwrite: Replace that file.
    """

    out: tyro.conf.Positional[Path]
    count: int = 1000
    split: SplitName = "train"
    seed: int = 0
    prompt: tyro.conf.OmitArgPrefixes[MadePromptConfig] = dataclasses.field(
        default_factory=MadePromptConfig
    )
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        check_at_least(1, self, "count")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        config = tyro.cli(
            MakeConfig,
            args=args,
            prog=f"{PROGRAM} make",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if config.out.exists() and not config.overwrite:
            raise ValueError(f"{config.out} is there already: give --overwrite.")
        made = examples.make(config.prompt, config.split, config.seed)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        count = write_dataset(config.out, itertools.islice(made, config.count))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(highlight=False)
    console.print(f"{count:,} examples, {MADE_UP}: {config.out}", markup=False)
    return 0
