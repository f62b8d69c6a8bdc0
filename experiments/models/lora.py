"""Adapters: linear layers whose weights are trained through two narrow factors.

For an input x, factors A ``(m, r)`` and B ``(r, n)``, and a kernel W ``(m, n)``::

    lora        y = x W + (alpha / r) (x A) B      W is frozen
    low_rank    y = (x A) B                        there is no W

In a module's parameters the factors are the leaves ``lora_a`` and ``lora_b``, beside
``kernel`` if there is one; layers may be stacked in front of each.

References:
  Hu et al., LoRA (arXiv 2106.09685). Both are baselines of Zhao et al., GaLore
  (arXiv 2403.03507, table 2); its dropout of the adapters' input is left out here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from experiments.models import placement
from ngalore_jax.sharding import spec_of

Kind = Literal["lora", "low_rank"]
Module = dict[str, jax.Array]  # the parameters of one adapted linear layer


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What takes the place of a trained kernel.

    Attributes:
      kind: "lora": two factors beside a frozen kernel; "low_rank": instead of one.
      rank: Columns of A, at most the smaller side of each matrix.
      alpha: Numerator of LoRA's factor ``alpha / rank``; low_rank has none.

    Raises:
      ValueError: If there is no such kind, or rank or alpha is not positive.
    """

    kind: Kind
    rank: int
    alpha: float = 32.0

    def __post_init__(self) -> None:
        """Check what can be checked without a matrix."""
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ValueError(f"kind must be one of {kinds}, got {self.kind!r}")
        for name in ("rank", "alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def scale(self) -> float:
        """Factor on ``A B``."""
        return self.alpha / self.rank if self.kind == "lora" else 1.0

    def init(
        self,
        key: jax.Array,
        name: str,
        shape: tuple[int, int],
        std: float,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Draw the factors of one matrix.

        LoRA starts as the kernel alone: B is zero, A drawn by :func:`draw_a`. The
        entries of both factors of low_rank are from ``N(0, std / sqrt(r))``: an entry
        of ``A B`` sums r products of variance ``(std / sqrt(r))^2`` each, so it has the
        standard deviation ``std``.

        Args:
          key: For the draws.
          name: Of the module, for the error.
          shape: ``(m, n)``.
          std: Standard deviation of the entries of a kernel in that place.
          dtype: Format of the factors.

        Returns:
          A ``(m, r)`` and B ``(r, n)``.

        Raises:
          ValueError: If the rank is above a side.
        """
        (m, n), r = shape, self.rank
        if r > min(m, n):
            raise ValueError(
                f"rank={r} is larger than a side of the {m} x {n} matrix of {name!r}: "
                f"an adapter has a rank of at most {min(m, n)} here"
            )
        if self.kind == "lora":
            return draw_a(key, (m, r), dtype), jnp.zeros((r, n), dtype)
        normal = jax.nn.initializers.normal(math.sqrt(std / math.sqrt(r)))
        key_a, key_b = jax.random.split(key)
        return normal(key_a, (m, r), dtype), normal(key_b, (r, n), dtype)


def draw_a(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Draw LoRA's A ``(..., m, r)`` from ``U(-1 / sqrt(m), 1 / sqrt(m))``.

    That is the initialisation of its reference implementation and of ReLoRA's.
    """
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def through_factors(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: float,
    name: str,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Return ``scale (x A) B`` in the layout of module ``name``, never forming ``A B``.

    On a mesh ``tensor`` cuts the side that the factors share with a kernel that it
    cuts, so that between them goes the narrow ``x A`` alone.

    Args:
      x: ``(B, T, m)``.
      a: ``(m, r)``, as stored.
      b: ``(r, n)``, as stored.
      scale: From :attr:`Adapter.scale`.
      name: Name of the module that holds the factors.
      dtype: Format to accumulate in and return, None for that of ``x``.
    """
    name_a, name_b = f"{name}/lora_a", f"{name}/lora_b"
    x = placement.pin_input(x, name_a, a.shape)
    a = placement.gather_matrix(a.astype(x.dtype), name_a)
    narrow = scale * placement.multiply(x, a, name_a)
    narrow = placement.pin_input(narrow, name_b, b.shape)
    b = placement.gather_matrix(b.astype(x.dtype), name_b)
    return placement.multiply(narrow, b, name_b, dtype)


def is_adapted(node: Any) -> bool:
    """Whether a node of a parameter tree is a module with factors."""
    return isinstance(node, dict) and "lora_a" in node


def labels(params: Any) -> Any:
    """Label each leaf of adapted modules ``adapter`` or, their kernels, ``frozen``.

    Raises:
      ValueError: If a module is not adapted: nothing in it would be trained.
    """

    def label(path: jax.tree_util.KeyPath, node: Any) -> dict[str, str]:
        if not is_adapted(node):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {where!r} has no factors lora_a and lora_b: build the "
                "model with an Adapter, or leave this leaf to another optimizer"
            )
        return {
            name: "adapter" if name in ("lora_a", "lora_b") else "frozen"
            for name in node
        }

    return jax.tree.map_with_path(label, params, is_leaf=is_adapted)


def weight_change(module: Module, scale: float) -> jax.Array:
    """Return ``scale A B`` ``(..., m, n)`` in float32, split over a mesh as the kernel.

    Without a kernel it is split as A is on its side m.
    """
    a, b = module["lora_a"], module["lora_b"]
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return scale * jnp.matmul(a, b, **exact)
    *stacked, rows, columns = spec_of(module.get("kernel", a))
    if "kernel" not in module:
        columns = None  # A's other side is the rank
    a = jax.sharding.reshard(a, P(*stacked, rows, None))
    b = jax.sharding.reshard(b, P(*stacked, None, columns))
    spec = P(*stacked, rows, columns)
    return scale * jnp.matmul(a, b, **exact, out_sharding=spec)


def merge(params: Any, scale: float) -> Any:
    """Fold the factors into kernels: the tree of the model without adapters.

    Args:
      params: Nested dictionaries of arrays, as :func:`functional_llama` makes them.
      scale: From :attr:`Adapter.scale`.

    Returns:
      The same tree with ``W + scale A B`` (low_rank: ``A B``) as kernels, in the
      factors' dtype, and no factors. Added in float32, so that a model in float32
      computes the same up to rounding.
    """

    def fold(node: Any) -> Any:
        if not is_adapted(node):
            return node
        kernel = weight_change(node, scale)
        if "kernel" in node:
            kernel += node["kernel"].astype(jnp.float32)
        rest = {k: v for k, v in node.items() if k not in ("lora_a", "lora_b")}
        return rest | {"kernel": kernel.astype(node["lora_a"].dtype)}

    return jax.tree.map(fold, params, is_leaf=is_adapted)


def without_adapter(
    params: Any, adapter: Adapter | None, fetch: Callable[[jax.Array], Any]
) -> Any:
    """Return parameters with the factors folded in, each as `fetch` hands it on.

    A module at a time, compiled: devices hold no second tree of parameters.
    """

    def fold(node: Any) -> Any:
        if adapter is not None and is_adapted(node):
            node = _merged(node, adapter.scale)
        return jax.tree.map(fetch, node)

    return jax.tree.map(fold, params, is_leaf=is_adapted)


def _merged(module: Module, scale: float) -> Module:
    """One module merged, split over a mesh as its kernel is."""
    factors = ("lora_a", "lora_b")
    kept = {k: x.sharding for k, x in module.items() if k not in factors}
    shardings = {"kernel": None} | kept
    return jax.jit(lambda module: merge(module, scale), out_shardings=shardings)(module)
