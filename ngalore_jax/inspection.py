"""What an optimizer state weighs, in total and by part."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngalore_jax.low_rank import LowRankState
from ngalore_jax.natural import NaturalGradientState
from ngalore_jax.two_sided import TwoSidedState


def state_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, over all devices, a replica counted once.

    Args:
      tree: Any tree of arrays or ``jax.ShapeDtypeStruct``, as from
        ``jax.eval_shape(tx.init, params)``.

    Example:
      >>> import jax, ngalore_jax as ng, optax
      >>> params = {"w": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> ng.state_bytes(jax.eval_shape(optax.adam(1e-3).init, params))
      8388612
      >>> ng.state_bytes(jax.eval_shape(ng.galore(1e-3, rank=128).init, params))
      2359308
    """
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_report(state: optax.OptState) -> dict[str, int]:
    """Bytes of an optimizer state by part.

    Args:
      state: State of any optax transformation, however nested, or its
        ``jax.eval_shape``.

    Returns:
      Bytes of ``basis`` (the projectors, or the factors and what moves them),
      ``history`` (gradients and Gram matrices of the natural gradient), ``moments``
      (everything else of the transform run inside :func:`ngalore_jax.low_rank` or
      :func:`ngalore_jax.reference`), ``residual`` (the rule for the gradient outside
      the subspace) and ``unprojected`` (whatever lies outside these: the moments of
      embeddings and norms, counters). They add up to :func:`state_bytes`.

    Example:
      >>> import jax, ngalore_jax as ng
      >>> params = {"w": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> tx = ng.natural_galore(1e-3)
      >>> for part, size in ng.state_report(jax.eval_shape(tx.init, params)).items():
      ...     print(part, size)
      basis 65540
      history 557316
      moments 524292
      residual 1052672
      unprojected 4
    """
    parts = ("basis", "history", "moments", "residual", "unprojected")
    report: dict[str, int] = dict.fromkeys(parts, 0)

    def is_projected(node: Any) -> bool:
        return isinstance(node, LowRankState | TwoSidedState)

    def is_history(node: Any) -> bool:
        return isinstance(node, NaturalGradientState)

    for node in jax.tree.leaves(state, is_leaf=is_projected):
        if not is_projected(node):
            report["unprojected"] += state_bytes(node)
            continue
        if isinstance(node, TwoSidedState):
            report["basis"] += state_bytes((node.factors, node.drift, node.count))
        else:
            report["basis"] += state_bytes((node.projector, node.count))
            report["residual"] += state_bytes(node.residual)
        for part in jax.tree.leaves(node.inner, is_leaf=is_history):
            report["history" if is_history(part) else "moments"] += state_bytes(part)
    return report
