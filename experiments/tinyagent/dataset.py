"""Examples of requests with their plans, from TinyAgent's dataset.

The dataset is a JSON object of examples by id. Each has an "input", the request, and an
"output", turns of the planner and of what joins results. Of these the first plan is
learnt: its "raw_input" is a text that holds a Python list of messages, its "raw_output"
the plan.
"""

import ast
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.data.hub import dataset_folder
from experiments.data.text_files import TextError
from experiments.files import replace_text
from experiments.tinyagent.plan import (
    END_OF_PLAN,
    Plan,
    PlanError,
    parse_plan,
    until_join,
)

TRAINING, TESTING = "training_data.json", "testing_data.json"
# What reading an example may meet; the last two: brackets nested too deeply.
_MALFORMED = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    SyntaxError,
    RecursionError,
    MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A request and its plan.

    Attributes:
      name: Of the example, for messages.
      system: What the planner is told.
      request: What a user asks for.
      plan: The label.
      text: The plan as it is written, to its end, which a planner learns.
      today: The date of a made-up request; None: the system message says it.
    """

    name: str
    system: str
    request: str
    plan: Plan
    text: str
    today: datetime.date | None = None


def find(name: str, file: str, report: Callable[[str], None]) -> Path:
    """Returns the file of a dataset.

    Args:
      name: The file itself, a folder that has it, or the dataset's name on the hub.
      file: `TRAINING` or `TESTING`.
      report: Takes lines for the user.

    Raises:
      TextError: There is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = dataset_folder(name, [TRAINING, TESTING], report)
    if not (folder / file).exists():
        raise TextError(f"{folder} has no {file}.")
    return folder / file


def read_dataset(path: Path) -> tuple[list[Example], dict[str, str]]:
    """Returns a file's examples, and why each of the others is none, by name.

    Raises:
      TextError: The file cannot be read, is no JSON object, or holds no example.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TextError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise TextError(f"{path} is to hold a JSON object of examples by id.")
    examples, bad = [], {}
    for name, record in found.items():
        try:
            examples.append(_example(name, record))
        except PlanError as error:
            bad[name] = f"its plan: {error}"
        except StopIteration:
            bad[name] = "no plan, or no system message in front of it"
        except _MALFORMED as error:
            bad[name] = f"not as the dataset's examples are ({error!r})"
    if not examples:
        name, why = next(iter(bad.items()), ("", "the object is empty"))
        raise TextError(f"{path} holds no example ({name}: {why}).")
    return examples, bad


def write_dataset(path: Path, examples: Iterable[Example]) -> int:
    """Writes examples as the dataset's; returns how many.

    Raises:
      OSError: The file cannot be written.
    """
    found = {example.name: _record(example) for example in examples}
    replace_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return len(found)


def _example(name: str, record: dict[str, Any]) -> Example:
    turn = next(turn for turn in record["output"] if turn["type"] == "plan")
    messages = ast.literal_eval(turn["raw_input"])
    system = next(m["content"] for m in messages if m["role"] == "system")
    written, request = turn["raw_output"], record["input"]
    for text in (written, request, system):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is to be a text")
    text = until_join(written) + END_OF_PLAN
    return Example(name, system, request, parse_plan(written), text)


def _record(example: Example) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": example.system},
        {"role": "user", "content": f"Question: {example.request}"},
    ]
    turn = {
        "type": "plan",
        "raw_input": repr(messages),
        "raw_output": example.text,
        "parsed_output": [dataclasses.asdict(step) for step in example.plan.steps],
        "id": 0,
        "index": 0,
    }
    return {"input": example.request, "output": [turn], "closest_5_queries": []}
