"""The one place that chooses an optimizer.

Every method gets the same leaves and the same rest: the hidden matrices (kernels
but the output layer's, stacked over layers or not) are trained by the method at its
learning rate, through an adapter's factors if it has one; embeddings, output layer and
norms by Adam at a learning rate of their own. Comparisons between methods are then
about the matrices alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ngalore_jax as ng
from experiments.configs.optimizer import OptimizerConfig, Others, StorageDtype
from experiments.models import lora
from experiments.training import variants
from experiments.training.relora import jagged, relora
from ngalore_jax.matrices import work_dtype
from ngalore_jax.precision import in_float32

# A matrix is the last two axes; an axis in front of them counts layers.
_MUON_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

# Products and sums of sharded matrices in these do not say how the result is to be
# sharded, which a mesh with explicit axes demands.
_AUTO_AXES_ONLY = ("muon", "optax_galore")


def takes_explicit_axes(config: OptimizerConfig) -> bool:
    """Whether the optimizer runs on a mesh with explicit axes, or on auto ones only."""
    return config.optimizer not in _AUTO_AXES_ONLY and config.fisher == "matrix"


def build_optimizer(
    config: OptimizerConfig,
    *,
    learning_rate: float,
    steps: int,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that `config` names.

    Args:
        config: The method and its settings.
        learning_rate: Peak learning rate of the hidden matrices.
        steps: Steps of the whole run; the schedule ends there.
        accumulation_steps: Updates that make up a step, one a microbatch (galore,
            natural_galore). None: each is a step.

    Returns:
        A transformation of a model's parameters: nested dictionaries whose hidden
        matrices are leaves named `kernel`, or an adapter's `lora_a` and `lora_b`,
        outside `lm_head` and `head`.
    """
    accumulates = accumulation_steps is not None
    more = {"accumulation_steps": accumulation_steps} if accumulates else {}
    if config.optimizer == "relora":
        more["gap"] = config.restart_gap(steps)
    if config.optimizer == "reference":
        more["peak"] = learning_rate
    schedule = matrix_schedule(config, learning_rate, steps)
    method = _METHODS[config.optimizer](config, schedule, **more)
    given = config.adam_learning_rate
    others_rate = learning_rate if given is None else given
    adam = optax.chain(
        _scale_by_adam(config),
        optax.scale_by_learning_rate(
            learning_rate_schedule(config, others_rate, steps)
        ),
    )
    if accumulates:
        adam = optax.MultiSteps(adam, accumulation_steps).gradient_transformation()
    parts = {"matrix": method, "other": adam}
    if config.others == "freeze":
        parts["frozen"] = optax.set_to_zero()
    optimizer = optax.partition(
        parts, functools.partial(matrix_labels, others=config.others)
    )
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def learning_rate_schedule(
    config: OptimizerConfig, peak: float, steps: int
) -> optax.Schedule:
    """Returns a linear rise to `peak`, then a cosine or a line down to its end value.

    The first step has a learning rate above zero: none is wasted.
    """
    warmup = min(round(config.warmup_fraction * steps), steps - 1)
    start, end = peak / (warmup + 1), config.final_fraction * peak
    if config.decay == "linear":
        fall = optax.linear_schedule(peak, end, steps - warmup)
        if not warmup:
            return fall
        rise = optax.linear_schedule(start, peak, warmup)
        return optax.join_schedules([rise, fall], [warmup])
    return optax.warmup_cosine_decay_schedule(
        init_value=start,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=end,
    )


def matrix_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Returns the schedule of the hidden matrices: ReLoRA's rises at every restart.

    Each of its rises takes a tenth of the steps between two restarts, at most the 100
    steps of arXiv 2307.05695.
    """
    schedule = learning_rate_schedule(config, peak, steps)
    if config.optimizer != "relora":
        return schedule
    gap = config.restart_gap(steps)
    return jagged(schedule, gap, warmup=min(gap // 10, 100))


def matrix_labels(params: optax.Params, others: Others = "train") -> optax.Params:
    """Labels each leaf `matrix` (left to the method), `other` (on Adam) or `frozen`.

    Matrices are the hidden kernels and adapters' factors, also the kernels that a
    method with adapters freezes. With `others` frozen, output layer or head alone is
    on Adam.
    """

    def label(path: jax.tree_util.KeyPath, _: jax.Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if not {"lm_head", "head"}.isdisjoint(names):
            return "other"
        if names[-1] in ("kernel", "lora_a", "lora_b"):
            return "matrix"
        return "other" if others == "train" else "frozen"

    return jax.tree.map_with_path(label, params)


def adamw_state_bytes(params: optax.Params) -> int:
    """Returns the bytes AdamW's state would take; `params` may be abstract.

    With adapters it is that of the model without: what they are to be compared with.
    """
    base = jax.eval_shape(functools.partial(lora.merge, scale=1.0), params)
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, work_dtype(x)), base)
    return ng.state_bytes(jax.eval_shape(optax.adamw(1e-3).init, wide))


def per_layer(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Lets `inner` see every stacked leaf (L, m, n) as L matrices (m, n).

    For transformations that only know two-dimensional leaves.
    """

    def split(tree: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda x: tuple(x) if x.ndim == 3 else x, tree)

    def merge(like: optax.Updates, tree: optax.Updates) -> optax.Updates:
        return jax.tree.map(
            lambda x, layers: jnp.stack(layers) if x.ndim == 3 else layers, like, tree
        )

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(split(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        split_params = None if params is None else split(params)
        new_updates, state = inner.update(split(updates), state, split_params)
        return merge(updates, new_updates), state

    return optax.GradientTransformation(init, update)


def _stored(dtype: StorageDtype) -> str | None:
    """The library's name of a storage dtype; None is its float32, rounded nowhere."""
    return None if dtype == "float32" else dtype


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam, with moments as wide as those of the library's methods."""
    return in_float32(optax.scale_by_adam(b1=config.b1, b2=config.b2))


def _adamw(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    return optax.chain(
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _galore(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformation:
    return ng.galore(
        learning_rate,
        **_shared(config),
        **_subspace(config),
        moments_at_refresh=config.moments_at_refresh,
        moments_dtype=_stored(config.moments_dtype),
        accumulation_steps=accumulation_steps,
    )


def _natural_galore(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    accumulation_steps: int | None = None,
) -> optax.GradientTransformation:
    if config.fisher != "matrix":
        return _natural_galore_trial(config, learning_rate)
    return ng.natural_galore(
        learning_rate,
        history=config.history,
        damping=config.damping,
        relative_damping=config.relative_damping,
        history_at_refresh=config.history_at_refresh,
        history_dtype=_stored(config.history_dtype),
        **_shared(config),
        **_subspace(config),
        moments_at_refresh=config.moments_at_refresh,
        moments_dtype=_stored(config.moments_dtype),
        accumulation_steps=accumulation_steps,
    )


def _natural_galore_trial(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Natural GaLore with another Fisher than the library's."""
    if config.fisher == "model":
        fisher = variants.scale_by_model_fisher(config.history, config.damping)
    else:
        fisher = variants.scale_by_averaged_history(config.damping)
    adam = ng.scale_by_subspace_adam(
        config.b1,
        config.b2,
        at_refresh=config.moments_at_refresh,
        moments_dtype=_stored(config.moments_dtype),
    )
    return optax.chain(
        ng.low_rank(
            optax.chain(fisher, adam),
            config.rank,
            config.update_proj_gap,
            config.scale,
            **_subspace(config),
        ),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _natural_galore_paper(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    given = dict(history=config.history, damping=config.damping)
    return ng.natural_galore(learning_rate, **{**ng.PAPER, **_shared(config), **given})


def _shared(config: OptimizerConfig) -> dict[str, Any]:
    """Arguments that everything with a GaLore in it has."""
    return dict(
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
    )


def _subspace(config: OptimizerConfig) -> dict[str, Any]:
    """Where the subspace comes from, how it is kept, and what is outside it."""
    match config.residual:
        case "orthogonal":
            residual = ng.orthogonal(config.residual_weight, config.momentum)
        case None:
            residual = None
        case rule:
            residual = _COLUMN_RULES[rule](config.residual_weight)
    return dict(
        projector=_PROJECTORS[config.projector](),
        residual=residual,
        basis_dtype=_stored(config.basis_dtype),
    )


_PROJECTORS = {
    "subspace_iteration": ng.subspace_iteration,
    "svd": ng.svd,
    "eigh": ng.eigh,
    "gaussian": ng.gaussian,
    "switching": variants.switching,
    "averaged": variants.averaged,
}
_COLUMN_RULES = {"compensation": ng.compensation, "fira": ng.fira}


def _muon(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        # Updates as large as Adam's whatever the shape: arXiv 2502.16982.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: _MUON_AXES, params
        ),
    )


def _optax_galore(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    return per_layer(
        optax.contrib.galore(
            learning_rate,
            rank=config.rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.scale,
            base_optimizer=optax.scale_by_adam(b1=config.b1, b2=config.b2),
            weight_decay=config.weight_decay,
        )
    )


def _reference(
    config: OptimizerConfig, learning_rate: optax.Schedule, peak: float
) -> optax.GradientTransformation:
    return ng.reference(
        learning_rate,
        mode=config.reference_mode,
        history=config.history,
        damping=config.damping,
        **_shared(config),
        factor_learning_rate=lambda step: (
            learning_rate(step) / peak / config.update_proj_gap
        ),
    )


def _lora(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    return optax.partition(
        {"adapter": _adamw(config, learning_rate), "frozen": optax.set_to_zero()},
        lora.labels,
    )


def _relora(
    config: OptimizerConfig, learning_rate: optax.Schedule, gap: int
) -> optax.GradientTransformation:
    direction = optax.chain(
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay),
    )
    return relora(direction, learning_rate, gap=gap, scale=config.adapter.scale)


_Method = Callable[..., optax.GradientTransformation]
_METHODS: dict[str, _Method] = {
    "adamw": _adamw,
    "galore": _galore,
    "natural_galore": _natural_galore,
    "natural_galore_paper": _natural_galore_paper,
    "muon": _muon,
    "optax_galore": _optax_galore,
    "reference": _reference,
    "lora": _lora,
    "relora": _relora,
    "low_rank": _adamw,  # of the model's factors
}
