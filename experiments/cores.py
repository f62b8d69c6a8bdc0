"""The processor's cores, on every system."""

import os


def available_cores() -> int:
    """Returns how many this process may use; where the system does not tell, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
