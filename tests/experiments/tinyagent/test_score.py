"""Scores of plans against a label."""

import pytest

from experiments.tinyagent.plan import parse_plan
from experiments.tinyagent.score import score

LABEL = """\
1. get_email_address("Alice")
2. get_email_address("Bob")
3. open_and_get_file_path("Budget")
4. compose_new_email(["$1", "$2"], [], "Budget", "", ["$3"])
5. join()<END_OF_PLAN>"""
# Other numbers, the same graph.
TURNED = """\
1. open_and_get_file_path("Budget")
2. get_email_address("Bob")
3. get_email_address("Alice")
4. compose_new_email(["$3", "$2"], [], "Budget", "", ["$1"])
5. join()"""


def scored(text):
    return score(text, parse_plan(LABEL))


def test_the_label_itself_is_right_in_every_way():
    found = scored(LABEL)
    assert found.parsed and found.success and found.exact and found.tools
    assert found.distance == 0


def test_the_order_of_independent_calls_does_not_count():
    assert scored(TURNED).success and scored(TURNED).exact


@pytest.mark.parametrize(
    ("old", "new", "exact"),
    [
        ('"Alice"', '"Carla"', False),
        ('"Alice"', '" ALICE "', True),
        ('["$3", "$2"]', '["$2", "$3"]', False),
        ("[],", '"",', True),
        ("[],", "None,", True),
        ('["$1"]', '"$1"', True),
        ('"Budget", "",', '"Budget", "see $1",', False),
    ],
)
def test_what_arguments_say_counts_in_exact_alone(old, new, exact):
    found = scored(TURNED.replace(old, new))
    assert (found.success, found.exact, found.tools) == (True, exact, True)


@pytest.mark.parametrize(
    ("old", "new", "tools", "distance"),
    [
        ('["$1"])', "[])", True, 1),  # an edge
        ("get_email_address", "get_phone_number", False, 2),  # two names
        ("open_and_get_file_path", "open_note", False, 1),
    ],
)
def test_another_graph_is_a_failure_and_its_distance_is_told(old, new, tools, distance):
    found = scored(TURNED.replace(old, new))
    assert found.parsed and not found.success and not found.exact
    assert (found.tools, found.distance) == (tools, distance)


def test_a_call_too_few_and_one_too_many():
    lines = LABEL.splitlines()
    alone = "\n".join([*lines[:2], "3. join()"])
    assert scored(alone).distance == 2 + 3  # calls and edges
    more = "\n".join([*lines[:4], '5. send_sms([], "")', "6. join()"])
    assert scored(more).distance == 1 and not scored(more).tools
    twice = "\n".join([*lines[:4], '5. get_email_address("Elif")', "6. join()"])
    assert scored(twice).tools and not scored(twice).success


def test_a_step_that_takes_a_result_twice_has_one_edge():
    text = LABEL.replace('"Budget", ""', '"Budget", "$3"')
    assert scored(text).success and not scored(text).exact


def test_what_is_no_plan_has_no_part_of_it():
    found = scored("I am sorry, I cannot do that.")
    assert not (found.parsed or found.success or found.exact or found.tools)
    assert found.distance == 4 + 3
