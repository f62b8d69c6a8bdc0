"""Compiles one training step for a TPU that is not there, and reads off its costs.

Also the process that `experiments.compile_tpu` starts for each program, because only
the end of a process ends a compilation: a job comes as JSON on stdin, its costs go as
JSON to the file named in the arguments.
"""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.assembly import mesh_of, parts_of, step_of
from experiments.compiled.counts import count
from experiments.configs.pretrain import PretrainConfig
from experiments.presets import parse
from experiments.training.chips import known_chip
from experiments.training.mesh import batch_sharding
from experiments.training.microbatches import Batch
from experiments.training.state import abstract_state, shardings_of
from experiments.training.step import make_update
from experiments.training.throughput import flops_per_token

# libtpu describes a topology without a TPU if it does not look for one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the topology's name decides
    # Several processes may hold libtpu, since none holds a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # A time to compile is the compiler's, not that of reading what it made before.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
COMMAND = "uv run --group tpu python -m experiments.compile_tpu"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a compiled step takes of each chip; bytes, operations and seconds.

    Attributes:
        compile_seconds: Time of the compiler.
        code: Size of the program.
        arguments: State and batch.
        temporaries: What it needs besides, at its peak.
        outputs: Results that do not take the place of an argument.
        sent: Bytes sent in a step by kind of collective, loops counted in full.
        flops: Operations of matrix products in a step, loops counted in full.
        unknown_loops: Loops whose number of rounds is unknown: counted once.
        model_flops: Operations in a step by `experiments.training.throughput`.
    """

    compile_seconds: float
    code: int
    arguments: int
    temporaries: int
    outputs: int
    sent: dict[str, float]
    flops: float
    unknown_loops: int
    model_flops: float

    @property
    def memory(self) -> int:
        """Bytes of a chip's memory that the step takes."""
        return self.arguments + self.temporaries + self.outputs + self.code


class DoesNotFitError(ValueError):
    """A program needs more memory than the chip has."""


def topology_devices(name: str) -> np.ndarray:
    """Returns the devices of a TPU topology such as "v5e:8x8", which need not be here.

    Raises:
        ValueError: libtpu is missing, or it does not know the topology.
    """
    # A v4 chip is one device, as JAX has it on the machine.
    more = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **more
        )
    # RuntimeError is what JAX raises for both, and for a TPU that is held.
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ValueError(
                f"compiling for TPUs needs libtpu, which is not installed: {COMMAND} "
                "(on Linux, x86_64)"
            ) from error
        raise ValueError(
            f"topology {name!r}: {error} Give version:shape, such as v5e:4x4, v6e:8x8, "
            "v4:2x2x4 or v5p:4x4x4."
        ) from error
    return np.array(described.devices)


def on_topology(config: PretrainConfig, devices: int) -> PretrainConfig:
    """Returns the config on a mesh of that many devices: all fsdp if it gives none.

    Raises:
        ValueError: It gives a mesh of another size, or one that does not fit the batch.
    """
    if config.devices == 1:
        mesh = dataclasses.replace(config.mesh, fsdp=devices)
        return dataclasses.replace(config, mesh=mesh)
    if config.devices != devices:
        raise ValueError(
            f"the mesh has {config.devices} devices, the topology {devices}: give "
            "--mesh.data, --mesh.fsdp and --mesh.tensor whose product it is."
        )
    return config


def lower_step(
    config: PretrainConfig,
    devices: np.ndarray,
    refresh: bool | None,
    *,
    update_only: bool = False,
) -> jax.stages.Lowered:
    """Traces the training step of a config, with a state that is never made.

    Args:
        config: A run; its mesh has as many devices as are given.
        devices: What to compile for.
        refresh: As in `make_train_step`.
        update_only: Leave out the model: the gradient, laid out like the parameters,
            is an argument, and only the optimizer works.
    """
    mesh, parts = mesh_of(config, devices.tolist()), parts_of(config)
    state = abstract_state(parts.init_params, parts.optimizer, mesh)
    shardings = shardings_of(state)
    with jax.set_mesh(mesh):
        if update_only:
            step = make_update(parts.optimizer, shardings, refresh)
            return step.lower(state, state.params)
        step = step_of(config, parts, shardings, refresh)
        return step.lower(state, _abstract_batch(config, mesh))


def _abstract_batch(config: PretrainConfig, mesh: Mesh) -> Batch:
    rows, length = config.run.batch_size, config.text.sequence_length
    shapes = {
        "tokens": ((rows, length + 1), jnp.int32),
        "weights": ((rows, length), jnp.float32),
    }
    if config.text.treatment == "packed":
        shapes["segments"] = shapes["tokens"]
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


def compile_step(
    config: PretrainConfig,
    devices: np.ndarray,
    refresh: bool | None,
    *,
    update_only: bool = False,
) -> Costs:
    """Compiles the training step of a config; arguments as of `lower_step`.

    Raises:
        DoesNotFitError: The chip's memory is too small; the message says by how much.
    """
    lowered = lower_step(config, devices, refresh, update_only=update_only)
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # "... for HLO temporaries (39.69G) exceeds available HBM (15.75G) ..."
        sizes = re.findall(r"\(([\d.]+[KMGT])\)", str(error))
        if len(sizes) < 2:
            raise DoesNotFitError(str(error).partition("\n")[0]) from error
        raise DoesNotFitError(
            f"temporaries of {sizes[0]}, HBM of {sizes[1]}"
        ) from error
    seconds = time.perf_counter() - started
    memory, counts = compiled.memory_analysis(), count(compiled.as_text())
    tokens = config.run.batch_size * config.text.sequence_length
    model_flops = tokens * flops_per_token(
        config.model, config.text.sequence_length, config.optimization.adapter
    )
    return Costs(
        compile_seconds=seconds,
        code=memory.generated_code_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        sent=dict(counts.sent),
        flops=counts.flops,
        unknown_loops=counts.unknown_loops,
        model_flops=model_flops / devices.size,
    )


def main() -> int:
    """Runs the job on stdin; its result goes to the file that argument 1 names."""
    job = json.load(sys.stdin)
    result: dict[str, Any]
    try:
        devices = topology_devices(job["topology"])
        config = on_topology(parse(job["args"]), devices.size)
        costs = compile_step(
            config, devices, job["refresh"], update_only=job["update_only"]
        )
        chip = known_chip(devices[0].device_kind)
        result = dataclasses.asdict(costs) | {
            "hbm": None if chip is None else chip.memory
        }
    except DoesNotFitError as error:
        result = {"failed": f"does not fit: {error}"}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    Path(sys.argv[1]).write_text(json.dumps(result), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
