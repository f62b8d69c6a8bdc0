"""Part memory: what a training step takes of the device, compiled but not run."""

import functools

import jax
import numpy as np

from experiments.bench.config import Bench, PeerName
from experiments.bench.optimizers import TRAINABLE, peer_of
from experiments.bench.records import Row, Task
from experiments.compiled.program import compile_step


def tasks(bench: Bench) -> list[Task]:
    """Returns the work of the part: a task for each optimizer."""
    if "memory" not in bench.config.parts:
        return []
    return [
        Task("memory", f"memory: {name}", functools.partial(measure, bench, name), name)
        for name in bench.config.optimizers
        if name in TRAINABLE
    ]


def measure(bench: Bench, name: PeerName) -> list[Row]:
    """Compiles the training step."""
    preset = bench.config.preset
    peer = peer_of(bench, name, preset)
    device = np.array(jax.devices()[:1])
    costs = compile_step(peer.run, device, None)
    figures = {
        f"{part}_mb": getattr(costs, part) / 1e6
        for part in ("memory", "arguments", "temporaries", "outputs")
    }
    return [Row("memory", preset, name, figures=figures)]
