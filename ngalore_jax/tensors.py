"""Which leaves a Tucker projection takes, and which of their axes are modes.

What :mod:`ngalore_jax.matrices` is to matrices: a leaf is a batch of tensors
``(..., n_1, ..., n_d)`` each of whose sides is projected.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from ngalore_jax.matrices import default_dimension_numbers, leaves_with, without_masks

WeightModeAxes = optax.Params | Callable[[optax.Params], optax.Params]


@dataclasses.dataclass(frozen=True)
class TensorView:
    """A leaf seen as ``(*batch, n_1, ..., n_d)`` with each side projected.

    Attributes:
      shape: Shape of the leaf.
      batch: Its batch axes, in order.
      modes: The axes that are modes.
      ranks: Number of directions kept of each mode.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    modes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes, batch first."""
        return self.batch + self.modes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of the modes."""
        return tuple(self.shape[axis] for axis in self.modes)

    def to_tensor(self, leaf: jax.Array) -> jax.Array:
        """Reorders a leaf of ``shape`` to ``(*batch, n_1, ..., n_d)``."""
        return leaf.transpose(self.order)

    def from_tensor(self, tensor: jax.Array) -> jax.Array:
        """Inverse of :meth:`to_tensor`."""
        return tensor.transpose(
            [self.order.index(axis) for axis in range(len(self.shape))]
        )


def default_mode_axes(params: optax.Params) -> optax.Params:
    """The last two axes of a matrix, and every axis of a convolution kernel.

    The leaves are those of :func:`ngalore_jax.default_dimension_numbers`. One of two or
    three dimensions is a batch of matrices; one of four or more is one tensor.

    Returns:
      A tree like ``params`` with a tuple of axes or None per leaf.
    """

    def axes(leaf: Any, spec: Any) -> tuple[int, ...] | None:
        if spec is None:
            return None
        return tuple(range(leaf.ndim)) if leaf.ndim >= 4 else (-2, -1)

    return jax.tree.map(axes, params, default_dimension_numbers(params))


def tensor_views(
    tree: optax.Params, weight_mode_axes: WeightModeAxes | None, rank: int
) -> list[TensorView | None]:
    """Every leaf of ``tree`` as tensors, None where it is not projected.

    Args:
      tree: Parameters or updates; only paths and shapes are read.
      weight_mode_axes: None for :func:`default_mode_axes`, a tree with a tuple of axes
        or None for each leaf, or a function of the parameters that returns one.
      rank: Directions kept of each mode, all of a mode that has no more.

    Raises:
      TypeError: If the tree holds anything but tuples of axes and None.
      ValueError: If axes are out of range, repeated or fewer than two.
    """
    if weight_mode_axes is None:
        weight_mode_axes = default_mode_axes
    specs = weight_mode_axes
    if callable(specs):
        specs = specs(without_masks(tree))
    return [
        None if axes is None else _tensor_view(leaf.shape, axes, rank)
        for leaf, axes in leaves_with(tree, specs)
    ]


def _tensor_view(shape: tuple[int, ...], axes: Any, rank: int) -> TensorView:
    if not isinstance(axes, Sequence) or not all(isinstance(a, int) for a in axes):
        raise TypeError(
            "weight_mode_axes must give a tuple of axes or None for each leaf, got "
            f"{axes!r} for a leaf of shape {shape}."
        )
    modes = tuple(a % len(shape) for a in axes if -len(shape) <= a < len(shape))
    if len(modes) < len(axes) or len(set(modes)) < len(modes) or len(modes) < 2:
        raise ValueError(
            f"weight_mode_axes gives {axes} to a leaf of shape {shape}; give two or "
            f"more different axes from {-len(shape)} to {len(shape) - 1}, or None."
        )
    batch = tuple(a for a in range(len(shape)) if a not in modes)
    return TensorView(shape, batch, modes, tuple(min(rank, shape[a]) for a in modes))
