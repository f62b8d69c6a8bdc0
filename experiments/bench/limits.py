"""What the machine can do, and the least time that an update could take on it.

The limit of an update is the larger of two times: that of moving what it must read and
write, at the bandwidth of a stream, and that of its matrix products, at the rate of a
large product; both rates are measured in the same run.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ngalore_jax as ng
from experiments.bench.optimizers import Peer
from experiments.bench.shapes import sides
from experiments.models.formats import Dtype

_STREAM_ELEMENTS = 1 << 25  # 128 MiB in float32: more than caches hold
_PRODUCT_SIDE = 2048
_ROUNDS = 10
_NEWTON_SCHULZ_STEPS = 5  # of optax.contrib.muon and ngalore_jax.orthogonal


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Attributes:
        stream: Bytes read and written by `y <- a x + y`, arrays in float32.
        products: Multiply-adds of a product of square matrices, counted as two; by
            dtype, at JAX's default precision.
    """

    stream: float
    products: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Work:
    """What an update cannot do without.

    Attributes:
        bytes: Read and written, each array once.
        flops: Of matrix products.
    """

    bytes: float
    flops: float

    def figures(self, rates: Rates, seconds: float, dtype: Dtype) -> dict[str, float]:
        """Returns the limit in milliseconds, and how many times that it took.

        Args:
            rates: Of the machine.
            seconds: What the update took.
            dtype: Of the gradients, whose products are at the better of this rate and
                float32's.
        """
        move = self.bytes / rates.stream
        multiply = self.flops / max(rates.products["float32"], rates.products[dtype])
        return {
            "bytes_moved_mb": self.bytes / 1e6,
            "products_gflop": self.flops / 1e9,
            "limit_ms": 1e3 * max(move, multiply),
            "limit_no_overlap_ms": 1e3 * (move + multiply),
            "times_limit": seconds / max(move, multiply),
        }


def measure_rates(elements: int = _STREAM_ELEMENTS, side: int = _PRODUCT_SIDE) -> Rates:
    """Measures the default device: the best of several rounds, for a limit is one.

    Args:
        elements: Of each array of the stream.
        side: Of the matrices.
    """
    add = jax.jit(lambda x, y: 0.5 * x + y, donate_argnums=1)
    x, y = jnp.ones(elements), jnp.ones(elements)

    def stream() -> None:
        nonlocal y
        y = jax.block_until_ready(add(x, y))

    products = {}
    for dtype in ("float32", "bfloat16"):
        matrix = jnp.full((side, side), 1 / side, dtype)
        multiply = functools.partial(jax.jit(jnp.matmul), matrix, matrix)
        seconds = _best(lambda call=multiply: jax.block_until_ready(call()))
        products[dtype] = 2 * side**3 / seconds
    return Rates(3 * x.nbytes / _best(stream), products)


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    call()
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def steady_work(peer: Peer, shapes: Any) -> Work:
    """Counts what a steady update must do.

    Gradients are read, updates written, the state is read; all of it is written but
    the bases and the gradients of the past.
    """
    state = jax.eval_shape(peer.make().init, shapes)
    kept = _bytes_under(state, "projector") + _bytes_under(state, "projections")
    history = _bytes_under(state, "history")
    slots = max(1, peer.history)
    written = ng.state_bytes(state) - kept - history * (1 - 1 / slots)
    moved = 2 * ng.state_bytes(shapes) + ng.state_bytes(state) + written
    flops = sum(count * _steady_products(peer, m, n) for count, m, n in sides(shapes))
    return Work(moved, flops)


def refresh_work(peer: Peer, shapes: Any) -> Work | None:
    """Counts what a refresh by one subspace iteration must do; None of other refreshes.

    On top of a steady update: `G (G^T P)`, 4 m n r; Q of `(m, r)`, 4 m r^2; the
    rotation, 2 m r^2; the past and both moments in the new basis, 2 r^2 n each; the
    bases and the whole past are written.
    """
    if not peer.two_programs or peer.rank is None:
        return None
    state = jax.eval_shape(peer.make().init, shapes)
    history = _bytes_under(state, "history")
    steady, r = steady_work(peer, shapes), peer.rank
    flops = sum(
        count * (4 * m * n * r + 6 * m * r**2 + 2 * r**2 * n * (peer.history + 2))
        for count, m, n in sides(shapes)
    )
    slots = max(1, peer.history)
    moved = _bytes_under(state, "projector") + history * (1 - 1 / slots)
    return Work(steady.bytes + moved, steady.flops + flops)


def _steady_products(peer: Peer, m: int, n: int) -> float:
    """Operations of the products of one matrix, m its smaller side."""
    flops = 0 if peer.rank is None else 4 * m * n * min(peer.rank, m)
    residual = None if peer.run is None else peer.run.optimization.residual
    if peer.name == "muon" or (peer.rank is not None and residual == "orthogonal"):
        # X X^T, its square, and a product with X.
        flops += _NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)
    return flops


def _bytes_under(state: Any, field: str) -> float:
    """Bytes of all leaves below a field of that name."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if any(getattr(key, "name", None) == field for key in path):
            total += ng.state_bytes(leaf)
    return float(total)
