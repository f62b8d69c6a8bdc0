"""Ready optimizers: which leaves are projected, what runs there, and the step size."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax

from ngalore_jax.accumulation import accumulate
from ngalore_jax.checks import check_at_least
from ngalore_jax.low_rank import low_rank
from ngalore_jax.matrices import (
    Side,
    WeightDimensionNumbers,
    resolve_dimension_numbers,
)
from ngalore_jax.moments import scale_by_subspace_adam
from ngalore_jax.natural import scale_by_natural_gradient
from ngalore_jax.orthogonalized import Orthogonal, orthogonal
from ngalore_jax.precision import dtypes_kept, in_float32
from ngalore_jax.projection import finite_or_zero
from ngalore_jax.projectors import Projector, svd
from ngalore_jax.residual import Residual
from ngalore_jax.subspace import AtRefresh

PAPER: Mapping[str, Any] = MappingProxyType(
    dict(
        update_proj_gap=200,
        scale=0.25,
        history=20,
        history_dtype=None,
        damping=1e-3,
        eps=1e-6,
        projector=svd(),
        residual=None,
        history_at_refresh="keep",
        moments_at_refresh="keep",
    )
)
"""Settings that reproduce the published method: ``natural_galore(lr, rank, **PAPER)``.

Exact SVD, nothing carried over a refresh, the gradient outside the subspace dropped,
a history in float32 (arXiv 2410.16029, section 4; its learning rate is 0.01 with 10 %
warmup). The method as the paper writes it, one side projected; the published code
projects both. The float32 safeguards of :func:`scale_by_natural_gradient` stay.
"""

_ORTHOGONAL = orthogonal()


def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    update_proj_gap: int = 3,
    scale: jax.typing.ArrayLike = 0.25,
    history: int = 8,
    damping: jax.typing.ArrayLike = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    projector: Projector | None = None,
    residual: Residual | Orthogonal | float | None = _ORTHOGONAL,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    history_at_refresh: AtRefresh = "rotate",
    moments_at_refresh: AtRefresh = "rotate",
    relative_damping: bool = False,
    history_dtype: jax.typing.DTypeLike | None = "int8",
    moments_dtype: jax.typing.DTypeLike | None = None,
    basis_dtype: jax.typing.DTypeLike | None = None,
    side: Side = "smaller",
    clip_rank: bool = False,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore: Adam on the natural gradient in a low-rank subspace.

    Each projected matrix goes through :func:`ngalore_jax.low_rank` with
    :func:`ngalore_jax.scale_by_natural_gradient` and
    :func:`ngalore_jax.scale_by_subspace_adam` inside:

    .. math::
      R &= P^\top G, \quad S = (\lambda I + H H^\top)^{-1} R, \quad
        N = \mathrm{Adam}(S) \\
      W &\leftarrow W - \eta \left(\alpha\,(P N + E) + \omega W\right)

    All other leaves take Adam. Departures from the paper, each an argument and
    undone by ``**PAPER``: :math:`E`, the momentum of the gradient outside the subspace,
    orthogonalised (:func:`ngalore_jax.orthogonal`); moments and history follow the
    basis at a refresh; the basis comes from subspace iteration, every few steps; the
    history is short and kept in 8 bits; ``eps`` is 1e-8.

    Args:
      learning_rate: :math:`\eta`, a number or an optax schedule.
      rank: Directions kept of the projected side of each matrix. None: a sixteenth of
        its smaller side; GaLore's published ranks are about a quarter.
      update_proj_gap: Steps between refreshes of the basis; GaLore's is 200.
      scale: :math:`\alpha`, a factor on the update of projected leaves.
      history: Gradients in the Fisher, the current one included.
      damping: :math:`\lambda > 0`, in units of squared gradient norms.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: :math:`\omega`, decoupled, on the full parameters.
      mask: Tree of bools, or a function of the parameters that returns one: which
        leaves decay. None for all.
      projector: See :func:`ngalore_jax.low_rank`.
      residual: The rule :math:`E` of the gradient outside the subspace, or None to
        drop it; see :func:`ngalore_jax.low_rank`.
      weight_dimension_numbers: Which leaves are projected, and along which axes. By
        default all matrices but embeddings, output layers and norms.
      adam_learning_rate: Learning rate of the leaves that are not projected, None for
        ``learning_rate``.
      history_at_refresh: ``"rotate"``, ``"keep"`` or ``"reset"``.
      moments_at_refresh: ``"rotate"``, ``"keep"`` or ``"reset"``.
      relative_damping: Whether ``damping`` is relative to the history's mean energy.
      history_dtype: Storage dtype of the history: ``"int8"``, ``"bfloat16"``, or None
        for float32; see :mod:`ngalore_jax.storage`.
      moments_dtype: Likewise of Adam's moments of projected leaves.
      basis_dtype: Likewise of the bases.
      side: Side of each matrix that is projected.
      clip_rank: Use the smaller side where ``rank`` exceeds it, instead of an error.
      accumulation_steps: Microbatches per step, None for one; see
        :func:`ngalore_jax.low_rank`. Only without a residual.

    Returns:
      An optimizer for ``optax.apply_updates``; ``update`` needs ``params`` where there
      is weight decay.

    Raises:
      TypeError: If ``rank``, ``history`` or ``accumulation_steps`` is not an int known
        at trace time.
      ValueError: If an argument is outside its range, or a rank exceeds a side.

    Memory:
      ``4 m r + (8 + s) r n + 2 s n + 4 s^2 + (m + 2) n`` bytes per projected matrix,
      side ``m`` projected, in float32 but for the history and, the last term, the
      momentum outside; and twice the size of any other leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ngalore_jax as ng
      >>> params = {"w": jnp.zeros((8, 16))}
      >>> target = jax.random.normal(jax.random.key(0), (8, 16))
      >>> loss = lambda p: jnp.mean((p["w"] - target) ** 2)
      >>> tx = ng.natural_galore(0.05, rank=2, update_proj_gap=10)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> state, before = tx.init(params), loss(params)
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < before / 3)
      True

    References:
      Das, Natural GaLore, 2024 (arXiv 2410.16029).
    """
    inside = optax.chain(
        scale_by_natural_gradient(
            history,
            damping,
            relative_damping=relative_damping,
            at_refresh=history_at_refresh,
            history_dtype=history_dtype,
        ),
        scale_by_subspace_adam(
            b1, b2, eps, at_refresh=moments_at_refresh, moments_dtype=moments_dtype
        ),
    )
    return _optimizer(
        inside,
        optax.scale_by_adam(b1, b2, eps),
        learning_rate,
        adam_learning_rate,
        weight_decay,
        mask,
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        projector=projector,
        residual=residual,
        weight_dimension_numbers=weight_dimension_numbers,
        side=side,
        clip_rank=clip_rank,
        basis_dtype=basis_dtype,
        accumulation_steps=accumulation_steps,
    )


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    projector: Projector | None = None,
    residual: Residual | Orthogonal | float | None = None,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    moments_at_refresh: AtRefresh = "rotate",
    moments_dtype: jax.typing.DTypeLike | None = None,
    basis_dtype: jax.typing.DTypeLike | None = None,
    side: Side = "smaller",
    clip_rank: bool = False,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in a low-rank subspace of each matrix.

    :func:`natural_galore` without the Fisher, and without a residual unless asked.
    It takes the place of ``optax.contrib.galore``: ``rank``, ``update_proj_gap`` and
    ``scale`` mean the same. What differs by default: ``scale`` is 0.25 (there 1.0), the
    basis is subspace iteration's and not an SVD's, a rank above a side is an error and
    not clipped, embeddings and output layers are not projected, stacked leaves are, the
    smaller side is projected, the moments follow the basis. ``scale=1.0,
    side="larger", clip_rank=True, projector=svd(), moments_at_refresh="keep",
    weight_dimension_numbers=MatrixDimensionNumbers()`` gives its numbers on 2-D
    leaves, up to the signs of the SVD after the first refresh.

    Args:
      learning_rate: A number or an optax schedule.
      rank: Directions kept of the smaller side of each matrix.
      update_proj_gap: Steps between refreshes of the basis.
      scale: Factor on the update of projected leaves.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled weight decay, on the full parameters.
      mask: Which leaves decay; see :func:`natural_galore`.
      projector: See :func:`ngalore_jax.low_rank`.
      residual: See :func:`ngalore_jax.low_rank`.
      weight_dimension_numbers: See :func:`natural_galore`.
      adam_learning_rate: Learning rate of the leaves that are not projected, None for
        ``learning_rate``.
      moments_at_refresh: ``"rotate"``, ``"keep"`` (as published) or ``"reset"``.
      moments_dtype: Storage dtype of Adam's moments of projected leaves: None for
        float32, ``"bfloat16"`` or ``"int8"``; see :mod:`ngalore_jax.storage`.
      basis_dtype: Likewise of the bases.
      side: Side of each matrix that is projected.
      clip_rank: Use the smaller side where ``rank`` exceeds it, instead of an error.
      accumulation_steps: Microbatches per step, None for one; see
        :func:`ngalore_jax.low_rank`. Only without a residual.

    Returns:
      An optimizer for ``optax.apply_updates``; ``update`` needs ``params`` where there
      is weight decay.

    Raises:
      TypeError: If ``rank`` or ``accumulation_steps`` is not an int known at trace
        time.
      ValueError: If an argument is outside its range, or a rank exceeds a side.

    Memory:
      ``m r + 2 r n`` elements per projected matrix, side ``m`` projected.

    Example:
      >>> import jax.numpy as jnp, ngalore_jax as ng
      >>> tx = ng.galore(1e-3, rank=2, side="larger")
      >>> state = tx.init({"w": jnp.zeros((8, 4))})
      >>> ng.state_report(state)["basis"] == 4 * 8 * 2 + 4  # and a counter
      True

    References:
      Zhao et al., GaLore, 2024 (arXiv 2403.03507).
    """
    return _optimizer(
        scale_by_subspace_adam(
            b1, b2, eps, at_refresh=moments_at_refresh, moments_dtype=moments_dtype
        ),
        optax.scale_by_adam(b1, b2, eps),
        learning_rate,
        adam_learning_rate,
        weight_decay,
        mask,
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        projector=projector,
        residual=residual,
        weight_dimension_numbers=weight_dimension_numbers,
        side=side,
        clip_rank=clip_rank,
        basis_dtype=basis_dtype,
        accumulation_steps=accumulation_steps,
    )


def _optimizer(
    inside: optax.GradientTransformation,
    full_rank: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None,
    *,
    weight_dimension_numbers: WeightDimensionNumbers | None,
    scale: jax.typing.ArrayLike,
    accumulation_steps: int | None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """``low_rank(inside, **settings)`` on matrices, ``full_rank`` on other leaves."""
    check_at_least("weight_decay", weight_decay, 0)

    def labels(params: optax.Params) -> optax.Params:
        treedef = jax.tree.structure(params)
        specs = resolve_dimension_numbers(params, weight_dimension_numbers)
        return treedef.unflatten(
            ["full_rank" if spec is None else "low_rank" for spec in specs]
        )

    rates = {
        "low_rank": learning_rate,
        "full_rank": learning_rate
        if adam_learning_rate is None
        else adam_learning_rate,
    }
    projected = low_rank(
        inside,
        # The step size too: on ``r n`` numbers, not on ``m n``.
        scale=_product(-1, scale, rates["low_rank"]),
        weight_dimension_numbers=weight_dimension_numbers,
        accumulation_steps=accumulation_steps,
        **settings,
    )
    # As in low_rank: a gradient that is not finite, or huge, counts as zero.
    guard = optax.stateless(lambda updates, _: jax.tree.map(finite_or_zero, updates))
    full_rank = optax.chain(
        in_float32(full_rank), optax.scale_by_learning_rate(rates["full_rank"])
    )
    if accumulation_steps is not None:
        full_rank = accumulate(full_rank, accumulation_steps)
    optimizer = optax.partition(
        {"low_rank": projected, "full_rank": optax.chain(guard, full_rank)}, labels
    )
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.chain(optimizer, optax.identity())  # parameters are not read

    def decaying(label: str) -> Callable[[optax.Params], Any]:
        def choose(params: optax.Params) -> Any:
            decays = True if mask is None else mask(params) if callable(mask) else mask
            return jax.tree.map(
                lambda one, decays: decays and one == label,
                labels(params),
                jax.tree.broadcast(decays, params),
            )

        return choose

    decay = dtypes_kept(
        optax.chain(
            *(
                optax.add_decayed_weights(
                    _product(-1, rate, weight_decay), decaying(label)
                )
                for label, rate in rates.items()
            )
        )
    )
    if accumulation_steps is not None:
        last = accumulation_steps - 1

        def is_last(step: Any, **extra_args: Any) -> jax.Array:
            del extra_args
            return step % accumulation_steps == last

        decay = optax.conditionally_mask(decay, is_last)
    return optax.chain(optimizer, decay)


def _product(*factors: Any) -> Any:
    """The product of numbers and schedules, a schedule if one of them is."""

    def at(count: jax.Array | None) -> Any:
        values: list[Any] = [f(count) if callable(f) else f for f in factors]
        return math.prod(values)

    return at if any(map(callable, factors)) else at(None)
