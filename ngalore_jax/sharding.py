"""Shardings of state from shardings of parameters.

Under an explicit mesh (the default of ``jax.make_mesh``) every array's type says
how it is sharded. The library's state follows the parameters: a basis
``(..., m, r)`` keeps the parameter's batch sharding and is replicated over the
matrix axes, anything ``(..., r, n)`` also keeps the sharding of ``n``. So with the
side ``n`` sharded (FSDP on the side that is not projected), projection, Adam, the
natural gradient and the projection back run on local shards. Where ``m`` is sharded
instead, as when ``n`` does not divide, ``r`` is sharded like it, if it divides: the
state is as small, and a step sends ``2 r n`` numbers per matrix.

The matrix maths itself runs with automatic axes, its outputs pinned to those
types: factorisations are not defined on explicitly sharded operands. A refresh moves
each stack of matrices to "one's own matrices on every device" (:func:`spread`) and
back; a steady update does so for the residual that orthogonalises alone. Without a
mesh everything here is the identity.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngalore_jax.matrices import MatrixView

Spec = jax.sharding.PartitionSpec


def spec_of(x: Any) -> Spec:
    """Explicit partition spec of an array or ShapeDtypeStruct, an entry per axis."""
    spec = jax.typeof(x).sharding.spec
    return Spec(*spec, *[None] * (len(x.shape) - len(spec)))


def known(spec: Spec) -> Spec:
    """A spec where types tell it; on automatic axes, whatever the compiler chooses."""
    if jax.sharding.get_abstract_mesh().explicit_axes:
        return spec
    return Spec(*[Spec.UNCONSTRAINED] * len(spec))


class LeafSpecs(NamedTuple):
    """Specs of a projected leaf's state."""

    basis: Spec  # (..., m, r), and (..., r, r)
    used_basis: Spec  # (..., m, r), m split like the leaf, for products with it
    low: Spec  # (..., r, n)
    matrix: Spec  # (..., m, n)
    columns: Spec  # (..., n)
    batch: Spec  # (...)


def leaf_specs(view: MatrixView, leaf: Any) -> LeafSpecs:
    """Specs of the state of a leaf: batch axes and kept side as in the leaf."""
    spec = spec_of(leaf)
    batch = [spec[axis] for axis in view.batch]

    def side(axes: tuple[int, ...]) -> Any:
        # Of several merged axes only the major one can stay sharded in the merged axis.
        major, *minor = [spec[axis] for axis in axes]
        return major if all(axis is None for axis in minor) else None

    projected, kept = side(view.projected), side(view.kept)
    # Neither the projections nor what is kept of them is whole on every device.
    parts = _parts(projected)
    split_rank = parts > 1 and _parts(kept) == 1 and view.rank % parts == 0
    return LeafSpecs(
        basis=Spec(*batch, None, None),
        used_basis=Spec(*batch, projected, None),
        low=Spec(*batch, projected if split_rank else None, kept),
        matrix=Spec(*batch, projected, kept),
        columns=Spec(*batch, kept),
        batch=Spec(*batch),
    )


def zeros(shape: tuple[int, ...], dtype: Any, spec: Spec) -> jax.Array:
    """Zeros of the given explicit sharding."""
    return jnp.zeros(shape, dtype, out_sharding=_used(spec))


def repeat(matrix: jax.Array, batch: tuple[int, ...], spec: Spec) -> jax.Array:
    """A matrix for every member of a batch, of the given explicit sharding."""
    repeated = jnp.broadcast_to(matrix, (*batch, *matrix.shape))
    return repeated if _used(spec) is None else jax.sharding.reshard(repeated, spec)


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


def split(x: jax.Array, spec: Spec) -> jax.Array:
    """Inside :func:`pinned`: takes one's own part of a copied array, if it has parts.

    For the factor beside a split one. The compiler may otherwise gather that one, a
    whole gradient, instead of adding up the smaller products of the parts.
    """
    return x if _used(spec) is None else jax.lax.with_sharding_constraint(x, spec)


def spreading_axes(view: MatrixView, leaf: Any) -> tuple[str, ...]:
    """Mesh axes that :func:`spread` lays a leaf's matrices over, in this order.

    First those that the batch is split over already, then those that hold copies, then
    those of the two sides. Of several on one side the minor one goes first: what is
    left of the side is then whole blocks. On automatic axes, where an array's type does
    not tell, the order is the mesh's.

    Returns:
      The axes; none without a mesh, where no device would have fewer matrices, and
      where a batch axis other than the first is split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not view.batch:
        return ()
    spec = [_axes(entry) for entry in spec_of(leaf)]
    first, *rest = [spec[axis] for axis in view.batch]
    if any(rest):
        return ()
    sides = [a for axis in view.projected + view.kept for a in reversed(spec[axis])]
    free = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind != jax.sharding.AxisType.Manual and name not in (*first, *sides)
    ]
    axes = tuple(a for a in (*first, *free, *sides) if mesh.shape[a] > 1)
    matrices = math.prod(view.batch_shape)
    now, then = (
        -(-matrices // math.prod(mesh.shape[a] for a in split))
        for split in (first, axes)
    )
    return axes if then < now else ()


def spread(
    fn: Callable[..., Any], axes: tuple[str, ...], out_spec: Spec
) -> Callable[..., Any]:
    """Runs ``fn`` on matrices, each device on its own ones.

    For use inside :func:`pinned`, or on automatic axes. What a device is given is
    whole matrices, so ``fn`` communicates nothing. A number of matrices that the
    devices do not divide is filled up with zeros.

    Args:
      fn: ``(gradient (..., m, n), basis (..., m, r), count ()) -> tree`` of arrays
        ``(..., a, b)``, where each matrix depends on its own operands alone.
      axes: From :func:`spreading_axes`; none runs ``fn`` as it is.
      out_spec: Spec of every array of the result; its first entry is how the batch is
        split already. From :func:`known`, it may leave that to the compiler.
    """
    if not axes:
        return fn
    kept = len({*_axes(out_spec[0])} & {*axes})
    sides = [_axes(entry) for entry in out_spec[-2:]]
    unconstrained = Spec.UNCONSTRAINED
    told = unconstrained not in sides[0]

    def run(gradient: jax.Array, basis: jax.Array, count: jax.Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        batch = gradient.shape[:-2]
        matrices = math.prod(batch)
        padding = -matrices % math.prod(mesh.shape[axis] for axis in axes)

        def stack(x: jax.Array) -> jax.Array:
            x = x.reshape(matrices, *x.shape[-2:])
            return jnp.pad(x, ((0, padding), (0, 0), (0, 0)))

        def unstack(x: jax.Array) -> jax.Array:
            # Back likewise, each axis to the side that it splits, which the compiler
            # finds out where types do not tell; then the copies.
            for used in reversed(range(kept, len(axes))):
                if told and not any(axes[used] in side for side in sides):
                    break
                left = [
                    tuple(a for a in side if a in axes[used:]) or None
                    if told
                    else unconstrained
                    for side in sides
                ]
                spec = Spec(axes[:used] or None, *left)
                x = jax.lax.with_sharding_constraint(x, spec)
            x = x[:matrices].reshape(*batch, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, out_spec)

        gradient = stack(gradient)
        # One mesh axis after the other, each an all-to-all or a local slice. To move
        # several at once the compiler may gather the whole stack on every device.
        for used in range(kept, len(axes)):
            gradient = jax.lax.with_sharding_constraint(
                gradient, Spec(axes[:used] or None, unconstrained, unconstrained)
            )
        own = jax.shard_map(
            fn,
            in_specs=(Spec(axes), Spec(axes), Spec()),
            out_specs=Spec(axes),
            axis_names=set(mesh.auto_axes),
            check_vma=False,  # a projector need not know about mesh axes
        )
        return jax.tree.map(unstack, own(gradient, stack(basis), count))

    return run


def _axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a spec, major first."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _parts(entry: Any) -> int:
    """Devices over which an entry of a spec splits its axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _axes(entry))


def _used(spec: Spec) -> Spec | None:
    return spec if any(axis is not None for axis in spec) else None
