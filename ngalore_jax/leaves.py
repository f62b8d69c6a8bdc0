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
from ngalore_jax.projectors import Projector, first_basis
from ngalore_jax.residual import Residual

_NOTHING = optax.MaskedNode()


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
    residual: Residual | None
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

    def energy(self, leaf: Any) -> jax.Array | optax.MaskedNode:
        """Residual state, ``(*batch, n)``."""
        if self.residual is None or not self.residual.keeps_energy:
            return _NOTHING
        shape = (*self.view.batch_shape, self.view.n)
        return sharding.zeros(shape, work_dtype(leaf), self._specs(leaf).columns)

    def norm(self, leaf: Any) -> jax.Array | optax.MaskedNode:
        """Residual state, ``(*batch,)``."""
        if self.residual is None:
            return _NOTHING
        specs = self._specs(leaf)
        return sharding.zeros(self.view.batch_shape, work_dtype(leaf), specs.batch)

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
        specs, exact = self._specs(gradient), self.residual is not None
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
        energy: jax.Array | optax.MaskedNode,
        norm: jax.Array | optax.MaskedNode,
        count: jax.Array,
        scale: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, Any, Any]:
        """Update in the leaf's shape and dtype, and the residual's new state."""
        scale = jnp.asarray(scale, low.dtype)
        basis = self._codec(gradient).decode(basis, low.dtype)
        full, specs = sharding.spec_of(gradient), self._specs(gradient)
        if self.residual is None:
            fn = functools.partial(projection.project_back, view=self.view)
            update = sharding.pinned(_multiply(fn, specs), full)(
                direction, basis, scale
            )
        else:
            fn = functools.partial(
                projection.project_back_with_residual,
                view=self.view,
                residual=self.residual,
            )
            # As operands: what is pinned must not close over a traced number.
            numbers = tuple(
                jnp.asarray(x, low.dtype) for x in self.residual.hyperparameters
            )
            columns = specs.columns if self.residual.keeps_energy else _NOTHING
            update, energy, norm = sharding.pinned(
                _multiply(fn, specs), (full, columns, specs.batch)
            )(
                direction,
                basis,
                gradient,
                low,
                finite,
                energy,
                norm,
                count,
                scale,
                numbers,
            )
        return update.astype(gradient.dtype), energy, norm

    def _specs(self, leaf: Any) -> sharding.LeafSpecs:
        return sharding.leaf_specs(self.view, leaf)

    def _codec(self, leaf: Any) -> storage.Codec:
        """How the basis is stored: in int8 with a scale a row."""
        return storage.Codec(self.basis_dtype or work_dtype(leaf), axes=(-1,))


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

    energy = norm = basis

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
        energy: optax.MaskedNode,
        norm: optax.MaskedNode,
        count: jax.Array,
        scale: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, optax.MaskedNode, optax.MaskedNode]:
        """The direction, unscaled."""
        return direction.astype(gradient.dtype), energy, norm
