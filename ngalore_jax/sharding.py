"""Shardings of state from shardings of parameters.

Under an explicit mesh (the default of ``jax.make_mesh``) every array's type says
how it is sharded. The library's state follows the parameters: a basis
``(..., m, r)`` keeps the parameter's batch sharding and is replicated over the
matrix axes, anything ``(..., r, n)`` also keeps the sharding of ``n``. So with the
side ``n`` sharded (FSDP on the side that is not projected), projection, Adam, the
natural gradient and the projection back run on local shards.

The matrix maths itself runs with automatic axes, its outputs pinned to those
types: factorisations are not defined on explicitly sharded operands. Without an
explicit mesh everything here is the identity.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngalore_jax.matrices import MatrixView

Spec = jax.sharding.PartitionSpec


def spec_of(x: Any) -> Spec:
    """Explicit partition spec of an array or ShapeDtypeStruct, an entry an axis."""
    spec = jax.typeof(x).sharding.spec
    return Spec(*spec, *[None] * (len(x.shape) - len(spec)))


class LeafSpecs(NamedTuple):
    """Specs of a projected leaf's state."""

    basis: Spec  # (..., m, r), and (..., r, r)
    low: Spec  # (..., r, n)
    columns: Spec  # (..., n)
    batch: Spec  # (...)


def leaf_specs(view: MatrixView, leaf: Any) -> LeafSpecs:
    """Specs of the state of a leaf: batch axes and kept side as in the leaf."""
    spec = spec_of(leaf)
    batch = [spec[axis] for axis in view.batch]
    # Of several merged axes only the major one can stay sharded in the merged axis.
    minor = [spec[axis] for axis in view.kept[1:]]
    kept = spec[view.kept[0]] if all(axis is None for axis in minor) else None
    return LeafSpecs(
        Spec(*batch, None, None),
        Spec(*batch, None, kept),
        Spec(*batch, kept),
        Spec(*batch),
    )


def zeros(shape: tuple[int, ...], dtype: Any, spec: Spec) -> jax.Array:
    """Zeros of the given explicit sharding."""
    return jnp.zeros(shape, dtype, out_sharding=_used(spec))


def eye(shape: tuple[int, ...], dtype: Any, spec: Spec) -> jax.Array:
    """Batch of identity columns ``(..., m, r)`` of the given explicit sharding."""
    identity = jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)
    return identity if _used(spec) is None else jax.sharding.reshard(identity, spec)


def pinned(fn: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Runs ``fn`` with automatic mesh axes and explicit types on its outputs.

    Args:
      fn: Function of arrays; it may close over static values, not over arrays.
      out_specs: Tree of partition specs like the output of ``fn``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=out_specs)


def _used(spec: Spec) -> Spec | None:
    return spec if any(axis is not None for axis in spec) else None
