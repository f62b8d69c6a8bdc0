"""How a model was trained: a file in its folder, which goes with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.configs.tinyagent import MadePromptConfig
from experiments.data.text_files import TextError
from experiments.files import replace_text

_FILE = "training.json"


@dataclasses.dataclass(frozen=True)
class _Model:
    name: str = ""


@dataclasses.dataclass(frozen=True)
class _Choice:
    model: _Model = _Model()


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes a run's settings into its model's folder."""
    replace_text(folder / _FILE, json.dumps(settings, indent=2) + "\n")


def settings_of(name: str) -> dict[str, Any] | None:
    """Returns the settings of the run that a model is of, None without one.

    Raises:
      TextError: Its file is none of `train`.
    """
    path = Path(name).expanduser() / _FILE
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text("utf-8"))
        MadePromptConfig(**settings["data"]["prompt"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TextError(f"{path} is of no run of `train`: {error!r}.") from error
    return settings


def prompt_of(args: Sequence[str]) -> MadePromptConfig:
    """Returns the prompts that the model which arguments name has been trained with.

    Of one that is of no run: the default ones.

    Raises:
      TextError: As of `settings_of`.
    """
    choice, _ = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    settings = settings_of(choice.model.name)
    return MadePromptConfig(**({} if settings is None else settings["data"]["prompt"]))
