"""How well a plan answers a request whose plan is known.

TinyAgent's success (arXiv 2409.00608) asks for the label's graph of calls: a node a
call, named after its tool, an edge for every result that another one takes. What the
arguments say does not count there; in `exact` it does.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import networkx as nx

from experiments.tinyagent.plan import Plan, PlanError, Value, parse_plan, refer


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one written plan, each from 0 to 1 but for the distance.

    Attributes:
      parsed: Whether it is a plan at all.
      success: Whether its graph of calls equals the label's.
      exact: Whether arguments do as well, but for case, spaces and how nothing is
        written.
      tools: Whether it calls the label's tools, how often and in what order ever.
      distance: Nodes and edges to add, remove or rename till the graphs are equal; of
        what is no plan, all of the label's.
    """

    parsed: bool
    success: bool
    exact: bool
    tools: bool
    distance: int


def score(text: str, label: Plan) -> Score:
    """Scores what a planner has written."""
    there = graph(label)
    try:
        plan = parse_plan(text)
    except PlanError:
        size = there.number_of_nodes() + there.number_of_edges()
        return Score(False, False, False, False, size)
    here = graph(plan)
    success = nx.is_isomorphic(here, there, node_match=_same_tool)
    return Score(
        parsed=True,
        success=success,
        exact=success and _expressions(plan) == _expressions(label),
        tools={s.tool for s in plan.steps} == {s.tool for s in label.steps},
        distance=0 if success else _distance(here, there),
    )


def graph(plan: Plan) -> nx.DiGraph:
    """Returns the calls, each with its tool, and edges to those that take results."""
    found = nx.DiGraph()
    for step in plan.steps:
        found.add_node(step.number, tool=step.tool)
        found.add_edges_from((number, step.number) for number in step.needs)
    return found


def _same_tool(one: dict[str, str], other: dict[str, str]) -> bool:
    return one["tool"] == other["tool"]


def _distance(one: nx.DiGraph, other: nx.DiGraph) -> int:
    """The least number of edits that a second's search finds."""
    found = nx.graph_edit_distance(one, other, node_match=_same_tool, timeout=1)
    sizes = [g.number_of_nodes() + g.number_of_edges() for g in (one, other)]
    return sum(sizes) if found is None else round(found)


def _expressions(plan: Plan) -> Counter[str]:
    """All calls, each with those it needs written out in it."""
    known: dict[int, str] = {}
    for step in plan.steps:
        inside = ", ".join(_expression(value, known) for value in step.arguments)
        known[step.number] = f"{step.tool}({inside})"
    return Counter(known.values())


def _expression(value: Value, known: Mapping[int, str]) -> str:
    if value in ("", None, []):
        return "None"
    if isinstance(value, list):
        inside = [_expression(item, known) for item in value]
        return inside[0] if len(inside) == 1 else f"[{', '.join(inside)}]"
    if isinstance(value, str):
        return repr(" ".join(refer(value, known).casefold().split()))
    return repr(value)
