"""Part state: bytes of optimizer state, as a tree and as a compiled program takes it.

Of the hidden matrices alone, and of the whole model, whose embeddings and output layer
have Adam's two moments in every row.
"""

from typing import Any

import jax

import ngalore_jax as ng
from experiments.assembly import parts_of
from experiments.bench.config import Bench
from experiments.bench.optimizers import Peer, peer_of
from experiments.bench.programs import compile_update
from experiments.bench.records import Row, Task, tasks_by_preset
from experiments.bench.shapes import matrices
from experiments.configs.pretrain import PresetName
from experiments.training.record import first_line

REFERENCE = "galore"
_COUNT_BYTES = 4


def tasks(bench: Bench) -> list[Task]:
    """Returns the work of the part: the demo, and the preset."""
    return tasks_by_preset(bench, "state", measure)


def measure(bench: Bench, preset: PresetName) -> list[Row]:
    """Weighs the state of all optimizers that are JAX's; nothing is run."""
    model = bench.run(preset).model
    rows: list[Row] = []
    for layout in ("stacked", "model"):
        found: dict[str, dict[str, float]] = {}
        for name in bench.config.optimizers:
            if name in ("torch_galore", "eleuther_galore"):
                continue
            try:
                peer = peer_of(bench, name, preset)
                if layout == "stacked":
                    found[name] = _of_matrices(peer, matrices(model, "stacked"))
                else:
                    found[name] = _of_model(peer)
            except Exception as error:  # whatever a peer raises is its result
                rows.append(Row("state", preset, name, layout, error=first_line(error)))
        for name, figures in found.items():
            if REFERENCE in found:
                ratio = figures["state_mb"] / found[REFERENCE]["state_mb"]
                figures["state_ratio"] = ratio
            rows.append(Row("state", preset, name, layout, figures=figures))
    return rows


def _of_matrices(peer: Peer, shapes: Any) -> dict[str, float]:
    """Of the hidden matrices; what the compiled update takes besides them as well."""
    state = jax.eval_shape(peer.make().init, shapes)
    # Of two programs the one that is compiled sooner; they have the same arguments.
    refresh = False if peer.two_programs else None
    compiled = compile_update(peer, shapes, refresh, keep_unused=True)
    arguments = compiled.program.memory_analysis().argument_size_in_bytes
    matrices_twice = 2 * ng.state_bytes(shapes)  # gradients and parameters
    return _figures(state) | {
        "compiled_state_mb": (arguments - matrices_twice - _COUNT_BYTES) / 1e6
    }


def _of_model(peer: Peer) -> dict[str, float]:
    parts = parts_of(peer.run)
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    return _figures(jax.eval_shape(parts.optimizer.init, params))


def _figures(state: Any) -> dict[str, float]:
    report = ng.state_report(state)
    parts = {f"{part}_mb": size / 1e6 for part, size in report.items() if size}
    return {"state_mb": ng.state_bytes(state) / 1e6} | parts
