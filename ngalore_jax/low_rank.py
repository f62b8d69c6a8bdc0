r"""Any optax transformation, run on gradients projected to a low-rank subspace.

====================================  =============  ==============================
papers (2403.03507, 2410.16029)       here           shape, for one matrix
====================================  =============  ==============================
:math:`G_t`                           ``gradient``   ``(m, n)``
:math:`P_t`                           ``basis``      ``(m, r)``, orthonormal columns
:math:`R_t = P_t^\top G_t`            ``low``        ``(r, n)``
:math:`N_t`                           ``direction``  ``(r, n)``, what ``inner`` returns
:math:`T`                             ``update_proj_gap``  steps
:math:`\alpha`                        ``scale``      scalar
====================================  =============  ==============================
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import accumulation, storage
from ngalore_jax.checks import check_choice, check_gap, check_int
from ngalore_jax.leaves import FullRankLeaf, ProjectedLeaf
from ngalore_jax.matrices import (
    Side,
    WeightDimensionNumbers,
    matrix_view,
    resolve_dimension_numbers,
)
from ngalore_jax.orthogonalized import Orthogonal
from ngalore_jax.projectors import Projector, subspace_iteration
from ngalore_jax.residual import Residual, ResidualState, compensation
from ngalore_jax.subspace import SubspaceChange, when


class LowRankState(NamedTuple):
    """State of :func:`low_rank`; a leaf not projected holds ``MaskedNode()``."""

    count: jax.Array  # () int32
    # (..., m, r), orthonormal columns; in int8 a storage.Int8 of two trees
    projector: optax.Updates | storage.Int8
    inner: optax.OptState  # of inner on leaves (..., r, n), or AccumulationState
    residual: ResidualState  # no arrays without a residual


def low_rank(
    inner: optax.GradientTransformation,
    rank: int | None = 128,
    update_proj_gap: int = 200,
    scale: optax.ScalarOrSchedule = 1.0,
    *,
    projector: Projector | None = None,
    residual: Residual | Orthogonal | float | None = None,
    weight_dimension_numbers: WeightDimensionNumbers | None = None,
    side: Side = "smaller",
    clip_rank: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` in a low-rank subspace of each matrix.

    For every projected matrix :math:`G` (``m x n``, side ``m`` projected):

    .. math::
      P &\leftarrow \mathrm{projector}(G, P)
        \quad\text{if } t \bmod T = 0,\ t = 0, 1, \dots \\
      R &= P^\top G, \qquad N = \mathrm{inner}(R) \\
      U &= \alpha\,(P N + E)

    where :math:`E` is there only with ``residual``, whose rule makes it of what is
    outside the subspace, :math:`G - P R`. The first refresh is at count 0, from the
    gradient. Leaves that are not projected reach ``inner`` as they are and leave it
    unscaled.

    A matrix whose gradient holds a NaN or an Inf, or is so large that squares might
    overflow (a norm above some 1e17 in float32), counts as having a zero gradient in
    that step: it is not refreshed, ``inner`` sees zeros, and its update is what
    ``inner`` makes of zeros (with Adam, the momentum's next step). A zero gradient at
    a refresh likewise keeps the old basis. Other matrices are unaffected, also those
    stacked in the same leaf. To skip the whole step instead, wrap in
    ``optax.apply_if_finite``.

    Args:
      inner: Transformation of the projected gradients that needs no parameters. It is
        handed the extra argument ``subspace_change``
        (:class:`ngalore_jax.SubspaceChange`), which optax's own ignore. One that passes
        over steps, as ``optax.MultiSteps``, would miss a refresh: add up microbatches
        with ``accumulation_steps``.
      rank: Directions kept, ``r``. None: a sixteenth of each matrix's smaller side.
      update_proj_gap: Steps between refreshes, ``T``, as in ``optax.contrib.galore``.
      scale: :math:`\alpha`, a factor on the update of projected leaves: a number or an
        optax schedule.
      projector: One of :func:`ngalore_jax.subspace_iteration` (None means this),
        :func:`~ngalore_jax.svd`, :func:`~ngalore_jax.eigh`,
        :func:`~ngalore_jax.gaussian`, or a function like them.
      residual: Rule that puts the gradient outside the subspace back,
        :func:`ngalore_jax.compensation`, :func:`ngalore_jax.fira` or
        :func:`ngalore_jax.orthogonal`; a number is the weight of the first; None drops
        it, as GaLore does. A matrix whose rank is its side has nothing outside.
      weight_dimension_numbers: Which leaves are projected, along which axes: see
        :func:`ngalore_jax.default_dimension_numbers`, the default, and
        :class:`ngalore_jax.MatrixDimensionNumbers`. A spec, a tree or a function.
      side: Which side of a matrix is projected: ``"smaller"`` (a tie: the left one),
        ``"larger"`` (a tie: the left one, as ``optax.contrib.galore``), ``"left"``
        (the reduction side) or ``"right"`` (the output side).
      clip_rank: Use the smaller side where ``rank`` exceeds it, instead of an error.
      basis_dtype: Storage dtype of the bases: a float dtype, ``"int8"`` with one scale
        per row (:mod:`ngalore_jax.storage`), or None for float32 (float64 leaves:
        float64).
      accumulation_steps: Microbatches per step, as in ``optax.MultiSteps``; None: each
        gradient is a whole one. ``update`` takes a microbatch's gradient and returns
        zeros but for the last one's. Projected gradients add up, ``r n`` elements a
        matrix, so nothing of size ``m n`` is kept between calls. ``update_proj_gap``
        counts steps; a refresh sees the first microbatch's gradient. Not with a
        residual, which needs the whole gradient.

    Returns:
      A transformation. ``update`` takes the extra argument ``refresh``: None decides
      by the count inside one program, a Python bool compiles the steady step (False)
      or the refresh step (True) alone; the caller then keeps the schedule. With
      ``accumulation_steps`` True refreshes on a step's first microbatch only.

    Shapes:
      ``inner`` sees ``(*batch, r, n)`` float32 (float64 for float64 leaves) for a
      projected leaf. Updates have the shape and dtype of the gradients.

    Raises:
      TypeError: If ``rank`` or ``accumulation_steps`` is not an int known when
        tracing, or ``residual`` neither a rule nor a number.
      ValueError: If ``rank`` is below 1, ``update_proj_gap`` no whole number of at
        least 1, ``side`` or ``basis_dtype`` unknown, ``accumulation_steps`` below 1 or
        given with a residual, ``basis_dtype`` narrower than float32 and the residual
        one that scales columns, or, at ``init``, a rank exceeds a side or axes do not
        fit a leaf.

    Memory:
      ``m r`` elements per matrix, ``r n + r r`` with accumulation, the residual's (its
      rule tells) and ``inner``'s state.

    Example:
      >>> import jax.numpy as jnp, optax, ngalore_jax as ng
      >>> tx = ng.low_rank(optax.trace(0.9), rank=1, update_proj_gap=10)
      >>> g = jnp.outer(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0, 0.0]))
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(state.projector.shape, jnp.allclose(updates, g))  # rank one: kept whole
      (2, 1) True

    References:
      Zhao et al., GaLore, 2024 (arXiv 2403.03507), algorithm 2.
    """
    _check_arguments(rank, update_proj_gap, side, accumulation_steps, residual)
    basis_dtype = storage.check_dtype("basis_dtype", basis_dtype, of_gradients=False)
    inner = optax.with_extra_args_support(inner)
    microbatches = accumulation_steps or 1
    projector = subspace_iteration() if projector is None else projector
    if residual is not None and not isinstance(residual, Residual | Orthogonal):
        residual = compensation(residual)
    if isinstance(residual, Residual) and storage.is_narrow(basis_dtype):
        raise ValueError(
            f"basis_dtype={basis_dtype} is not orthonormal enough for a residual "
            "that scales columns by what lies outside: give basis_dtype=None, or "
            "residual=ng.orthogonal()."
        )

    def plan(tree: optax.Params) -> list[ProjectedLeaf | FullRankLeaf]:
        """How each leaf is treated; from paths and shapes alone."""
        plans: list[ProjectedLeaf | FullRankLeaf] = []
        specs = resolve_dimension_numbers(tree, weight_dimension_numbers)
        for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True):
            if spec is None:
                plans.append(FullRankLeaf())
                continue
            view = matrix_view(leaf.shape, spec, rank, side, clip_rank)
            # Outside of a subspace that is all of the space there is only rounding.
            outside = residual if view.rank < view.m else None
            plans.append(ProjectedLeaf(view, projector, outside, basis_dtype))
        return plans

    def init(params: optax.Params) -> LowRankState:
        leaves, treedef = jax.tree.flatten(params)
        plans = list(zip(plan(params), leaves, strict=True))
        tree = treedef.unflatten
        lows = tree([how.low(p) for how, p in plans])
        no_rotations = tree([how.no_rotation(p) for how, p in plans])
        return LowRankState(
            count=jnp.zeros([], jnp.int32),
            projector=storage.join(treedef, [how.basis(p) for how, p in plans]),
            inner=accumulation.start(inner, accumulation_steps, lows, no_rotations),
            residual=_stacked(treedef, [how.outside(p) for how, p in plans]),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowRankState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        how = plan(updates)
        tree = treedef.unflatten
        leaves_of = functools.partial(storage.leaves_of, treedef)
        count = state.count

        due = count % (update_proj_gap * microbatches) == 0
        if refresh is not None:
            due = refresh
        if accumulation_steps is not None and refresh:
            due = state.inner.mini_step == 0  # microbatches of a step share a basis
        bases, rotations = when(
            due,
            lambda old: _transpose(
                2, [h.refresh(g, p, count) for h, g, p in zip(how, gradients, old[0])]
            ),
            (
                leaves_of(state.projector),
                [h.no_rotation(g) for h, g in zip(how, gradients)],
            ),
        )
        lows, finite = _transpose(
            2, [h.project(g, p) for h, g, p in zip(how, gradients, bases)]
        )
        directions, inner_state = accumulation.add(
            inner,
            accumulation_steps,
            tree(lows),
            state.inner,
            SubspaceChange(due, tree(rotations)),
            extra_args,
        )
        factor = scale(count // microbatches) if callable(scale) else scale
        stages = zip(
            gradients,
            bases,
            lows,
            finite,
            leaves_of(directions),
            map(ResidualState, *map(leaves_of, state.residual)),
        )
        out, outside = _transpose(
            2,
            [
                h.project_back(*stage, count=count, scale=factor)
                for h, stage in zip(how, stages)
            ],
        )
        return tree(out), LowRankState(
            count=jnp.asarray(optax.safe_increment(count)),
            projector=storage.join(treedef, bases),
            inner=inner_state,
            residual=_stacked(treedef, outside),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _stacked(treedef: Any, leaves: list[ResidualState]) -> ResidualState:
    """States of single leaves as one of trees."""
    fields = _transpose(len(ResidualState._fields), leaves)
    return ResidualState(*(storage.join(treedef, field) for field in fields))


def _transpose(width: int, rows: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Rows of ``width`` to that many columns, also where there is no row."""
    return tuple([row[i] for row in rows] for i in range(width))


def _check_arguments(
    rank: Any,
    update_proj_gap: Any,
    side: str,
    accumulation_steps: int | None,
    residual: Residual | Orthogonal | float | None,
) -> None:
    if rank is not None:
        check_int("rank", rank)
    check_gap("update_proj_gap", update_proj_gap)
    check_choice("side", side, Side)
    if callable(residual) or isinstance(residual, str):
        raise TypeError(
            "residual must be a rule such as ng.orthogonal() (called), a number or "
            f"None, got {residual!r}."
        )
    if accumulation_steps is None:
        return
    check_int("accumulation_steps", accumulation_steps)
    if residual is not None:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} keeps projected gradients only, "
            "but residual needs the whole gradient: give residual=None, or add up the "
            "gradients before update (optax.MultiSteps)."
        )
