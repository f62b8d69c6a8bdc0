"""Lets an error of Orbax be heard once: as the exception it raises.

At the first error Orbax also logs its stack, at every place that it passes, and closes
the event loop that it works in. Every read or write that is still under way there then
complains on stderr, about that or its own error.
"""

import gc
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS = 0.5


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Drops what Orbax says on stderr about errors that it raises."""
    hook, logger = sys.unraisablehook, logging.getLogger("absl")

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_closed_loops
    logger.addFilter(_raised_as_well)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(_raised_as_well)


@contextmanager
def quiet_reads() -> Iterator[None]:
    """Drops the errors of reads that nobody waits for after the first has failed."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:
        settle()
        raise
    finally:
        logger.setLevel(level)


def settle() -> None:
    """Waits for what is still under way after an error, so that it fails unheard."""
    time.sleep(_SECONDS)
    gc.collect()  # an error that nobody has asked for is logged when it goes


def _raised_as_well(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
