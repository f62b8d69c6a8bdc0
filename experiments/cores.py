"""How many processes a machine is for."""

import os
import shutil


def available_cores() -> int:
    """Returns how many this process may use; where the system does not tell, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Returns how many runs at a time: one a core, or two that share a GPU."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi")
    return available_cores() if on_cpu else min(available_cores(), 2)
