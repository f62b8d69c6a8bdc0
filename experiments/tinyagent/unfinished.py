"""Plans of an evaluation that has not come to its end, a line each."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.data.text_files import TextError
from experiments.files import replace_text
from experiments.training.record import compare


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """A file of them.

    Attributes:
        path: The file.
        facts: All that decides what the plans are, as JSON objects: the file's first
            line.
    """

    path: Path
    facts: Mapping[str, Any]

    def start(self, *, afresh: bool) -> list[dict[str, Any]]:
        """Returns the plans that are there, unless all is to be done afresh.

        Raises:
            TextError: They are of an evaluation of other settings.
            OSError: The file cannot be written.
        """
        there = self.path.exists() and not afresh
        # A line that a kill has cut has no end.
        *lines, _ = self.path.read_text("utf-8").split("\n") if there else [""]
        try:
            before, *plans = [json.loads(line) for line in lines] or [self.facts]
            differences = compare(before, self.facts)
        except (ValueError, AttributeError) as error:
            differences = [f"it cannot be read: {error!r}"]
        if differences:
            raise TextError(
                f"{self.path} holds plans of an evaluation that was cut short and is "
                f"another one ({'; '.join(differences)}): --overwrite deletes them, "
                "--out keeps them."
            )
        replace_text(self.path, _lines([self.facts, *plans]))
        return plans

    def add(self, plans: Iterable[Mapping[str, Any]]) -> None:
        """Writes more of them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(plans))


def _lines(objects: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)
