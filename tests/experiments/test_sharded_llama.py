"""Natural GaLore on a bf16 Llama with scanned layers, sharded over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from experiments.models.functional import functional_llama
from experiments.models.llama import LlamaConfig
from experiments.training.mesh import FSDP, batch_sharding, make_mesh
from experiments.training.state import abstract_like, create_state
from experiments.training.step import make_train_step, next_token_loss

GAP, SAVED_AT, STEPS = 4, 6, 30
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    num_layers=3,
    param_dtype="bfloat16",
    dtype="bfloat16",
)


def test_it_trains_and_survives_a_checkpoint_bit_for_bit(tmp_path):
    init_params, apply = functional_llama(CONFIG)
    schedule = optax.constant_schedule(0.02)
    optimizer = ng.natural_galore(schedule, rank=4, update_proj_gap=GAP, history=3)
    mesh = make_mesh(fsdp=8)
    tokens = np.random.default_rng(0).integers(0, 64, (16, 9), np.int32)
    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        state = create_state(init_params, optimizer, seed=0, mesh=mesh)
        layout = jax.tree.map(jax.typeof, state)
        gate = state.params["layers"]["mlp"]["gate_proj"]["kernel"]
        assert gate.dtype == jnp.bfloat16
        assert jax.typeof(gate).sharding.spec == P(None, None, FSDP)
        low_rank = state.opt_state[0].inner_states["low_rank"].inner_state
        basis = low_rank.projector["layers"]["mlp"]["gate_proj"]["kernel"]
        assert basis.shape == (3, 16, 4)
        assert low_rank.projector["lm_head"]["kernel"] == optax.MaskedNode()

        step = make_train_step(next_token_loss(apply), optimizer, schedule)
        batch = jax.device_put(
            {"tokens": tokens, "weights": np.ones((16, 8), np.float32)},
            batch_sharding(mesh),
        )

        def run(state, steps):
            losses = []
            for _ in range(steps):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            return state, losses

        state, before = run(state, SAVED_AT)
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract_like(state))
        assert jax.tree.map(jax.typeof, restored) == layout
        state, after = run(state, STEPS - SAVED_AT)
        restored, again = run(restored, STEPS - SAVED_AT)

        assert after[-1] < before[0] / 2
        assert after == again
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored)):
            np.testing.assert_array_equal(ours, theirs)
        assert step._cache_size() == 1
