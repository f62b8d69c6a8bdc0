"""What an optimizer step of a sharded Llama moves; its losses on every layout."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig
from experiments.training.mesh import batch_sharding, make_mesh
from experiments.training.state import create_state, shardings_of
from experiments.training.step import make_train_step, next_token_loss
from tests.collectives import collectives
from tests.sharded_update import compiled_update, factorised, matrices

LAYERS, D, F, RANK, HISTORY = 3, 32, 96, 4, 3
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=D,
    intermediate_size=F,
    num_heads=8,
    num_kv_heads=4,
    num_layers=LAYERS,
)
MULTI_HEAD = dataclasses.replace(CONFIG, num_kv_heads=None)
OPTIMIZERS = {
    "natural_galore": lambda: ng.natural_galore(
        0.01, RANK, update_proj_gap=2, history=HISTORY, residual=1.0
    ),
    "galore": lambda: ng.galore(0.01, RANK, update_proj_gap=2),
    "adamw": lambda: optax.adamw(0.01),
    "orthogonal": lambda: ng.natural_galore(0.01, RANK, history=HISTORY),
}
LAYOUTS = pytest.mark.parametrize(
    "layout", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4)], ids=str
)


def moved(config, layout, name, *, explicit=True, refresh=False):
    """Elements that one update's collectives produce, by kind and dtype."""
    program = compiled_update(
        OPTIMIZERS[name](),
        matrices(config),
        make_mesh(*layout, explicit=explicit),
        refresh=refresh,
    )
    total = collections.Counter()
    for kind, dtype, size in collectives(program):
        total[kind, dtype] += size
    return dict(total)


def expected(config, layout, name):
    """Numbers a matrix, and low-rank gradients where tensor cuts the projected side."""
    _, fsdp, tensor = layout
    kernels = 7 * LAYERS
    found = {("all-reduce", "pred"): kernels}  # is it finite?
    numbers = 0
    if tensor > 1:
        grouped = config.num_kv_heads is not None
        projected = 3 if grouped else 1  # o_proj, and k_proj and v_proj if smaller
        rows = RANK + (name == "natural_galore")  # the residual's energy of a column
        numbers += projected * LAYERS * rows * D // fsdp
    if name == "natural_galore":
        numbers += kernels * (HISTORY + 1)  # row of the Gram matrix, residual's norm
    if numbers:
        found["all-reduce", "f32"] = numbers
    return found


@LAYOUTS
@pytest.mark.parametrize("config", [CONFIG, MULTI_HEAD], ids=["grouped", "multi-head"])
def test_a_steady_update_moves_no_matrix(config, layout):
    name = "natural_galore"
    assert moved(config, layout, name) == expected(config, layout, name)


@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["natural_galore", "galore"])
def test_nor_does_one_on_auto_axes(layout, name):
    found = moved(CONFIG, layout, name, explicit=False)
    assert found == expected(CONFIG, layout, name)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    "layout", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)], ids=str
)
def test_what_is_orthogonalised_comes_back_without_a_sum_of_whole_matrices(
    layout, explicit
):
    """By all-to-all, an axis at a time; copies of it by all-gather."""
    found = collections.defaultdict(list)
    program = compiled_update(
        OPTIMIZERS["orthogonal"](),
        matrices(MULTI_HEAD),
        make_mesh(*layout, explicit=explicit),
        refresh=False,
    )
    for kind, _, size in collectives(program):
        found[kind].append(size)
    assert max(found["all-reduce"]) < LAYERS * D * D
    assert found["all-to-all"] and bool(found["all-gather"]) == (layout[0] > 1)


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_refresh_gives_each_device_layers_of_its_own(layout):
    program = compiled_update(
        OPTIMIZERS["galore"](),
        matrices(MULTI_HEAD),
        make_mesh(*layout),
        refresh=True,
    )
    # Three layers filled up to eight, of each kernel.
    assert factorised(program, RANK) == 7
    kinds = {kind for kind, _, _ in collectives(program)}
    assert kinds == {"all-to-all", "all-reduce"}


@functools.cache
def losses(name, layout=None, explicit=True):
    """Losses of four training steps, with refreshes at the first and the third."""
    init_params, apply = functional_llama(CONFIG)
    tx = OPTIMIZERS[name]()
    tokens = np.random.default_rng(0).integers(0, 64, (8, 21), np.int32)
    batch = {"tokens": tokens, "weights": np.ones((8, 20), np.float32)}
    mesh = None if layout is None else make_mesh(*layout, explicit=explicit)
    with jax.set_mesh(mesh) if mesh else jax.default_matmul_precision("float32"):
        state = create_state(init_params, tx, seed=0, mesh=mesh)
        step = make_train_step(
            next_token_loss(apply),
            tx,
            optax.constant_schedule(0.01),
            shardings=mesh and shardings_of(state),
        )
        batch = jax.device_put(batch, mesh and batch_sharding(mesh))
        found = []
        for _ in range(4):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    return jnp.asarray(found)


@pytest.mark.parametrize(
    ("name", "layout", "explicit"),
    [
        ("natural_galore", (2, 2, 2), True),
        ("natural_galore", (2, 2, 2), False),
        ("galore", (1, 2, 4), True),
        ("galore", (1, 1, 2), False),
        ("adamw", (1, 4, 2), True),
    ],
    ids=str,
)
def test_losses_are_those_of_one_device(name, layout, explicit):
    alone = losses(name)
    assert alone[-1] < alone[0] - 0.2
    np.testing.assert_allclose(losses(name, layout, explicit), alone, rtol=2e-6)
