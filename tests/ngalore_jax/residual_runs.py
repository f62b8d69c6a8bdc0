"""One leaf driven through a residual rule, for the tests of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngalore_jax as ng


def run(tx, stream):
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(stream[0].shape))
    updates, states = [], []
    for g in stream:
        u, state = update(jnp.asarray(g, jnp.float32), state)
        updates.append(np.asarray(u, np.float64))
        states.append(state)
    return updates, states


def only_residual(residual, rank=2, gap=3, scale=1.0, **settings):
    """``low_rank`` whose inside is silent: updates are the added term alone."""
    silent = optax.set_to_zero()
    return ng.low_rank(silent, rank, gap, scale, residual=residual, **settings)
