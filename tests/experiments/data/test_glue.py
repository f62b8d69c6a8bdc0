"""GLUE's files, scores and submissions."""

import datasets
import numpy as np
import pytest

from experiments.data import glue
from experiments.data.glue import TASKS
from experiments.data.text_files import TextError
from tests.experiments.glue_files import ROWS, write_task


def load(name, split, folder, on_bad_input="error", report=print):
    return glue.load(name, split, folder, on_bad_input=on_bad_input, report=report)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_read_from_its_official_layout(name, tmp_path):
    task, count = TASKS[name], 6
    write_task(tmp_path, name, count)
    for split in (task.train, *task.validation, *task.test):
        examples = load(name, split, tmp_path)
        assert examples.texts == [ROWS[name](n)[0] for n in range(count)]
        if split in task.test:
            assert examples.labels is None
        else:
            labels = [ROWS[name](n)[1] for n in range(count)]
            expected = [task.classes.index(x) if task.classes else x for x in labels]
            np.testing.assert_allclose(examples.labels, expected)
            kind = np.int32 if task.classes else np.float32
            assert examples.labels.dtype == kind
    # The task's own folder does as well.
    assert len(load(name, task.train, tmp_path / task.folder)) == count
    assert len(load(name, task.train, tmp_path).first(2)) == 2


def test_quotes_and_a_mark_of_byte_order_are_text_as_it_stands(tmp_path):
    (tmp_path / "MRPC").mkdir()
    path = tmp_path / "MRPC" / "train.tsv"
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    path.write_text(f'{header}1\t2\t3\tHe said " no .\tNo\n', "utf-8-sig")
    examples = load("mrpc", TASKS["mrpc"].train, tmp_path)
    assert examples.texts == [('He said " no .', "No")]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("mrpc", "1\tone column", r"MRPC/train.tsv, line 4: 2 columns, 5 are needed"),
        ("mrpc", "2\ta\tb\tc\td", r"line 4: label '2' is none of 0, 1"),
        ("stsb", "\t".join("012345678") + "\t7.5", "score '7.5' is no number from 0"),
        ("stsb", "\t".join("012345678") + "\tx", "score 'x' is no number from 0 to 5"),
        ("rte", "0\ta\tb\tyes", "label 'yes' is none of entailment, not_entailment"),
        ("cola", "gj04\t1\tno sentence", "line 3: 3 columns, 4 are needed"),
    ],
)
def test_a_malformed_row_says_where_it_is_or_is_left_out(name, line, message, tmp_path):
    write_task(tmp_path, name, 2)
    task = TASKS[name]
    path = tmp_path / task.folder / "train.tsv"
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TextError, match=f"{message}.*on-bad-input skip"):
        load(name, task.train, tmp_path)
    said = []
    assert len(load(name, task.train, tmp_path, "skip", said.append)) == 2
    assert "1 rows skipped" in said[0] and str(path) in said[0]


def test_empty_lines_are_no_rows(tmp_path):
    write_task(tmp_path, "rte", 3)
    task = TASKS["rte"]
    for split in (task.train, *task.validation, *task.test):
        path = tmp_path / "RTE" / split.file
        header, *lines = path.read_text().splitlines()
        path.write_text("\r\n\n".join([header, *lines]) + "\n\n")
        examples = load("rte", split, tmp_path)
        assert examples.texts == [ROWS["rte"](n)[0] for n in range(3)]
        assert examples.labels is None or len(examples.labels) == 3


@pytest.mark.parametrize("name", ["rte", "sst2"])
def test_no_prediction_is_of_another_row_than_its_number_says(name, tmp_path):
    """An empty line in the place of a row; the second file does not number them."""
    write_task(tmp_path, name, 3)
    task = TASKS[name]
    path = tmp_path / task.folder / "test.tsv"
    lines = path.read_text().splitlines()
    lines[2] = ""
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TextError, match=r"line 4: .* numbered 1 is needed.*of all row"):
        load(name, task.test[0], tmp_path, "skip")


def test_files_that_are_not_there_or_hold_nothing_are_named(tmp_path):
    task = TASKS["rte"]
    with pytest.raises(TextError, match=r"RTE/train.tsv is missing: .* official lay"):
        load("rte", task.train, tmp_path)
    write_task(tmp_path, "rte", 0)
    with pytest.raises(TextError, match=r"RTE/train.tsv holds no example"):
        load("rte", task.train, tmp_path)
    path = tmp_path / "RTE" / "train.tsv"
    path.write_text("index\tsentence1\tlabel\n")
    with pytest.raises(TextError, match="has no column 'sentence2'; its first line"):
        load("rte", task.train, tmp_path)
    path.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n")
    with pytest.raises(TextError, match=r"RTE/train\.tsv cannot be read"):
        load("rte", task.train, tmp_path)


HUB_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "mnli": ["premise", "hypothesis"],
}


@pytest.mark.parametrize("name", TASKS)
def test_the_hub_s_columns_and_labels_are_those_of_the_files(name, monkeypatch):
    asked = []

    def load_dataset(repository, task, split, revision):
        asked.append((repository, task, split, len(revision)))
        texts = {column: [column] for column in HUB_COLUMNS[name]}
        return datasets.Dataset.from_dict(texts | {"label": [1], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]
    examples = load(name, task.validation[-1], None)
    assert asked == [("nyu-mll/glue", name, task.validation[-1].hub, 40)]
    assert examples.texts == [tuple(HUB_COLUMNS[name])]
    assert examples.labels == [1]
    assert load(name, task.test[0], None).labels is None


def test_a_hub_that_fails_is_explained(monkeypatch):
    def fail(*args, **more):
        raise PermissionError("not yours")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TextError, match=r"hf://datasets/nyu-mll/glue \(rte, train\): "):
        load("rte", TASKS["rte"].train, None)


def test_a_row_that_is_scored_or_predicted_is_never_left_out(tmp_path):
    write_task(tmp_path, "rte", 2)
    for file in ("dev.tsv", "test.tsv"):
        with (tmp_path / "RTE" / file).open("a") as lines:
            lines.write("cut\n")
    for split in (*TASKS["rte"].validation, *TASKS["rte"].test):
        with pytest.raises(TextError, match=r"line 4: 1 columns.*of all rows"):
            load("rte", split, tmp_path, "skip")


def outputs(predicted, classes=2):
    return np.eye(classes)[predicted]


def test_scores_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 1])
    predicted = [1, 1, 0, 0, 1, 1]  # 3 hits of 4, a false alarm
    found = glue.scores(TASKS["mrpc"], outputs(predicted), labels)
    assert found == pytest.approx({"f1": 0.75, "accuracy": 4 / 6})
    assert list(found) == ["f1", "accuracy"]
    # (3 * 1 - 1 * 1) / sqrt(4 * 4 * 2 * 2)
    found = glue.scores(TASKS["cola"], outputs(predicted), labels)
    assert found == pytest.approx({"matthews": 0.25})
    numbers = np.array([0.0, 1, 2, 4], np.float32)
    monotone = np.array([[1.0], [2], [3], [9]])
    found = glue.scores(TASKS["stsb"], monotone, numbers)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(numbers, monotone[:, 0])[0, 1])
    constant = glue.scores(TASKS["stsb"], np.ones((4, 1)), numbers)
    assert constant == {"pearson": 0, "spearman": 0}


def test_submissions_have_the_server_s_format(tmp_path):
    path = tmp_path / "x.tsv"
    glue.write_submission(path, TASKS["rte"], outputs([1, 0]))
    assert path.read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    glue.write_submission(path, TASKS["stsb"], np.array([[2.25], [7.0], [-1.0]]))
    assert path.read_text() == "index\tprediction\n0\t2.250\n1\t5.000\n2\t0.000\n"
    glue.write_submission(path, TASKS["cola"], outputs([1]))
    assert path.read_text() == "index\tprediction\n0\t1\n"
    assert [split.submission for split in TASKS["mnli"].test] == [
        "MNLI-m.tsv",
        "MNLI-mm.tsv",
    ]
