"""Errors that may be over a little later, apart from those that stay."""

import jax


class PassingError(Exception):
    """What may be over a little later: the same command, started again, may go on."""


def may_pass(error: Exception) -> bool:
    """Whether the same command, started again, may go on.

    So it is of a network, of storage that is reached over one, and of a device or a
    connection between processes that broke; not of memory that is too small.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return isinstance(error, PassingError)
