"""Compiled updates of one optimizer that share one state."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngalore_jax as ng
from experiments.bench.optimizers import Peer


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled update `(gradients, state, params, count) -> (updates, state)`.

    Attributes:
        program: The compiled one; it gives up the state it is given.
        seconds: Time to trace, lower and compile it.
    """

    program: jax.stages.Compiled
    seconds: float


def compile_update(
    peer: Peer, shapes: Any, refresh: bool | None, *, keep_unused: bool = False
) -> Compiled:
    """Compiles the update of matrices.

    The counters of the state are an argument, so that one program can be run again and
    again at the same count.

    Args:
        peer: Whose update.
        shapes: Abstract parameters, and gradients.
        refresh: What `update` is told: False or True for the program of a steady step
            or of a refresh alone; None: the count decides.
        keep_unused: Whether arguments that are not looked at stay arguments.
    """
    optimizer = peer.make()
    told = {} if refresh is None else {"refresh": refresh}

    def update(gradients: Any, state: Any, params: Any, count: jax.Array) -> Any:
        state = optax.tree.set(state, count=count)
        return optimizer.update(gradients, state, params, **told)

    started = time.perf_counter()
    state = jax.eval_shape(optimizer.init, shapes)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    jitted = jax.jit(update, donate_argnums=1, keep_unused=keep_unused)
    program = jitted.lower(shapes, state, shapes, count).compile()
    return Compiled(program, time.perf_counter() - started)


class Updates:
    """One optimizer's updates of the same matrices, at whatever count is asked for.

    The state goes from call to call, whichever program is called.
    """

    def __init__(self, peer: Peer, gradients: Any, params: Any) -> None:
        """Makes the state; nothing is compiled yet."""
        self.peer = peer
        self._gradients, self._params = gradients, params
        self._shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
        )
        self._programs: dict[bool | None, jax.stages.Compiled] = {}
        self._state = jax.jit(peer.make().init)(params)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return ng.state_bytes(self._state)

    def compile(self, refresh: bool | None) -> None:
        """Compiles the program that `update(refresh=...)` is."""
        if refresh not in self._programs:
            compiled = compile_update(self.peer, self._shapes, refresh)
            self._programs[refresh] = compiled.program

    def run(self, calls: int, *, refresh: bool, alone: bool = False) -> None:
        """Does steady updates or refreshes, and waits for the last.

        Args:
            calls: How many.
            refresh: Whether each of them refreshes.
            alone: Whether a program that can do nothing else does it, not the one in
                which the count decides.
        """
        gap = self.peer.gap or 2
        count = gap + self.peer.first_refresh + (0 if refresh else 1)
        # NumPy's: one number is handed over, without a computation of its own.
        number = np.asarray(count, np.int32)
        program = self._programs[refresh if alone else None]
        updates = None
        for _ in range(calls):
            updates, self._state = program(
                self._gradients, self._state, self._params, number
            )
        jax.block_until_ready((updates, self._state))
