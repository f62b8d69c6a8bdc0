"""Interleaved timing: what disturbs the machine disturbs all candidates alike.

Candidates take turns, in an order drawn anew each round, and are compared round by
round: a ratio is of two measurements a moment apart.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.training.record import first_line

Candidate = Callable[[int], None]
"""Does a number of calls, one after the other, and waits for the last one's result."""

# A sample of calls that are over sooner is of several of them.
_LEAST_SECONDS = 0.02
_MOST_CALLS = 100
# One whose call takes longer than this takes part in the first rounds only.
_SLOW_SECONDS = 1.0
_ROUNDS_OF_SLOW = 3


class Timings(NamedTuple):
    """Seconds a call of each candidate, and why others have none.

    Attributes:
        seconds: By candidate: one for each round that it took part in, which are the
            first ones, in their order.
        errors: By candidate that failed: the reason.
    """

    seconds: dict[str, list[float]]
    errors: dict[str, str]

    def ratios(self, name: str, reference: str) -> list[float] | None:
        """A candidate's seconds over the reference's, in the rounds that have both.

        None where one of them has failed.
        """
        if name not in self.seconds:
            return None
        return self.ratios_of(self.seconds[name], reference)

    def ratios_of(self, seconds: Sequence[float], reference: str) -> list[float] | None:
        """The same of seconds that were reckoned from a candidate's, a round each."""
        if reference not in self.seconds:
            return None
        # Round i is element i of each; a slow one has the first rounds only.
        pairs = zip(seconds, self.seconds[reference], strict=False)
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
    rounds, in the first three of them where a call takes more than a second. One that
    raises is left out from there on.

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
            errors[name] = first_line(error)
            del seconds[name]
            return 0.0
        return (clock() - started) / calls

    warm = {name: sample(name, 1) for name in candidates}
    calls = {name: _calls_a_sample(taken) for name, taken in warm.items()}
    order = random.Random(seed)
    for number in range(repeats):
        names = [
            name
            for name in seconds
            if warm[name] <= _SLOW_SECONDS or number < _ROUNDS_OF_SLOW
        ]
        for name in _shuffled(names, order):
            time_of_call = sample(name, calls[name])
            if name in seconds:
                seconds[name].append(time_of_call)
    return Timings(seconds, errors)


def _calls_a_sample(seconds: float) -> int:
    enough = _LEAST_SECONDS / max(seconds, 1e-9)
    return max(1, min(_MOST_CALLS, round(enough)))


def _shuffled(names: Sequence[str], order: random.Random) -> list[str]:
    return order.sample(names, len(names))
