"""The tasks of GLUE: files, labels, scores, predictions as GLUE's server takes them.

Reference: Wang et al., GLUE (arXiv 1804.07461). Texts and labels are read from the
official layout, `FOLDER/MRPC/train.tsv` and so on, or from the Hugging Face hub.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.hub import dataset_split
from experiments.data.text_files import OnBadInput, TextError

TaskName = Literal["cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp"]
_HUB = "nyu-mll/glue"
_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"


@dataclasses.dataclass(frozen=True)
class Split:
    """A file of a task."""

    file: str  # TSV in the task's folder
    hub: str  # name of the split on the hub
    submission: str = ""  # what GLUE's server wants predictions on it to be called
    suffix: str = ""  # of the names of its scores


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task is made of.

    Attributes:
      folder: Of its files.
      columns: Headers of its texts, one or two.
      label: Header of its label.
      classes: Labels as written in the files, by their numbers on the hub; none: the
        label is a number from 0 to 5.
      metrics: Names of its scores; the first one is the table's.
      hub_columns: Names of the texts on the hub.
      header: Of train and dev, where the file itself has none.
      validation, test: Splits; MNLI has two of each.
      train: Split to train on.
    """

    folder: str
    columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    hub_columns: tuple[str, ...]
    header: tuple[str, ...] = ()
    validation: tuple[Split, ...] = (Split("dev.tsv", "validation"),)
    test: tuple[Split, ...] = ()
    train: Split = Split("train.tsv", "train")

    @property
    def outputs(self) -> int:
        """Scores that a model gives for an example."""
        return len(self.classes) or 1


def _test(name: str) -> tuple[Split, ...]:
    return (Split("test.tsv", "test", f"{name}.tsv"),)


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
TASKS: dict[TaskName, Task] = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        ("0", "1"),
        ("matthews",),
        ("sentence",),
        header=("source", "label", "mark", "sentence"),
        test=_test("CoLA"),
    ),
    "stsb": Task(
        "STS-B",
        _PAIR,
        "score",
        (),
        ("pearson", "spearman"),
        _PAIR,
        test=_test("STS-B"),
    ),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("0", "1"),
        ("f1", "accuracy"),
        _PAIR,
        test=_test("MRPC"),
    ),
    "rte": Task(
        "RTE", _PAIR, "label", _ENTAILED, ("accuracy",), _PAIR, test=_test("RTE")
    ),
    "sst2": Task(
        "SST-2",
        ("sentence",),
        "label",
        ("0", "1"),
        ("accuracy",),
        ("sentence",),
        test=_test("SST-2"),
    ),
    "mnli": Task(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis"),
        validation=(
            Split("dev_matched.tsv", "validation_matched"),
            Split("dev_mismatched.tsv", "validation_mismatched", suffix="_mismatched"),
        ),
        test=(
            Split("test_matched.tsv", "test_matched", "MNLI-m.tsv"),
            Split("test_mismatched.tsv", "test_mismatched", "MNLI-mm.tsv"),
        ),
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        _ENTAILED,
        ("accuracy",),
        ("question", "sentence"),
        test=_test("QNLI"),
    ),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        ("accuracy", "f1"),
        ("question1", "question2"),
        test=_test("QQP"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a split.

    Attributes:
      texts: One or two of each example.
      labels: Numbers of the classes, int32, or scores, float32, ``(N,)``; None where
        they are not told.
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.texts)

    def first(self, most: int | None) -> "Examples":
        """Returns the first examples, or all."""
        labels = None if self.labels is None else self.labels[:most]
        return Examples(self.texts[:most], labels)


def load(
    name: TaskName,
    split: Split,
    folder: Path | None,
    *,
    on_bad_input: OnBadInput,
    report: Callable[[str], None],
) -> Examples:
    """Returns the examples of a split: from a folder, or (None) from the hub.

    Args:
      name: Of the task.
      split: Of its `train`, `validation` or `test`. Those of `test` have no labels.
      folder: In the official layout: of all tasks, or with this one's files in it.
      on_bad_input: Whether a malformed row of a file to train on is an error, or
        skipped. Elsewhere it is an error: scores and predictions are of all rows.
        Empty lines are no rows.
      report: Takes lines for the user, on what was skipped or has to wait.

    Raises:
      TextError: A file is missing or empty, or a row is malformed; it says which. Or
        the hub cannot be reached.
    """
    if folder is None:
        return _from_hub(name, split, report)
    return _from_folder(folder, TASKS[name], split, on_bad_input, report)


def _from_folder(
    folder: Path,
    task: Task,
    split: Split,
    on_bad_input: OnBadInput,
    report: Callable[[str], None],
) -> Examples:
    path = folder / task.folder / split.file
    if not path.exists() and (folder / split.file).exists():
        path = folder / split.file
    told = split not in task.test
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = list(task.header if task.header and told else next(rows, ()))
            examples, bad = _read_rows(path, task, header, rows, told)
    except FileNotFoundError:
        raise TextError(
            f"{path} is missing: {folder} is to have GLUE's official layout, a folder "
            f"a task ({task.folder}/{split.file} ...)."
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TextError(f"{path} cannot be read: {error}.") from error
    if bad and split != task.train:
        raise TextError(f"{bad[0]} Mend it: scores and predictions are of all rows.")
    if bad and on_bad_input == "error":
        raise TextError(f"{bad[0]} Mend it, or give --on-bad-input skip.")
    if bad:
        report(f"{path}: {len(bad)} rows skipped, the first one is {bad[0]}")
    if not examples:
        raise TextError(f"{path} holds no example.")
    return examples


def _read_rows(
    path: Path, task: Task, header: list[str], rows: "csv.reader", told: bool
) -> tuple[Examples, list[str]]:
    """The examples, and what is wrong with the rows that are none."""
    wanted = [*task.columns, *([task.label] if told else [])]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise TextError(
            f"{path} has no column {missing[0]!r}; its first line names "
            f"{', '.join(header) or 'none'}."
        )
    where = [header.index(name) for name in task.columns]
    texts, labels, bad = [], [], []
    gap = False
    for row in rows:
        if not row:
            gap = True
            continue
        try:
            if len(row) != len(header):
                columns = f"{len(header)} are needed ({', '.join(header)})"
                raise ValueError(f"{len(row)} columns, {columns}.")
            if gap and not told and row[0] != str(len(texts)):
                raise ValueError(
                    f"behind an empty line the row that is numbered {len(texts)} is "
                    f"needed, this one begins with {row[0][:40]!r}."
                )
            if told:
                labels.append(_label(row[header.index(task.label)], task))
            texts.append(tuple(row[column] for column in where))
        except ValueError as error:
            bad.append(f"{path}, line {rows.line_num}: {error}")
    return Examples(texts, _numbers(labels, task) if told else None), bad


def _numbers(labels: Sequence[float], task: Task) -> np.ndarray:
    return np.array(labels, np.int32 if task.classes else np.float32)


def _label(text: str, task: Task) -> float:
    """The number of a label, or the score.

    Raises:
      ValueError: It is none.
    """
    if task.classes:
        if text not in task.classes:
            raise ValueError(f"label {text!r} is none of {', '.join(task.classes)}.")
        return task.classes.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"score {text!r} is no number from 0 to 5.")
    return score


def _from_hub(name: TaskName, split: Split, report: Callable[[str], None]) -> Examples:
    task, told = TASKS[name], split not in TASKS[name].test
    rows = dataset_split(_HUB, _REVISION, name, split.hub, report)
    texts = list(zip(*(rows[column] for column in task.hub_columns), strict=True))
    return Examples(texts, _numbers(rows["label"], task) if told else None)


def scores(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns a task's metrics, from 0 to 1 or from -1 to 1.

    Args:
      task: The task.
      outputs: A model's, ``(N, C)``; C is 1 for a task of numbers.
      labels: As of `Examples`.
    """
    predicted = outputs[:, 0] if not task.classes else outputs.argmax(-1)
    return {name: _METRICS[name](labels, predicted) for name in task.metrics}


def write_submission(path: Path, task: Task, outputs: np.ndarray) -> None:
    """Writes predictions in the format of GLUE's server.

    Class names where the task's files have names, else numbers; scores within 0 to 5.
    """
    if task.classes:
        predictions = [task.classes[number] for number in outputs.argmax(-1)]
    else:
        predictions = [f"{score:.3f}" for score in np.clip(outputs[:, 0], 0, 5)]
    lines = [f"{index}\t{label}" for index, label in enumerate(predictions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["index\tprediction", *lines]) + "\n", "utf-8")


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0))


def _accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.mean(labels == predicted))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, predicted: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(predicted) == 0:
            return 0.0  # of a constant it is not defined
        return float(getattr(stats, name)(labels, predicted).statistic)

    return correlation


_METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "matthews": _matthews,
    "f1": _f1,
    "accuracy": _accuracy,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
