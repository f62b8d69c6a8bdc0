"""Gradients that the optimizer adds up itself, inside its subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from experiments.configs.optimizer import OptimizerConfig
from experiments.training.optimizer import _PROJECTORS, build_optimizer
from experiments.training.state import create_state
from experiments.training.step import make_train_step, next_token_loss
from tests.experiments.training.toy import VOCAB, apply_toy, init_toy

PIECES, GAP = 4, 2


def batches(steps):
    random = np.random.default_rng(0)
    return [
        {
            "tokens": random.integers(0, VOCAB, (16, 7), dtype=np.int32),
            # The pieces weigh differently.
            "weights": random.integers(0, 2, (16, 6)).astype(np.float32),
        }
        for _ in range(steps)
    ]


def fixed_basis(gradient, basis, count):
    """The same whatever the gradient: both ways then project to one subspace."""
    del gradient, count
    return jnp.linalg.qr(jax.random.normal(jax.random.key(3), basis.shape))[0]


def run(accumulate, steps=5, **changes):
    """Losses and parameters of a few steps, gradients added up here or there."""
    settings = dict(optimizer="galore", rank=4, update_proj_gap=GAP, weight_decay=0.1)
    config = OptimizerConfig(**{**settings, **changes})
    optimizer = build_optimizer(
        config,
        learning_rate=0.1,
        steps=steps,
        accumulation_steps=PIECES if accumulate == "subspace" else None,
    )
    step = make_train_step(
        next_token_loss(apply_toy),
        optimizer,
        optax.constant_schedule(0.1),
        microbatches=PIECES,
        by_piece=accumulate == "subspace",
    )
    state, rows = create_state(init_toy, optimizer, seed=0), []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


@pytest.mark.parametrize("optimizer", ["galore", "natural_galore"])
def test_adding_up_in_the_subspace_takes_the_same_steps(optimizer, monkeypatch):
    monkeypatch.setitem(_PROJECTORS, "subspace_iteration", lambda: fixed_basis)
    changes = dict(optimizer=optimizer, history=3, damping=1.0)
    there, rows = run("subspace", **changes)
    here, expected = run("full", **changes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        there.params,
        here.params,
    )
    assert int(there.step) == 5
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("loss", "tokens", "learning_rate", "update_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3), name
        assert row["skipped"] == 0 and row["gradient_norm"] > 0


def test_no_sum_of_whole_matrices_is_kept():
    """Only projected ones are, from one microbatch to the next."""
    config = OptimizerConfig(optimizer="galore", rank=2)
    weights = {"layers": {"kernel": jax.ShapeDtypeStruct((64, 64, 96), jnp.float32)}}
    whole = ng.state_bytes(weights)

    def state_size(accumulation_steps):
        optimizer = build_optimizer(
            config,
            learning_rate=0.1,
            steps=5,
            accumulation_steps=accumulation_steps,
        )
        return ng.state_bytes(jax.eval_shape(optimizer.init, weights))

    assert 0 < state_size(PIECES) - state_size(None) < whole / 20


def test_a_piece_that_is_not_finite_is_skipped():
    def loss_fn(params, batch):
        loss, weight = next_token_loss(apply_toy)(params, batch)
        return jnp.where(jnp.any(batch["bad"]), jnp.nan, loss), weight

    optimizer = build_optimizer(
        OptimizerConfig(optimizer="galore", rank=4),
        learning_rate=0.1,
        steps=5,
        accumulation_steps=PIECES,
    )
    step = make_train_step(
        loss_fn,
        optimizer,
        optax.constant_schedule(0.1),
        microbatches=PIECES,
        by_piece=True,
    )
    state = create_state(init_toy, optimizer, seed=0)
    before = jax.tree.map(np.asarray, state.params)
    batch = batches(1)[0] | {"bad": np.arange(16) == 0}
    state, metrics = step(state, batch)
    assert float(metrics["skipped"]) == 1 and float(metrics["update_norm"]) > 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params)):
        assert np.isfinite(new).all() and np.any(old != new)
    state, metrics = step(state, batch | {"bad": np.zeros(16, bool)})
    assert float(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"])
