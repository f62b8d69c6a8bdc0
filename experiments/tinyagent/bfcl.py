"""Questions of the Berkeley Function-Calling Leaderboard, answered as plans.

A question's functions are described as tools; a plan is right when it makes the calls
that are asked for, in any order, with arguments among those that the question's ground
truth allows. Names with dots are written with underscores, as plans have them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import networkx as nx

from experiments.data.text_files import TextError
from experiments.tinyagent.plan import Plan, PlanError, Step, Value, parse_plan
from experiments.tinyagent.prompt import instructions
from experiments.tinyagent.score import Score

_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that may be called.

    Attributes:
      name: As plans have it.
      about: What it does.
      parameters: What each is, by name, in the order of a plan's arguments.
      types: JSON schema's, by name.
      defaults: Of those that have one.
    """

    name: str
    about: str
    parameters: Mapping[str, str]
    types: Mapping[str, str]
    defaults: Mapping[str, Any]

    def describe(self, *, brief: bool) -> str:
        """Returns it as tools are described."""
        if brief:
            return f"{self.name}({', '.join(self.parameters)})"
        typed = ", ".join(f"{name}: {self.types[name]}" for name in self.parameters)
        told = [f"{name}: {about}" for name, about in self.parameters.items()]
        return "\n   ".join([f"{self.name}({typed})", self.about, *told])


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
      name: Its id.
      request: What is asked for.
      functions: That may be called, by name.
      calls: To be made: a function's name, and values that each argument may have.
    """

    name: str
    request: str
    functions: Mapping[str, Function]
    calls: Sequence[tuple[str, Mapping[str, Sequence[Any]]]]

    @property
    def label(self) -> str:
        """A plan that is right: the first value of each argument."""
        steps = [
            Step(number, name, tuple(self._first(name, values)))
            for number, (name, values) in enumerate(self.calls, 1)
        ]
        return str(Plan(tuple(steps)))

    def system(self, *, brief: bool) -> str:
        """Returns the system prompt."""
        tools = [one.describe(brief=brief) for one in self.functions.values()]
        return instructions(tools, today=None, rules=not brief)

    def score(self, text: str) -> Score:
        """Scores a plan: `exact` by the arguments, `success` by the calls alone.

        The distance is the number of calls too many and too few.
        """
        wanted = [name for name, _ in self.calls]
        try:
            plan = parse_plan(text)
        except PlanError:
            return Score(False, False, False, False, len(wanted))
        made = [step.tool for step in plan.steps]
        missing = list(wanted)
        for name in made:
            if name in missing:
                missing.remove(name)
        distance = len(made) - len(wanted) + 2 * len(missing)
        success = distance == 0 and not any(step.needs for step in plan.steps)
        return Score(
            parsed=True,
            success=success,
            exact=success and self._all_fit(plan.steps),
            tools=set(made) == set(wanted),
            distance=distance,
        )

    def _all_fit(self, steps: Sequence[Step]) -> bool:
        """Whether each step can have a call of its own that it fits."""
        pairs = nx.Graph()
        ours = [("step", at) for at in range(len(steps))]
        pairs.add_nodes_from(ours)
        pairs.add_edges_from(
            (("step", at), ("call", to))
            for at, step in enumerate(steps)
            for to, call in enumerate(self.calls)
            if self._fits(step, call)
        )
        matched = nx.bipartite.maximum_matching(pairs, top_nodes=ours)
        return all(step in matched for step in ours)

    def _fits(self, step: Step, call: tuple[str, Mapping[str, Sequence[Any]]]) -> bool:
        name, allowed = call
        function = self.functions[name]
        names = list(function.parameters)
        if step.tool != name or len(step.arguments) > len(names):
            return False
        given = dict(zip(names, step.arguments, strict=False))
        for parameter, values in allowed.items():
            optional = not values or "" in values
            if parameter not in given or given[parameter] in ("", None):
                if not optional:
                    return False
            elif not any(_same(given[parameter], value) for value in values):
                return False
        return all(
            parameter in allowed
            or value in ("", None)
            or value == function.defaults.get(parameter)
            for parameter, value in given.items()
        )

    def _first(self, name: str, values: Mapping[str, Sequence[Any]]) -> list[Value]:
        names = self.functions[name].parameters
        return [values[one][0] if values.get(one) else "" for one in names]


def read(
    paths: Sequence[Path], most: int | None, report: Callable[[str], None]
) -> tuple[list[Asked], dict[str, str]]:
    """Returns the questions of files, and why others are left out, by name.

    Left out are those whose arguments are no literals of plans, objects among them.

    Args:
      paths: JSON-lines files. A question without its `ground_truth` has it in the file
        of the same name in the folder `possible_answer` beside, where BFCL keeps them.
      most: The first so many of each file; None: all.
      report: Takes lines for the user.

    Raises:
      TextError: A line is no question, or has no answer.
      OSError: A file cannot be read.
    """
    found, left_out = [], {}
    for path in paths:
        beside = path.parent / "possible_answer" / path.name
        answers = (
            dict(_each(beside, _answer, "answer of BFCL")) if beside.exists() else {}
        )
        what = f"question of BFCL with its ground_truth, there or in {beside}"
        as_asked = functools.partial(_asked, answers=answers)
        for asked in _each(path, as_asked, what, most):
            if _has_object([values for _, values in asked.calls]):
                left_out[asked.name] = "an argument is an object, which plans have not"
            else:
                found.append(asked)
    if left_out:
        report(
            f"{len(left_out)} of {len(found) + len(left_out)} questions are left out: "
            "an argument is an object, which plans have not."
        )
    if not found:
        raise TextError(f"no question in {', '.join(map(str, paths))}.")
    return found, left_out


def _each(
    path: Path,
    read_one: Callable[[Mapping[str, Any]], _Read],
    what: str,
    most: int | None = None,
) -> Iterator[_Read]:
    """What is read from each line; raises TextError, which says `what` one is not."""
    # Not `splitlines`: texts may hold what it takes for ends of lines.
    lines = path.read_text("utf-8").rstrip("\n").split("\n")[:most]
    for number, line in enumerate(lines, 1):
        try:
            yield read_one(json.loads(line))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path}, line {number} is no {what} ({error!r})."
            ) from error


def _answer(record: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    return record["id"], record["ground_truth"]


def _asked(record: Mapping[str, Any], answers: Mapping[str, Sequence[Any]]) -> Asked:
    truth = record.get("ground_truth") or answers[record["id"]]
    functions = [_function(one) for one in record["function"]]
    calls = [
        (_plain(name), dict(values)) for call in truth for name, values in call.items()
    ]
    by_name = {one.name: one for one in functions}
    if unknown := [name for name, _ in calls if name not in by_name]:
        raise ValueError(f"{unknown[0]} is none of its functions")
    request = "\n".join(turn["content"] for turn in record["question"][0])
    return Asked(record["id"], request, by_name, calls)


def _function(record: Mapping[str, Any]) -> Function:
    properties = record["parameters"]["properties"]
    return Function(
        _plain(record["name"]),
        record["description"],
        {name: one.get("description", "") for name, one in properties.items()},
        {name: one["type"] for name, one in properties.items()},
        {name: one["default"] for name, one in properties.items() if "default" in one},
    )


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _has_object(calls: Sequence[Mapping[str, Sequence[Any]]]) -> bool:
    def inside(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(inside, value))
        return isinstance(value, dict)

    return any(inside(value) for values in calls for value in values.values())


def _same(given: Value, allowed: Any) -> bool:
    """Whether two values are one, but for case and spaces of texts."""
    if isinstance(given, list) and isinstance(allowed, list):
        return len(given) == len(allowed) and all(map(_same, given, allowed))
    if isinstance(given, str) and isinstance(allowed, str):
        return "".join(given.casefold().split()) == "".join(allowed.casefold().split())
    if isinstance(given, bool) or isinstance(allowed, bool):
        return given is allowed
    return given == allowed
