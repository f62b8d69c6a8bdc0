"""Questions of BFCL: functions to tools, calls to plans, allowed values to scores."""

import json
from pathlib import Path

import pytest

from experiments.data.text_files import TextError
from experiments.tinyagent import bfcl
from tests.experiments.tinyagent.bfcl_files import PLAY


def read(tmp_path, *records):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in records) + "\n")
    return bfcl.read([path], None, print)


@pytest.fixture
def play(tmp_path):
    (found,), left_out = read(tmp_path, PLAY)
    assert left_out == {}
    return found


def test_functions_are_described_as_tools(play):
    assert play.request == "Play A and B."
    assert "1. music_play(artist, minutes, loud)" in play.system(brief=True)
    told = play.system(brief=False)
    assert "1. music_play(artist: string, minutes: integer, loud: boolean)" in told
    assert "   minutes: How long." in told and "join()" in told and "Today" not in told


@pytest.mark.parametrize(
    ("calls", "success", "exact"),
    [
        (['music_play("A", 20, "")', 'music_play("B", 15, True)'], True, True),
        (['music_play("b", 15, True)', 'music_play("the a", 20)'], True, True),
        (['music_play("A", 20, False)', 'music_play("B", "", True)'], True, True),
        (['music_play("A", 20, True)', 'music_play("B", 15, True)'], True, False),
        (['music_play("A", "", "")', 'music_play("B", 15, True)'], True, False),
        (['music_play("A", 20, "")', 'music_play("B", 15, 1)'], True, False),
        (['music_play("A", 20, "")', 'music_play("B", 15)'], True, False),
        (['music_play("A", 20, "")', 'music_play("A", 20, "")'], True, False),
        (['music_play("A", 20, "", 1)', 'music_play("B", 15, True)'], True, False),
        (['music_play("A", 20, "")', 'music_play("$1", 15, True)'], False, False),
        (['music_play("A", 20, "")'], False, False),
    ],
)
def test_calls_in_any_order_with_values_that_are_allowed(calls, success, exact, play):
    lines = [f"{n}. {call}" for n, call in enumerate([*calls, "join()"], 1)]
    found = play.score("\n".join(lines))
    assert (found.parsed, found.success, found.exact) == (True, success, exact)
    assert found.tools
    assert found.distance == 2 - len(calls)


def test_other_functions_and_no_plans(play):
    found = play.score("1. stop()\n2. join()")
    assert (found.success, found.tools, found.distance) == (False, False, 3)
    found = play.score("Playing A.")
    assert (found.parsed, found.success, found.distance) == (False, False, 2)


def test_the_label_is_right(play):
    assert play.score(play.label).exact
    assert play.label.startswith(
        '1. music_play("A", 20, "")\n2. music_play("B", 15, True)'
    )


def test_what_plans_cannot_say_is_named(tmp_path):
    odd = json.loads(json.dumps(PLAY)) | {"id": "odd"}
    odd["ground_truth"] = [{"music.play": {"artist": [{"name": ["A"]}]}}]
    found, left_out = read(tmp_path, PLAY, odd)
    assert len(found) == 1 and set(left_out) == {"odd"}
    with pytest.raises(TextError, match="no question in"):
        read(tmp_path, odd)


def test_values_that_two_calls_allow_are_given_to_both(tmp_path):
    """A first step that fits either call leaves the one that the second step needs."""
    both = json.loads(json.dumps(PLAY))
    both["ground_truth"] = [
        {"music.play": {"artist": ["A", "B"], "minutes": [20]}},
        {"music.play": {"artist": ["B"], "minutes": [20]}},
    ]
    (asked,), _ = read(tmp_path, both)
    for first, second in (("A", "B"), ("B", "A"), ("B", "B")):
        calls = [f'music_play("{one}", 20, "")' for one in (first, second)]
        plan = f"1. {calls[0]}\n2. {calls[1]}\n3. join()"
        assert asked.score(plan).exact
    assert not asked.score(plan.replace('"B"', '"A"')).exact


def test_the_first_questions_of_each_file(tmp_path):
    for name in ("one", "two"):
        lines = [json.dumps(PLAY | {"id": f"{name}{n}"}) for n in range(3)]
        (tmp_path / name).write_text("\n".join(lines))
    found, _ = bfcl.read([tmp_path / "one", tmp_path / "two"], 2, print)
    assert [one.name for one in found] == ["one0", "one1", "two0", "two1"]


def test_a_text_may_hold_what_other_formats_take_for_ends_of_lines(tmp_path):
    spoken = {"question": [[{"role": "user", "content": "Play\u2028it\x85now"}]]}
    path = tmp_path / "questions"
    lines = [json.dumps(one, ensure_ascii=False) for one in (PLAY | spoken, PLAY)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    first, _ = bfcl.read([path], None, print)[0]
    assert first.request == "Play\u2028it\x85now"


def test_answers_may_have_a_file_of_their_own(tmp_path):
    questions = [PLAY | {"id": f"parallel_{n}"} for n in range(2)]
    answers = [
        {"id": one["id"], "ground_truth": one.pop("ground_truth")[n:]}
        for n, one in enumerate(questions)
    ]
    beside = tmp_path / "possible_answer" / "questions.jsonl"
    beside.parent.mkdir()
    beside.write_text("\n".join(json.dumps(one) for one in reversed(answers)))
    found, _ = read(tmp_path, *questions)
    assert [len(one.calls) for one in found] == [2, 1]

    with pytest.raises(TextError, match=r"line 3 is no question .*possible_answer"):
        read(tmp_path, *questions, questions[0] | {"id": "unanswered"})
    beside.write_text('{"id": "parallel_0"}')
    with pytest.raises(TextError, match=r"possible_answer.*line 1 is no answer"):
        read(tmp_path, *questions)


@pytest.mark.parametrize(
    "change",
    [
        {"ground_truth": [{"music.stop": {}}]},
        {"question": []},
        {"function": [{"name": "f"}]},
        {"ground_truth": None},
    ],
)
def test_a_line_that_is_no_question_is_named(change, tmp_path):
    with pytest.raises(TextError, match="line 2 is no question of BFCL"):
        read(tmp_path, PLAY, PLAY | change)


@pytest.mark.parametrize("name", ["simple_python", "parallel", "multiple"])
def test_the_real_questions_labels_are_right(name):
    folder = Path(__file__).parents[4] / "shared/data/function_calling_bfcl"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    asked, left_out = bfcl.read([folder / f"{name}.jsonl"], None, print)
    assert len(asked) > 190 and len(left_out) < 6
    for one in asked:
        assert one.score(one.label).exact, one.name
