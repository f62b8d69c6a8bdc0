"""Made-up requests: many, varied, right, the same by seed, held out by wording."""

import collections
import datetime
import itertools
import re

import pytest

from experiments.tinyagent.executor import check
from experiments.tinyagent.generator import example, examples
from experiments.tinyagent.plan import parse_plan
from experiments.tinyagent.sandbox import TOOLS, Desk
from experiments.tinyagent.score import score

COUNT = 3000
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def made():
    return {
        split: list(itertools.islice(examples(split, 0), COUNT)) for split in SPLITS
    }


@pytest.mark.parametrize("split", SPLITS)
def test_every_plan_is_one_and_its_own_label(made, split):
    tools = Desk().tools
    for one in made[split]:
        assert parse_plan(str(one.plan)) == one.plan
        check(one.plan, tools)
        found = score(str(one.plan), one.plan)
        assert found.exact and found.distance == 0


def test_all_tools_are_called_in_plans_of_many_shapes(made):
    for split in SPLITS:
        called = {step.tool for one in made[split] for step in one.plan.steps}
        assert called == set(TOOLS)
    lengths = collections.Counter(len(one.plan.steps) for one in made["train"])
    assert set(range(1, 8)) <= set(lengths)
    assert any(step.needs for one in made["train"] for step in one.plan.steps)
    assert len({one.request for one in made["train"]}) > 0.85 * COUNT


def test_a_seed_gives_the_same_and_another_seed_others(made):
    again = list(itertools.islice(examples("train", 0), 100))
    assert again == made["train"][:100]
    others = list(itertools.islice(examples("train", 1), 100))
    assert others != again


def test_held_out_requests_are_worded_as_none_that_is_learnt(made):
    ways = {
        split: {way for one in made[split] for way in one.template} for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not ways[one] & ways[other]
        assert not {m.request for m in made[one]} & {m.request for m in made[other]}


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MOMENT = re.compile(
    r"(?:(?P<tomorrow>tomorrow)|on (?P<day>\w+day)|"
    r"on (?P<month>[A-Z]\w+) (?P<date>\d+))"
    r"(?: at (?:(?P<noon>noon)|(?P<hour>\d+) (?P<half>[AP]M)))?"
)


def moment(text, today):
    """What a request says of when, read from its words alone."""
    (said,) = MOMENT.finditer(text)
    if said["tomorrow"]:
        day = today + datetime.timedelta(days=1)
    elif said["day"]:
        ahead = (DAYS.index(said["day"]) - today.weekday()) % 7
        day = today + datetime.timedelta(days=ahead)
    else:
        month = datetime.datetime.strptime(said["month"], "%B").month
        day = today.replace(month=month, day=int(said["date"]))
        if day < today:
            day = day.replace(year=today.year + 1)
    if said["noon"] or said["hour"]:
        hour = 12 if said["noon"] else int(said["hour"]) % 12
        hour += 12 if said["half"] == "PM" else 0
        return f"{day:%Y-%m-%d} {hour:02}:00:00"
    return f"{day:%Y-%m-%d}"


def test_dates_are_what_the_request_says_on_its_day(made):
    kinds = collections.Counter()
    for one in made["train"]:
        dates = re.findall(r'"(\d{4}-\d\d-\d\d[^"]*)"', str(one.plan))
        found = list(MOMENT.finditer(one.request))
        if len(one.template) > 1 or not dates:
            continue
        assert len(found) == 1 and dates[0] == moment(one.request, one.today), one
        kinds[next(k for k in ("tomorrow", "day", "month") if found[0][k])] += 1
        kinds["AM" if found[0]["half"] == "AM" else "other"] += 1
        kinds["next year"] += dates[0][:4] != str(one.today.year)
    assert min(kinds[k] for k in ("tomorrow", "day", "month", "AM")) > 20
    assert kinds["next year"] > 3
    assert len({one.today for one in made["train"]}) > 500


def test_a_request_on_another_day_is_the_same_but_for_its_dates():
    day = datetime.date(2024, 12, 31)
    for number in range(50):
        one, other = example("train", 0, number), example("train", 0, number, day)
        assert other.today == day and other.template == one.template
        assert [s.tool for s in other.plan.steps] == [s.tool for s in one.plan.steps]
