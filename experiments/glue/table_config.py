"""The command line of the table of GLUE: methods, tasks, and what each gets."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments.configs.glue import GluePreset
from experiments.data.glue import TASKS, TaskName
from experiments.glue.presets import PROGRAM
from experiments.glue.subject import GLUE
from experiments.study.arms import Arm, parse_arms
from experiments.study.config import WORKERS
from experiments.study.tuning import Budget

# The published table's rows (arXiv 2410.16029).
METHODS = (
    "full=--method adamw",
    "lora_r4=--method lora --rank 4",
    "galore_r4=--method galore --rank 4",
    "natural_galore_r4=--method natural_galore --rank 4",
    "lora_r8=--method lora --rank 8",
    "galore_r8=--method galore --rank 8",
    "natural_galore_r8=--method natural_galore --rank 8",
)


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Make the table of methods and tasks of GLUE.

    Every method gets the same factors on its learning rate on each task, by the score
    on the validation split and the first seed; where the best is at the edge, one
    factor more beyond it; the best of all goes on to the other seeds. Arguments of
    experiments.glue that are not among those below go to every run:

    python -m experiments.glue --task all --data glue --model.name minilm --preset
    minilm --train-examples 8000 --study-dir runs/glue

    Ctrl-C saves; the same command goes on, and so does one with more tasks, methods,
    factors or seeds: what study.json in the folder has is not run again. glue.md and
    its plot are made from it, at any time again by `python -m experiments.glue.table
    FOLDER`.

    Attributes:
        task: The table of all.
        tasks: Its columns.
        methods: Its rows: METHOD or 'NAME=ARGUMENTS' of experiments.glue each.
        preset: A recipe, as of experiments.glue.
        factors: Learning rates tried, as factors on each method's own; as published
            1e-5, 2e-5 and 3e-5.
        extensions: Factors tried beyond, at most, where the best is at the edge.
        seeds: The first one is tuned on; the median is over all of them.
        workers: Runs at a time, one CPU core each; where there is a GPU, two, which
            share its memory. Of several GPUs each run gets one, that with the fewest
            runs, unless --mesh spreads runs over them. A TPU is one process's: 1.
        study_dir: Folder of the table. None: runs/glue-PRESET.
    """

    task: Literal["all"] = "all"
    tasks: tuple[TaskName, ...] = tuple(TASKS)
    methods: tuple[str, ...] = METHODS
    preset: GluePreset = "paper"
    factors: tuple[float, ...] = (0.5, 1.0, 1.5)
    extensions: int = Budget.extensions
    seeds: tuple[int, ...] = Budget.seeds
    workers: int = WORKERS
    study_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The table's folder, its default resolved."""
        return self.study_dir or Path("runs") / f"glue-{self.preset}"

    @property
    def budget(self) -> Budget:
        """What every method gets on every task."""
        return Budget(self.factors, self.extensions, self.seeds)


def parse_args(args: Sequence[str]) -> tuple[TableConfig, list[Arm]]:
    """Reads the command line; an arm is a method on a task, named TASK-METHOD.

    A mistake in it is explained on stderr and ends the process with code 2.

    Raises:
        ValueError: There is no method, or two have one name.
    """
    config, extra = tyro.cli(
        TableConfig, args=args, prog=PROGRAM, return_unknown_args=True
    )
    arms = []
    for task in config.tasks:
        common = ["--preset", config.preset, "--task", task, *extra]
        arms += [
            dataclasses.replace(arm, name=f"{task}-{arm.name}")
            for arm in parse_arms(config.methods, common, GLUE)
        ]
    return config, arms
