"""bench.json: everything that was measured, written and read back."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from experiments.bench.limits import Rates
from experiments.bench.records import Row
from experiments.bench.targets import Verdict, verdicts
from experiments.files import replace_text

_FORMAT = 1
# Processes that run or wait, beyond one a core, while nobody else uses the machine.
_OWN_LOAD = 1.0


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run of the bench found.

    Attributes:
        command: Command line that made it.
        environment: As of `environment.describe`.
        config: Settings.
        rates: What the machine can do.
        rows: What was measured.
        seconds: How long each task took, by its name.
        loads: Mean number of processes that ran or waited in the minute before the end
            of each task, by its name.
    """

    command: str
    environment: dict[str, Any]
    config: dict[str, Any]
    rates: Rates
    rows: list[Row] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    loads: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def warning(self) -> str | None:
        """Says that others used the machine, if they seem to have.

        LAPACK's threads wait by spinning: on a busy machine a peer's SVD may take ten
        times as long, and a ratio to it is worth nothing.
        """
        cores = self.environment["machine"]["cores"]
        load = max(self.loads.values(), default=0.0)
        if load <= cores + _OWN_LOAD:
            return None
        return (
            f"Others used this machine: load up to {load:.1f} on {cores} cores. Do not "
            "trust these times, least of all those of refreshes by SVD."
        )

    @property
    def verdicts(self) -> list[Verdict]:
        """The targets and what came of them."""
        return verdicts(self.rows)

    def write(self, path: Path) -> None:
        """Writes all of it as JSON, null for what is not finite."""
        facts = {"format": _FORMAT} | dataclasses.asdict(self)
        facts["targets"] = [
            dataclasses.asdict(verdict) | {"verdict": verdict.word}
            for verdict in self.verdicts
        ]
        facts["warning"] = self.warning
        text = json.dumps(_finite(facts), indent=1, default=str)
        replace_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
