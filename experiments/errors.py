"""Errors that may be over a little later, apart from those that stay."""

import jax


class PassingError(Exception):
    """What may be over a little later: the same command, started again, may go on."""


# What XLA calls errors of a device, or of the connection to another process.
_PASSING_STATUS = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "INTERNAL",
)
_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")


def of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device's memory is too small."""
    return any(word in str(error) for word in _MEMORY)


def may_pass(error: Exception) -> bool:
    """Whether the same command, started again, may go on.

    So it is of a network, of storage that is reached over one, and of a device or a
    connection between processes that broke; not of memory that is too small.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return str(error).startswith(_PASSING_STATUS) and not of_memory(error)
    return isinstance(error, PassingError)
