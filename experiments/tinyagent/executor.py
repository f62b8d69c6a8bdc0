"""Carries a plan out: each step as soon as those that it needs are done.

As LLMCompiler does (arXiv 2312.04511). Arguments are what the plan's parser has read as
literals; nothing of a plan is evaluated.
"""

import concurrent.futures as futures
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.tinyagent.plan import Plan, Step, Value, refer, reference

Tools = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of a step.

    Attributes:
      step: Which one.
      arguments: As the tool was given them, results in the place of references.
      result: Of the tool; None if it was not called or failed.
      error: Why, else None.
      started, ended: Seconds since the plan was begun.
    """

    step: Step
    arguments: tuple[Any, ...]
    result: Any
    error: str | None
    started: float
    ended: float


def check(plan: Plan, tools: Tools) -> None:
    """Refuses steps that cannot be: in their order, their tool or its arguments.

    Raises:
      ValueError: There is one; it says which.
    """
    earlier: set[int] = set()
    for step in plan.steps:
        if not earlier.issuperset(step.needs):
            raise ValueError(
                f"step {step.number} needs {step.needs}, not all of them before it"
            )
        earlier.add(step.number)
        tool = tools.get(step.tool)
        if tool is None:
            raise ValueError(
                f"step {step.number} calls {step.tool}, which is none of the tools "
                f"({', '.join(sorted(tools))})"
            )
        signature = inspect.signature(tool)
        try:
            signature.bind(*step.arguments)
        except TypeError as error:
            raise ValueError(
                f"step {step.number} gives {step.tool} {len(step.arguments)} "
                f"arguments, it takes {signature}: {error}"
            ) from error


def execute(plan: Plan, tools: Tools, workers: int = 8) -> list[Outcome]:
    """Carries a plan out, steps that do not need each other at the same time.

    A step whose tool fails takes those with it that need its result; the others go on.

    Args:
      plan: What to do.
      tools: Functions by name. They are called from several threads.
      workers: Steps at a time.

    Returns:
      What came of each step, in the plan's order.

    Raises:
      ValueError: As of `check`, before anything is called.
    """
    check(plan, tools)
    begun = time.perf_counter()
    done: dict[int, Outcome] = {}

    def call(step: Step) -> Outcome:
        started = time.perf_counter() - begun
        results = {number: done[number].result for number in step.needs}
        arguments, result, error = (), None, None
        failed = [n for n in step.needs if done[n].error is not None]
        if failed:
            error = f"step {failed[0]}, which it needs, has failed"
        else:
            arguments = tuple(_fill(value, results) for value in step.arguments)
            try:
                result = tools[step.tool](*arguments)
            except Exception as problem:  # whatever a tool raises, the others go on
                error = f"{type(problem).__name__}: {problem}"
        return Outcome(
            step, arguments, result, error, started, time.perf_counter() - begun
        )

    with futures.ThreadPoolExecutor(workers) as pool:
        waiting, running = list(plan.steps), set()
        while waiting or running:
            ready = [s for s in waiting if done.keys() >= set(s.needs)]
            waiting = [s for s in waiting if s not in ready]
            running |= {pool.submit(call, step) for step in ready}
            ended, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            done |= {o.step.number: o for o in (future.result() for future in ended)}
    return [done[step.number] for step in plan.steps]


def _fill(value: Value, results: Mapping[int, Any]) -> Any:
    """An argument with results for references, or the result that it stands for."""
    if isinstance(value, list):
        return [_fill(item, results) for item in value]
    if not isinstance(value, str):
        return value
    whole = reference(value)
    return refer(value, results) if whole is None else results[whole]
