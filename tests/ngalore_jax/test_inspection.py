"""Bytes of a state, in total and by part."""

import jax
import jax.numpy as jnp
import optax
import pytest

import ngalore_jax as ng

M, N, R, S, LAYERS = 8, 12, 2, 5, 3
PARAMS = {
    "layers": {"w": jnp.zeros((LAYERS, M, N)), "norm": jnp.zeros((LAYERS, M))},
    "embed": jnp.zeros((10, M)),
}
COUNT = 4  # bytes of a counter
PARTS = {"basis", "history", "moments", "residual", "unprojected"}


def bytes_by_hand(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "galore": ng.galore(1e-3, R),
    "galore larger side": ng.galore(1e-3, R, side="larger"),
    "natural_galore": ng.natural_galore(1e-3, R, history=S),
    "bfloat16": ng.natural_galore(1e-3, R, history=S, history_dtype=jnp.bfloat16),
    "scheduled": ng.natural_galore(optax.linear_schedule(1.0, 0.0, 9), R),
    "reference": ng.reference(1e-3, R, "online_natural_galore"),
    "inside": ng.low_rank(ng.scale_by_natural_gradient(S), R),
    "outside": ng.scale_by_natural_gradient(S),
    "injected": optax.inject_hyperparams(
        ng.galore, static_args=("rank", "update_proj_gap")
    )(learning_rate=1e-3, rank=R),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_total_and_parts_add_up(name):
    state = OPTIMIZERS[name].init(PARAMS)
    total = ng.state_bytes(state)
    assert total == bytes_by_hand(state)
    report = ng.state_report(state)
    assert set(report) == PARTS
    assert sum(report.values()) == total
    # The same without allocating anything.
    abstract = jax.eval_shape(OPTIMIZERS[name].init, PARAMS)
    assert ng.state_bytes(abstract) == total
    assert ng.state_report(abstract) == report


def test_bytes_count_the_dtype():
    tree = {
        "a": jnp.zeros((3, 5), jnp.bfloat16),
        "b": jnp.zeros(7, jnp.int8),
        "c": jnp.zeros((), jnp.int32),
    }
    assert ng.state_bytes(tree) == 30 + 7 + 4
    assert ng.state_bytes({}) == 0


def test_each_part_is_what_the_formulas_say():
    report = ng.state_report(ng.natural_galore(1e-3, R, history=S).init(PARAMS))
    unprojected = LAYERS * M + 10 * M
    assert report == {
        "basis": 4 * LAYERS * M * R + COUNT,
        "history": LAYERS * (S * (R + 2) * N + 4 * S * S) + COUNT,
        "moments": 4 * LAYERS * 2 * R * N + COUNT,
        "residual": LAYERS * (M + 2) * N,  # momentum in int8, a scale a column
        "unprojected": 4 * 2 * unprojected + COUNT,
    }


def test_both_sides_and_what_moves_them_are_the_basis():
    tx = ng.reference(1e-3, R, "online_natural_galore", history=S)
    assert ng.state_report(tx.init(PARAMS)) == {
        "basis": 4 * LAYERS * 3 * (M + N) * R + 2 * COUNT,
        "history": 4 * LAYERS * (S * R * R + S * S) + COUNT,
        "moments": 4 * LAYERS * 2 * R * R + COUNT,
        "residual": 0,
        "unprojected": 4 * 2 * (LAYERS * M + 10 * M) + COUNT,
    }


def test_the_larger_side_has_the_larger_basis_and_the_smaller_moments():
    report = ng.state_report(ng.galore(1e-3, R, side="larger").init(PARAMS))
    assert report["basis"] == 4 * LAYERS * N * R + COUNT
    assert report["moments"] == 4 * LAYERS * 2 * R * M + COUNT


def test_natural_minus_galore_is_the_history():
    def size(tx):
        return ng.state_bytes(tx.init(PARAMS))

    def difference(history_dtype):
        tx = ng.natural_galore(
            1e-3, R, history=S, residual=None, history_dtype=history_dtype
        )
        return size(tx) - size(ng.galore(1e-3, R))

    assert difference(None) == 4 * LAYERS * (S * R * N + S * S) + COUNT
    assert difference(None) - difference("bfloat16") == 2 * LAYERS * S * R * N
    assert difference("bfloat16") - difference("int8") == LAYERS * S * (R - 2) * N


def test_whatever_lies_outside_low_rank_is_unprojected():
    for tx in (optax.adam(1e-3), ng.scale_by_natural_gradient(S)):
        state = tx.init(PARAMS)
        report = ng.state_report(state)
        assert report["unprojected"] == ng.state_bytes(state) > 0
