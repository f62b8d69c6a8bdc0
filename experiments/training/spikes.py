"""Losses that are far above the recent ones."""

import collections
import statistics
from collections.abc import Iterable

WINDOW = 100  # steps that count as recent
FEWEST = 30  # steps seen before anything is judged
DEVIATIONS = 6.0  # above the mean of the recent ones

# A loss that hardly moves has no deviation to speak of: this share of it is the least.
_LEAST_SHARE = 0.005


class SpikeDetector:
    """Judges each loss by those of the last `WINDOW` steps.

    A loss is a spike if it lies more than `DEVIATIONS` standard deviations above their
    mean, the deviation taken as 0.5 % of the mean at least. While the loss falls fast,
    as in the first steps, its own fall makes the deviation large and the mean high, so
    that nothing is reported. A spike counts as recent itself: of a new, higher level
    only the first steps are reported.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        """Starts with the losses of the steps before, if there are any."""
        self._recent = collections.deque(losses, maxlen=WINDOW)

    def judge(self, loss: float) -> float | None:
        """Takes a loss; returns its deviations above the mean if it is a spike."""
        deviations = self._deviations(loss)
        self._recent.append(loss)
        return deviations if deviations > DEVIATIONS else None

    def _deviations(self, loss: float) -> float:
        if len(self._recent) < FEWEST:
            return 0.0
        mean = statistics.fmean(self._recent)
        least = max(_LEAST_SHARE * abs(mean), 1e-12)
        return (loss - mean) / max(statistics.pstdev(self._recent, mean), least)
