"""Which checkpoints stay."""

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers


class LowestLoss(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of the lowest validation loss that is known.

    Orbax's own `BestN` reads losses from a file of its own in every checkpoint when a
    folder is opened, which fails as a whole where one of these is damaged.
    """

    def __init__(self) -> None:
        self._losses: dict[int, float] = {}

    def add(self, step: int, loss: float | None) -> None:
        """Takes the loss of a checkpoint."""
        if loss is not None:
            self._losses[step] = loss

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Says of each checkpoint whether it stays."""
        steps = [info.step for info in checkpoints]
        known = [step for step in steps if step in self._losses]
        best = min(known, key=self._losses.__getitem__, default=None)
        return [step == best for step in steps]
