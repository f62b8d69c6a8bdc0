"""What the records say about each arm."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Self

from experiments.study.records import Records
from experiments.study.runs import Record


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some losses; infinite where runs diverged."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarizes one or more values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Summary:
    """An arm at its best learning rate.

    Attributes:
        arm: Its name.
        tried: Final loss by learning rate, on the first seed.
        records: Its runs at the best rate, by seed.
    """

    arm: str
    tried: dict[float, float]
    records: tuple[Record, ...]

    @property
    def learning_rate(self) -> float:
        """The best one that was tried."""
        return min(self.tried, key=self.tried.__getitem__)

    @property
    def place(self) -> str:
        """Where the best rate lies: inside if worse ones were tried on both sides."""
        if math.isinf(min(self.tried.values())):
            return "all diverged"
        inside = min(self.tried) < self.learning_rate < max(self.tried)
        return "inside" if inside else "at the edge"

    @property
    def steps(self) -> list[int]:
        """Steps that were evaluated."""
        return sorted({step for record in self.records for step in record.losses})

    @property
    def half(self) -> int:
        """The evaluated step that is nearest to half of all."""
        budget = self.records[0].settings["steps"]
        return min(self.steps, key=lambda step: abs(step - budget / 2), default=0)

    def losses(self, step: int) -> Spread:
        """Losses after a step, over seeds."""
        return Spread.of([run.losses.get(step, math.inf) for run in self.records])

    @property
    def final(self) -> Spread:
        """Losses at the end, over seeds."""
        return Spread.of([record.final_loss for record in self.records])

    @property
    def seconds(self) -> float:
        """Median training time of a run."""
        return statistics.median(record.seconds for record in self.records)

    def column(self, name: str) -> list[float]:
        """Median over seeds of a column of the curve, at each of `steps`."""
        rows: dict[int, list[float]] = {}
        for record in self.records:
            pairs = zip(record.curve["step"], record.curve[name], strict=True)
            for step, value in pairs:
                rows.setdefault(step, []).append(value)
        return [statistics.median(rows[step]) for step in self.steps]


def summarize(records: Records) -> list[Summary]:
    """Returns the arms that have been tuned, the lowest final median first."""
    arms = dict.fromkeys(run.arm for run in records.runs)
    summaries = (_summarize(arm, records) for arm in arms)
    return sorted(
        (summary for summary in summaries if summary is not None),
        key=lambda summary: summary.final.median,
    )


def _summarize(arm: str, records: Records) -> Summary | None:
    losses = {
        run: record.final_loss for run, record in records.runs.items() if run.arm == arm
    }
    tried = {
        run.learning_rate: loss
        for run, loss in sorted(losses.items(), key=lambda item: item[0].learning_rate)
        if run.seed == records.seeds[0]
    }
    if not tried:
        return None
    rate = min(tried, key=tried.__getitem__)  # the lowest of those that tie
    at_best = [run for run in losses if run.learning_rate == rate]
    at_best.sort(key=lambda run: records.seeds.index(run.seed))
    return Summary(arm, tried, tuple(records.runs[run] for run in at_best))
