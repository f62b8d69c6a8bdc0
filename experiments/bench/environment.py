"""Where and with what a bench was run."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from experiments.cores import available_cores

_DISTRIBUTIONS = (
    "ngalore-jax",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "numpy",
    "torch",
    "galore-torch",
)


def describe() -> dict[str, Any]:
    """Returns date, machine, devices and versions, as JSON takes them."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": available_cores(),
            "load": os.getloadavg()[0],
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "number": jax.device_count(),
        },
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _processor() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
