"""Settings read from a command line whose preset and method set the defaults."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from experiments.configs.run import TrainingConfig

_Config = TypeVar("_Config", bound=TrainingConfig)


def parse_with_preset(
    choice_type: Callable[[], Any],
    preset: Callable[[Any, Any], _Config],
    args: Sequence[str] | None,
    program: str,
) -> _Config:
    """Reads a config from command-line arguments (None: those of the process).

    A mistake in them is explained on stderr and ends the process with code 2.

    Args:
        choice_type: Dataclass of `preset` and `optimizer`, which are read first, for
            they set the defaults of everything else, also of those that --help shows.
        preset: Returns the settings of these two.
        args: The arguments.
        program: The command's name in --help.
    """
    choice, _ = tyro.cli(
        choice_type, args=args, return_unknown_args=True, add_help=False
    )
    default = preset(choice.preset, choice.optimizer)
    return tyro.cli(
        type(default),
        args=args,
        default=default,
        prog=program,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
