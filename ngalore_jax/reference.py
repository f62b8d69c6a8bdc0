"""The optimizer of the published code, which is not quite that of the paper."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax.checks import (
    check_at_least,
    check_choice,
    check_decay,
    check_gap,
    check_int,
)
from ngalore_jax.natural import scale_by_natural_gradient
from ngalore_jax.projection import finite_or_zero
from ngalore_jax.tensors import WeightModeAxes, tensor_views
from ngalore_jax.two_sided import two_sided

ReferenceMode = Literal[
    "galore", "natural_galore", "online_galore", "online_natural_galore"
]
"""With or without the Fisher; factors decomposed anew, or moved a little every step."""


def reference(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    mode: ReferenceMode = "natural_galore",
    update_proj_gap: int = 200,
    scale: jax.typing.ArrayLike = 0.25,
    history: int = 20,
    damping: jax.typing.ArrayLike = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_mode_axes: WeightModeAxes | None = None,
    *,
    factor_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore as its published PyTorch code has it, in four modes.

    Every side of a projected tensor is projected. With a factor
    :math:`U_k \in \mathbb{R}^{n_k \times r_k}` a mode and :math:`\times_k` the product
    along mode :math:`k` (for a matrix :math:`C = U_1^\top G\, U_2`),

    .. math::
      U &\leftarrow \mathrm{Tucker}(G) \quad\text{at counts } 0, T, 2T, \ldots \\
      C &= G \times_1 U_1^\top \cdots \times_d U_d^\top \\
      S &= (\lambda I + H H^\top)^{-1} \mathrm{vec}\, C, \quad
        H = [\mathrm{vec}\, C_{t-s+1} \cdots \mathrm{vec}\, C_t] \\
      m &\leftarrow \beta_1 m + (1 - \beta_1) S, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) S^2 \\
      N &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\, \frac{m}{\sqrt v + \epsilon} \\
      W &\leftarrow W - \eta\, \alpha\, N \times_1 U_1 \cdots \times_d U_d \\
      W &\leftarrow W - \eta\, \omega\, W

    ``"natural_galore"`` is all of this; ``"galore"`` has :math:`S = C`. In
    ``"online_galore"`` and ``"online_natural_galore"`` the factors are decomposed at
    count 0 only. At the end of each later step one step of AdamW (decay 0.01, the other
    numbers PyTorch's) moves them, orthonormal no more, down

    .. math::
      \left\| \bar G - \bar G \times_1 U_1 U_1^\top \cdots \times_d U_d U_d^\top
        \right\|^2, \qquad \bar G = G / \|G\| .

    The slope of a mode kept whole is rounding, which AdamW makes whole steps of.
    Nothing follows the factors when they move: history and moments stay as they are.
    All other leaves take the same Adam, step size and decay, without :math:`\alpha`.

    Departures from the published code: the Fisher is solved in the push-through form,
    and its damping has a floor at rounding (see
    :func:`ngalore_jax.scale_by_natural_gradient`), where the code has Woodbury's, equal
    in exact arithmetic. HOOI makes ten sweeps on tensors of three or more modes and
    none on matrices, where it changes nothing; there it stops when an error changes by
    less than 1e-4. Factors, history and moments of projected leaves are float32
    (float64 for float64 leaves), there of the parameters' dtype. A tensor whose
    gradient is not finite has a zero gradient in that step, and with a zero gradient
    factors are not decomposed; there either makes NaN. A stack of layers is a batch of
    tensors; there each layer is a parameter of its own.

    Args:
      learning_rate: :math:`\eta`, a number or an optax schedule.
      rank: Directions kept of each mode; all of a mode that has no more.
      mode: One of the four.
      update_proj_gap: :math:`T`, steps between refreshes of the factors.
      scale: :math:`\alpha`, a factor on the update of projected leaves.
      history: :math:`s`, gradients in the Fisher, the current one included.
      damping: :math:`\lambda > 0`, in units of squared gradient norms.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, which is not bias-corrected there.
        Where a matrix has just been decomposed its core is diagonal up to rounding, and
        ``eps`` is what keeps Adam from dividing that by itself.
      weight_decay: :math:`\omega`, decoupled, on all leaves, after the update.
      weight_mode_axes: Which axes of a leaf are modes; axes not named are batch. A tree
        with a tuple of axes for each leaf, or None where it is not projected, or a
        function of the parameters that returns one. By default the leaves of
        :func:`ngalore_jax.default_dimension_numbers`: of two or three dimensions, the
        last two axes; of four or more (convolution kernels), all axes.
      factor_learning_rate: Learning rate of online factors, a number or a schedule.
        None: ``1 / update_proj_gap``, as published for a constant learning rate. A
        schedule multiplies it there by its share of the peak, which a schedule does not
        tell: ``lambda t: learning_rate(t) / peak / update_proj_gap``.

    Returns:
      An optimizer for ``optax.apply_updates``; ``update`` needs ``params`` where there
      is weight decay.

    Raises:
      TypeError: If ``rank`` or ``history`` is not an int known at trace time.
      ValueError: If an argument is outside its range, ``mode`` is none of the four, or
        a schedule comes with online factors and no ``factor_learning_rate``.

    Memory:
      ``sum_k n_k r_k + (2 + s) prod_k r_k + s^2`` elements per tensor, without ``s`` in
      the modes that have no Fisher, ``3 sum_k n_k r_k`` where factors are online; twice
      the size of any other leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ngalore_jax as ng
      >>> params = {"conv": jnp.zeros((3, 3, 4, 8)), "dense": jnp.zeros((8, 16))}
      >>> tx = ng.reference(0.01, rank=2, weight_decay=0.1)
      >>> grads = jax.tree.map(jnp.ones_like, params)  # rank one: kept whole
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(jax.tree.map(lambda w: jnp.unique(jnp.round(w, 5)).size, params))
      {'conv': 1, 'dense': 1}

    References:
      Das, Natural GaLore, 2024 (arXiv 2410.16029) and its code,
      ``selfsupervised-ai/Natural-GaLore`` on GitHub.
    """
    check_int("rank", rank)
    check_choice("mode", mode, ReferenceMode)
    check_gap("update_proj_gap", update_proj_gap)
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_at_least("eps", eps, 0)
    check_at_least("weight_decay", weight_decay, 0)
    online, adam = mode.startswith("online"), _scale_by_adam(b1, b2, eps)
    if not online:
        factor_learning_rate = None
    elif factor_learning_rate is None:
        if callable(learning_rate):
            raise ValueError(
                f"mode={mode!r} moves its factors at a rate that follows learning_rate "
                "/ its peak, and a schedule does not tell its peak: give "
                "factor_learning_rate, as published lambda t: learning_rate(t) / peak "
                "/ update_proj_gap."
            )
        factor_learning_rate = 1 / update_proj_gap
    inner = adam
    if "natural" in mode:
        inner = optax.chain(scale_by_natural_gradient(history, damping), adam)

    def labels(params: optax.Params) -> optax.Params:
        views = tensor_views(params, weight_mode_axes, rank)
        return jax.tree.structure(params).unflatten(
            ["other" if view is None else "projected" for view in views]
        )

    projected = two_sided(
        inner, rank, update_proj_gap, scale, weight_mode_axes, factor_learning_rate
    )
    guard = optax.stateless(lambda updates, _: jax.tree.map(finite_or_zero, updates))
    return optax.chain(
        optax.partition(
            {"projected": projected, "other": optax.chain(guard, adam)}, labels
        ),
        _step_then_decay(learning_rate, weight_decay),
    )


def _scale_by_adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """Adam whose ``eps`` is beside the root of ``v`` before its bias is corrected."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        directions = jax.tree.map(
            lambda m, v: correction.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu
        )
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


class _StepCount(NamedTuple):
    """State of :func:`_step_then_decay`."""

    count: jax.Array  # () int32


def _step_then_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """``W <- (1 - lr wd) (W - lr N)``: what is decayed is the updated weight."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.scale_by_learning_rate(learning_rate)  # parameters are not read

    def init(params: optax.Params) -> _StepCount:
        del params
        return _StepCount(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, _StepCount]:
        if params is None:
            raise ValueError(
                f"weight_decay={weight_decay} decays the parameters: give them to "
                "update as its third argument."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate)

        def change(n: jax.Array, w: jax.Array) -> jax.Array:
            step = -rate * n
            return (step - rate * weight_decay * (w + step)).astype(n.dtype)

        changes = jax.tree.map(change, updates, params)
        return changes, _StepCount(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)
