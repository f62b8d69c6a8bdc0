"""The compiled step and the evaluation, against NumPy, in pieces and on a mesh."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments.configs.optimizer import OptimizerConfig
from experiments.training.mesh import batch_sharding, make_mesh
from experiments.training.optimizer import build_optimizer, takes_explicit_axes
from experiments.training.state import create_state, shardings_of
from experiments.training.step import (
    make_evaluate,
    make_train_step,
    next_token_loss,
)
from tests.experiments.training.toy import VOCAB, apply_toy, init_toy


def bigram(params, tokens):
    return params["table"].at[tokens].get(mode="fill")


def make_batch(size: int = 16, length: int = 6, seed: int = 0, vocab: int = VOCAB):
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(0, vocab, (size, length + 1), dtype=np.int32),
        "weights": random.integers(0, 2, (size, length)).astype(np.float32),
    }


def make_table():
    random = np.random.default_rng(9)
    return {"table": jnp.asarray(random.normal(size=(VOCAB, VOCAB)), jnp.float32)}


def reference(table, batch):
    """Weighted mean loss and its gradient in float64, token by token."""
    table = np.asarray(table, np.float64)
    loss, gradient = 0.0, np.zeros_like(table)
    for row, weights in zip(batch["tokens"], batch["weights"], strict=True):
        for here, there, weight in zip(row, row[1:], weights, strict=False):
            p = np.exp(table[here]) / np.exp(table[here]).sum()
            loss -= weight * np.log(p[there])
            p[there] -= 1
            gradient[here] += weight * p
    total = batch["weights"].sum()
    return loss / total, gradient / total


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_step_is_one_update_on_the_weighted_mean(microbatches):
    optimizer = optax.sgd(0.5)
    state = create_state(lambda key: make_table(), optimizer, seed=0)
    step = make_train_step(
        next_token_loss(bigram),
        optimizer,
        optax.constant_schedule(0.5),
        microbatches=microbatches,
    )
    batch = make_batch()
    loss, gradient = reference(make_table()["table"], batch)
    state, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["tokens"]) == batch["weights"].sum()
    assert float(metrics["learning_rate"]) == 0.5
    norm = np.linalg.norm(gradient)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["update_norm"]) == pytest.approx(0.5 * norm, rel=1e-5)
    expected = np.asarray(make_table()["table"]) - 0.5 * gradient
    np.testing.assert_allclose(state.params["table"], expected, atol=1e-6)
    assert int(state.step) == 1


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    # 256 pieces that each add 1 + 1/256: bfloat16 has no such sum.
    def loss(params, batch):
        return jnp.sum(params["w"] * batch["x"]).astype(jnp.float32), jnp.float32(1)

    optimizer = optax.sgd(1.0)
    state = create_state(
        lambda key: {"w": jnp.zeros((), jnp.bfloat16)}, optimizer, seed=0
    )
    step = make_train_step(
        loss, optimizer, optax.constant_schedule(1.0), microbatches=256
    )
    state, metrics = step(state, {"x": np.ones(256, np.float32)})
    assert float(metrics["gradient_norm"]) == pytest.approx(1.0, rel=1e-2)
    assert state.params["w"].dtype == jnp.bfloat16


def test_a_batch_without_weight_changes_nothing():
    optimizer = optax.sgd(0.5)
    state = create_state(lambda key: make_table(), optimizer, seed=0)
    step = make_train_step(
        next_token_loss(bigram), optimizer, optax.constant_schedule(0.5)
    )
    batch = make_batch()
    state, metrics = step(state, batch | {"weights": 0 * batch["weights"]})
    assert float(metrics["loss"]) == 0
    np.testing.assert_array_equal(state.params["table"], make_table()["table"])


def test_step_compiles_once_and_gives_up_the_old_state():
    optimizer = build_optimizer(
        OptimizerConfig(rank=4, update_proj_gap=2, history=3, residual="compensation"),
        learning_rate=1e-3,
        steps=10,
    )
    state = create_state(init_toy, optimizer, seed=0)
    step = make_train_step(
        next_token_loss(apply_toy), optimizer, optax.constant_schedule(1e-3)
    )
    old = jax.tree.leaves(state)
    for seed in range(4):
        state, _ = step(state, jax.device_put(make_batch(seed=seed)))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in old)


def test_evaluation_weighs_tokens_not_batches():
    batches = [make_batch(seed=1), make_batch(seed=2)]
    batches[1]["weights"][3:] = 0
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    expected, _ = reference(make_table()["table"], joined)
    evaluate = make_evaluate(next_token_loss(bigram), jax.device_put)
    assert evaluate(make_table(), batches) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        ("natural_galore", "matrix"),
        ("natural_galore", "model"),
        ("muon", "matrix"),
        ("optax_galore", "matrix"),
    ],
)
def test_a_mesh_trains_as_one_device_does(name, fisher):
    config = OptimizerConfig(
        name,
        rank=4,
        update_proj_gap=2,
        history=3,
        residual="compensation",
        fisher=fisher,
    )

    def train(mesh):
        optimizer = build_optimizer(config, learning_rate=1e-2, steps=10)
        state = create_state(init_toy, optimizer, seed=0, mesh=mesh)
        layout = None if mesh is None else shardings_of(state)
        step = make_train_step(
            next_token_loss(apply_toy),
            optimizer,
            optax.constant_schedule(1e-2),
            microbatches=2,
            shardings=layout,
        )
        losses = []
        for seed in range(3):
            batch = make_batch(seed=seed)
            sharding = None if mesh is None else batch_sharding(mesh)
            state, metrics = step(state, jax.device_put(batch, sharding))
            losses.append(float(metrics["loss"]))
        if mesh is not None:
            same = jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout
            )
            assert jax.tree.all(same)
            assert step._cache_size() == 1
        return state, losses

    expected_state, expected = train(None)
    mesh = make_mesh(data=2, fsdp=4, explicit=takes_explicit_axes(config))
    with jax.set_mesh(mesh):
        state, losses = train(mesh)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    kernel = state.params["layers"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "fsdp")
    np.testing.assert_allclose(
        kernel,
        expected_state.params["layers"]["up_proj"]["kernel"],
        atol=2e-4,
    )


# ------------------------------------------------------- steps that are not finite


def toy_run(explicit: bool | None):
    """An optimizer, and a mesh with the context that enters it, or none."""
    config = OptimizerConfig(
        rank=4, update_proj_gap=2, history=3, residual="compensation"
    )
    mesh = None if explicit is None else make_mesh(data=2, fsdp=4, explicit=explicit)
    optimizer = build_optimizer(config, learning_rate=1e-2, steps=10)
    context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    return optimizer, mesh, context


@pytest.mark.parametrize("explicit", [None, True, False])
def test_a_step_that_is_not_finite_changes_the_count_and_nothing_else(explicit):
    optimizer, mesh, context = toy_run(explicit)
    with context:
        state = create_state(init_toy, optimizer, seed=0, mesh=mesh)
        step = make_train_step(
            next_token_loss(apply_toy),
            optimizer,
            optax.constant_schedule(1e-2),
            shardings=None if mesh is None else shardings_of(state),
        )
        sharding = None if mesh is None else batch_sharding(mesh)
        state, metrics = step(state, jax.device_put(make_batch(seed=0), sharding))
        assert float(metrics["skipped"]) == 0
        before = jax.tree.map(np.asarray, state)
        batch = make_batch(seed=1)
        batch["weights"][3, 2] = np.inf
        state, metrics = step(state, jax.device_put(batch, sharding))
        assert float(metrics["skipped"]) == 1
        assert not np.isfinite(metrics["loss"])
        assert float(metrics["update_norm"]) == 0
        assert int(state.step) == 2
        after = jax.tree.map(np.asarray, state)._replace(step=before.step)
        chex.assert_trees_all_equal(after, before)
        state, metrics = step(state, jax.device_put(make_batch(seed=2), sharding))
        assert float(metrics["skipped"]) == 0
        assert step._cache_size() == 1
    kernel = before.params["layers"]["up_proj"]["kernel"]
    assert not np.array_equal(state.params["layers"]["up_proj"]["kernel"], kernel)


def test_a_gradient_that_is_not_finite_is_enough():
    def loss_fn(params, batch):
        # At 0 the square root is finite and its slope is not.
        return jnp.sum(jnp.sqrt(params["w"]) * batch["x"]), jnp.float32(1)

    optimizer = optax.adam(0.1)
    state = create_state(lambda key: {"w": jnp.zeros(3)}, optimizer, seed=0)
    step = make_train_step(loss_fn, optimizer, optax.constant_schedule(0.1))
    state, metrics = step(state, {"x": np.ones(3, np.float32)})
    assert float(metrics["loss"]) == 0 and float(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.params["w"], np.zeros(3))


def test_the_check_takes_no_second_copy_of_the_state():
    optimizer, _, _ = toy_run(None)
    state = create_state(init_toy, optimizer, seed=0)
    step = make_train_step(
        next_token_loss(apply_toy), optimizer, optax.constant_schedule(1e-2)
    )
    memory = step.lower(state, make_batch()).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size


@pytest.mark.parametrize("refresh", [False, True])
def test_the_steady_and_the_refresh_step_can_be_compiled_alone(refresh):
    optimizer, _, _ = toy_run(None)
    state = create_state(init_toy, optimizer, seed=0)
    step, both = (
        make_train_step(
            next_token_loss(apply_toy),
            optimizer,
            optax.constant_schedule(1e-2),
            refresh=chosen,
        )
        for chosen in (refresh, None)
    )
    # Only a refresh draws random numbers.
    assert ("threefry" in step.lower(state, make_batch()).as_text()) == refresh
    if refresh:
        copy = jax.tree.map(jnp.copy, state)
        alone, _ = step(state, make_batch())
        expected, _ = both(copy, make_batch())
        chex.assert_trees_all_close(alone, expected, rtol=1e-5, atol=1e-7)
