"""Interleaved timing: what disturbs the machine disturbs all candidates alike.

Candidates take turns, in an order drawn anew each round, and are compared round by
round: a ratio is of two measurements a moment apart.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.bench.records import reason

Candidate = Callable[[int], None]
"""Does a number of calls, one after the other, and waits for the last one's result."""

# A sample of calls that are over sooner is of several of them.
_LEAST_SECONDS = 0.02
_MOST_CALLS = 100


class Timings(NamedTuple):
    """Seconds a call of each candidate, and why others have none.

    Attributes:
        seconds: By candidate: one a round, in the order of the rounds.
        errors: By candidate that failed: the reason.
    """

    seconds: dict[str, list[float]]
    errors: dict[str, str]

    def ratios(self, name: str, reference: str) -> list[float] | None:
        """A candidate's seconds over the reference's, round by round; None without."""
        if name not in self.seconds or reference not in self.seconds:
            return None
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return [mine / other for mine, other in pairs]


def interleaved(
    candidates: Mapping[str, Candidate],
    *,
    repeats: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Times candidates that are compiled and ready.

    Each is called once to warm up and to see how long it takes, then in `repeats`
    rounds. One that raises is left out from there on.

    Args:
        candidates: By name.
        repeats: Rounds, at least 1.
        seed: Seed of the orders.
        clock: Seconds from anywhere.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str, calls: int) -> float:
        started = clock()
        try:
            candidates[name](calls)
        except Exception as error:  # whatever a peer raises is its result
            errors[name] = reason(error)
            del seconds[name]
            return 0.0
        return (clock() - started) / calls

    calls: dict[str, int] = {}
    for name in candidates:
        calls[name] = _calls_a_sample(sample(name, 1))
    order = random.Random(seed)
    for _ in range(repeats):
        for name in _shuffled(list(seconds), order):
            time_of_call = sample(name, calls[name])
            if name in seconds:
                seconds[name].append(time_of_call)
    return Timings(seconds, errors)


def _calls_a_sample(seconds: float) -> int:
    enough = _LEAST_SECONDS / max(seconds, 1e-9)
    return max(1, min(_MOST_CALLS, round(enough)))


def _shuffled(names: Sequence[str], order: random.Random) -> list[str]:
    return order.sample(names, len(names))
