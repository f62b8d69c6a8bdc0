"""Each part measures what it says, on matrices of a handful of numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngalore_jax as ng
from experiments.bench import limits, optimizers, state, train_step, update
from experiments.bench.energy import Follower
from experiments.bench.growth import slope
from experiments.bench.limits import Rates, Work
from experiments.bench.optimizers import (
    NotInstalledError,
    Peer,
    peer_of,
)
from experiments.bench.programs import Updates
from experiments.bench.shapes import (
    matrices,
    random_gradients,
    random_params,
    sides,
)
from tests.experiments.bench.tiny import tiny

RATES = Rates(stream=1e9, products={"float32": 1e9, "bfloat16": 2e9})


@functools.cache
def bench():
    return tiny()


def shapes(layout="stacked", **kwargs):
    return matrices(bench().run("demo").model, layout, **kwargs)


# ------------------------------------------------------------------------- matrices


def test_a_list_and_a_stack_are_the_same_matrices():
    stacked, listed = shapes(), shapes("list", dtype="bfloat16")
    assert len(listed) == 2
    assert len(jax.tree.leaves(stacked)) == len(jax.tree.leaves(listed)) / 2 == 7
    assert ng.state_bytes(stacked) == 2 * ng.state_bytes(listed)
    kernel = stacked["mlp"]["down_proj"]["kernel"]
    assert kernel.shape == (2, 24, 16)
    assert listed[1]["mlp"]["down_proj"]["kernel"].shape == (24, 16)
    assert (2, 16, 24) in sides(stacked) and (1, 16, 24) in sides(listed)
    assert len(shapes("list", layers=5)) == 5


def test_gradients_have_a_spectrum_that_falls():
    gradients = random_gradients(shapes(), seed=1)
    for leaf in jax.tree.leaves(gradients):
        values = np.linalg.svd(np.asarray(leaf), compute_uv=False)
        assert np.all(values[:, 0] > 2 * values[:, 4])
    other = random_gradients(shapes(), seed=2)
    first, second = (jax.tree.leaves(tree)[0] for tree in (gradients, other))
    assert not jnp.array_equal(first, second)
    kinds = {x.dtype.name for x in jax.tree.leaves(random_params(shapes()))}
    assert kinds == {"float32"}


# -------------------------------------------------------------------------- updates


def basis(updates):
    """The bases of either library's state."""
    return [
        leaf
        for path, leaf in jax.tree.leaves_with_path(updates._state)
        if any(getattr(key, "name", None) == "projector" for key in path)
    ]


@pytest.mark.parametrize("name", ["galore", "optax_galore"])
def test_a_refresh_moves_the_basis_and_a_steady_update_does_not(name):
    params = random_params(shapes(layers=1))
    updates = Updates(
        peer_of(bench(), name, "demo"), random_gradients(shapes(layers=1)), params
    )
    assert updates.peer.two_programs == (name == "galore")
    for refresh in (None, False, True) if updates.peer.two_programs else (None,):
        updates.compile(refresh)
    for alone in (False, True) if updates.peer.two_programs else (False,):
        for refresh in (True, False):
            # Away from where it is, so that a refresh is seen.
            updates._state = jax.tree.map(lambda x: x + 1, updates._state)
            before = jax.tree.map(jnp.array, basis(updates))
            updates.run(1, refresh=refresh, alone=alone)
            same = map(jnp.array_equal, before, basis(updates))
            assert all(same) != refresh


def test_ranks_are_those_of_the_settings():
    found = {
        name: peer_of(bench(), name, "demo").rank
        for name in ("adamw", "galore", "natural_galore")
    }
    assert found == {
        "adamw": None,
        "galore": 4,
        "natural_galore": 2,
    }
    published = tiny("--preset", "llama_60m", "--model.hidden-size", "512")
    published = type(published)(
        type(published.config)(preset="llama_60m"), published.extra
    )
    assert peer_of(published, "natural_galore", "llama_60m").rank == 32
    assert peer_of(published, "optax_galore", "llama_60m").rank == 128


@pytest.fixture(scope="module")
def rows():
    """Rows of update and refresh, one of the peers broken and one absent."""
    chosen = tiny(
        *("--optimizers", "adamw", "optax_galore", "muon", "galore"),
        "eleuther_galore",
    )

    def broken_muon(bench, name, preset):
        if name == "muon":
            return Peer("muon", lambda: 1 / 0)
        return peer_of(bench, name, preset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "peer_of", broken_muon)
        patch.setattr(optimizers, "is_installed", lambda name: False)
        (task,) = update.tasks(chosen, RATES)
        return {(row.part, row.optimizer): row for row in task.run()}


def test_every_peer_has_a_row(rows):
    assert rows["update", "adamw"].figures["update_ms"] > 0
    reference = rows["refresh", "optax_galore"].figures
    assert reference["refresh_ratio"] == reference["refresh_ratio_high"] == 1
    assert ("refresh", "adamw") not in rows
    for part in ("update", "refresh"):
        mine = rows[part, "galore"]
        assert len(mine.samples[part]) == len(mine.samples["alone"]) == 2
        other = rows[part, "optax_galore"].samples[part]
        ratios = [a / b for a, b in zip(mine.samples[part], other)]
        assert mine.figures[f"{part}_ratio"] == pytest.approx(np.median(ratios))
        assert mine.figures["times_limit"] > 0


def test_a_peer_that_fails_is_a_row_with_its_error(rows):
    for part in ("update", "refresh"):
        assert rows[part, "muon"].error.startswith("ZeroDivisionError")
        assert not rows[part, "muon"].figures


def test_a_peer_that_is_not_here_is_no_failure(rows, monkeypatch):
    monkeypatch.setattr(optimizers, "is_installed", lambda name: False)
    assert rows["update", "eleuther_galore"].error is None
    assert "PYTHONPATH" in rows["update", "eleuther_galore"].note
    with pytest.raises(NotInstalledError):
        peer_of(bench(), "eleuther_galore", "demo")


# --------------------------------------------------------------------------- limits


def test_a_limit_is_what_must_move_or_be_multiplied():
    work = Work(bytes=2e6, flops=8e6)
    figures = work.figures(RATES, 0.04, "bfloat16")
    assert figures["limit_ms"] == pytest.approx(4.0)  # 8e6 at 2e9
    assert figures["limit_no_overlap_ms"] == pytest.approx(6.0)
    assert figures["times_limit"] == pytest.approx(10.0)
    assert work.figures(RATES, 0.04, "float32")["limit_ms"] == pytest.approx(8.0)
    slow = Rates(stream=1e9, products={"float32": 8e9, "bfloat16": 1e9})
    assert work.figures(slow, 0.04, "bfloat16")["limit_ms"] == pytest.approx(2.0)


def test_work_counts_every_array_once():
    stack, elements = shapes(), 2 * (4 * 16 * 16 + 3 * 16 * 24)
    work = limits.steady_work(peer_of(bench(), "adamw", "demo"), stack)
    counters = 4 * 2 * 4
    assert work.bytes == 4 * elements * (1 + 1 + 2 + 2) + counters
    assert work.flops == 0
    galore = peer_of(bench(), "galore", "demo")
    work = limits.steady_work(galore, stack)
    assert work.flops == 4 * elements * galore.rank
    state = jax.eval_shape(galore.make().init, stack)
    basis_bytes = 4 * 2 * 7 * 16 * galore.rank
    assert work.bytes == 8 * elements + 2 * ng.state_bytes(state) - basis_bytes
    natural = peer_of(bench(), "natural_galore", "demo")
    refresh = limits.refresh_work(natural, stack)
    steady = limits.steady_work(natural, stack)
    assert refresh.flops - steady.flops > 4 * elements * natural.rank
    assert refresh.bytes > steady.bytes
    assert limits.refresh_work(peer_of(bench(), "muon", "demo"), stack) is None
    muon = limits.steady_work(peer_of(bench(), "muon", "demo"), stack)
    square, wide = 6 * 16**3, 4 * 16 * 16 * 24 + 2 * 16**3
    assert muon.flops == 5 * 2 * (4 * square + 3 * wide)
    # What is outside the subspace is orthogonalised as muon does it.
    assert steady.flops == muon.flops + 4 * elements * natural.rank


def test_the_machine_is_measured():
    rates = limits.measure_rates(elements=1 << 12, side=16)
    assert rates.stream > 0
    assert all(rate > 0 for rate in rates.products.values())


# ------------------------------------------------------------- steps, energy, growth


def test_a_refresh_is_spread_over_its_gap():
    assert train_step.amortised([1.0, 2.0], [9.0, 11.0, 10.0], gap=4) == [3.25, 4.0]
    assert train_step.amortised([1.0], [201.0], gap=200) == [2.0]


def test_captured_energy_is_that_of_the_exact_basis():
    rng = np.random.default_rng(0)
    gradients = {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(2, 12, 20)), jnp.float32),
            "other": jnp.asarray(rng.normal(size=(30, 10)), jnp.float32),
        }
    }
    follower = Follower(3, gradients)
    gradients = jax.device_put(gradients, jax.devices()[0])  # committed, as training's
    for _ in range(2):
        captured = follower(gradients)
    assert follower._refresh._cache_size() == 1
    one, three = captured["1 iteration"], captured["3 iterations"]
    assert one.shape == (3,)
    assert np.all(one <= 1 + 1e-5) and np.all(one > 0.5)
    assert np.all(three >= one - 1e-5)
    # Against NumPy: what the followed basis catches of the first matrix.
    basis = np.asarray(
        follower._states["1 iteration"].projector["layers"]["kernel"][0], np.float64
    )
    matrix = np.asarray(gradients["layers"]["kernel"][0], np.float64)
    best = np.sum(np.linalg.svd(matrix, compute_uv=False)[:3] ** 2)
    assert one[0] == pytest.approx(np.sum((basis.T @ matrix) ** 2) / best, rel=1e-4)


def test_exponents_are_fitted():
    assert slope([1.0, 2.0, 8.0], [5.0, 10.0, 40.0]) == pytest.approx(1)
    assert slope([1.0, 10.0], [1.0, 1000.0]) == pytest.approx(3)


def test_the_compiled_state_weighs_what_the_tree_does():
    (task,) = state.tasks(bench())
    rows = {(row.layout, row.optimizer): row.figures for row in task.run()}
    for name in ("adamw", "optax_galore", "galore", "natural_galore"):
        mine = rows["stacked", name]
        assert mine["compiled_state_mb"] == pytest.approx(mine["state_mb"], rel=1e-3)
        # The rest of the model is on Adam whatever the method.
        assert rows["model", name]["state_mb"] > mine["state_mb"]
    natural = rows["stacked", "natural_galore"]
    ratio = natural["state_mb"] / rows["stacked", "galore"]["state_mb"]
    assert natural["state_ratio"] == pytest.approx(ratio)
    parts = ("basis", "history", "moments", "residual", "unprojected")
    assert sum(natural[f"{part}_mb"] for part in parts) == pytest.approx(
        natural["state_mb"]
    )
