"""Part energy: how much of a real gradient the refreshed subspace catches.

A Llama of the demo trains with natural_galore. Each time its subspaces are due, the
same gradient goes to several projectors that have followed the run from its start, and
to an exact SVD. The figure is `|P^T G|^2 / |P_svd^T G|^2` for each matrix.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from rich.console import Console

import ngalore_jax as ng
from experiments.assembly import parts_of, step_of
from experiments.bench.config import Bench
from experiments.bench.optimizers import galore_rank, natural_rank
from experiments.bench.records import Row, Task
from experiments.configs.pretrain import PretrainConfig
from experiments.data.batches import Share
from experiments.pretrain import load_run_text
from experiments.training.folder import RunFolder
from experiments.training.microbatches import Batch
from experiments.training.optimizer import matrix_labels
from experiments.training.state import create_state

_EXACT = "exact"
_PROJECTORS = {
    "default projector": None,
    "1 iteration": ng.subspace_iteration(1),
    "2 iterations": ng.subspace_iteration(2),
    "3 iterations": ng.subspace_iteration(3),
    _EXACT: ng.svd(),
}

Matrices = dict[str, jax.Array]
Captured = dict[str, np.ndarray]  # by projector: energy of each matrix


def tasks(bench: Bench, console: Console) -> list[Task]:
    """Returns the work of the part: one run."""
    if "energy" not in bench.config.parts:
        return []
    run = functools.partial(measure, bench, console)
    return [Task("energy", "energy: demo in training", run)]


class Follower:
    """Projectors of one rank that see the same gradients at the same refreshes."""

    def __init__(self, rank: int, shapes: Any) -> None:
        """Starts all of them at the library's first basis.

        Args:
            rank: Of all subspaces.
            shapes: Abstract matrices, or a tree of them.
        """
        self.rank = rank
        # The update of `low_rank(identity)` is P P^T G, of the same norm as P^T G.
        self._transforms = {
            name: ng.low_rank(optax.identity(), rank=rank, projector=projector)
            for name, projector in _PROJECTORS.items()
        }
        # Committed to a device, as training's gradients are: one program serves all.
        device = SingleDeviceSharding(jax.devices()[0])
        self._states = {
            name: jax.jit(tx.init, out_shardings=device)(shapes)
            for name, tx in self._transforms.items()
        }
        self._refresh = jax.jit(self._refreshed)

    def __call__(self, gradients: Any) -> Captured:
        """Refreshes all, and returns what each catches of the exact one's energy."""
        energy, self._states = self._refresh(gradients, self._states)
        exact = np.asarray(energy[_EXACT])
        return {
            name: np.asarray(value) / exact
            for name, value in energy.items()
            if name != _EXACT
        }

    def _refreshed(
        self, gradients: Any, states: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        energy, new = {}, {}
        for name, tx in self._transforms.items():
            caught, new[name] = tx.update(gradients, states[name], refresh=True)
            energy[name] = jnp.concatenate(
                [
                    jnp.sum(jnp.square(leaf), axis=(-2, -1)).reshape(-1)
                    for leaf in jax.tree.leaves(caught)
                ]
            )
        return energy, new


def measure(bench: Bench, console: Console) -> list[Row]:
    """Trains, follows the refreshes, and returns a row a rank and projector."""
    run = bench.run("demo", "natural_galore", natural_rank(bench, "demo"))
    ranks = dict.fromkeys((natural_rank(bench, "demo"), galore_rank(bench, "demo")))
    followers: list[Follower] = []
    found: list[list[Captured]] = []
    for gradients in _refresh_gradients(bench, run, console):
        if not followers:
            followers = [Follower(rank, gradients) for rank in ranks]
        found.append([follower(gradients) for follower in followers])
    return [
        _row(rank, name, [at_refresh[index][name] for at_refresh in found])
        for index, rank in enumerate(ranks)
        for name in _PROJECTORS
        if name != _EXACT
    ]


def _refresh_gradients(
    bench: Bench, run: PretrainConfig, console: Console
) -> Iterator[Matrices]:
    """Trains, and yields the gradients at the steps that choose subspaces."""
    parts = parts_of(run)
    state = create_state(parts.init_params, parts.optimizer, seed=run.run.seed)
    step = step_of(run, parts, None)

    @jax.jit
    def gradients_of(params: optax.Params, batch: Batch) -> Matrices:
        return _hidden_matrices(jax.grad(parts.loss_fn, has_aux=True)(params, batch)[0])

    folder = bench.config.bench_dir / "energy"
    folder.mkdir(parents=True, exist_ok=True)
    text = load_run_text(run, RunFolder(folder), Share(), console)
    try:
        for number in range(bench.config.energy_steps):
            batch = jax.device_put(next(text.batches))
            if number % run.optimization.update_proj_gap == 0:
                yield gradients_of(state.params, batch)
            state, _ = step(state, batch)
    finally:
        text.batches.close()


def _hidden_matrices(tree: optax.Params) -> Matrices:
    labels = jax.tree.leaves(matrix_labels(tree))
    return {
        jax.tree_util.keystr(path): leaf
        for (path, leaf), label in zip(
            jax.tree.leaves_with_path(tree), labels, strict=True
        )
        if label == "matrix"
    }


def _row(rank: int, name: str, captured: list[np.ndarray]) -> Row:
    """Mean and least over matrices, of the first refresh and of those after it."""
    means = [float(np.mean(values)) for values in captured]
    least = [float(np.min(values)) for values in captured]
    figures = {"rank": float(rank), "refreshes": float(len(captured))}
    figures |= {"first_mean": means[0], "first_least": least[0]}
    if len(captured) > 1:
        later = captured[1:]
        figures |= {
            "captured_mean": float(np.mean(later)),
            "captured_least": float(np.min(later)),
        }
    samples = {"mean over matrices": means, "least of matrices": least}
    return Row("energy", "demo", name, figures=figures, samples=samples)
