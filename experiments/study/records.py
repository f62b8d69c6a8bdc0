"""study.json: all that is left of the runs of a study, and all that it rests on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from experiments.files import replace_text
from experiments.study.arms import Arm
from experiments.study.runs import Record, Run
from experiments.study.subject import Shared, Subject
from experiments.training.record import compare

_FORMAT = 1
_DIGITS = 6


class Records:
    """The records of a study and their file, which is replaced as a whole.

    Attributes:
        path: The file, study.json.
        kind: "study", "sensitivity" of a method's settings, or "glue" for the table of
            fine-tuning.
        seeds: The first one is that of the tuning.
        commands: Command lines that have made or added runs.
        runs: What each run has left.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        *,
        seeds: Sequence[int] = (),
        commands: Sequence[str] = (),
        runs: Sequence[Record] = (),
    ) -> None:
        self.path = path
        self.kind = kind
        self.seeds = list(seeds)
        self.commands = list(commands)
        self.runs = {record.run: record for record in runs}

    @classmethod
    def read(cls, path: Path, kinds: Sequence[str] = ()) -> Self:
        """Reads a file; one of these kinds, if any are named.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is no study's, another version's, or of another kind.
        """
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there: give a folder in which `python -m "
                "experiments.study --study-dir FOLDER` has finished a run."
            )
        try:
            facts = json.loads(path.read_text("utf-8"))
            if facts.pop("format") != _FORMAT:
                raise ValueError("it has another format")
            runs = [_parse(fields) for fields in facts.pop("runs")]
            if unknown := {record.run.seed for record in runs} - {*facts["seeds"]}:
                raise ValueError(f"seeds lacks {min(unknown)}, which a run has")
            read = cls(path, **facts, runs=runs)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no study.json of this version ({type(error).__name__}: "
                f"{error}): mend it, or give the study another --study-dir."
            ) from error
        if kinds and read.kind not in kinds:
            raise ValueError(
                f"{path} is of another kind, {read.kind}, not {' or '.join(kinds)}: "
                "give another folder."
            )
        return read

    def results(self, subject: Subject) -> dict[Run, float]:
        """Result of every run; infinite if it diverged."""
        return {run: subject.result(record) for run, record in self.runs.items()}

    def check(self, arms: Sequence[Arm], subject: Subject, shared: Shared) -> None:
        """Refuses to go on with records that are not of these arms and this data.

        Raises:
            ValueError: A run has the name of one of theirs, but other settings; or it
                could not stand in one table with them.
        """
        named = {arm.name: arm for arm in arms}
        for run, record in self.runs.items():
            arm = named.get(run.arm, arms[0])
            prints = subject.fingerprints(arm.config, shared)
            now = _rounded(arm.settings(run, prints))
            there = _over(_rounded(subject.defaults(record.settings)), record.settings)
            if run.arm not in named:
                now, there = subject.common(now), subject.common(there)
            if differences := compare(there, now):
                raise ValueError(
                    f"{self.path} has {run.name} with other settings "
                    f"({'; '.join(differences)}): give the arm another name, or the "
                    "study another --study-dir."
                )

    def add(self, record: Record) -> None:
        """Takes a record and writes the file."""
        self.runs[record.run] = record
        self.write()

    def write(self) -> None:
        """Writes the file: a line a run, in an order that does not depend on time."""
        facts = {
            "format": _FORMAT,
            "kind": self.kind,
            "seeds": self.seeds,
            "commands": self.commands,
        }
        by_name = sorted(
            self.runs, key=lambda run: (run.arm, run.learning_rate, run.seed)
        )
        head = "".join(f"{_dump(key)}: {_dump(facts[key])},\n" for key in facts)
        lines = ",\n".join(_dump(_fields(self.runs[run])) for run in by_name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, f'{{\n{head}"runs": [\n{lines}\n]\n}}\n')


def _fields(record: Record) -> dict[str, Any]:
    fields = dataclasses.asdict(record)
    return _rounded(fields.pop("run") | fields)


def _parse(fields: Mapping[str, Any]) -> Record:
    rest = dict(fields)
    run = Run(rest.pop("arm"), rest.pop("learning_rate"), rest.pop("seed"))
    return Record(run, **rest)


def _over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that came after a record was made are the defaults that it had."""
    merged = dict(defaults)
    for name, value in given.items():
        both = isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping)
        merged[name] = _over(defaults[name], value) if both else value
    return merged


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
