"""Where arrays live: the device mesh and the rules that place arrays on it.

Three mesh axes. ``data`` and ``fsdp`` split the batch; ``data`` holds copies of the
weights, ``fsdp`` splits them, and they are gathered just before they are used.
``tensor`` splits the work on one sequence as Megatron-LM does (arXiv 1909.08053): of
the matrices that work side by side (:attr:`ShardingRules.column`) each device uses some
output columns, whole attention heads or a part of the feed-forward width, and of those
that follow (:attr:`ShardingRules.row`) the matching input rows, whose partial sums are
added up over ``tensor``. Everything else works on a part of the positions
(arXiv 2205.05198). What runs on it is in :mod:`experiments.models.placement`.

How a matrix is stored is chosen for Natural GaLore's sake. It projects the smaller side
(the input side of a square matrix), and with the other side split by ``fsdp`` and
``tensor`` its projections, Adam and the projection back run on local shards without
communication. ``tensor`` has to split the side that it works on, which for ``o_proj``
(square), and with few key-value heads for ``k_proj`` and ``v_proj``, is the projected
one: for these a steady step adds up rank x kept side numbers over ``tensor``.

Enter a mesh with ``jax.set_mesh(mesh)``; explicit and auto axes both serve.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split what; a matrix is the last two axes of its parameter.

    Attributes:
      batch: Leading axis of tokens, activations and logits.
      vector: Norm scales and biases.
      column: Names of the modules whose kernel ``tensor`` cuts on its output side;
        ``MODULE/lora_b`` for that factor of an adapter.
      row: Names of the modules whose kernel ``tensor`` cuts on its input side;
        ``MODULE/lora_a`` likewise.
    """

    batch: P
    vector: P
    column: tuple[str, ...]
    row: tuple[str, ...]

    def cut(
        self, name: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int]
    ) -> int | None:
        """Return the side of a matrix that ``tensor`` splits while it is used.

        Args:
          name: Name of the module that holds the matrix.
          shape: ``(..., m, n)``; only the last two axes count.
          axis_sizes: Size of every mesh axis by name.

        Returns:
          0 for the input side, 1 for the output side, None if every device uses the
          whole matrix: ``tensor`` is 1, does not divide the side (the 1B Llama's
          5461), or the module is in neither list.
        """
        side = 1 if name in self.column else 0 if name in self.row else None
        tensor = axis_sizes.get(TENSOR, 1)
        if side is None or tensor == 1 or shape[-2:][side] % tensor:
            return None
        return side

    def used_matrix(
        self, name: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int]
    ) -> P:
        """Return the spec in which a matrix is used; arguments as for :meth:`cut`."""
        side = self.cut(name, shape, axis_sizes)
        return P(*(TENSOR if side == i else None for i in (0, 1)))

    def stored_matrix(
        self, name: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int]
    ) -> P:
        """Return the spec in which a matrix is stored; arguments as for :meth:`cut`.

        ``tensor`` splits the side that it cuts, if it cuts one, and ``fsdp`` the larger
        side, the output side of a square matrix. A mesh axis that does not divide its
        side goes to the other one, ``tensor`` only if it cuts none.

        Returns:
          A spec of two entries, for ``(m, n)``.

        Raises:
          ValueError: If the mesh axes do not divide the sides in any of these ways.
        """
        sides = shape[-2:]
        kept = 0 if sides[0] > sides[1] else 1
        other = 1 - kept
        cut = self.cut(name, shape, axis_sizes)
        sizes = {axis: axis_sizes.get(axis, 1) for axis in (TENSOR, FSDP)}
        for tensor_side, fsdp_side in (
            (kept, kept),
            (other, kept),
            (other, other),
            (kept, other),
        ):
            spec: list[Any] = [None, None]
            spec[fsdp_side] = FSDP
            if sizes[TENSOR] > 1:
                # Major, so that gathering over fsdp leaves each its whole cut.
                same = tensor_side == fsdp_side
                spec[tensor_side] = (TENSOR, FSDP) if same else TENSOR
            parts = [1, 1]
            parts[tensor_side] *= sizes[TENSOR]
            parts[fsdp_side] *= sizes[FSDP]
            if cut in (None, tensor_side) and not any(
                side % part for side, part in zip(sides, parts, strict=True)
            ):
                return P(*spec)
        axes = " and ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"cannot shard the {sides[0]} x {sides[1]} matrix of {name!r}: {axes} do "
            "not divide its sides; choose sizes that divide the model's hidden size"
        )


_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROW = ("o_proj", "down_proj")
# Of an adapter's factors A (m, r) and B (r, n) the one that has the kernel's cut side
# is cut with it, the rank never: x A is narrow, and moves instead.
RULES = ShardingRules(
    batch=P((DATA, FSDP)),
    vector=P(None),
    column=(*_COLUMN, *(f"{name}/lora_b" for name in _COLUMN)),
    row=(*_ROW, *(f"{name}/lora_a" for name in _ROW)),
)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    explicit: bool = True,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make the ``(data, fsdp, tensor)`` mesh over the first devices.

    Args:
      data: Copies of the weights, at least 1.
      fsdp: Devices that one copy of the weights is split over, at least 1.
      tensor: Devices that share the work on a sequence, at least 1. They talk the most
        and are next to each other.
      explicit: Axis types. Explicit axes put the sharding in every array's type and
        raise where it is ambiguous; auto axes leave it to the compiler.
      devices: Those to choose from. None: all that JAX sees. Of several TPU slices, or
        nodes of GPUs, as many are along ``data`` as it holds, the rest along ``fsdp``.

    Returns:
      A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
      ValueError: If a size is below 1 or there are too few devices.
    """
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if min(sizes.values()) < 1:
        raise ValueError(f"mesh sizes must be at least 1, got {asked}")
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor > len(devices):
        raise ValueError(
            f"a mesh of {asked} needs {data * fsdp * tensor} devices, "
            f"but JAX sees {len(devices)}"
        )
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    arranged = arrange((data, fsdp, tensor), devices[: data * fsdp * tensor])
    return Mesh(arranged, tuple(sizes), axis_types=(axis_type,) * 3)


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices as an array of these sizes, near ones along the last axes.

    ``jax.make_mesh`` refuses several slices, which several nodes of GPUs are to JAX,
    and sizes that are not made of whole axes of a torus.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = []
    for size in sizes:
        across.append(math.gcd(size, slices // math.prod(across)))
    within = [size // many for size, many in zip(sizes, across, strict=True)]
    if slices == 1:
        return create_device_mesh(within, devices, allow_split_physical_axes=True)
    return create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of tokens ``(B, ...)``: B split over data and fsdp."""
    return NamedSharding(mesh, RULES.batch)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """Return the sharding of every parameter, by the last two names of its path.

    Args:
      abstract_params: Pure tree of arrays or ``ShapeDtypeStruct``. Leaves named
        ``kernel``, ``embedding``, ``lora_a`` or ``lora_b`` are matrices
        ``(..., m, n)``, leaves named ``scale`` or ``bias`` vectors ``(..., d)``; axes
        in front (stacked layers) are not split.
      mesh: A mesh with an ``fsdp`` axis, and ``tensor`` if it is split.

    Returns:
      The same tree with a ``NamedSharding`` for every leaf.

    Raises:
      ValueError: If a leaf's name has no rule or its shape cannot be split.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        *_, module, last = ("", *name.split("/"))
        match last:
            case "kernel" | "embedding":
                spec = RULES.stored_matrix(module, leaf.shape, mesh.shape)
            case "lora_a" | "lora_b":
                spec = RULES.stored_matrix(f"{module}/{last}", leaf.shape, mesh.shape)
            case "scale" | "bias":
                spec = RULES.vector
            case _:
                raise ValueError(
                    f"no sharding rule for parameter {name!r}: its last name must be "
                    "kernel, embedding, lora_a, lora_b, scale or bias; add a rule to "
                    "experiments.training.mesh for any other"
                )
        stacked = (None,) * (len(leaf.shape) - len(spec))
        return NamedSharding(mesh, P(*stacked, *spec))

    return jax.tree_util.tree_map_with_path(sharding, abstract_params)


def placed(abstract: Any, shardings: Any) -> Any:
    """Return a tree of shapes and dtypes with their shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


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
    typed_params = placed(abstract_params, param_shardings(abstract_params, explicit))
    with jax.sharding.use_abstract_mesh(explicit.abstract_mesh):
        state = jax.eval_shape(init, typed_params)

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Constants, such as a counter's zero, have no sharding: they are replicated.
        return NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else P())

    return jax.tree.map(on_mesh, state)
