"""Arguments that are wrong: what was given, what is needed."""

from collections.abc import Callable
from typing import Any, get_args


def check_number(
    name: str, value: Any, ok: Callable[[float], bool], needed: str
) -> None:
    """Raises ValueError if a concrete number is out of range.

    Traced ones and schedules pass.
    """
    if isinstance(value, int | float) and not ok(value):
        raise ValueError(f"{name} must be {needed}, got {value}.")


def check_at_least(name: str, value: Any, least: float) -> None:
    """Raises ValueError if a concrete number is below ``least``, or a NaN."""
    check_number(name, value, lambda x: x >= least, f"at least {least}")


def check_decay(name: str, value: Any) -> None:
    """Raises ValueError if a concrete number is no decay of an average."""
    check_number(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def check_gap(name: str, value: Any) -> None:
    """Raises ValueError if a concrete number is no number of steps."""
    check_number(
        name,
        value,
        lambda x: x >= 1 and float(x).is_integer(),
        "a whole number of at least 1",
    )


def check_int(name: str, value: Any) -> None:
    """Raises unless it is an int of at least 1 that is known when tracing."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int known at trace time, got {type(value).__name__}; "
            f"with optax.inject_hyperparams add {name!r} to static_args."
        )
    check_at_least(name, value, 1)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless ``value`` is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(
            f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}."
        )
