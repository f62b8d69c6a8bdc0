"""What a study has to know about that which its runs train."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from experiments.assembly import Parts
from experiments.configs.run import TrainingConfig
from experiments.study.runs import Record


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all runs of a study read, ready to be trained on.

    Attributes:
        fingerprints: Of it.
        arguments: Those of the command that spare a run the work.
    """

    fingerprints: Mapping[str, Any]
    arguments: tuple[str, ...] = ()


class Subject(Protocol):
    """A command that trains, and how its runs are judged.

    Attributes:
        module: The command, as of `python -m`.
        unit: What a row of its metrics counts.
    """

    module: str
    unit: str

    def parse(self, arguments: Sequence[str]) -> TrainingConfig:
        """Reads the command's arguments."""
        ...

    def check_comparable(self, configs: Mapping[str, TrainingConfig]) -> None:
        """Refuses arms, by name, that cannot stand in one table."""
        ...

    def parts(self, config: TrainingConfig) -> Parts:
        """Returns what is trained; it is looked at, and not run."""
        ...

    def prepare(
        self, configs: Sequence[TrainingConfig], folder: Path, console: Console
    ) -> Shared:
        """Reads what runs read, and keeps in `folder` what takes time to make.

        Raises:
            ValueError: It cannot be read.
            OSError: A file is not there.
        """
        ...

    def fingerprints(self, config: TrainingConfig, shared: Shared) -> Mapping[str, Any]:
        """Returns those of all that runs share that a run of `config` depends on."""
        ...

    def fingerprints_read(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns those, or some, that a run has found, by its config.json."""
        ...

    def defaults(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings that a recorded run had where it names no others."""
        ...

    def common(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings that all runs of a study have alike."""
        ...

    def columns(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Returns the names in a row with an evaluation that are worth keeping."""
        ...

    def result(self, record: Record) -> float:
        """Returns what a run is worth: lower is better, infinite if it diverged."""
        ...

    def shown(self, record: Record) -> str:
        """Returns the same in words, of a run that did not diverge."""
        ...
