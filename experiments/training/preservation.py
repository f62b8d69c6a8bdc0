"""Which checkpoints stay."""

from collections.abc import Iterable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers


class LowestObjective(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of the lowest objective that is known.

    Orbax's own `BestN` reads metrics from a file of its own in every checkpoint when a
    folder is opened, which fails as a whole where one of these is damaged.
    """

    def __init__(self) -> None:
        self._values: dict[int, float] = {}

    def add(self, step: int, objective: float | None) -> None:
        """Takes the objective of a checkpoint."""
        if objective is not None:
            self._values[step] = objective

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Says of each checkpoint whether it stays."""
        steps = [info.step for info in checkpoints]
        best = self.best(steps)
        return [step == best for step in steps]

    def best(self, steps: Iterable[int]) -> int | None:
        """Returns the step of the lowest objective among these, None if none is known.

        Of several it is the first, as in the reports.
        """
        known = sorted(step for step in steps if step in self._values)
        return min(known, key=self._values.__getitem__, default=None)
