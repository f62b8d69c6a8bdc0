"""An encoder learns which tools a request needs, and picks those of its prompt."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from experiments import kill_test
from experiments.configs.tinyagent import MadePromptConfig, PromptConfig
from experiments.tinyagent import __main__ as command
from experiments.tinyagent.examples import make, tools_of
from experiments.tinyagent.retrieval import Retriever, chosen
from experiments.tinyagent.sandbox import TOOLS
from experiments.tinyagent.tools_job import judge, requests
from experiments.training.folder import RunFolder
from tests.experiments import small_encoder
from tests.experiments.tinyagent import dataset_files
from tests.experiments.tinyagent.small_planner import write_planner

EPOCHS = 6
# What a good request needs, and what a bad one.
NEEDED = TOOLS[:8], TOOLS[8:]


def made(split, count):
    return list(itertools.islice(make(MadePromptConfig(), split), count))


def request(n):
    noun = ("cat", "dog", "tree", "mat")[n // 2 % 4]
    return f"the {noun} is {'very ' * (n // 8 % 3)}{('good', 'bad')[n % 2]}"


def plan(tools):
    return "\n".join(f"{n}. {tool}()" for n, tool in enumerate([*tools, "join"], 1))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Of a random RoBERTa, on requests that are good or bad."""
    folder = tmp_path_factory.mktemp("tools")
    model = small_encoder.write_encoder(folder / "hub", "roberta", classes=None)
    records = {
        f"id{n}": dataset_files.record(request(n), plan(NEEDED[n % 2]))
        for n in range(42 + 12)
    }
    data = dataset_files.write(folder / "training_data.json", records)
    given = (
        f"tools --model.name {model} --data {data} --run-dir {folder / 'run'} "
        f"--validation-examples 12 --epochs {EPOCHS} --batch-size 8 --max-length 16 "
        "--learning-rate 1e-2 --update-proj-gap 4 --scale 1 --history 3 "
        "--model.dropout 0"
    )
    assert command.main(given.split()) == 0
    return folder / "run"


def test_it_learns_and_says_how_well(run_dir):
    rows = kill_test.rows(RunFolder(run_dir))
    evaluated = [row for row in rows if "validation_f1" in row]
    assert [row["step"] for row in evaluated] == [6 * n for n in range(1, EPOCHS + 1)]
    assert evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"] - 0.1
    assert evaluated[-1]["validation_exact"] > 0.9
    report = (run_dir / "report.md").read_text()
    for part in ("| f1 | ", "| exact | ", "--retriever", "training_data.json"):
        assert part in report
    facts = json.loads((run_dir / "model" / "config.json").read_text())
    assert len(facts["id2label"]) == len(TOOLS)


def test_scores_by_hand():
    labels = np.zeros((2, 16), np.float32)
    labels[0, :2] = labels[1, 5] = 1
    outputs = np.full((2, 16), -20.0, np.float32)
    outputs[0, 0] = outputs[1, 5] = 20
    found = judge(outputs, labels)
    assert found["validation_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert found["validation_exact"] == 0.5
    assert found["validation_loss"] == pytest.approx(20 / 32)


def test_labels_are_the_tools_of_the_plans():
    examples = made("test", 20)
    found = requests(examples)
    for one, row, (request,) in zip(examples, found.labels, found.texts, strict=True):
        assert request == one.request
        assert {TOOLS[at] for at in np.flatnonzero(row)} == tools_of(one.plan)


def test_tools_are_picked_and_prompts_have_them(run_dir):
    retriever = Retriever.load(run_dir / "model", print)
    asked = [request(n) for n in range(40)]
    chances, embeddings = retriever.look(asked)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-4)
    picked = [chosen(row) for row in chances]
    expected = [list(tools) for tools in NEEDED] * 20
    assert sum(one == other for one, other in zip(picked, expected, strict=True)) > 36
    one_by_one = [retriever.look([one])[0][0] for one in asked[:3]]
    np.testing.assert_allclose(one_by_one, chances[:3], atol=1e-4)

    told = [
        dataclasses.replace(one, request=words)
        for one, words in zip(made("test", 2), asked, strict=False)
    ]
    for one, new, tools in zip(
        told,
        retriever.rewrite(told, PromptConfig(shown_examples=2)),
        picked,
        strict=False,
    ):
        listed = re.findall(r"^\d+\. (\w+)\(.*->", new.system, re.MULTILINE)
        assert listed == tools
        called = re.findall(r"^\d+\. (\w+)\((?!.*->)", new.system, re.MULTILINE)
        assert called and set(called) <= {*tools, "join"}
        assert len(re.findall("Question: ", new.system)) == 2
        assert (new.request, new.plan) == (one.request, one.plan)
        assert f"{one.today:%Y-%m-%d}" in new.system


def test_a_tool_is_chosen_in_any_case():
    chances = np.linspace(0.1, 0.4, 16)
    assert chosen(chances) == [TOOLS[-1]]
    chances[[2, 5]] = 0.9
    assert chosen(chances) == [TOOLS[2], TOOLS[5]]


def test_evaluations_and_plans_use_it(run_dir, tmp_path, capsys):
    model = write_planner(tmp_path / "llama")
    given = (
        f"evaluate --brief --model.name {model} --out {tmp_path / 'o.json'} "
        f"--test-examples 3 --max-new-tokens 16 --retriever {run_dir / 'model'}"
    )
    assert command.main(given.split()) == 0
    assert json.loads((tmp_path / "o.json").read_text())["count"] == 3
    given = f"--model.name {model} --max-new-tokens 16 --retriever {run_dir / 'model'}"
    assert command.main(["plan", "Text Bob that all is well.", *given.split()]) == 1
    assert command.main(["plan", "x", *given.split()[:-1], str(model)]) == 1
    assert "not the 16 tools" in capsys.readouterr().err
