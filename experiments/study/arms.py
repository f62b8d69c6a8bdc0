"""What a study compares, and the runs that it is made of."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from experiments.configs.optimizer import OptimizerName
from experiments.configs.run import TrainingConfig
from experiments.study.runs import Run
from experiments.study.subject import Subject

# The study gives these to each run itself.
_OWN = ("seed", "run-dir", "checkpoint-dir", "resume", "auto-resume", "overwrite")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train, but for learning rate and seed.

    Attributes:
        name: What tables and plots call it.
        arguments: Those of the subject's command that make it.
        config: What they stand for; its learning rate is the one that factors are on.
    """

    name: str
    arguments: tuple[str, ...]
    config: TrainingConfig

    def run(self, factor: float, seed: int) -> Run:
        """Returns the run at a factor on the arm's own learning rate."""
        # Rounded as the records are, so that a run is found again in them.
        return Run(self.name, float(f"{factor * self.config.learning_rate:.6g}"), seed)

    def settings(self, run: Run, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Returns all that decides what comes of a run.

        Args:
            run: One of this arm's.
            fingerprints: Of what it reads.
        """
        config = dataclasses.replace(
            self.config,
            optimization=dataclasses.replace(
                self.config.optimization, learning_rate=run.learning_rate
            ),
            run=dataclasses.replace(self.config.run, seed=run.seed),
        )
        return config.decisive() | {"fingerprints": dict(fingerprints)}


def parse_arms(
    specs: Sequence[str], common: Sequence[str], subject: Subject
) -> list[Arm]:
    """Reads arms from the command line.

    Args:
        specs: METHOD, or NAME=ARGUMENTS of the subject's command.
        common: Arguments that go to every run; an arm's own take their place.
        subject: What runs train.

    Raises:
        ValueError: There is none, or two of a name; a name that is no method and has
            no arguments; arguments that are the study's; arms that the subject
            cannot compare.
    """
    if not specs:
        raise ValueError("a study needs an arm: --arms METHOD or 'NAME=ARGUMENTS'.")
    arms = [_parse_arm(spec, common, subject) for spec in specs]
    check_comparable(arms, subject)
    return arms


def check_comparable(arms: Sequence[Arm], subject: Subject) -> None:
    """Refuses arms that cannot stand in one table.

    Raises:
        ValueError: Two have one name, or the subject does not compare them.
    """
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two arms are named {twice[0]}: give each a name of its own.")
    subject.check_comparable({arm.name: arm.config for arm in arms})


def make_arm(name: str, arguments: Sequence[str], subject: Subject) -> Arm:
    """Returns the arm that these arguments of the subject's command make.

    Raises:
        ValueError: A name that cannot be a folder's, or arguments that are the study's.
    """
    if not re.fullmatch(r"[\w.=,+-]+", name):
        raise ValueError(
            f"{name!r} is to be a folder's name: give an arm letters, digits and any "
            "of _.,+- as its name."
        )
    for word in arguments:
        flag = word.split("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and flag in _OWN:
            raise ValueError(
                f"{word} is the study's to give: --seeds and --study-dir say which "
                "seeds, and where runs lie."
            )
    return Arm(name, tuple(arguments), subject.parse(arguments))


def _parse_arm(spec: str, common: Sequence[str], subject: Subject) -> Arm:
    name, equals, text = spec.partition("=")
    if not equals and name not in get_args(OptimizerName):
        raise ValueError(
            f"{name!r} is no method ({', '.join(get_args(OptimizerName))}): give one "
            "of these, or 'NAME=ARGUMENTS' as in 'low=--optimizer galore --rank 4'."
        )
    own = shlex.split(text) if equals else ["--optimizer", name]
    return make_arm(name, [*common, *own], subject)
