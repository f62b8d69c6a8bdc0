"""``low_rank`` against the float64 reference: whole trajectories, and its promises."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from ngalore_jax import storage
from ngalore_jax.projectors import first_basis
from tests.ngalore_jax import reference

SHAPES = {"tall": (9, 5), "wide": (5, 9), "square": (6, 6)}
PROJECTORS = {
    "subspace_iteration": ng.subspace_iteration(),
    "svd": ng.svd(),
    "eigh": ng.eigh(),
    "gaussian": ng.gaussian(),
}


def streams(shapes, steps, seed=0):
    """A list of gradient trees."""
    parts = {
        name: reference.gradients(seed + i, steps, *shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return [{name: part[t] for name, part in parts.items()} for t in range(steps)]


def run(tx, stream, dtype=jnp.float32, eager_gap=None):
    """Updates and states of every step, compiled once; params are NaN.

    A transformation that reads its parameters, for the first basis say, cannot pass.

    Args:
      eager_gap: Run operation by operation instead, refreshing at its multiples. The
        operations of all tests then share one compilation each.
    """
    update = tx.update if eager_gap else jax.jit(tx.update)
    params = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, dtype), stream[0])
    state = tx.init(params)
    updates, states = [], []
    for t, g in enumerate(stream):
        g = jax.tree.map(lambda x: jnp.asarray(x, dtype), g)
        when = {"refresh": t % eager_gap == 0} if eager_gap else {}
        u, state = update(g, state, **when)
        updates.append(u)
        states.append(state)
    return updates, states


def adam(policy="rotate"):
    return ng.scale_by_subspace_adam(at_refresh=policy)


def natural_adam(policy="rotate", history=3, damping=0.1):
    return optax.chain(
        ng.scale_by_natural_gradient(history, damping, at_refresh=policy), adam(policy)
    )


def projects_left(side, shape):
    m, n = shape
    return {"left": True, "right": False, "smaller": m <= n, "larger": m >= n}[side]


def check_trajectory(stream, updates, states, gap, side, tolerance, **settings):
    """Every update and basis of ``tx`` against one ``reference.Matrix`` a leaf."""
    for name in stream[0]:
        left = projects_left(side, stream[0][name].shape)
        matrix = reference.Matrix(gap=gap, left=left, **settings)
        for t, g in enumerate(stream):
            basis = np.asarray(states[t].projector[name], np.float64)
            expected = matrix.step(g[name], oriented_like=basis)
            chex.assert_trees_all_close(basis, matrix.basis, atol=tolerance)
            actual = np.asarray(updates[t][name], np.float64)
            chex.assert_trees_all_close(actual, expected, atol=tolerance)


SIDES = ["smaller", "larger", "left", "right"]
# Each side meets each of policy, residual and inner.
TRAJECTORIES = [
    (policy, residual, fisher, SIDES[(i + j + 2 * k) % 4])
    for i, policy in enumerate(["keep", "rotate", "reset"])
    for j, residual in enumerate([None, 2.0])
    for k, fisher in enumerate([True, False])
]


@pytest.mark.parametrize(("policy", "residual", "fisher", "side"), TRAJECTORIES)
def test_trajectory_equals_the_reference(policy, residual, fisher, side):
    stream = streams({"tall": (9, 5), "wide": (5, 9)}, 8)
    with jax.enable_x64(True):
        tx = ng.low_rank(
            natural_adam(policy) if fisher else adam(policy),
            rank=2,
            update_proj_gap=3,
            scale=0.25,
            projector=ng.svd(),
            residual=residual,
            side=side,
        )
        updates, states = run(tx, stream, jnp.float64, eager_gap=3)
        floats = jax.tree.leaves((updates[-1], states[-1].projector))
        chex.assert_type(floats, jnp.float64)
    # Below the residual's energy the library adds 1e-6 of the column's as a floor.
    tolerance = 1e-8 if residual is None else 1e-4
    settings = dict(
        rank=2,
        scale=0.25,
        history=3 if fisher else None,
        damping=0.1,
        residual=residual,
        history_at_refresh=policy,
        moments_at_refresh=policy,
    )
    check_trajectory(stream, updates, states, 3, side, tolerance, **settings)


@pytest.mark.parametrize("rank", [1, 5])
def test_trajectory_in_float32_at_the_extreme_ranks(rank):
    stream = streams({"tall": (9, 5), "wide": (5, 9), "square": (5, 5)}, 8)
    tx = ng.low_rank(natural_adam(), rank, 3, 0.25, projector=ng.svd())
    updates, states = run(tx, stream)
    settings = dict(
        rank=rank,
        scale=0.25,
        history=3,
        damping=0.1,
        history_at_refresh="rotate",
        moments_at_refresh="rotate",
    )
    check_trajectory(stream, updates, states, 3, "smaller", 2e-3, **settings)


def test_paper_damping_in_float32():
    """Damping 1e-3 and 20 columns on gradients of norm 10 and more."""
    stream = streams({"wide": (6, 12)}, 25)
    tx = ng.low_rank(natural_adam("keep", 20, 1e-3), 2, 10, projector=ng.svd())
    updates, states = run(tx, stream)
    settings = dict(rank=2, history=20, damping=1e-3)
    check_trajectory(stream, updates, states, 10, "smaller", 2e-2, **settings)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_refreshes_at_multiples_of_the_gap_only(projector):
    stream = streams({"w": (6, 8)}, 8)
    tx = ng.low_rank(optax.identity(), 2, 3, projector=PROJECTORS[projector])
    _, states = run(tx, stream)
    assert [int(state.count) for state in states] == list(range(1, 9))
    bases = [np.asarray(state.projector["w"]) for state in states]
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True, False]
    initial = tx.init({"w": jnp.zeros((6, 8))}).projector["w"]
    chex.assert_trees_all_equal(initial, first_basis(6, 2))
    assert not np.array_equal(bases[0], initial)


@pytest.mark.parametrize(
    ("projector", "batch"),
    [
        ("svd", (3,)),
        ("eigh", (3,)),
        ("gaussian", (3,)),
        ("subspace_iteration", (2, 2)),
    ],
)
def test_stacked_matrices_equal_separate_ones(projector, batch):
    # Scales far apart: nothing may be normalised over the stack.
    stream = reference.gradients(0, 5, *batch, 5, 8)
    scales = 10.0 ** np.arange(np.prod(batch)).reshape(*batch, 1, 1)
    stream = [np.float32(scales * g) for g in stream]
    inner = adam() if projector in ("eigh", "gaussian") else natural_adam()
    tx = ng.low_rank(inner, 2, 2, 0.5, projector=PROJECTORS[projector], residual=1.0)
    stacked, states = run(tx, stream)
    update = jax.jit(tx.update)
    for index in np.ndindex(*batch):
        state = tx.init(stream[0][index])
        for t, g in enumerate(stream):
            u, state = update(g[index], state)
            chex.assert_trees_all_close(
                (stacked[t][index], states[t].projector[index]),
                (u, state.projector),
                atol=1e-4,
            )


KERNELS = [
    # shape, dimension numbers, and the leaf as (batch, rows, columns) by hand
    ((6, 2, 4), (0, (1, 2)), lambda x: x.reshape(1, 6, 8)),
    ((3, 6, 2, 4), (1, (2, 3)), lambda x: x.reshape(3, 6, 8)),
    ((4, 6, 2), ((0, 2), 1), lambda x: np.moveaxis(x, 2, 1).reshape(1, 8, 6)),
    ((6, 3, 8), (0, -1), lambda x: np.moveaxis(x, 1, 0)),
]


@pytest.mark.parametrize("residual", [1.0, ng.orthogonal(momentum_dtype=None)])
@pytest.mark.parametrize(("shape", "axes", "by_hand"), KERNELS)
def test_kernels_equal_their_matrices_reshaped_by_hand(shape, axes, by_hand, residual):
    stream = reference.gradients(0, 4, *shape)
    dims = ng.MatrixDimensionNumbers(*axes)
    arguments = dict(rank=2, update_proj_gap=2, residual=residual, projector=ng.svd())
    tx = ng.low_rank(optax.trace(0.9), weight_dimension_numbers=dims, **arguments)
    updates, _ = run(tx, stream)
    plain = ng.low_rank(optax.trace(0.9), **arguments)
    expected, _ = run(plain, [by_hand(g) for g in stream])
    for u, v in zip(updates, expected):
        chex.assert_shape(u, shape)
        chex.assert_trees_all_close(by_hand(np.asarray(u)), np.asarray(v), atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_side_and_tie_rule(side):
    tx = ng.low_rank(optax.trace(0.9), 2, side=side)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state = tx.init(params)
    for name, (m, n) in SHAPES.items():
        left = projects_left(side, (m, n))
        chex.assert_shape(state.projector[name], (m if left else n, 2))
        chex.assert_shape(state.inner.trace[name], (2, n if left else m))
    # A tie goes to the left side: a gradient with one row is kept by the left basis.
    g = jnp.zeros((6, 6)).at[4].set(jnp.arange(1.0, 7.0))
    tx = ng.low_rank(optax.identity(), 1, side=side)
    _, state = tx.update(g, tx.init(g))
    basis = np.abs(state.projector[:, 0])
    row = np.eye(6)[4]
    column = np.arange(1.0, 7.0) / np.sqrt(91)
    expected = column if side == "right" else row
    chex.assert_trees_all_close(basis, np.float32(expected), atol=1e-5)


def test_rank_above_a_side_is_an_error_or_clipped():
    params = {"w": jnp.zeros((3, 8)), "x": jnp.zeros((6, 6))}
    with pytest.raises(ValueError, match=r"rank=4 .* 3 x 8 .*clip_rank=True"):
        ng.low_rank(optax.identity(), 4).init(params)
    tx = ng.low_rank(optax.identity(), 4, clip_rank=True)
    state = tx.init(params)
    chex.assert_shape([state.projector["w"], state.projector["x"]], [(3, 3), (6, 4)])
    stream = streams({"w": (3, 8), "x": (6, 6)}, 1)
    (updates,), _ = run(tx, stream)
    # A full basis loses nothing.
    chex.assert_trees_all_close(updates["w"], np.float32(stream[0]["w"]), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(rank=2.0), TypeError, "rank must be an int.*static_args"),
        (dict(rank=True), TypeError, "rank must be an int"),
        (dict(rank=0), ValueError, "rank must be at least 1, got 0"),
        (dict(update_proj_gap=0), ValueError, "update_proj_gap must be a whole number"),
        (dict(update_proj_gap=2.5), ValueError, "of at least 1, got 2.5"),
        (dict(residual=ng.fira), TypeError, r"such as ng.orthogonal\(\) \(called\)"),
        (dict(residual="fira"), TypeError, "a number or None, got 'fira'"),
        (dict(side="top"), ValueError, "side must be one of .*'top'"),
    ],
)
def test_wrong_arguments_say_what_is_needed(arguments, error, match):
    with pytest.raises(error, match=match):
        ng.low_rank(optax.identity(), **arguments)


def test_unprojected_leaves_meet_the_inner_transform_unscaled():
    shapes = {"w": (5, 7), "bias": (5,), "lm_head": (5, 7), "gain": ()}
    stream = streams(shapes, 7)
    tx = ng.low_rank(natural_adam(), 2, 3, scale=0.125, residual=2.0)
    with jax.enable_x64(True):
        updates, states = run(tx, stream, jnp.float64)
        plain, _ = run(natural_adam(), stream, jnp.float64)
    for u, v in zip(updates, plain):
        for name in ("bias", "lm_head", "gain"):
            chex.assert_trees_all_close(u[name], v[name], rtol=1e-9)
    assert set(states[-1].projector) == set(shapes)
    assert isinstance(states[-1].projector["bias"], optax.MaskedNode)


@pytest.mark.parametrize("residual", [None, 2.0])
def test_scale_multiplies_the_update_only(residual):
    stream = streams({"w": (5, 7)}, 5)
    one, states = run(ng.low_rank(adam(), 2, 2, 1.0, residual=residual), stream)
    half, same = run(ng.low_rank(adam(), 2, 2, 0.5, residual=residual), stream)
    chex.assert_trees_all_close(one, jax.tree.map(lambda x: 2 * x, half), rtol=1e-5)
    chex.assert_trees_all_close(states, same, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_small_basis_is_the_one_that_projects(dtype):
    stream = [np.float32(g) for g in np.random.default_rng(9).normal(size=(5, 6, 9))]
    tx = ng.low_rank(optax.identity(), 3, 2, basis_dtype=dtype)
    updates, states = run(tx, stream)
    codec = storage.Codec(jnp.dtype(dtype), axes=(-1,))
    for t, (g, u) in enumerate(zip(stream, updates)):
        basis = codec.decode(states[t].projector, jnp.float32)
        chex.assert_trees_all_close(u, basis @ (basis.T @ g), atol=1e-5)
        gram = np.asarray(basis.T @ basis)
        assert 1e-4 < np.max(np.abs(gram - np.eye(3))) < 2e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_small_basis_is_found_as_well_as_a_large_one(dtype):
    """The first refresh still knows that it is the first, and iterates more."""
    g = np.float32(np.random.default_rng(3).normal(size=(30, 40)))
    u, _, v = np.linalg.svd(g)
    sizes = 1.1 ** -np.arange(30)
    g = np.float32(u * sizes @ v[:30])
    tx = ng.low_rank(optax.identity(), 7, 5, basis_dtype=dtype)
    update, _ = tx.update(g, tx.init(g))  # the first basis rounds in these dtypes
    assert np.sum(np.square(update)) > 0.97 * np.sum(sizes[:7] ** 2)


def test_a_residual_of_columns_needs_an_orthonormal_basis():
    for dtype in ("bfloat16", "float16", "int8"):
        for rule in (1.0, ng.fira()):
            with pytest.raises(ValueError, match=f"basis_dtype={dtype} .*orthogonal"):
                ng.low_rank(adam(), 2, residual=rule, basis_dtype=dtype)
    ng.low_rank(adam(), 2, residual=1.0, basis_dtype="float32")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_a_basis_that_is_kept_is_kept_bit_for_bit(dtype):
    stack = np.random.default_rng(4).normal(size=(2, 6, 9)).astype(np.float32)
    tx = ng.low_rank(optax.identity(), 3, 1, basis_dtype=dtype)
    _, first = tx.update(stack, tx.init(stack))
    stack[0] = 0
    _, second = tx.update(stack, first)
    for old, new in zip(
        jax.tree.leaves(first.projector), jax.tree.leaves(second.projector)
    ):
        assert np.array_equal(old[0], new[0])
        assert not np.array_equal(old[1], new[1])


def test_static_programs_equal_the_conditional_one():
    stream = jax.tree.map(np.float32, streams({"w": (5, 7), "bias": (5,)}, 7))
    tx = ng.low_rank(natural_adam(), 2, 3, residual=1.0)
    updates, states = run(tx, stream)
    programs = {
        static: jax.jit(lambda g, s, r=static: tx.update(g, s, refresh=r))
        for static in (True, False)
    }
    state = tx.init(stream[0])
    for t, g in enumerate(stream):
        u, state = programs[t % 3 == 0](g, state)
        chex.assert_trees_all_close(u, updates[t], atol=1e-5)
        chex.assert_trees_all_close(state, states[t], atol=1e-5)
    # The steady program holds no refresh, not even in a branch.
    for static, program in programs.items():
        assert ("while" in program.lower(stream[0], state).as_text()) == static


INNER = {
    "trace": (optax.trace(0.9), lambda: Trace(0.9)),
    "lion": (optax.scale_by_lion(0.9, 0.99), lambda: Lion(0.9, 0.99)),
    "rms": (optax.scale_by_rms(0.9, 1e-8), lambda: Rms(0.9, 1e-8)),
}


class Trace:
    def __init__(self, decay):
        self.decay, self.m = decay, 0.0

    def __call__(self, g):
        self.m = g + self.decay * self.m
        return self.m


class Lion:
    def __init__(self, b1, b2):
        self.b1, self.b2, self.m = b1, b2, 0.0

    def __call__(self, g):
        direction = np.sign(self.b1 * self.m + (1 - self.b1) * g)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return direction


class Rms:
    def __init__(self, decay, eps):
        self.decay, self.eps, self.v = decay, eps, 0.0

    def __call__(self, g):
        self.v = self.decay * self.v + (1 - self.decay) * g**2
        return g / np.sqrt(self.v + self.eps)


@pytest.mark.parametrize("name", INNER)
def test_any_optax_transformation_runs_inside(name):
    tx, make = INNER[name]
    stream = streams({"tall": (9, 5), "wide": (5, 9)}, 7)
    updates, states = run(ng.low_rank(tx, 2, 3, projector=ng.svd()), stream)
    for leaf in stream[0]:
        inner = make()
        for t in range(7):
            p = np.asarray(states[t].projector[leaf], np.float64)
            g = stream[t][leaf]
            if leaf == "wide":
                expected = p @ inner(p.T @ g)
            else:
                expected = inner(g @ p) @ p.T
            chex.assert_trees_all_close(
                updates[t][leaf], np.float32(expected), rtol=1e-3, atol=1e-3
            )


def svd_as_optax_takes_it(gradient, basis, count):
    """Of a wide matrix optax factorises ``G`` itself, whose signs LAPACK chooses."""
    del count
    _, _, vh = jnp.linalg.svd(jnp.matrix_transpose(gradient), full_matrices=False)
    return jnp.matrix_transpose(vh[: basis.shape[-1]])


@pytest.mark.parametrize(
    ("shape", "projector"),
    [((12, 7), ng.svd()), ((9, 2), ng.svd()), ((7, 12), svd_as_optax_takes_it)],
)
def test_parity_with_optax_galore(shape, projector):
    """One line apart from optax.contrib.galore, over three refreshes."""
    stream = [{"w": np.float32(g)} for g in reference.gradients(0, 9, *shape)]
    theirs = optax.contrib.galore(0.01, 4, 3, 0.25)
    ours = ng.galore(
        0.01,
        4,
        3,
        0.25,
        side="larger",
        projector=projector,
        moments_at_refresh="keep",
        clip_rank=True,
    )
    params = {"w": jnp.ones(shape)}
    state, their_state = ours.init(params), theirs.init(params)
    update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for g in stream:
        actual, state = update(g, state, params)
        expected, their_state = their_update(g, their_state, params)
        chex.assert_trees_all_close(actual, expected, atol=2e-6)
