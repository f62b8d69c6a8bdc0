"""What an optimizer's update of a sharded Llama moves between devices, by layout.

``python -m tests.sharded_update`` prints the table of the README: on eight CPU devices,
compiled only, of one device and with loops counted once.
"""

import collections
import re
import unittest.mock
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import ngalore_jax as ng
from experiments.models.functional import functional_llama
from experiments.models.llama import PRESETS, LlamaConfig
from experiments.training.mesh import (
    make_mesh,
    param_shardings,
    placed,
    state_shardings,
)
from ngalore_jax import sharding
from tests.collectives import KINDS, bytes_by_kind

RANK = 128
LAYOUTS = [
    (8, 1, 1),
    (1, 8, 1),
    (2, 4, 1),
    (1, 1, 8),
    (1, 4, 2),
    (1, 2, 4),
    (2, 2, 2),
]


def matrices(config: LlamaConfig) -> Any:
    """Abstract parameters of the layers' kernels, the ones that are projected."""
    init_params, _ = functional_llama(config)
    params = jax.eval_shape(init_params, jax.random.key(0))
    return {name: params["layers"][name] for name in ("attention", "mlp")}


def compiled_update(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    mesh: Mesh,
    *,
    refresh: bool,
) -> jax.stages.Compiled:
    """One update, everything laid out by the mesh's rules."""
    placements = (param_shardings(params, mesh), state_shardings(tx.init, params, mesh))

    with jax.set_mesh(mesh):
        update = jax.jit(
            lambda g, s: tx.update(g, s, g, refresh=refresh), out_shardings=placements
        )
        state = placed(jax.eval_shape(tx.init, params), placements[1])
        return update.lower(placed(params, placements[0]), state).compile()


def factorised(program: jax.stages.Compiled, rank: int) -> int:
    """Bases that one device makes orthonormal, over all leaves."""
    calls = re.findall(
        rf"= \(f32\[(\d+),{rank},{rank}\].*custom_call_target=\"lapack_spotrf",
        program.as_text(),
    )
    return sum(map(int, calls))


def main() -> None:
    """Print the table: the steady update, the refresh unspread, and as it is."""
    jax.config.update("jax_num_cpu_devices", 8)
    params = matrices(PRESETS["llama_60m"])
    tx = ng.natural_galore(1e-3, rank=RANK, residual=1.0)
    print(
        "| data x fsdp x tensor | update | " + " | ".join(KINDS) + " | GFLOP | bases |"
    )
    print("|---|---|" + "---|" * len(KINDS) + "---|---|")
    for layout in LAYOUTS:
        mesh = make_mesh(*layout)
        for name, refresh, spread in (
            ("steady", False, True),
            ("refresh, every device all layers", True, False),
            ("refresh, spread", True, True),
        ):
            axes = sharding.spreading_axes if spread else lambda *_: ()
            with unittest.mock.patch.object(sharding, "spreading_axes", axes):
                program = compiled_update(tx, params, mesh, refresh=refresh)
            moved = collections.Counter(bytes_by_kind(program))
            columns = [f"{moved[kind] / 1e6:.2f}" for kind in KINDS]
            flops = program.cost_analysis()["flops"] / 1e9
            print(
                f"| {' x '.join(map(str, layout))} | {name} | {' | '.join(columns)} "
                f"| {flops:.2f} | {factorised(program, RANK)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
