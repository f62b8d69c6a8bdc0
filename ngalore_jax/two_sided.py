"""``two_sided(inner)``: a transform run on the Tucker core of each gradient.

What :mod:`ngalore_jax.low_rank` is to one side, for every side at once. The maths is in
:mod:`ngalore_jax.tucker`; here it meets shapes, shardings and the tree.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import sharding, tucker
from ngalore_jax.matrices import work_dtype
from ngalore_jax.projectors import first_basis
from ngalore_jax.subspace import when
from ngalore_jax.tensors import TensorView, WeightModeAxes, tensor_views
from ngalore_jax.tucker import Factors

# Decay of PyTorch's AdamW, which moves the online factors with all its defaults.
_FACTOR_DECAY = 1e-2


class TwoSidedState(NamedTuple):
    """State of :func:`two_sided`."""

    count: jax.Array  # () int32
    # (..., n_k, r_k): one tree per mode k, MaskedNode() for a leaf of fewer modes
    factors: tuple[optax.Updates, ...]
    inner: optax.OptState
    drift: optax.OptState  # AdamW's of the factors; empty unless they are online


def two_sided(
    inner: optax.GradientTransformation,
    rank: int,
    update_proj_gap: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    weight_mode_axes: WeightModeAxes | None = None,
    factor_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on the Tucker cores of the gradients.

    A tensor whose gradient is zero or not finite keeps its factors at a refresh and has
    a zero core.

    Args:
      inner: Transformation of cores, each flattened to ``(..., 1, r_1 ... r_d)``.
      rank: See :func:`ngalore_jax.reference`.
      update_proj_gap: Steps between refreshes of the factors, from count 0.
      scale: Factor on the update.
      weight_mode_axes: See :func:`ngalore_jax.reference`; every leaf has modes.
      factor_learning_rate: None for refreshed factors. Else they are online: decomposed
        at count 0 and moved at the end of every later step.

    Returns:
      A transformation; ``update(..., refresh=True | False)`` decides early whether the
      factors are decomposed in this step.
    """
    inner = optax.with_extra_args_support(inner)
    online = factor_learning_rate is not None
    drift = optax.identity()
    if online:
        drift = optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(_FACTOR_DECAY)
        )

    def plan(tree: optax.Params) -> list[_Leaf]:
        views = tensor_views(tree, weight_mode_axes, rank)
        return [_Leaf(view) for view in views if view is not None]

    def init(params: optax.Params) -> TwoSidedState:
        leaves, treedef = jax.tree.flatten(params)
        plans = list(zip(plan(params), leaves, strict=True))
        factors = _by_mode(treedef, [how.factors(p) for how, p in plans])
        return TwoSidedState(
            count=jnp.zeros([], jnp.int32),
            factors=factors,
            inner=inner.init(treedef.unflatten([how.core(p) for how, p in plans])),
            drift=drift.init(factors),
        )

    def move(
        treedef: Any,
        how: list[_Leaf],
        tensors: list[jax.Array],
        count: jax.Array,
        factors: list[Factors],
        drift_state: optax.OptState,
    ) -> tuple[list[Factors], optax.OptState]:
        slopes = [h.slope(g, u) for h, g, u in zip(how, tensors, factors)]
        steps, drift_state = drift.update(
            _by_mode(treedef, slopes), drift_state, _by_mode(treedef, factors)
        )
        rate = factor_learning_rate
        rate = rate(count) if callable(rate) else rate
        moved = jax.tree.map(
            lambda u, step: u - jnp.asarray(rate, u.dtype) * step,
            factors,
            _by_leaf(treedef, steps),
        )
        return moved, drift_state

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TwoSidedState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        how, count = plan(updates), state.count
        tensors = [h.tensor(g) for h, g in zip(how, gradients, strict=True)]
        due = count == 0 if online else count % update_proj_gap == 0
        due = due if refresh is None else refresh
        factors = when(
            due,
            lambda old: [h.refresh(g, u) for h, g, u in zip(how, tensors, old)],
            _by_leaf(treedef, state.factors),
        )
        cores = [h.project(g, u) for h, g, u in zip(how, tensors, factors)]
        directions, inner_state = inner.update(
            treedef.unflatten(cores), state.inner, **extra_args
        )
        out = [
            h.project_back(direction, u, scale, g)
            for h, direction, u, g in zip(
                how, treedef.flatten_up_to(directions), factors, gradients
            )
        ]

        drift_state = state.drift
        if online:
            steady = not due if isinstance(due, bool) else ~due
            factors, drift_state = when(
                steady,
                lambda kept: move(treedef, how, tensors, count, *kept),
                (factors, drift_state),
            )
        return treedef.unflatten(out), TwoSidedState(
            count=jnp.asarray(optax.safe_increment(count)),
            factors=_by_mode(treedef, factors),
            inner=inner_state,
            drift=drift_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _by_mode(treedef: Any, leaves: list[Factors]) -> tuple[optax.Updates, ...]:
    """Factors of leaves as one tree per mode; of no leaves, the tree as it is.

    So `optax.tree.map_params` finds what it puts in the place of the parameters.
    """
    if not leaves:
        return treedef.unflatten([])
    columns = itertools.zip_longest(*leaves, fillvalue=optax.MaskedNode())
    return tuple(treedef.unflatten(column) for column in columns)


def _by_leaf(treedef: Any, trees: Any) -> list[Factors]:
    """Inverse of :func:`_by_mode`."""
    if not isinstance(trees, tuple):  # no leaves
        return []
    rows = zip(*(treedef.flatten_up_to(tree) for tree in trees), strict=True)
    return [
        tuple(u for u in row if not isinstance(u, optax.MaskedNode)) for row in rows
    ]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """How one leaf goes through :func:`two_sided`.

    Factors and cores are whole on every device but for the leaf's batch axes.
    """

    view: TensorView

    def factors(self, leaf: Any) -> Factors:
        """Factors before the first refresh: of orthonormal columns."""
        return tuple(
            sharding.repeat(
                first_basis(n, r, work_dtype(leaf)), self.view.batch_shape, spec
            )
            for n, r, spec in zip(self.view.sides, self.view.ranks, self._specs(leaf))
        )

    def core(self, leaf: Any) -> jax.Array:
        """Zeros like a core, flattened: ``(*batch, 1, r_1 ... r_d)``.

        As one vector, since a Fisher is one of a whole core and not of matrices in it.
        """
        shape = (*self.view.batch_shape, 1, math.prod(self.view.ranks))
        return sharding.zeros(shape, work_dtype(leaf), self._specs(leaf)[0])

    def tensor(self, gradient: jax.Array) -> jax.Array:
        """The gradient as ``(*batch, n_1, ..., n_d)``, zeros where it is not finite."""
        tensor = self.view.to_tensor(gradient).astype(work_dtype(gradient))
        finite = jnp.all(jnp.isfinite(tensor), axis=self._mode_axes, keepdims=True)
        return jnp.where(finite, tensor, 0)

    def refresh(self, tensor: jax.Array, factors: Factors) -> Factors:
        """New factors, or the old ones of a tensor that has none."""
        modes = len(factors)

        def fn(tensor: jax.Array, old: Factors) -> Factors:
            tensor = tucker.unit(tensor, modes)
            usable = jnp.any(tensor != 0, axis=self._mode_axes)[..., None, None]
            new = tucker.decompose(tensor, self.view.ranks)
            for u in new:
                usable &= jnp.all(jnp.isfinite(u), axis=(-2, -1), keepdims=True)
            return jax.tree.map(lambda u, o: jnp.where(usable, u, o), new, old)

        return sharding.pinned(fn, self._specs_of(factors))(tensor, factors)

    def project(self, tensor: jax.Array, factors: Factors) -> jax.Array:
        """The core, flattened."""

        def fn(tensor: jax.Array, factors: Factors) -> jax.Array:
            core = tucker.core(tensor, factors)
            return core.reshape(*self.view.batch_shape, 1, -1)

        spec = self._specs_of(factors)[0]
        return sharding.pinned(fn, spec)(tensor, factors)

    def project_back(
        self,
        direction: jax.Array,
        factors: Factors,
        scale: jax.typing.ArrayLike,
        like: jax.Array,
    ) -> jax.Array:
        """The update of a leaf, sharded and of the dtype ``like`` its gradient."""

        def fn(direction: jax.Array, factors: Factors, scale: jax.Array) -> jax.Array:
            core = direction.reshape(*self.view.batch_shape, *self.view.ranks)
            return self.view.from_tensor(scale * tucker.expand(core, factors))

        scale = jnp.asarray(scale, direction.dtype)
        update = sharding.pinned(fn, sharding.spec_of(like))(direction, factors, scale)
        return update.astype(like.dtype)

    def slope(self, tensor: jax.Array, factors: Factors) -> Factors:
        """Derivative of the online loss by the factors."""
        fn = functools.partial(_slope, modes=len(factors))
        return sharding.pinned(fn, self._specs_of(factors))(tensor, factors)

    @property
    def _mode_axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.view.modes), 0))

    def _specs(self, leaf: Any) -> tuple[sharding.Spec, ...]:
        spec = sharding.spec_of(leaf)
        batch = [spec[axis] for axis in self.view.batch]
        return (sharding.Spec(*batch, None, None),) * len(self.view.modes)

    def _specs_of(self, factors: Factors) -> tuple[sharding.Spec, ...]:
        return tuple(sharding.spec_of(u) for u in factors)


def _slope(tensor: jax.Array, factors: Factors, *, modes: int) -> Factors:
    return tucker.loss_gradient(tucker.unit(tensor, modes), factors)
