"""Where arrays live: the device mesh and the rules that place arrays on it.

Fully sharded data parallelism over two mesh axes. The batch is split over both;
every matrix is stored split over ``fsdp`` on one side and gathered just before it is
used. The side is the larger one, for Natural GaLore's sake: it projects the smaller
side (the input side of a square matrix), and with the other side sharded the
projections, Adam and the projection back run on local shards without communication.

Activations are pinned to the batch axes. Without that the compiler reads a matrix
sharded on its output side as tensor parallelism, at several times the traffic.

The model side of this module (:func:`pin_batch`, :func:`gather_matrix`,
:func:`look_up`) does nothing without a mesh, and serves explicit and auto mesh axes
alike. Enter a mesh with ``jax.set_mesh(mesh)``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
FSDP = "fsdp"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Partition specs by role; a matrix is the last two axes of its parameter.

    Attributes:
      batch: Leading axis of tokens, activations and logits.
      matrix_in: A stored matrix, split on its input side (the axis before the last).
      matrix_out: A stored matrix, split on its output side (the last axis).
      matrix_gathered: A matrix as the forward and backward pass use it.
      vector: Norm scales.
    """

    batch: P
    matrix_in: P
    matrix_out: P
    matrix_gathered: P
    vector: P

    def stored_matrix(self, shape: tuple[int, ...], axis_sizes: Mapping[str, int]) -> P:
        """Return the spec in which a matrix of this shape is stored.

        The larger side is split, the output side of a square matrix, unless the mesh
        axis does not divide it (the 1B Llama's 5461); then the other side is.

        Args:
          shape: ``(..., m, n)``; only the last two axes count.
          axis_sizes: Size of every mesh axis by name.

        Returns:
          A spec of two entries, for ``(m, n)``.

        Raises:
          ValueError: If the fsdp axis divides neither side.
        """
        m, n = shape[-2:]
        size = axis_sizes[FSDP]
        preferred = ((n, self.matrix_out), (m, self.matrix_in))
        if m > n:
            preferred = preferred[::-1]
        for side, spec in preferred:
            if side % size == 0:
                return spec
        raise ValueError(
            f"cannot shard a {m} x {n} matrix: fsdp={size} divides neither side; "
            "choose an fsdp size that divides the model's hidden size"
        )


RULES = ShardingRules(
    batch=P((DATA, FSDP)),
    matrix_in=P(FSDP, None),
    matrix_out=P(None, FSDP),
    matrix_gathered=P(None, None),
    vector=P(None),
)


def make_mesh(data: int = 1, fsdp: int = 1, *, explicit: bool = True) -> Mesh:
    """Make the ``(data, fsdp)`` mesh over the first ``data * fsdp`` devices.

    Args:
      data: Copies of the weights, at least 1.
      fsdp: Devices that one copy of the weights is split over, at least 1.
      explicit: Axis types. Explicit axes put the sharding in every array's type and
        raise where it is ambiguous; auto axes leave it to the compiler.

    Returns:
      A mesh with the axes ``data`` and ``fsdp``.

    Raises:
      ValueError: If a size is below 1 or there are too few devices.
    """
    if data < 1 or fsdp < 1:
        raise ValueError(f"mesh sizes must be at least 1, got {data=}, {fsdp=}")
    devices = jax.device_count()
    if data * fsdp > devices:
        raise ValueError(
            f"a mesh of {data=} x {fsdp=} needs {data * fsdp} devices, "
            f"but JAX sees {devices}"
        )
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((data, fsdp), (DATA, FSDP), axis_types=(axis_type,) * 2)


# ---------------------------------------------------------------- the training side


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of tokens ``(B, ...)``: B split over every device."""
    return NamedSharding(mesh, RULES.batch)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """Return the sharding of every parameter, by the last name of its path.

    Args:
      abstract_params: Pure tree of arrays or ``ShapeDtypeStruct``. Leaves named
        ``kernel`` or ``embedding`` are matrices ``(..., m, n)``, leaves named
        ``scale`` vectors ``(..., d)``; axes in front (stacked layers) are not split.
      mesh: A mesh with an ``fsdp`` axis.

    Returns:
      The same tree with a ``NamedSharding`` for every leaf.

    Raises:
      ValueError: If a leaf's name has no rule or its shape cannot be split.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        match name.rsplit("/", 1)[-1]:
            case "kernel" | "embedding":
                spec = RULES.stored_matrix(leaf.shape, mesh.shape)
            case "scale":
                spec = RULES.vector
            case _:
                raise ValueError(
                    f"no sharding rule for parameter {name!r}: its last name must be "
                    "kernel, embedding or scale; add a rule to experiments.training."
                    "mesh for any other"
                )
        stacked = (None,) * (len(leaf.shape) - len(spec))
        return NamedSharding(mesh, P(*stacked, *spec))

    return jax.tree_util.tree_map_with_path(sharding, abstract_params)


def state_shardings(
    init: Callable[[Any], Any], abstract_params: Any, mesh: Mesh
) -> Any:
    """Return the shardings of a state computed from parameters.

    The rules are not written down a second time for each optimizer: ``init`` is
    traced under explicit axes, where the sharding of its every output follows from
    those of the parameters. Nothing runs, no memory is taken.

    Args:
      init: ``params -> state``, as an optimizer's ``init``.
      abstract_params: As for :func:`param_shardings`.
      mesh: The mesh to place the state on, with explicit or auto axes.

    Returns:
      The tree of ``init``'s result with a ``NamedSharding`` for every leaf.
    """
    explicit = Mesh(
        mesh.devices, mesh.axis_names, (AxisType.Explicit,) * len(mesh.axis_names)
    )
    typed_params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
        abstract_params,
        param_shardings(abstract_params, explicit),
    )
    with jax.sharding.use_abstract_mesh(explicit.abstract_mesh):
        state = jax.eval_shape(init, typed_params)

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Constants, such as a counter's zero, have no sharding: they are replicated.
        return NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else P())

    return jax.tree.map(on_mesh, state)


# ------------------------------------------------------------------- the model side


def pin_batch(x: jax.Array) -> jax.Array:
    """Split ``x`` of shape ``(B, ...)`` over the batch axes and nothing else."""
    return _place(x, _batch_spec(x.ndim))


def gather_matrix(w: jax.Array) -> jax.Array:
    """Gather a stored ``(m, n)`` matrix for use; its gradient is stored like it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w
    if not mesh.are_all_axes_explicit:
        # An auto array's type does not say where it lives. Naming the stored form
        # here names it in the transpose too, or the gradient would stay gathered.
        w = _place(w, RULES.stored_matrix(w.shape, mesh.shape))
    return _place(w, RULES.matrix_gathered)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the rows of a stored table at tokens split over the batch axes.

    Args:
      table: ``(V, D)``, stored by :data:`RULES`.
      tokens: ``(B, ...)`` integers below V.

    Returns:
      ``(B, ..., D)`` in the table's dtype, NaN for a token that is not below V.
    """
    # Float32 rows, for the transpose's sake: it adds up one gradient for every time
    # a token occurs, which in bfloat16 stalls at a few hundred.
    rows = gather_matrix(table).astype(jnp.float32).at[pin_batch(tokens)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        found = pin_batch(rows.get(mode="fill"))
    else:
        found = rows.get(mode="fill", out_sharding=_batch_spec(tokens.ndim + 1))
    return found.astype(table.dtype)


def _batch_spec(ndim: int) -> P:
    return P(*RULES.batch, *(None,) * (ndim - len(RULES.batch)))


def _place(x: jax.Array, spec: P) -> jax.Array:
    """Move ``x`` to a spec of the current mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)
