"""Compiles the training step for TPUs that are not here, and tabulates what it costs.

``uv run --group tpu python -m experiments.compile_tpu --help``. The step is the one
that `experiments.pretrain` runs, or the optimizer's share of it; where the optimizer
refreshes subspaces, its two branches are compiled by themselves as well, to tell what
each costs. Each program is compiled in a process of its own, so that a time limit can
end it.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.assembly import refreshes_of
from experiments.compiled.program import (
    ENVIRONMENT,
    on_topology,
    topology_devices,
)
from experiments.compiled.table import markdown, show
from experiments.configs.optimizer import Method, OptimizerName
from experiments.configs.pretrain import PresetName
from experiments.presets import parse

_COMPARED: tuple[OptimizerName, ...] = ("adamw", "optax_galore")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """Compile a training step for a TPU topology, on a machine without a TPU.

    Arguments of experiments.pretrain are taken as well and mean the same: batch size,
    sequence length, microbatches, rank, model.dtype, model.remat, mesh.fsdp and so on.
    Without a mesh all chips are on its fsdp axis.

    Attributes:
        model: Preset of experiments.pretrain.
        topology: Version and shape: v5e:8x8, v6e:4x4, v4:2x2x4, v5p:4x4x4 ...
        optimizer: Optimizer whose steady and refresh steps are compiled.
        update_only: Compile the optimizer's share of the step alone.
        compare: Compile adamw and optax_galore as well.
        time_limit: Seconds after which a compilation is given up.
        json: File to write all figures to.
        markdown: Print the table in Markdown, too.
    """

    model: PresetName = "llama_60m"
    topology: str = "v5e:4x4"
    optimizer: Method = "natural_galore"
    update_only: bool = False
    compare: bool = False
    time_limit: float = 600.0
    json: Path | None = None
    markdown: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """One program to compile."""

    optimizer: OptimizerName
    refresh: bool | None  # None: what training runs, with a branch for refreshes

    @property
    def name(self) -> str:
        """What the table calls it."""
        part = {None: "", False: ", steady", True: ", refresh"}[self.refresh]
        return f"{self.optimizer}{part}"


def parse_args(
    args: Sequence[str] | None = None,
) -> tuple[CompileConfig, list[str]]:
    """Reads the command's own arguments, and those for experiments.pretrain.

    A mistake in either is explained on stderr and ends the process with code 2.
    """
    config, extra = tyro.cli(
        CompileConfig,
        args=args,
        prog="python -m experiments.compile_tpu",
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if any(word.partition("=")[0] == "--preset" for word in extra):
        print("error: --preset is --model here.", file=sys.stderr)
        raise SystemExit(2)
    parse(_pretrain_args(config, config.optimizer, extra))
    return config, extra


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    config, extra = parse_args(args)
    console = Console(highlight=False)
    os.environ |= ENVIRONMENT
    results: dict[str, dict[str, Any]] = {}
    try:
        # What is wrong with the arguments is said before anything is compiled.
        programs = _programs(config, extra)
        for program in programs:
            with console.status(f"Compiling {program.name}", spinner="line"):
                results[program.name] = _compile(config, program, extra)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    subject = f"{config.model}'s update" if config.update_only else config.model
    show(" ".join([subject, "on", config.topology, *extra]), results, console)
    if config.markdown:
        console.print(markdown(results), markup=False, soft_wrap=True)
    if config.json is not None:
        facts = {"model": config.model, "topology": config.topology, "extra": extra}
        facts["programs"] = results
        config.json.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return 0


def _programs(config: CompileConfig, extra: Sequence[str]) -> list[Program]:
    chips = topology_devices(config.topology).size
    optimizers = [config.optimizer]
    if config.compare:
        optimizers += [name for name in _COMPARED if name != config.optimizer]
    programs = []
    for optimizer in optimizers:
        run = on_topology(parse(_pretrain_args(config, optimizer, extra)), chips)
        for refresh in dict.fromkeys((None, *refreshes_of(run))):
            programs.append(Program(optimizer, refresh))
    return programs


def _pretrain_args(
    config: CompileConfig, optimizer: OptimizerName, extra: Sequence[str]
) -> list[str]:
    return ["--preset", config.model, "--optimizer", optimizer, *extra]


def _compile(
    config: CompileConfig, program: Program, extra: Sequence[str]
) -> dict[str, Any]:
    """Compiles one program in a process of its own."""
    job = {
        "args": _pretrain_args(config, program.optimizer, extra),
        "topology": config.topology,
        "refresh": program.refresh,
        "update_only": config.update_only,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.compiled.program", str(path)],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=config.time_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"did not finish in {config.time_limit:g} s"}
        if done.returncode == 0:
            return json.loads(path.read_text("utf-8"))
    if done.returncode < 0:
        return {"failed": f"the compiler was killed by signal {-done.returncode}"}
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    return {"failed": lines[-1][:200]}


if __name__ == "__main__":
    sys.exit(main())
