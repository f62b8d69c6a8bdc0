"""Which leaves are projected, and how an N-D leaf is a batch of matrices.

The rest of the library sees one orientation only: a leaf is a batch of matrices
``(..., m, n)`` whose side ``m`` is projected onto ``rank`` directions. Which of
the leaf's axes form ``m`` and ``n`` is decided here, once, from shapes alone.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Side = Literal["smaller", "larger", "left", "right"]


class MatrixDimensionNumbers(NamedTuple):
    """Which axes of a leaf are the rows and the columns of a matrix.

    The leaf is read as a linear map ``x W = y``. Axes named in neither field are
    batch axes: each of their entries is a matrix of its own. The default takes
    the last two axes, so stacked layers ``[L, m, n]`` are ``L`` matrices.

    ``optax.contrib.GaLoreDimensionNumbers`` and ``MuonDimensionNumbers`` mean the
    same and are accepted in its place.

    Attributes:
      reduction_axis: Axis or axes that make up the rows (the input side).
      output_axis: Axis or axes that make up the columns (the output side).

    Example:
      >>> import ngalore_jax as ng
      >>> ng.MatrixDimensionNumbers(0, (1, 2))  # an (embed, heads, head_dim) kernel
      MatrixDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


WeightDimensionNumbers = (
    MatrixDimensionNumbers | optax.Params | Callable[[optax.Params], optax.Params]
)

# The smaller side over the rank, where none is given.
_DEFAULT_SHARE = 16
# Full-rank by name, wherever it stands in the path.
_EMBEDDING = re.compile(
    r"(.*_)?(un)?emb(ed(s|der|ding|dings)?)?(_.*)?|wte|wpe|lm_?head|.*norm.*|ln(_.*)?",
    re.IGNORECASE,
)
# Full-rank if the leaf or the module that holds it is called so.
_OUTPUT = re.compile(
    r"head|output|output_layer|output_projection|logits(_.*)?|classifier(_head)?"
    r"|scale|bias",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A leaf seen as ``(*batch, m, n)`` with side ``m`` projected to ``rank``.

    Attributes:
      shape: Shape of the leaf.
      batch: Its batch axes, in order.
      projected: The axes merged into ``m``.
      kept: The axes merged into ``n``.
      rank: Number of directions kept of ``m``.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    projected: tuple[int, ...]
    kept: tuple[int, ...]
    rank: int

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def m(self) -> int:
        """Size of the projected side."""
        return math.prod(self.shape[axis] for axis in self.projected)

    @property
    def n(self) -> int:
        """Size of the side that is kept."""
        return math.prod(self.shape[axis] for axis in self.kept)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """Reorders a leaf of ``shape`` to ``(*batch, m, n)``."""
        ordered = leaf.transpose(self.batch + self.projected + self.kept)
        return ordered.reshape((*self.batch_shape, self.m, self.n))

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Inverse of :meth:`to_matrix`."""
        order = self.batch + self.projected + self.kept
        ordered = matrix.reshape(tuple(self.shape[axis] for axis in order))
        return ordered.transpose([order.index(axis) for axis in range(len(order))])

    def column_sums(self, leaf: jax.Array) -> jax.Array:
        """Sums of a leaf of ``shape`` over side ``m``: ``(*batch, n)``."""
        sums = jnp.sum(leaf, axis=self.projected, keepdims=True)
        ordered = sums.transpose(self.batch + self.projected + self.kept)
        return ordered.reshape((*self.batch_shape, self.n))

    def from_columns(self, columns: jax.Array) -> jax.Array:
        """``(*batch, n)`` as an array that multiplies a leaf, 1 long along ``m``."""
        order = self.batch + self.projected + self.kept
        shape = [1 if axis in self.projected else self.shape[axis] for axis in order]
        ordered = columns.reshape(shape)
        return ordered.transpose([order.index(axis) for axis in range(len(order))])


def work_dtype(leaf: Any) -> jnp.dtype:
    """Dtype of everything computed in the subspace: float32, or wider for the leaf."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def matrix_view(
    shape: tuple[int, ...],
    dimension_numbers: MatrixDimensionNumbers,
    rank: int | None,
    side: Side,
    clip_rank: bool,
) -> MatrixView:
    """Resolves one leaf's axes, projected side and rank.

    A ``rank`` of None is a sixteenth of the smaller side, at least 1.

    Raises:
      ValueError: If the axes overlap or are out of range, or if ``rank`` exceeds
        a side of the matrix and ``clip_rank`` is False.
    """
    rows = _axes(dimension_numbers.reduction_axis, shape)
    columns = _axes(dimension_numbers.output_axis, shape)
    if set(rows) & set(columns):
        raise ValueError(
            f"reduction_axis and output_axis of {dimension_numbers} name the same axis "
            f"of a leaf of shape {shape}; each axis can be on one side only."
        )
    batch = tuple(a for a in range(len(shape)) if a not in rows + columns)
    m, n = (math.prod(shape[a] for a in axes) for axes in (rows, columns))
    if rank is None:
        rank = max(1, min(m, n) // _DEFAULT_SHARE)
    if rank > min(m, n):
        if not clip_rank:
            raise ValueError(
                f"rank={rank} is larger than a side of the {m} x {n} matrix in a leaf "
                f"of shape {shape}. Lower rank, pass clip_rank=True to use {min(m, n)} "
                "there, or leave the leaf out through weight_dimension_numbers."
            )
        rank = min(m, n)
    left = (
        side == "left"
        or (side == "smaller" and m <= n)
        or (side == "larger" and m >= n)
    )
    projected, kept = (rows, columns) if left else (columns, rows)
    return MatrixView(shape, batch, projected, kept, rank)


def resolve_dimension_numbers(
    tree: optax.Params, weight_dimension_numbers: WeightDimensionNumbers | None
) -> list[MatrixDimensionNumbers | None]:
    """Dimension numbers of every leaf of ``tree``, None where it is not projected.

    Args:
      tree: Parameters or updates; only paths and shapes are read.
      weight_dimension_numbers: None for the default rule
        (:func:`default_dimension_numbers`), one spec for all leaves of two or more
        dimensions, a tree with a spec or None for each leaf, or a function of the
        parameters that returns such a tree. Leaves that are another transform's are
        scalars to it.

    Raises:
      TypeError: If the tree holds anything but specs and None.
      ValueError: If a leaf with fewer than two dimensions is given a spec.
    """
    if weight_dimension_numbers is None:
        specs = default_dimension_numbers(tree)
    elif callable(weight_dimension_numbers):
        specs = weight_dimension_numbers(without_masks(tree))
    elif _is_spec(weight_dimension_numbers):
        specs = jax.tree.map(
            lambda leaf: weight_dimension_numbers if leaf.ndim >= 2 else None, tree
        )
    else:
        specs = weight_dimension_numbers
    pairs = leaves_with(tree, specs)
    for leaf, spec in pairs:
        if spec is not None and not _is_spec(spec):
            raise TypeError(
                "weight_dimension_numbers must give a MatrixDimensionNumbers or None "
                f"for each leaf, got {spec!r} for a leaf of shape {leaf.shape}."
            )
        if spec is not None and leaf.ndim < 2:
            raise ValueError(
                f"weight_dimension_numbers gives {spec} to a leaf of shape "
                f"{leaf.shape}, which has fewer than two dimensions; give it None."
            )
    return [spec for _, spec in pairs]


def leaves_with(tree: optax.Params, specs: Any) -> list[tuple[Any, Any]]:
    """Each leaf of ``tree`` with its spec, but for those of other transforms.

    ``optax.masked`` leaves a ``MaskedNode`` in the place of those.
    """
    pairs = []
    jax.tree.map(
        lambda leaf, spec: pairs.append((leaf, spec)),
        tree,
        specs,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return [pair for pair in pairs if not isinstance(pair[0], optax.MaskedNode)]


def without_masks(tree: optax.Params) -> optax.Params:
    """``tree`` with scalars in the place of what ``optax.masked`` has left out."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.map(
        lambda x: scalar if isinstance(x, optax.MaskedNode) else x,
        tree,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def default_dimension_numbers(params: optax.Params) -> optax.Params:
    """The leaves projected by default: every matrix but embeddings, outputs, norms.

    A leaf of two or more dimensions is projected, its last two axes as the matrix
    and the axes in front as batch, unless its path says that it is an embedding
    (``embed...``, ``tok_emb``, ``wte``, ``wpe``), an output layer (``lm_head``,
    ``head``, ``output``, ``logits``, ``classifier``), a norm, or stacked scales or
    biases.

    Returns:
      A tree like ``params`` with a :class:`MatrixDimensionNumbers` or None per leaf.

    Example:
      >>> import jax, ngalore_jax as ng
      >>> w = jax.ShapeDtypeStruct((2, 8, 8), "float32")
      >>> specs = ng.default_dimension_numbers({"mlp": w, "lm_head": w})
      >>> print(specs["mlp"], specs["lm_head"])
      MatrixDimensionNumbers(reduction_axis=-2, output_axis=-1) None
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> MatrixDimensionNumbers | None:
        if leaf.ndim < 2:
            return None
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-1] == "value":  # of an nnx.Variable: its module names the leaf
            names.pop()
        full_rank = any(_EMBEDDING.fullmatch(name) for name in names) or any(
            _OUTPUT.fullmatch(name) for name in names[-2:]
        )
        return None if full_rank else MatrixDimensionNumbers()

    return jax.tree_util.tree_map_with_path(spec, params)


def _is_spec(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _axes(axis: int | Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Non-negative axes, checked against the shape."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(
                f"weight_dimension_numbers names axis {a} of a leaf of shape {shape}, "
                f"which has {len(shape)} axes."
            )
    axes = tuple(a % len(shape) for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"weight_dimension_numbers names an axis of a leaf of shape {shape} twice: "
            f"{axis}."
        )
    return axes
