"""Plans: numbered calls of tools, as a planner writes them.

One call a line, arguments by position, the last step always join::

    1. get_email_address("Alice")
    2. compose_new_email(["$1"], [], "Lunch", "", [])
    3. join()<END_OF_PLAN>

"$1" stands for the result of step 1, by itself, in a list or within a text; there a
number that is no earlier step's is an amount of money. Lines that begin with "Thought:"
are passed over. So TinyAgent (arXiv 2409.00608) and LLMCompiler (arXiv 2312.04511)
write them. TinyAgent's own parser passes over all lines that are no calls, and takes
arguments that it cannot read for texts; here such a text is no plan.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

END_OF_PLAN = "<END_OF_PLAN>"
JOIN = "join"

Value = str | int | float | bool | None | list["Value"]

_CALL = re.compile(r"(\d{1,9})\s*\.\s*(\w+)\((.*)\)")
_END = re.compile(rf"^[ \t]*\d{{1,9}}\s*\.\s*{JOIN}\(\s*\)", re.MULTILINE)
_REFERENCE = re.compile(r"\$\{?(\d{1,9})(?!\d)\}?")
# A text in quotes, or else a reference outside of any: planners forget the quotes.
_QUOTED_OR_BARE = re.compile(
    r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|""" + _REFERENCE.pattern
)


class PlanError(ValueError):
    """A text that is no plan; says what of it."""


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
      number: In the plan, from 1.
      tool: Name of the function.
      arguments: Its arguments, by position.
    """

    number: int
    tool: str
    arguments: tuple[Value, ...]

    @property
    def needs(self) -> tuple[int, ...]:
        """Numbers of the steps whose results it takes, ascending."""
        found = {n for value in self.arguments for n in self._references(value)}
        return tuple(sorted(found))

    def _references(self, value: Value) -> Iterator[int]:
        if isinstance(value, list):
            for item in value:
                yield from self._references(item)
        elif isinstance(value, str):
            whole = reference(value)
            inside = (int(number) for number in _REFERENCE.findall(value))
            yield from (n for n in inside if n == whole or 1 <= n < self.number)


@dataclass(frozen=True)
class Plan:
    """Calls in the order in which they are written, join not among them."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """Returns the plan as a planner writes it."""
        lines = [
            f"{step.number}. {step.tool}({', '.join(map(_literal, step.arguments))})"
            for step in self.steps
        ]
        last = self.steps[-1].number + 1 if self.steps else 1
        return "\n".join([*lines, f"{last}. {JOIN}(){END_OF_PLAN}"])


def parse_plan(text: str) -> Plan:
    """Reads a plan; what follows its join is passed over.

    Raises:
      PlanError: A line is no call, arguments are no literals, steps are not numbered
        1, 2, ..., a reference is not to an earlier step, or there is no join.
    """
    steps: list[Step] = []
    for line in _lines(text):
        step = _parse_step(line)
        if step.number != len(steps) + 1:
            raise PlanError(f"step {len(steps) + 1} is numbered {step.number}: {line}")
        if step.tool == JOIN:
            return Plan(tuple(steps))
        for number in step.needs:
            if not 1 <= number < step.number:
                raise PlanError(f"step {step.number} needs ${number}: {line}")
        steps.append(step)
    raise PlanError(f"no {JOIN}() ends the plan")


def until_join(text: str) -> str:
    """Returns a plan's text to its join; all of it if there is none."""
    found = _END.search(text)
    return text if found is None else text[: found.end()].strip()


def reference(text: str) -> int | None:
    """Returns the number of the step whose result a text stands for, if for one."""
    found = _REFERENCE.fullmatch(text)
    return int(found[1]) if found else None


def refer(text: str, results: Mapping[int, object]) -> str:
    """Returns a text with the results of other steps in the place of its references."""
    return _REFERENCE.sub(lambda m: str(results.get(int(m[1]), m[0])), text)


def _lines(text: str) -> Iterator[str]:
    for line in until_join(text).split("\n"):
        line = line.strip()
        if line and not line.startswith("Thought:"):
            yield line


def _parse_step(line: str) -> Step:
    found = _CALL.fullmatch(line)
    if not found:
        raise PlanError(f"no call of a tool: {line}")
    number, tool, inside = found.groups()
    quoted = _QUOTED_OR_BARE.sub(lambda m: m[1] or f'"${m[2]}"', inside)
    try:
        values = ast.literal_eval(f"({quoted},)") if quoted.strip() else ()
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise PlanError(f"arguments that are no literals: {line}") from error
    return Step(int(number), tool, tuple(_value(value, line) for value in values))


def _value(found: object, line: str) -> Value:
    if found is None or isinstance(found, str | int | float):
        return found
    if isinstance(found, list | tuple):
        return [_value(item, line) for item in found]
    raise PlanError(f"an argument of type {type(found).__name__}: {line}")


def _literal(value: Value) -> str:
    """As Python writes it, but texts in double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    )
