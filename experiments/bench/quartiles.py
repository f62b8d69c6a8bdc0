"""Median and quartiles of measurements."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Returns those of at least one value.

        Example:
            >>> Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Quartiles(low=2.0, median=3.0, high=4.0)
        """
        return cls(*map(float, np.quantile(list(values), [0.25, 0.5, 0.75])))
