"""How one leaf goes through ``low_rank``: state shapes, shardings and stages.

Both kinds of leaf answer the same calls, so the tree code asks no questions. The
maths is in :mod:`ngalore_jax.projection`; here it meets shapes and shardings.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import projection, sharding, storage
from ngalore_jax.matrices import MatrixView, work_dtype
from ngalore_jax.orthogonalized import Orthogonal, outside_orthogonal
from ngalore_jax.projectors import Projector, first_basis
from ngalore_jax.residual import Residual, ResidualState

_NOTHING = optax.MaskedNode()
# Of a momentum's rounding; moments inside the subspace have small even and odd ones.
_MOMENTUM_SALT = 2**31


@dataclasses.dataclass(frozen=True)
class ProjectedLeaf:
    """A leaf seen as matrices, one side of which is projected.

    Attributes:
      view: The leaf as ``(*batch, m, n)``.
      projector: What refreshes its basis.
      residual: Rule for the gradient outside the subspace, or None.
      basis_dtype: Storage dtype of the basis, None for the work dtype.
    """

    view: MatrixView
    projector: Projector
    residual: Residual | Orthogonal | None
    basis_dtype: jnp.dtype | None

    def basis(self, leaf: Any) -> storage.Stored:
        """First basis: :func:`projectors.first_basis`, ``(*batch, m, r)``."""
        codec = self._codec(leaf)
        first = first_basis(self.view.m, self.view.rank, work_dtype(leaf))
        return jax.tree.map(
            lambda part, spec: sharding.repeat(part, self.view.batch_shape, spec),
            codec.encode(first),
            codec.specs(self._specs(leaf).basis),
        )

    def low(self, leaf: Any) -> jax.Array:
        """Zeros like the projected gradient, ``(*batch, r, n)``."""
        shape = (*self.view.batch_shape, self.view.rank, self.view.n)
        return sharding.zeros(shape, work_dtype(leaf), self._specs(leaf).low)

    def outside(self, leaf: Any) -> ResidualState:
        """Zeros that the residual starts from."""
        specs, dtype = self._specs(leaf), work_dtype(leaf)
        energy = norm = momentum = _NOTHING
        if isinstance(self.residual, Orthogonal):
            momentum = self._momentum_codec(self.residual, leaf).zeros(
                leaf.shape, dtype, sharding.spec_of(leaf)
            )
        elif self.residual is not None:
            norm = sharding.zeros(self.view.batch_shape, dtype, specs.batch)
            if self.residual.keeps_energy:
                shape = (*self.view.batch_shape, self.view.n)
                energy = sharding.zeros(shape, dtype, specs.columns)
        return ResidualState(energy, norm, momentum)

    def no_rotation(self, leaf: Any) -> jax.Array:
        """Stands for the rotation where there is no refresh, ``(*batch, r, r)``."""
        shape = (*self.view.batch_shape, self.view.rank, self.view.rank)
        return sharding.zeros(shape, work_dtype(leaf), self._specs(leaf).basis)

    def refresh(
        self, gradient: jax.Array, basis: storage.Stored, count: jax.Array
    ) -> tuple[storage.Stored, jax.Array]:
        """New basis and the rotation into it."""
        spec, codec = self._specs(gradient).basis, self._codec(gradient)
        axes = sharding.spreading_axes(self.view, gradient)
        refresh = functools.partial(projection.refresh_basis, projector=self.projector)
        spread = sharding.spread(refresh, axes, spec)

        def fn(
            gradient: jax.Array, basis: storage.Stored, count: jax.Array
        ) -> tuple[storage.Stored, jax.Array]:
            matrix = self.view.to_matrix(gradient)
            old = codec.decode(basis, work_dtype(gradient))
            new, rotation, is_new = spread(matrix, old, count)
            stored = codec.encode(new)
            if isinstance(stored, storage.Int8) and isinstance(basis, storage.Int8):
                # One that stays is not encoded again, which might change it.
                stays = ~is_new[..., 0]
                stored = storage.Int8(
                    jnp.where(stays[..., None], basis.values, stored.values),
                    jnp.where(stays, basis.scale, stored.scale),
                )
            return stored, rotation

        return sharding.pinned(fn, (codec.specs(spec), spec))(gradient, basis, count)

    def project(
        self, gradient: jax.Array, basis: storage.Stored
    ) -> tuple[jax.Array, jax.Array]:
        """Projected gradient, and which matrices are finite ``(*batch, 1, 1)``."""
        specs, exact = self._specs(gradient), isinstance(self.residual, Residual)
        fn = functools.partial(projection.project, view=self.view, exact=exact)
        basis = self._codec(gradient).decode(basis, work_dtype(gradient))
        return sharding.pinned(_multiply(fn, specs), (specs.low, specs.basis))(
            gradient, basis
        )

    def project_back(
        self,
        gradient: jax.Array,
        basis: storage.Stored,
        low: jax.Array,
        finite: jax.Array,
        direction: jax.Array,
        outside: ResidualState,
        count: jax.Array,
        scale: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, ResidualState]:
        """Update in the leaf's shape and dtype, and the residual's new state."""
        scale = jnp.asarray(scale, low.dtype)
        basis = self._codec(gradient).decode(basis, low.dtype)
        if isinstance(self.residual, Residual):
            update, outside = self._with_columns(
                self.residual,
                outside,
                (direction, basis, gradient, low, finite, count, scale),
            )
        else:
            fn = functools.partial(projection.project_back, view=self.view)
            fn = _multiply(fn, self._specs(gradient))
            update = sharding.pinned(fn, sharding.spec_of(gradient))(
                direction, basis, scale
            )
            if self.residual is not None:
                added, outside = self._orthogonal(
                    self.residual, gradient, basis, finite, outside, count
                )
                update += scale * added
        return update.astype(gradient.dtype), outside

    def _with_columns(
        self, residual: Residual, outside: ResidualState, operands: tuple[Any, ...]
    ) -> tuple[jax.Array, ResidualState]:
        """The whole update with a residual that scales columns."""
        direction, basis, gradient, low, finite, count, scale = operands
        specs = self._specs(gradient)
        fn = functools.partial(
            projection.project_back_with_residual, view=self.view, residual=residual
        )
        columns = specs.columns if residual.keeps_energy else _NOTHING
        update, energy, norm = sharding.pinned(
            _multiply(fn, specs), (sharding.spec_of(gradient), columns, specs.batch)
        )(
            direction,
            basis,
            gradient,
            low,
            finite,
            outside.energy,
            outside.norm,
            count,
            scale,
            _operands(residual, low.dtype),
        )
        return update, outside._replace(energy=energy, norm=norm)

    def _orthogonal(
        self,
        residual: Orthogonal,
        gradient: jax.Array,
        basis: jax.Array,
        finite: jax.Array,
        outside: ResidualState,
        count: jax.Array,
    ) -> tuple[jax.Array, ResidualState]:
        """What an orthogonal residual adds, in the leaf's shape."""
        codec = self._momentum_codec(residual, gradient)
        full, specs = sharding.spec_of(gradient), self._specs(gradient)
        orthogonalise = sharding.spread(
            lambda x, basis, _: outside_orthogonal(
                x,
                basis,
                iterations=residual.iterations,
                narrow=storage.is_narrow(self.basis_dtype),
            ),
            sharding.spreading_axes(self.view, gradient),
            sharding.known(specs.matrix),
        )

        def fn(
            gradient: jax.Array,
            basis: jax.Array,
            finite: jax.Array,
            stored: storage.Stored,
            count: jax.Array,
            numbers: tuple[jax.Array, jax.Array],
        ) -> tuple[jax.Array, storage.Stored]:
            weight, decay = numbers
            momentum, ahead = projection.next_momentum(
                gradient,
                codec.decode(stored, basis.dtype),
                finite,
                decay,
                view=self.view,
            )
            added = orthogonalise(self.view.to_matrix(ahead), basis, count)
            bits = storage.random_bits(gradient.shape, count, _MOMENTUM_SALT)
            return (
                weight * self.view.from_matrix(added),
                codec.encode(momentum, bits),
            )

        added, momentum = sharding.pinned(fn, (full, codec.specs(full)))(
            gradient,
            basis,
            finite,
            outside.momentum,
            count,
            _operands(residual, basis.dtype),
        )
        return added, outside._replace(momentum=momentum)

    def _specs(self, leaf: Any) -> sharding.LeafSpecs:
        return sharding.leaf_specs(self.view, leaf)

    def _codec(self, leaf: Any) -> storage.Codec:
        """How the basis is stored: in int8 with one scale per row."""
        return storage.Codec(self.basis_dtype or work_dtype(leaf), axes=(-1,))

    def _momentum_codec(self, residual: Orthogonal, leaf: Any) -> storage.Codec:
        """How a residual's momentum is stored: in int8 with one scale per column."""
        axes = tuple(axis - len(self.view.shape) for axis in self.view.projected)
        dtype = residual.momentum_dtype or work_dtype(leaf)
        return storage.Codec(dtype, storage.Curve.SQUARE, axes)


def _operands(
    residual: Residual | Orthogonal, dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """A rule's numbers as arrays: what is pinned must not close over a traced one."""
    return tuple(jnp.asarray(x, dtype) for x in residual.hyperparameters)


def _multiply(fn: Callable[..., Any], specs: sharding.LeafSpecs) -> Callable[..., Any]:
    """``fn(x, basis, ...)``, where each device has the basis' rows that it needs."""

    def run(x: jax.Array, basis: jax.Array, *rest: Any) -> Any:
        return fn(x, sharding.split(basis, specs.used_basis), *rest)

    return run


class FullRankLeaf:
    """A leaf that reaches the inner transform as it is."""

    def basis(self, leaf: Any) -> optax.MaskedNode:
        """Nothing."""
        return _NOTHING

    def outside(self, leaf: Any) -> ResidualState:
        """Nothing."""
        return ResidualState(_NOTHING, _NOTHING, _NOTHING)

    def low(self, leaf: Any) -> Any:
        """The leaf itself."""
        return leaf

    def no_rotation(self, leaf: Any) -> None:
        """None: there is no basis to rotate."""
        return None

    def refresh(
        self, gradient: jax.Array, basis: optax.MaskedNode, count: jax.Array
    ) -> tuple[optax.MaskedNode, None]:
        """Nothing to refresh."""
        return basis, None

    def project(
        self, gradient: jax.Array, basis: optax.MaskedNode
    ) -> tuple[jax.Array, None]:
        """The gradient, or zero if it is not finite."""
        return projection.finite_or_zero(gradient), None

    def project_back(
        self,
        gradient: jax.Array,
        basis: optax.MaskedNode,
        low: jax.Array,
        finite: None,
        direction: jax.Array,
        outside: ResidualState,
        count: jax.Array,
        scale: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, ResidualState]:
        """The direction, unscaled."""
        return direction.astype(gradient.dtype), outside
