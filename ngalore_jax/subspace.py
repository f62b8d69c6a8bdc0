"""What a state that lives in the subspace does when the subspace moves."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

AtRefresh = Literal["keep", "rotate", "reset"]
"""What happens to a state in the old basis: nothing, it is rotated, or it is zeroed."""


class SubspaceChange(NamedTuple):
    """Extra argument ``subspace_change`` from ``low_rank`` to its inner transform.

    Attributes:
      moved: Whether this step refreshed the bases: a traced bool, or a Python bool
        when the caller compiles refresh and steady steps as two programs.
      rotation: Tree like the updates: ``P_new^T P_old``, ``(..., r, r)``, for each
        projected leaf and None elsewhere. Meaningful only where ``moved``.
    """

    moved: jax.Array | bool
    rotation: optax.Updates


def rotations_of(treedef: Any, change: SubspaceChange) -> list[jax.Array | None]:
    """Rotation of each leaf of updates of this structure.

    Leaves that ``optax.masked`` or ``optax.partition`` has put a ``MaskedNode()`` in
    the place of, which they do not in extra arguments, are passed over.
    """
    there, around = jax.tree.flatten(
        treedef.unflatten([True] * treedef.num_leaves),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    rotations = around.flatten_up_to(change.rotation)
    return [q for q, kept in zip(rotations, there, strict=True) if kept is True]


def when(pred: jax.Array | bool, fn: Callable[[Any], Any], operand: Any) -> Any:
    """``fn(operand)`` if ``pred`` else ``operand``, decided early if it can be.

    ``fn`` returns what it takes. Decided late it is a loop of one turn or none: a loop
    updates its operand in place, where the branch of a ``lax.cond`` that returns it
    unchanged would copy all of it in every step.
    """
    if isinstance(pred, bool):
        return fn(operand) if pred else operand

    def turn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(carry[0]), fn(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (pred, operand))[1]
