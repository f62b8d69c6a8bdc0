"""All processes of a run stop after the same step, whoever has the reason to.

Every step each process says whether it was asked to stop and whether it has the next
batch; the answer of the worst of them comes back a step later, as a step's metrics
do, so that no device waits. It is a collective of a few bytes. (JAX's own
`reached_preemption_sync_point` serves one caller that counts up; Orbax calls it too,
from a thread, with the step of the save that ends, which can let processes miss each
other.)
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# What a process says: the signal it caught (0: none), and of its next batch how bad it
# is (0: it is there).
Word = tuple[int, int]


def exchange(word: Callable[[], Word]) -> Callable[[], Word]:
    """Starts to tell the other processes; all of them call it, once a step.

    Args:
        word: What this process has to say.

    Returns:
        A function that waits for the largest of both numbers among all processes.
        Alone, a process hears itself, and what it says then.
    """
    if jax.process_count() == 1:
        return word
    largest = _largest(word())

    def wait() -> Word:
        number, lacking = np.asarray(largest)
        return int(number), int(lacking)

    return wait


def _largest(mine: Word) -> jax.Array:
    sharding, compiled = _program()
    devices = len(jax.local_devices())
    local = np.tile(np.array(mine, np.int32), (devices, 1))
    # The mesh of the model, which the caller has entered, is another.
    with jax.set_mesh(sharding.mesh):
        return compiled(jax.make_array_from_process_local_data(sharding, local))


@functools.cache
def _program() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    compiled = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("all")), compiled
