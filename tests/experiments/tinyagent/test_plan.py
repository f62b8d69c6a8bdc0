"""Plans as planners write them, read without evaluating anything."""

import pytest

from experiments.tinyagent.plan import (
    Plan,
    PlanError,
    Step,
    parse_plan,
    refer,
    until_join,
)

LUNCH = """\
1. get_email_address("Alice")
2. get_zoom_meeting_link("Lunch", "2024-05-14 12:00:00", 60, ["$1"])
3. create_calendar_event("Lunch", "2024-05-14", "", None, ["$1"], "Link: $2", "")
Thought: all of it is done.
4. join()<END_OF_PLAN>
what follows is not read"""


def test_calls_arguments_and_what_they_need():
    plan = parse_plan(LUNCH)
    assert [step.tool for step in plan.steps] == [
        "get_email_address",
        "get_zoom_meeting_link",
        "create_calendar_event",
    ]
    first, second, third = plan.steps
    assert first.arguments == ("Alice",)
    assert second.arguments == ("Lunch", "2024-05-14 12:00:00", 60, ["$1"])
    assert third.arguments[3] is None
    assert [step.needs for step in plan.steps] == [(), (1,), (1, 2)]


def test_what_is_written_is_read_again():
    step = Step(
        1, "say", ('with "quotes", a \\ and $ sign', -1.5, True, None, [[], ""])
    )
    plan = Plan((step, Step(2, "do", ("$1", ["$1"], "é\n"))))
    assert parse_plan(str(plan)) == plan
    assert parse_plan(str(Plan(()))) == Plan(())
    assert str(plan).splitlines()[-1] == "3. join()<END_OF_PLAN>"


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("1. f($2)", None),
        ("2. f($1, [$1])", ("$1", ["$1"])),
        ("2. f(${1})", ("$1",)),
        ("2. f('$1')", ("$1",)),
        ('2. f("rent is $1200, not $2")', ("rent is $1200, not $2",)),
        ('2. f("one\u2028line")', ("one\u2028line",)),
        ('2. f("costs $1")', ("costs $1",)),
        ("2. f((1, 2))", ([1, 2],)),
        ("2 . f( )", ()),
        ('2. f("a" "b")', ("ab",)),
    ],
)
def test_forgotten_quotes_and_other_habits(line, arguments):
    text = (
        f"1. g()\n{line}\n3. join()" if line.startswith("2") else f"{line}\n2. join()"
    )
    if arguments is None:
        with pytest.raises(PlanError, match=r"step 1 needs \$2"):
            parse_plan(text)
    else:
        assert parse_plan(text).steps[1].arguments == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no join\(\) ends the plan"),
        ("1. f()", r"no join\(\) ends the plan"),
        ("f()\n2. join()", r"no call of a tool: f\(\)"),
        ("1. f()\n3. join()", "step 2 is numbered 3"),
        ("2. f()\n3. join()", "step 1 is numbered 2"),
        ("1. f($1)\n2. join()", r"step 1 needs \$1"),
        ("1. f($2000)\n2. join()", r"step 1 needs \$2000"),
        ('1. f({{"x"}})\n2. join()', "no literals"),
        ("1. f({['b']: 2})\n2. join()", "no literals"),
        (f"1. f(${'9' * 5000})\n2. join()", "no literals"),
        (f"{'9' * 5000}. f()\n2. join()", "no call of a tool"),
        ("1. f([$0])\n2. join()", r"step 1 needs \$0"),
        ("1. f(g())\n2. join()", "no literals"),
        ("1. f(__import__('os'))\n2. join()", "no literals"),
        ("1. f(x=1)\n2. join()", "no literals"),
        ("1. f({'a': 1})\n2. join()", "an argument of type dict"),
        ("1. f(b'a')\n2. join()", "an argument of type bytes"),
        ("1. f('open)\n2. join()", "no literals"),
        ("Sure! Here is a plan.\n1. join()", "no call of a tool: Sure!"),
        (f"1. f({'[' * 500}{']' * 500})\n2. join()", "no literals|nested"),
    ],
)
def test_what_is_no_plan_says_why(text, message):
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


def test_amounts_of_money_are_no_references():
    text = '1. f()\n2. g("$1 costs $20", ["$300 each"])\n3. join(). Done, $5 left.'
    assert parse_plan(text).steps[1].needs == (1,)
    assert until_join(text).endswith("\n3. join()")
    assert until_join("no plan") == "no plan"


def test_results_take_the_place_of_references():
    assert refer("$1 and ${2}, $1, $30", {1: "a", 2: 5}) == "a and 5, a, $30"
