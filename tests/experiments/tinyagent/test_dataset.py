"""The dataset's real layout; what is malformed is named, and the rest is kept."""

import itertools

import huggingface_hub
import pytest

from experiments.configs.tinyagent import (
    MadePromptConfig,
    RequestsConfig,
    TinyAgentDataConfig,
)
from experiments.data.text_files import TextError
from experiments.tinyagent.dataset import read_dataset, write_dataset
from experiments.tinyagent.examples import load_test, load_training, make
from tests.experiments.tinyagent.dataset_files import SYSTEM, broken, sms, write


def test_requests_prompts_and_first_plans_are_read(tmp_path):
    records = {f"id{n}": sms(n) for n in range(3)}
    examples, bad = read_dataset(write(tmp_path / "d.json", records))
    assert bad == {} and [one.name for one in examples] == ["id0", "id1", "id2"]
    one = examples[1]
    assert (one.request, one.system) == ("Text person 1.", SYSTEM)
    assert one.plan.steps[1].arguments == (["$1"], "Hi")
    # As written, its thought included, but to the marker of its end.
    assert one.text.endswith("Thought: sent.\n3. join()<END_OF_PLAN>")


def test_malformed_examples_are_named_with_their_reasons(tmp_path):
    records = {"a": sms(1), **broken(), "z": sms(2)}
    examples, bad = read_dataset(write(tmp_path / "d.json", records))
    assert [one.name for one in examples] == ["a", "z"]
    assert set(bad) == set(broken())
    assert bad["no-plan"] == "its plan: no call of a tool: I cannot."
    assert bad["no-turns"] == bad["no-system"] != bad["code"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is to hold a JSON object of examples by id"),
        ("{}", r"holds no example \(: the object is empty\)"),
        ('{"a": 1}', r"holds no example \(a: not as the dataset's"),
    ],
)
def test_files_that_are_none_say_so(text, message, tmp_path):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(TextError, match=message):
        read_dataset(path)


def test_made_examples_are_written_as_the_dataset_has_them(tmp_path):
    made = list(itertools.islice(make(MadePromptConfig(), "train"), 40))
    assert write_dataset(tmp_path / "made.json", made) == 40
    examples, bad = read_dataset(tmp_path / "made.json")
    assert bad == {}
    for ours, theirs in zip(examples, made, strict=True):
        for name in ("name", "system", "request", "plan", "text"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.fixture
def folder(tmp_path):
    training = {f"t{n}": sms(n) for n in range(10)} | broken()
    write(tmp_path / "training_data.json", training)
    write(tmp_path / "testing_data.json", {f"e{n}": sms(n) for n in range(4)})
    return tmp_path


def names(found):
    return [one.name for one in found]


def test_splits_of_a_folder_and_of_a_file(folder):
    said = []
    for data in (folder, folder / "training_data.json"):
        config = TinyAgentDataConfig(data=str(data), validation_examples=3)
        found = load_training(config, said.append)
        assert names(found.train) == [f"t{n}" for n in range(7)]
        assert names(found.validation) == ["t7", "t8", "t9"]
        assert set(found.left_out) == set(broken())
    malformed, all_ = len(broken()), len(broken()) + 10
    assert said[0] == f"{malformed} of {all_} examples are malformed and left out:"
    assert said[1].startswith("  no-plan: ") and "the others are in" in said[6]
    config = RequestsConfig(data=str(folder), test_examples=2)
    assert names(load_test(config, print)[0]) == ["e0", "e1"]
    config = TinyAgentDataConfig(data=str(folder))
    with pytest.raises(TextError, match="give fewer --validation-examples"):
        load_training(config, print)
    config = TinyAgentDataConfig(
        data=str(folder), train_examples=4, validation_examples=5
    )
    assert names(load_training(config, print).train) == ["t0", "t1", "t2", "t3"]


def test_the_hub_s_files(folder, monkeypatch):
    asked = []

    def download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = RequestsConfig(data="squeeze-ai-lab/TinyAgent-dataset")
    assert len(load_test(config, print)[0]) == 4
    (one,) = asked
    assert one[:2] == ("squeeze-ai-lab/TinyAgent-dataset", "dataset")
    assert one[2] == ["training_data.json", "testing_data.json"]
    (folder / "testing_data.json").unlink()
    with pytest.raises(TextError, match=r"has no testing_data\.json"):
        load_test(config, print)
    with pytest.raises(TextError, match=r"nor a dataset's name .*OWNER/DATASET"):
        load_test(RequestsConfig(data="no/such/file.json"), print)


def test_made_prompts_have_the_tools_and_others_and_examples_of_the_same():
    config = MadePromptConfig(other_tools=2, shown_examples=2)
    for one in itertools.islice(make(config, "test"), 50):
        needed = {step.tool for step in one.plan.steps}
        listed = {line.split("(")[0].split(". ")[1] for line in tool_lines(one.system)}
        assert needed < listed and len(listed) == len(needed) + 2
        assert f"{one.today:%A, %Y-%m-%d}" in one.system
        assert one.request not in one.system
        shown = one.system.partition("Examples:\n")[2].split("\n###")[:-1]
        assert 1 <= len(shown) <= 2
    brief = MadePromptConfig(brief=True, other_tools=99, shown_examples=0)
    one = next(make(brief, "test"))
    assert len(tool_lines(one.system)) == 16 and "Examples" not in one.system
    assert "->" not in one.system and len(one.system) < 1200


def tool_lines(system):
    return [
        line
        for line in system.partition("\n- ")[0].splitlines()
        if line[:1].isdigit() and "(" in line
    ]
