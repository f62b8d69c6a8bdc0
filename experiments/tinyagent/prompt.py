"""What a planner is told, and how a request is put to it."""

import datetime
import inspect
from collections.abc import Callable, Iterable, Mapping

from experiments.tinyagent.plan import END_OF_PLAN, JOIN

_RULES = f"""\
- One call a line, numbered from 1, arguments by position, none left out.
- "$1" is the result of call 1; it may stand in a list or within a text.
- Calls that need nothing of each other are carried out at the same time.
- Dates are 'YYYY-MM-DD HH:MM:SS'. What is not told is empty: "", [] or None.
- The last line calls {JOIN}(), and {END_OF_PLAN} follows it."""


def instructions(
    tools: Iterable[str],
    *,
    today: datetime.date | None,
    examples: Iterable[tuple[str, str]] = (),
    rules: bool = True,
) -> str:
    """Returns the system prompt.

    Args:
      tools: Descriptions of those that the plan may call.
      today: The date that "tomorrow" is counted from.
      examples: Requests with their plans.
      rules: Whether to say how plans are written.
    """
    day = "" if today is None else f" Today is {today:%A, %Y-%m-%d}."
    numbered = [f"{number}. {tool}" for number, tool in enumerate(tools, 1)]
    parts = [f"Plan calls of these tools.{day}", "\n".join(numbered)]
    if rules:
        parts.append(_RULES)
    shown = [f"Question: {request}\n{plan}\n###" for request, plan in examples]
    if shown:
        parts.append("\n".join(["Examples:", *shown]))
    return "\n\n".join(parts)


def describe(
    tools: Mapping[str, Callable[..., object]], names: Iterable[str], *, brief: bool
) -> list[str]:
    """Returns each named tool's signature and docstring; brief: name and parameters."""
    return [_describe(tools[name], brief=brief) for name in names]


def put(system: str, request: str) -> str:
    """Returns what a plan is to follow: the template of TinyAgent's models."""
    return (
        f"\n### Instruction:\n{system}\n\n### Input:\nQuestion: {request}\n\n"
        "### Response:\n"
    )


def _describe(tool: Callable[..., object], *, brief: bool) -> str:
    signature = inspect.signature(tool)
    if brief:
        return f"{tool.__name__}({', '.join(signature.parameters)})"
    lines = [line for line in (inspect.getdoc(tool) or "").splitlines() if line]
    return "\n   ".join([f"{tool.__name__}{signature}", *lines])
