"""What changes while training: parameters, optimizer state, step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from experiments.training.mesh import param_shardings, placed, state_shardings


class TrainState(NamedTuple):
    """The whole state of training; a checkpoint holds it and the data position."""

    params: optax.Params  # nested dictionaries of arrays
    opt_state: optax.OptState
    step: jax.Array  # () int32, updates done


def create_state(
    init_params: Callable[[jax.Array], optax.Params],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh | None = None,
    pretrained: Callable[[optax.Params], optax.Params] | None = None,
) -> TrainState:
    """Makes the initial state on the devices, compiled, so that it is born sharded.

    Args:
        init_params: Makes the parameters from a PRNG key.
        optimizer: Makes its state from the parameters.
        seed: Seed of the key.
        mesh: Where the state is laid out by `mesh.ShardingRules`; the caller has
            entered it with `jax.set_mesh`. None: on one device.
        pretrained: Returns parameters like those that were made, with other values.
    """
    key = jax.random.key(seed)
    init = _initial(optimizer)
    if mesh is None:
        # Committed to a device, as a restored state is: one program serves both.
        of_params = of_state = SingleDeviceSharding(jax.devices()[0])
    else:
        abstract = jax.eval_shape(init_params, key)
        of_params = param_shardings(abstract, mesh)
        of_state = state_shardings(init, abstract, mesh)
    params = init_program(init_params, of_params)(key)
    if pretrained is not None:
        params = pretrained(params)
    return jax.jit(init, out_shardings=of_state, donate_argnums=0)(params)


def init_program(
    init_params: Callable[[jax.Array], optax.Params], shardings: Any
) -> Callable[[jax.Array], optax.Params]:
    """Compiles `init_params` so that each device makes its part of the parameters."""
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # The type of explicit random numbers is whole: so they would be made.
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        init_params = jax.sharding.auto_axes(init_params, out_sharding=specs)
    return jax.jit(init_params, out_shardings=shardings)


def abstract_state(
    init_params: Callable[[jax.Array], optax.Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Returns what `create_state` would make: shapes, dtypes and shardings."""
    init = _initial(optimizer)
    params = jax.eval_shape(init_params, jax.random.key(0))
    shardings = state_shardings(init, params, mesh)
    return placed(jax.eval_shape(init, params), shardings)


def abstract_like(state: TrainState) -> TrainState:
    """Returns the shapes, dtypes and shardings of `state`, without its arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def give_up(state: TrainState) -> TrainState:
    """Deletes the arrays of `state` and returns what `abstract_like` would.

    For where another state takes its place: devices that hold one need not hold two.
    """
    abstract = abstract_like(state)
    for array in jax.tree.leaves(state):
        array.delete()
    return abstract


def shardings_of(state: TrainState) -> TrainState:
    """Returns the sharding of every leaf of `state`, which may be abstract."""
    return jax.tree.map(lambda x: x.sharding, state)


def _initial(
    optimizer: optax.GradientTransformation,
) -> Callable[[optax.Params], TrainState]:
    def init(params: optax.Params) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return init
