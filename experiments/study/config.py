"""The command line of a study."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.configs.pretrain import PresetName
from experiments.cores import default_workers
from experiments.study.arms import Arm, parse_arms
from experiments.study.pretraining import PRETRAINING
from experiments.study.tuning import Budget

PROGRAM = "python -m experiments.study"
WORKERS = default_workers()


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Tune the learning rate of every arm alike, then compare arms over seeds.

    An arm is a method (adamw, galore ...), or a name and any arguments of
    experiments.pretrain: 'natural_r32=--optimizer natural_galore --rank 32'. Arguments
    that are not among those below go to every run. Two methods and a variant of one,
    on text of your own:

    python -m experiments.study --arms adamw natural_galore 'natural_r32=--optimizer
    natural_galore --rank 32' --steps 800 --data 'texts/*.txt' --study-dir runs/mine

    Every arm gets the factors on its default learning rate (or on the --learning-rate
    that it names) on the first seed; where the best is at the edge, one factor more
    beyond it; the best of all goes on to the other seeds. A run that diverges is
    infinitely bad. Ctrl-C saves; the same command goes on, and so does one with more
    arms, factors or seeds: what study.json in the folder has is not run again.
    study.md and the plots beside it are made from it, at any time again by
    `python -m experiments.study.report FOLDER`.

    Attributes:
        preset: Model and run settings, as of experiments.pretrain.
        arms: What is compared: METHOD or 'NAME=ARGUMENTS' each.
        factors: Learning rates tried, as factors on each arm's own.
        extensions: Factors tried beyond, at most, where the best is at the edge.
        seeds: The first one is tuned on; the median is over all of them.
        workers: Runs at a time, one CPU core each; where there is a GPU, two, which
            share its memory. Of several GPUs each run gets one, that with the fewest
            runs, unless --mesh spreads runs over them. A TPU is one process's: 1.
        study_dir: Folder of the study. None: runs/study-PRESET.
    """

    preset: PresetName = "demo"
    arms: tuple[str, ...] = ("adamw", "muon", "galore", "natural_galore")
    factors: tuple[float, ...] = Budget.factors
    extensions: int = Budget.extensions
    seeds: tuple[int, ...] = Budget.seeds
    workers: int = WORKERS
    study_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The study's folder, its default resolved."""
        return self.study_dir or Path("runs") / f"study-{self.preset}"

    @property
    def budget(self) -> Budget:
        """What every arm gets."""
        return Budget(self.factors, self.extensions, self.seeds)


def parse_args(args: Sequence[str]) -> tuple[StudyConfig, list[Arm]]:
    """Reads the command line.

    A mistake in it is explained on stderr and ends the process with code 2.

    Raises:
        ValueError: Arms that cannot be compared.
    """
    config, extra = tyro.cli(
        StudyConfig, args=args, prog=PROGRAM, return_unknown_args=True
    )
    common = ["--preset", config.preset, *extra]
    return config, parse_arms(config.arms, common, PRETRAINING)
