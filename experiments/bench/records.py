"""What a measurement leaves behind, and what does one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from experiments.bench.config import Bench, Part
from experiments.bench.quartiles import Quartiles
from experiments.configs.pretrain import PresetName


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the results: an optimizer in one setting.

    Attributes:
        part: Part of the bench that measured it.
        shapes: Whose matrices: a preset's name.
        optimizer: Name of the optimizer, as `optimizers.py` gives it.
        layout: "list" (one leaf per layer), "stacked" (one leaf for all layers) or
            "model" (the whole model as it is trained).
        dtype: Format of parameters and gradients.
        figures: Results by name; the name says the unit.
        samples: What was measured, by name: seconds a call unless it says otherwise.
        note: What a reader must know about this line.
        error: Why there are no figures, if there are none.
    """

    part: str
    shapes: str
    optimizer: str
    layout: str = "model"
    dtype: str = "float32"
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    note: str = ""
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of work of the bench, as small as paired measurements allow.

    Attributes:
        part: Part it belongs to.
        name: What the progress bar shows.
        run: Does it.
        subject: Whom a row is about that says it failed as a whole.
    """

    part: str
    name: str
    run: Callable[[], Sequence[Row]]
    subject: str = "all"


def tasks_by_preset(
    bench: Bench,
    part: Part,
    measure: Callable[[Bench, PresetName], Sequence[Row]],
) -> list[Task]:
    """Returns the work of a part that looks at the demo and at the preset."""
    if part not in bench.config.parts:
        return []
    return [
        Task(part, f"{part}: {preset}", functools.partial(measure, bench, preset))
        for preset in dict.fromkeys(("demo", bench.config.preset))
    ]


def timed_figures(
    name: str, seconds: Sequence[float], ratios: Sequence[float] | None
) -> dict[str, float]:
    """Figures of a timed program: `NAME_ms`, and its ratio with both quartiles.

    Args:
        name: Of the program.
        seconds: A call's time in each round.
        ratios: To the reference, round by round; None without a reference.
    """
    time = Quartiles.of(seconds)
    figures = {
        f"{name}_ms": 1e3 * time.median,
        f"{name}_ms_low": 1e3 * time.low,
        f"{name}_ms_high": 1e3 * time.high,
    }
    if ratios is not None:
        ratio = Quartiles.of(ratios)
        figures |= {
            f"{name}_ratio": ratio.median,
            f"{name}_ratio_low": ratio.low,
            f"{name}_ratio_high": ratio.high,
        }
    return figures
