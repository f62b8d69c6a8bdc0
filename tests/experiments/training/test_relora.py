"""ReLoRA: what a restart merges, draws and resets; rank that grows; resuming."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.configs.optimizer import OptimizerConfig
from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig
from experiments.models.lora import merge
from experiments.training.mesh import make_mesh
from experiments.training.optimizer import build_optimizer
from experiments.training.relora import jagged, relora
from experiments.training.state import TrainState, abstract_like, create_state
from experiments.training.step import make_train_step, next_token_loss

M, N, RANK, GAP, SCALE = 12, 14, 2, 3, 1.5


def start() -> optax.Params:
    """Two stacked layers, and one alone."""
    random = np.random.default_rng(0)

    def module(*stacked: int) -> dict[str, jax.Array]:
        w = random.normal(size=(*stacked, M, N))
        a = random.normal(size=(*stacked, M, RANK))
        return {
            "kernel": jnp.asarray(w, jnp.float32),
            "lora_a": jnp.asarray(a, jnp.float32),
            "lora_b": jnp.zeros((*stacked, RANK, N)),
        }

    return {"stack": {"up": module(2)}, "alone": module()}


def gradients(seed: int) -> optax.Updates:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), start()
    )


def transform(**settings) -> optax.GradientTransformationExtraArgs:
    return relora(
        optax.scale_by_adam(),
        optax.constant_schedule(0.1),
        **({"gap": GAP, "scale": SCALE} | settings),
    )


@functools.cache
def run(seed: int = 0) -> list[tuple[optax.Params, optax.OptState]]:
    """Parameters and state before and after each step of three cycles."""
    tx, params = transform(seed=seed), start()
    state, update = tx.init(params), jax.jit(tx.update)
    seen = [(params, state)]
    for step in range(1, 3 * GAP + 1):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def test_it_equals_a_float64_reference_over_three_restarts():
    """Adam of the factors from zero moments each cycle; merged at its end."""
    seen = run()
    for name in ("stack", "alone"):

        def leaf(tree, name=name):
            node = tree[name]["up"] if name == "stack" else tree[name]
            return {k: np.asarray(v, np.float64) for k, v in node.items()}

        now = leaf(seen[0][0])
        w, a, b = (now[k] for k in ("kernel", "lora_a", "lora_b"))
        moments = [np.zeros((2, *x.shape)) for x in (a, b)]
        for step in range(1, len(seen)):
            g = leaf(gradients(step))
            since = (step - 1) % GAP + 1
            for x, (mean, square), key in zip((a, b), moments, ("lora_a", "lora_b")):
                mean[...] = 0.9 * mean + 0.1 * g[key]
                square[...] = 0.999 * square + 0.001 * g[key] ** 2
                direction = mean / (1 - 0.9**since)
                x -= 0.1 * direction / (np.sqrt(square / (1 - 0.999**since)) + 1e-8)
            found = leaf(seen[step][0])
            if step % GAP == 0:
                w = w + SCALE * a @ b
                a, b = found["lora_a"].copy(), np.zeros_like(b)  # drawn, zero
                moments = [np.zeros_like(x) for x in moments]
            for value, key in ((w, "kernel"), (a, "lora_a"), (b, "lora_b")):
                np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4)


def test_a_restart_merges_draws_and_resets():
    seen = run()
    (before, _), (after, state) = seen[GAP - 1], seen[GAP]
    old, new = before["stack"]["up"], after["stack"]["up"]
    assert np.any(old["lora_b"]) and not np.any(new["lora_b"])
    a = np.asarray(new["lora_a"])
    assert 0.5 / np.sqrt(M) < np.abs(a).max() <= 1 / np.sqrt(M) + 1e-6
    draws = [a[0], a[1], np.asarray(after["alone"]["lora_a"])]
    draws += list(np.asarray(seen[2 * GAP][0]["stack"]["up"]["lora_a"]))
    overlap = np.corrcoef([draw.ravel() for draw in draws])
    assert np.abs(overlap - np.eye(5)).max() < 0.8  # nowhere the same numbers
    assert int(state.count) == GAP
    for leaf in jax.tree.leaves(state.inner):  # moments, and Adam's own count
        np.testing.assert_array_equal(leaf, 0)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(seen[GAP - 1][1].inner))


def test_frozen_kernels_move_at_restarts_only_and_have_no_state():
    seen = run()
    for step in range(1, len(seen)):
        for before, after in (
            (seen[step - 1][0]["alone"], seen[step][0]["alone"]),
            (seen[step - 1][0]["stack"]["up"], seen[step][0]["stack"]["up"]),
        ):
            moved = not np.array_equal(before["kernel"], after["kernel"])
            assert moved == (step % GAP == 0)
    sizes = {leaf.shape[-2:] for leaf in jax.tree.leaves(seen[0][1]) if leaf.ndim}
    assert sizes == {(M, RANK), (RANK, N)}


def test_rank_grows_over_restarts():
    changes = [
        merge(params, SCALE)["alone"]["kernel"] - start()["alone"]["kernel"]
        for params, _ in run()
    ]
    ranks = [int(np.linalg.matrix_rank(change, tol=1e-4)) for change in changes]
    # A step after a restart adds the new factors' rank.
    cycle = [RANK] * GAP
    assert ranks == [0, *cycle, *(2 * r for r in cycle), *(3 * r for r in cycle)]


def test_another_seed_draws_another_a():
    one, two = (run(seed)[GAP][0]["alone"]["lora_a"] for seed in (0, 1))
    assert not np.allclose(one, two)


def test_the_schedule_is_jagged():
    rate = jagged(lambda count: 10.0 - count, gap=4, warmup=1)
    rates = [float(rate(jnp.int32(count))) for count in range(9)]
    np.testing.assert_allclose(rates, [10, 9, 8, 7, 6 / 2, 5, 4, 3, 2 / 2])


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="gap=0 must be at least 1"):
        transform(gap=0)
    with pytest.raises(ValueError, match="'norm/scale' has no factors"):
        transform().init(start() | {"norm": {"scale": jnp.ones(3)}})
    params = start()
    with pytest.raises(ValueError, match="merges factors into kernels: call"):
        transform().update(gradients(1), transform().init(params))


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
def test_a_restart_on_a_mesh_is_that_of_one_device(explicit):
    """Factors split on their outer sides, as a kernel's two, by different axes."""
    mesh = make_mesh(1, 2, 2, explicit=explicit)
    specs = {
        "kernel": P("tensor", "fsdp"),
        "lora_a": P("tensor", None),
        "lora_b": P(None, "fsdp"),
    }
    shardings = jax.tree.map_with_path(
        lambda path, x: NamedSharding(
            mesh, P(*(None,) * (x.ndim - 2), *specs[path[-1].key])
        ),
        start(),
    )
    tx = transform()
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), shardings)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for seed in range(1, GAP + 1):
            given = jax.device_put(gradients(seed), shardings)
            updates, state = update(given, state, params)
            params = optax.apply_updates(params, updates)
    expected, _ = run()[GAP]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), params, expected
    )
    if explicit:  # where the type of every array says how it is split
        assert jax.tree.map(lambda x: x.sharding, params) == shardings


# ------------------------------------------------------------------ the whole model

STEPS, SAVED_AT = 7, 2
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_heads=4, num_layers=2
)
OPTIMIZATION = OptimizerConfig("relora", rank=4, lora_alpha=4.0, relora_gap=3)


class Trained(NamedTuple):
    first: optax.Params  # before training
    losses: list[float]
    state: TrainState
    go_on: Callable[[TrainState, int], tuple[list[float], TrainState]]
    saved: Path  # the state after SAVED_AT steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Two restarts."""
    init_params, apply = functional_llama(CONFIG, OPTIMIZATION.adapter)
    optimizer = build_optimizer(OPTIMIZATION, learning_rate=0.02, steps=STEPS)
    loss_fn, schedule = next_token_loss(apply), optax.constant_schedule(0.02)
    step = make_train_step(loss_fn, optimizer, schedule)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 9), np.int32)
    batch = {"tokens": tokens, "weights": np.ones((8, 8), np.float32)}

    def go_on(state, steps):
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses, state

    state = create_state(init_params, optimizer, seed=0)
    first = jax.device_get(state.params)
    losses, state = go_on(state, SAVED_AT)
    saved = tmp_path_factory.mktemp("relora") / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(saved, state)
    more, state = go_on(state, STEPS - SAVED_AT)
    return Trained(first, losses + more, state, go_on, saved)


def test_a_llama_learns_across_restarts(trained):
    assert trained.losses[-1] < trained.losses[0] - 0.1
    # Seven updates of rank four: six are merged, in two matrices.
    for name in ("up_proj", "down_proj"):
        now, first = (
            tree["layers"]["mlp"][name]["kernel"]
            for tree in (trained.state.params, trained.first)
        )
        assert np.linalg.matrix_rank(now - first, tol=1e-5).tolist() == [8, 8]


def test_a_run_goes_on_through_restarts_bit_for_bit(trained):
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(trained.saved, abstract_like(trained.state))
    losses, state = trained.go_on(state, STEPS - SAVED_AT)
    assert losses == trained.losses[SAVED_AT:]
    jax.tree.map(np.testing.assert_array_equal, state, trained.state)
