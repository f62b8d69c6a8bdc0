"""Part compile: what compiling an update takes, by number of layers."""

import functools

from experiments.bench.config import Bench, PeerName
from experiments.bench.optimizers import Peer, peer_of
from experiments.bench.programs import compile_update
from experiments.bench.records import Row, Task
from experiments.bench.shapes import Layout, matrices
from experiments.compiled.hlo import read_program

_COMPARED: tuple[PeerName, ...] = ("adamw", "optax_galore", "galore", "natural_galore")


def tasks(bench: Bench) -> list[Task]:
    """Returns the work of the part: a task for each program family and depth."""
    config = bench.config
    if "compile" not in config.parts:
        return []
    return [
        Task(
            "compile",
            f"compile: {name}, {layout}, {layers} layers",
            functools.partial(measure, bench, name, layout, layers),
            name,
        )
        for layout in config.layouts
        for layers in (config.layers if layout == "stacked" else config.list_layers)
        for name in _COMPARED
        if name in config.optimizers
    ]


def measure(bench: Bench, name: PeerName, layout: Layout, layers: int) -> list[Row]:
    """Compiles an update, its refresh included; nothing is run."""
    preset = bench.config.preset
    peer = peer_of(bench, name, preset)
    shapes = matrices(bench.run(preset).model, layout, layers=layers)
    figures = _costs(peer, shapes)
    figures = {"layers": float(layers)} | figures
    return [Row("compile", preset, name, layout, figures=figures)]


def _costs(peer: Peer, shapes: object) -> dict[str, float]:
    """Seconds, instructions and bytes of code."""
    compiled = compile_update(peer, shapes, None)
    computations = read_program(compiled.program.as_text()).computations
    instructions = float(sum(map(len, computations.values())))
    code = compiled.program.memory_analysis().generated_code_size_in_bytes
    # Zero where the compiler does not say: for a CPU.
    size = {"code_mb": code / 1e6} if code else {}
    return {"compile_s": compiled.seconds, "instructions": instructions} | size
