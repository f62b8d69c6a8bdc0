"""Settings of the bench: the command line, and what they stand for."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import tyro

from experiments.bench.shapes import Layout
from experiments.configs.optimizer import OptimizerName
from experiments.configs.pretrain import PresetName, PretrainConfig
from experiments.models.formats import Dtype
from experiments.presets import parse

Part = Literal[
    "update", "refresh", "step", "compile", "state", "memory", "energy", "growth"
]
PeerName = Literal[
    "adamw",
    "optax_galore",
    "muon",
    "galore",
    "natural_galore",
    "eleuther_galore",
    "torch_galore",
]

_PROGRAM = "python -m experiments.bench"
# Sequences per step of a published size on a CPU: seconds instead of half an hour. An
# optimizer's share of the step is then larger than in a real run.
_CPU_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure our optimizers and their peers in one process, taking turns.

    Writes bench.json (every sample), bench.md and plots into a folder, and prints the
    tables. Arguments of experiments.pretrain are taken as well and mean the same:
    --history 10, --model.hidden-size 256, --update-proj-gap 100 ...

    Attributes:
        parts: What is measured. update: the steady update, all optimizers in turn.
            refresh: the same where the subspace is chosen anew. step: whole training
            steps, a refresh spread over its gap. compile: time to compile the update
            by number of layers. state: bytes of optimizer state. memory: what a
            compiled training step takes. energy: how much of the gradient the refresh
            catches, on gradients of a model in training. growth: time and bytes by
            history, rank and layers.
        preset: Model whose hidden matrices are updated.
        rank: Rank of the GaLores. None: the preset's.
        natural_rank: Rank of natural_galore. None: the preset's.
        repeats: Rounds in which every optimizer is timed once; at most three for
            refreshes, training steps of a published size and whatever takes seconds.
        dtypes: Formats of parameters and gradients.
        layouts: list: one leaf per layer. stacked: one for all layers.
        optimizers: Who takes part. The last two only where they are installed:
            eleuther_galore from github.com/EleutherAI/optax-galore, torch_galore from
            galore-torch (update and refresh, list and float32 only).
        layers: Numbers of layers of the compile part, stacked.
        list_layers: The same of lists, which take longer by the layer.
        growth_layers: Numbers of layers of the growth part.
        growth_ranks: Ranks of the growth part; those above the smaller side are left
            out.
        growth_histories: History lengths of the growth part.
        energy_steps: Steps that the demo trains in the energy part.
        batch_size: Sequences a training step of a published size. None: the preset's
            on accelerators, 8 on a CPU.
        seed: Seed of gradients, parameters and orders.
        bench_dir: Folder of the results.
        overwrite: Replace those that are there.
    """

    parts: tuple[Part, ...] = get_args(Part)
    preset: PresetName = "llama_60m"
    rank: int | None = None
    natural_rank: int | None = None
    repeats: int = 11
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    layouts: tuple[Layout, ...] = ("list", "stacked")
    optimizers: tuple[PeerName, ...] = get_args(PeerName)
    layers: tuple[int, ...] = (8, 16, 32, 64)
    list_layers: tuple[int, ...] = (2, 8)
    growth_layers: tuple[int, ...] = (8, 24, 64)
    growth_ranks: tuple[int, ...] = (32, 64, 128, 256, 512)
    growth_histories: tuple[int, ...] = (1, 4, 16, 64)
    energy_steps: int = 151
    batch_size: int | None = None
    seed: int = 0
    bench_dir: Path = Path("runs") / "bench"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without measuring."""
        for name in ("repeats", "energy_steps", "rank", "natural_rank", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    @property
    def slow_repeats(self) -> int:
        """Rounds of what takes seconds."""
        return min(self.repeats, 3)


@dataclasses.dataclass(frozen=True)
class Bench:
    """The command's own settings, and those for the model and its training.

    Attributes:
        config: The command's.
        extra: Arguments for experiments.pretrain.
    """

    config: BenchConfig
    extra: tuple[str, ...] = ()

    def run(
        self,
        preset: PresetName,
        method: OptimizerName = "galore",
        rank: int | None = None,
    ) -> PretrainConfig:
        """Returns the settings of a training run.

        Args:
            preset: Its model.
            method: Its optimizer.
            rank: Its rank. None: the preset's, or what the extra arguments say.
        """
        args = ["--preset", preset, "--optimizer", method]
        if preset != "demo":
            args += ["--batch-size", str(self._batch_size(preset, method))]
        ranks = [] if rank is None else ["--rank", str(rank)]
        return parse([*args, *self.extra, *ranks])

    def _batch_size(self, preset: PresetName, method: OptimizerName) -> int:
        if self.config.batch_size is not None:
            return self.config.batch_size
        if jax.default_backend() == "cpu":
            return _CPU_BATCH_SIZE
        return parse(["--preset", preset, "--optimizer", method]).run.batch_size

    def command(self, args: Sequence[str]) -> str:
        """Returns the command line, ready to be pasted."""
        uv = "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
        return f"{uv}{_PROGRAM} {shlex.join(args)}".strip()


def parse_args(args: Sequence[str]) -> Bench:
    """Reads the command line.

    A mistake in it is explained on stderr and ends the process with code 2.
    """
    config, extra = tyro.cli(
        BenchConfig,
        args=args,
        prog=_PROGRAM,
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )
    bench = Bench(config, tuple(extra))
    bench.run(config.preset)
    return bench
