"""One run of a study, and what it leaves."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Folder name, which says what the run is."""
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        run: Which one.
        settings: As of `Arm.settings`.
        curve: Columns of its evaluations: `step`, and up to there `tokens` (or
            another unit) and `seconds` (of training steps, the first of which
            compiles), and `validation_loss` and other scores, None where not finite.
        state_bytes: Of the optimizer: `all`, and of the `matrices` alone.
        parameters: Number of them, likewise; and of values in the `state`, unless the
            record is an old one.
        versions: Of what it was made with; the `device`, unless the record is an old
            one.
        diverged: The message that it ended with early; None if it did not.
    """

    run: Run
    settings: dict[str, Any]
    curve: dict[str, list[Any]]
    state_bytes: dict[str, int]
    parameters: dict[str, int]
    versions: dict[str, str]
    diverged: str | None = None

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by step; infinite where it is not finite."""
        pairs = zip(self.curve["step"], self.curve["validation_loss"], strict=True)
        return {step: math.inf if loss is None else loss for step, loss in pairs}

    @property
    def final_loss(self) -> float:
        """Loss at the end; infinite if the run diverged."""
        if self.diverged is not None:
            return math.inf
        return self.losses[max(self.losses)]

    @property
    def seconds(self) -> float:
        """Training time."""
        return self.curve["seconds"][-1] if self.curve["seconds"] else math.nan
