"""Which runs a study needs: the same tries for every arm, then the seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.study.arms import Arm
from experiments.study.runs import Run


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm gets.

    Attributes:
        factors: Learning rates tried, as factors on an arm's own.
        extensions: Factors more, at most, where the best is at the edge.
        seeds: The first one is tuned on; the best rate runs on all.
    """

    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    extensions: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        for name in ("factors", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise ValueError(
                    f"{name}={values} must be one or more, none of them twice, none "
                    "negative."
                )
        if 0 in self.factors:
            raise ValueError(f"factors={self.factors}: a rate of 0 learns nothing.")
        if self.extensions < 0:
            raise ValueError(f"extensions={self.extensions} must be at least 0.")

    @property
    def runs(self) -> int:
        """Runs of an arm whose best rate lies inside."""
        return len(self.factors) + len(self.seeds) - 1


def needed(arm: Arm, budget: Budget, results: Mapping[Run, float]) -> list[Run]:
    """Returns the runs of an arm that are known to be needed, done or not.

    Args:
        arm: The arm.
        budget: What it gets.
        results: Of each run that is done: lower is better, infinite: it diverged.

    Returns:
        While a rate of `budget` is not tried: those to try. Then as well the best of
        all rates that were tried on the first seed, on the other seeds; unless none
        converged.
    """
    first, *others = budget.seeds
    factors = sorted(budget.factors)
    for left in reversed(range(budget.extensions + 1)):
        tries = [arm.run(factor, first) for factor in factors]
        if any(run not in results for run in tries):
            return tries
        beyond = _beyond(factors, [results[run] for run in tries])
        if beyond is None or not left:
            break
        factors = sorted([*factors, beyond])
    # Rates of an earlier command count, too.
    tried = [run for run in results if run.arm == arm.name and run.seed == first]
    # Scores of few examples tie: not the run that ended first then, but the lower rate.
    best = min(tried, key=lambda run: (results[run], run.learning_rate))
    if math.isinf(results[best]):
        return tries
    return [*tries, *(dataclasses.replace(best, seed=seed) for seed in others)]


def _beyond(factors: Sequence[float], losses: Sequence[float]) -> float | None:
    """The next factor where the best of these is at their edge, None if inside."""
    if len(factors) < 2:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    if best == 0:
        return factors[0] ** 2 / factors[1]
    if best == len(factors) - 1:
        return factors[-1] ** 2 / factors[-2]
    return None
