"""Orbax: a state that is saved and restored goes on bit for bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from tests.ngalore_jax.transforms import gradients

GAP, SAVED_AT, STEPS = 3, 2, 5  # refreshes at 0 and, after the restart, at 3


def transform():
    return ng.natural_galore(
        0.1, rank=2, update_proj_gap=GAP, history=3, history_dtype=jnp.bfloat16
    )


def params():
    """A stacked leaf that is projected and one that Adam owns."""
    keys = jax.random.split(jax.random.key(0))
    return {
        "layers": jax.random.normal(keys[0], (2, 8, 16)).astype(jnp.bfloat16),
        "embed": jax.random.normal(keys[1], (8, 4)),
    }


def continue_from(update, state, stream, weights):
    """Updates of the rest of the stream, and the last state."""
    updates = []
    for gradient in stream:
        u, state = update(gradient, state, weights)
        updates.append(u)
    return updates, state


def test_standard_checkpointer(tmp_path):
    tx, weights = transform(), params()
    update, stream = jax.jit(tx.update), gradients(weights, STEPS)
    _, state = continue_from(update, tx.init(weights), stream[:SAVED_AT], weights)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(tx.init, weights)
        )
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(
        continue_from(update, restored, stream[SAVED_AT:], weights),
        continue_from(update, state, stream[SAVED_AT:], weights),
    )


def test_checkpoint_manager_with_explicit_shardings(tmp_path):
    """Both sides of the matrices sharded, over two mesh axes."""
    tx = transform()
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    shardings = {
        "layers": NamedSharding(mesh, P(None, "x", "y")),
        "embed": NamedSharding(mesh, P("x")),
    }
    host = jax.tree.map(np.asarray, [params(), *gradients(params(), STEPS)])
    with jax.set_mesh(mesh), ocp.CheckpointManager(tmp_path) as manager:
        weights, *stream = [jax.device_put(x, shardings) for x in host]
        update = jax.jit(tx.update)
        _, state = continue_from(update, tx.init(weights), stream[:SAVED_AT], weights)
        manager.save(SAVED_AT, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, jax.typeof(x).sharding.spec),
            ),
            jax.eval_shape(tx.init, weights),
        )
        restored = manager.restore(SAVED_AT, args=ocp.args.StandardRestore(abstract))
        assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, state)
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal(
            continue_from(update, restored, stream[SAVED_AT:], weights),
            continue_from(update, state, stream[SAVED_AT:], weights),
        )
