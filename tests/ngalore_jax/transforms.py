"""Every public transform, small, and one donated run of each that tests share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ngalore_jax as ng

GAP = 3
STEPS = 5  # refreshes at 0 and GAP, steady steps before and after the second
LEARNING_RATE = 0.05

Factory = Callable[..., optax.GradientTransformationExtraArgs]

# Factory and arguments, apart so that a test can change or inject some.
TRANSFORMS: dict[str, tuple[Factory, dict[str, Any]]] = {
    "low_rank(adam)": (
        ng.low_rank,
        dict(inner=optax.scale_by_adam(), rank=2, update_proj_gap=GAP),
    ),
    "low_rank(natural+adam)": (
        ng.low_rank,
        dict(
            inner=optax.chain(
                ng.scale_by_natural_gradient(3), ng.scale_by_subspace_adam()
            ),
            rank=2,
            update_proj_gap=GAP,
            residual=ng.fira(),
        ),
    ),
    "scale_by_natural_gradient": (
        ng.scale_by_natural_gradient,
        dict(history=3, damping=1.0),
    ),
    "scale_by_subspace_adam": (ng.scale_by_subspace_adam, dict(b1=0.9)),
    "galore": (
        ng.galore,
        dict(learning_rate=LEARNING_RATE, rank=2, update_proj_gap=GAP),
    ),
    "natural_galore(compensation)": (
        ng.natural_galore,
        dict(
            learning_rate=LEARNING_RATE,
            rank=2,
            update_proj_gap=GAP,
            history=3,
            residual=2.0,
        ),
    ),
    "natural_galore(int8)": (
        ng.natural_galore,
        dict(
            learning_rate=LEARNING_RATE,
            rank=2,
            update_proj_gap=GAP,
            history=3,
            history_dtype="int8",
            moments_dtype="int8",
            basis_dtype="int8",
        ),
    ),
    "natural_galore(orthogonal)": (
        ng.natural_galore,
        dict(
            learning_rate=LEARNING_RATE,
            rank=2,
            update_proj_gap=GAP,
            history=3,
            residual=ng.orthogonal(momentum_dtype=None),
        ),
    ),
    "natural_galore(PAPER)": (
        ng.natural_galore,
        {
            **ng.PAPER,
            **dict(learning_rate=LEARNING_RATE, rank=2, update_proj_gap=GAP, history=3),
        },
    ),
    "reference": (
        ng.reference,
        dict(
            learning_rate=LEARNING_RATE,
            rank=2,
            update_proj_gap=GAP,
            history=3,
            scale=4.0,  # both sides projected and moments mixed up: slow otherwise
        ),
    ),
    "reference(online)": (
        ng.reference,
        dict(
            learning_rate=LEARNING_RATE,
            rank=2,
            mode="online_natural_galore",
            history=3,
            scale=1.0,
            factor_learning_rate=LEARNING_RATE,
        ),
    ),
}
NAMES = tuple(TRANSFORMS)
ALIASES = tuple(n for n, (_, kwargs) in TRANSFORMS.items() if "learning_rate" in kwargs)


def make(name: str, **changes: Any) -> optax.GradientTransformationExtraArgs:
    """The transform of that name, with other arguments where given."""
    factory, kwargs = TRANSFORMS[name]
    return factory(**{**kwargs, **changes})


def params(dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, jax.Array]:
    """A stacked leaf that is projected and a vector that is not."""
    keys = jax.random.split(jax.random.key(1))
    return {
        "stack": jax.random.normal(keys[0], (2, 4, 6)).astype(dtype),
        "bias": jax.random.normal(keys[1], (6,)).astype(dtype),
    }


def gradients(like: Any, steps: int = STEPS, seed: int = 2) -> list[Any]:
    """A stream of independent normal gradients."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), (steps, len(leaves)))
    return [
        treedef.unflatten(
            [jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(row, leaves)]
        )
        for row in keys
    ]


class Run(NamedTuple):
    """A transform driven by ``gradients(params())`` under jit, state and all donated.

    ``states`` has one entry more than the others: the start.
    """

    updates: list[Any]
    states: list[optax.OptState]
    compiles: list[int]  # XLA compilations during each step
    donated: list[bool]  # whether the step took over every buffer it was given


@functools.cache
def compiled_step(name: str) -> Callable[..., tuple[Any, Any, Any]]:
    """``(state, params, gradient, size)`` to state, params + size * updates, updates.

    Compiled once for all tests; takes over the buffers of state and params.
    """
    tx = make(name)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        state: Any, weights: Any, gradient: Any, size: jax.Array
    ) -> tuple[Any, Any, Any]:
        updates, state = tx.update(gradient, state, weights)
        moves = jax.tree.map(lambda u: size * u, updates)
        return state, optax.apply_updates(weights, moves), updates

    return step


@functools.cache
def run(name: str) -> Run:
    """Drives the transform of that name, once for all tests."""
    compiled = 0

    def count(event: str, duration: float, **kwargs: Any) -> None:
        nonlocal compiled
        del duration, kwargs
        compiled += event == "/jax/core/compile/backend_compile_duration"

    step, stream, size = compiled_step(name), gradients(params()), jnp.ones(())
    weights = params()
    state = make(name).init(weights)
    out = Run([], [jax.tree.map(jnp.copy, state)], [], [])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for gradient in stream:
            given = jax.tree.leaves((state, weights))
            before = compiled
            state, weights, updates = step(state, weights, gradient, size)
            out.compiles.append(compiled - before)
            out.donated.append(all(x.is_deleted() for x in given))
            out.updates.append(updates)
            out.states.append(jax.tree.map(jnp.copy, state))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return out


def low_rank_state(state: optax.OptState) -> ng.LowRankState:
    """The one ``LowRankState`` somewhere in a state."""
    found = [
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, ng.LowRankState)
        )
        if isinstance(node, ng.LowRankState)
    ]
    (only,) = found
    return only
