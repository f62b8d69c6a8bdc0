"""How much settings matter: `python -m experiments.study.sensitivity --help`.

A study whose arms are a method at its defaults, and the same with one setting at
another value; the learning rate is held.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.configs.optimizer import OptimizerConfig, OptimizerName
from experiments.configs.pretrain import PresetName
from experiments.study.arms import Arm, check_comparable, make_arm
from experiments.study.config import WORKERS
from experiments.study.pretraining import PRETRAINING
from experiments.study.records import Records
from experiments.study.report import show_report
from experiments.study.session import Session, start
from experiments.study.tuning import Budget

PROGRAM = "python -m experiments.study.sensitivity"
_USUAL = (
    "rank=1,4,8,16,32",
    "update_proj_gap=1,3,10,50,200",
    "history=1,4,8,20",
    "damping=1e-5,1e-3,1e-1",
    "scale=0.0625,0.125,0.25,0.5,1",
)


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """Vary one setting of a method at a time around its defaults.

    The learning rate is held, also for settings that act like a step size. Arguments
    that are not among those below go to every run and are the defaults varied around:

    python -m experiments.study.sensitivity --learning-rate 4e-3 --vary rank=1,4,8,16,32
    --vary history=1,5,20,40 --steps 800 --data 'texts/*.txt' --study-dir runs/mine

    As with experiments.study, Ctrl-C saves, the same command goes on, more values and
    seeds are added to what study.json has, and `python -m experiments.study.report
    FOLDER` makes sensitivity.md and its plot again.

    Attributes:
        vary: SETTING=VALUE,VALUE,... of the optimizer, once a setting. None given:
            rank, update_proj_gap, history, damping and scale.
        preset: Model and run settings, as of experiments.pretrain.
        method: Whose settings they are.
        learning_rate: Of the matrices. None: the method's own.
        seeds: The median is over all of them.
        workers: Runs at a time, one CPU core each; where there is a GPU, two, which
            share its memory. Of several GPUs each run gets one, that with the fewest
            runs, unless --mesh spreads runs over them. A TPU is one process's: 1.
        study_dir: Folder of the results. None: runs/sensitivity-PRESET-METHOD.
    """

    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    preset: PresetName = "demo"
    method: OptimizerName = "natural_galore"
    learning_rate: float | None = None
    seeds: tuple[int, ...] = Budget.seeds
    workers: int = WORKERS
    study_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the results, its default resolved."""
        default = Path("runs") / f"sensitivity-{self.preset}-{self.method}"
        return self.study_dir or default


def parse_args(args: Sequence[str]) -> tuple[SensitivityConfig, list[Arm]]:
    """Reads the command line; the first arm is the method at its defaults.

    A mistake in it is explained on stderr and ends the process with code 2.

    Raises:
        ValueError: A setting that there is not, or settings that do not fit.
    """
    config, extra = tyro.cli(
        SensitivityConfig, args=args, prog=PROGRAM, return_unknown_args=True
    )
    common = ["--preset", config.preset, "--optimizer", config.method, *extra]
    if config.learning_rate is not None:
        common += ["--learning-rate", repr(config.learning_rate)]
    base = make_arm(config.method, common, PRETRAINING)
    arms = [base]
    for spec in config.vary or _USUAL:
        setting, values = _parse(spec)
        for value in values:
            arm = make_arm(
                f"{setting}={value}", [*common, *_flag(setting, value)], PRETRAINING
            )
            # One name for 1e-3 and 0.001, and none for the default.
            arm = dataclasses.replace(arm, name=f"{setting}={_value(arm, setting)}")
            if arm.config != base.config:
                arms.append(arm)
    check_comparable(arms, PRETRAINING)
    return config, arms


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    return start(make_session, args)


def make_session(args: Sequence[str]) -> Session:
    """Reads what a study is to be of."""
    config, arms = parse_args(args)
    _check_rate(config.folder / "study.json", arms[0].run(1, 0).learning_rate)
    return Session(
        "sensitivity",
        PRETRAINING,
        arms,
        Budget((1.0,), 0, config.seeds),
        config.folder,
        config.workers,
        command=f"{PROGRAM} {shlex.join(args)}".strip(),
        report=show_report,
    )


def _parse(spec: str) -> tuple[str, list[str]]:
    setting, _, values = spec.partition("=")
    setting = setting.replace("-", "_")
    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    known = [name for name in fields if name not in ("optimizer", "learning_rate")]
    if setting not in known or not values:
        raise ValueError(
            f"{spec!r} varies nothing: give SETTING=VALUE,VALUE,... with one of "
            f"{', '.join(known)}."
        )
    return setting, values.split(",")


def _flag(setting: str, value: str) -> list[str]:
    name = f"--{setting.replace('_', '-')}"
    return {"True": [name], "False": []}.get(value, [name, value])


def _value(arm: Arm, setting: str) -> Any:
    value = getattr(arm.config.optimization, setting)
    return f"{value:g}" if isinstance(value, float) else value


def _check_rate(path: Path, rate: float) -> None:
    """Refuses to add runs at another learning rate than those that are there."""
    if not path.exists():
        return
    others = {run.learning_rate for run in Records.read(path).runs} - {rate}
    if others:
        raise ValueError(
            f"{path} has runs at learning rate {min(others):g}, not {rate:g}, and it "
            "is to be held: give that one, or another --study-dir."
        )


if __name__ == "__main__":
    sys.exit(main())
