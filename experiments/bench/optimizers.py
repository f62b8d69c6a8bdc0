"""Who is compared: our optimizers and their peers, by name.

All go through `experiments.training.optimizer`, which gives them the same leaves and
learning rates, except those that are no dependency of this project.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable

import optax

from experiments.assembly import refreshes_of
from experiments.bench.config import Bench, PeerName
from experiments.configs.pretrain import PresetName, PretrainConfig
from experiments.training.optimizer import build_optimizer

_STEPS = 100_000  # of the schedule; its end is never reached


@dataclasses.dataclass(frozen=True)
class Peer:
    """An optimizer of JAX that takes part.

    Attributes:
        name: What the tables call it.
        make: Makes the transformation.
        rank: Rank of its subspaces, None if it has none.
        history: Gradients in its Fisher, 0 if it has none.
        gap: Steps between refreshes, None if it has none.
        two_programs: Whether it can be told of a refresh, so that steady updates and
            refreshes can be programs of their own. Training runs the one that decides
            by the count.
        first_refresh: Count at whose multiples it refreshes, less the gap: 0, or -1
            where the count is raised before it is looked at.
        run: Settings of a training run with it, None of a peer that training cannot
            choose.
    """

    name: PeerName
    make: Callable[[], optax.GradientTransformationExtraArgs]
    rank: int | None = None
    history: int = 0
    gap: int | None = None
    two_programs: bool = False
    first_refresh: int = 0
    run: PretrainConfig | None = None


class NotInstalledError(ValueError):
    """A peer that is no dependency of this project is not here."""


TRAINABLE = ("adamw", "optax_galore", "muon", "galore", "natural_galore")
"""Those that a training run can choose."""
_REFRESHING = ("galore", "natural_galore", "optax_galore")
_MODULES = {
    "eleuther_galore": ("optax_galore",),
    "torch_galore": ("torch", "galore_torch"),
}
_WHERE = {
    "eleuther_galore": "it is on no package index: clone github.com/EleutherAI/"
    "optax-galore and put the folder on PYTHONPATH",
    "torch_galore": "`uv run --with galore-torch ...`",
}


def galore_rank(bench: Bench, preset: PresetName) -> int:
    """Returns the rank at which the GaLores run."""
    return bench.run(preset, "galore", bench.config.rank).optimization.rank


def natural_rank(bench: Bench, preset: PresetName) -> int:
    """Returns the rank of natural_galore."""
    rank = bench.config.natural_rank
    return bench.run(preset, "natural_galore", rank).optimization.rank


def peer_of(bench: Bench, name: PeerName, preset: PresetName) -> Peer:
    """Returns an optimizer with the settings of a preset.

    Raises:
        NotInstalledError: It is not here.
        ValueError: It is none of JAX.
    """
    if name == "eleuther_galore":
        return _eleuther_galore(bench, preset)
    if name not in TRAINABLE:
        raise ValueError(f"{name} is no optimizer of JAX.")
    rank_of = natural_rank if name == "natural_galore" else galore_rank
    rank = rank_of(bench, preset)
    return peer_of_run(name, bench.run(preset, name, rank))


def peer_of_run(name: PeerName, run: PretrainConfig) -> Peer:
    """Returns the optimizer of a training run under a name of the bench."""
    config = run.optimization
    refreshes = config.optimizer in _REFRESHING

    def make() -> optax.GradientTransformationExtraArgs:
        optimizer = build_optimizer(
            config, learning_rate=run.learning_rate, steps=_STEPS
        )
        return optax.with_extra_args_support(optimizer)

    return Peer(
        name,
        make,
        rank=config.rank if refreshes else None,
        history=config.history if config.optimizer == "natural_galore" else 0,
        gap=config.update_proj_gap if refreshes else None,
        two_programs=len(refreshes_of(run)) > 1,
        run=run,
    )


def is_installed(name: PeerName) -> bool:
    """Whether an optimizer is here."""
    return all(map(importlib.util.find_spec, _MODULES.get(name, ())))


def check_installed(name: PeerName) -> None:
    """Raises NotInstalledError, which says how to install it, unless it is here."""
    if not is_installed(name):
        raise NotInstalledError(f"not installed: {_WHERE[name]}.")


def _eleuther_galore(bench: Bench, preset: PresetName) -> Peer:
    check_installed("eleuther_galore")
    module = importlib.import_module("optax_galore.optax_galore")
    run = bench.run(preset, "galore", galore_rank(bench, preset))
    rank, gap = run.optimization.rank, run.optimization.update_proj_gap

    def make() -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(
            module.galore(run.learning_rate, rank=rank, subspace_change_freq=gap)
        )

    return Peer("eleuther_galore", make, rank=rank, gap=gap, first_refresh=-1)
