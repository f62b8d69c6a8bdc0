"""Part memory: what a training step takes of the device, compiled but not run.

Where the optimizer refreshes subspaces, of the steady step and the refresh apart;
training runs both in one program.
"""

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
    """Compiles the training step's programs; the largest figure of them counts."""
    preset = bench.config.preset
    peer = peer_of(bench, name, preset)
    device = np.array(jax.devices()[:1])
    programs = [compile_step(peer.run, device, refresh) for refresh in peer.programs]
    figures = {
        f"{part}_mb": max(getattr(costs, part) for costs in programs) / 1e6
        for part in ("memory", "arguments", "temporaries", "outputs")
    }
    return [Row("memory", preset, name, figures=figures)]
