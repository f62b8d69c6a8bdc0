"""How many processes a machine is for, and which GPUs they have."""

import os
import re
import shutil
import subprocess


def available_cores() -> int:
    """Returns how many this process may use; where the system does not tell, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Returns how many runs at a time: one a core, or two that share a GPU."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi")
    return available_cores() if on_cpu else min(available_cores(), 2)


def visible_gpus() -> tuple[str, ...]:
    """Returns the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them.

    JAX is not asked: it would take their memory. There are none where runs are on the
    CPU, or where GPUs are cut into parts (MIG) that the variable does not name.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        return tuple(name for name in names if name not in ("", "-1"))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    if "UUID: MIG-" in listed:
        return ()
    return tuple(re.findall(r"^GPU (\d+):", listed, re.MULTILINE))
