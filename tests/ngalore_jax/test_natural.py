"""``scale_by_natural_gradient`` against dense float64 solves of the Fisher."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from ngalore_jax import storage
from ngalore_jax.natural import push_through_weights, rotate_history
from tests.ngalore_jax import reference

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 7), (7, 1)]


def run(tx, stream, dtype=jnp.float32):
    """Updates and the final state, one compiled step."""
    update = jax.jit(tx.update)
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), stream[0]))
    out = []
    for g in stream:
        u, state = update(jax.tree.map(lambda x: jnp.asarray(x, dtype), g), state)
        out.append(u)
    return out, state


def relative_error(x, exact):
    return np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_float64_inverse(shape):
    stream = reference.gradients(0, 11, *shape)
    natural = reference.Natural(4, 0.1)
    out, _ = run(ng.scale_by_natural_gradient(4, 0.1), stream)
    for t, (g, u) in enumerate(zip(stream, out)):
        assert relative_error(u, natural(g)) < 1e-4
        window = stream[max(0, t - 3) : t + 1]
        woodbury = reference.woodbury_natural_gradient(window, g, 0.1)
        assert relative_error(u, woodbury) < 1e-4


def test_float64_leaves_are_solved_in_float64():
    stream = reference.gradients(1, 7, 4, 5)
    natural = reference.Natural(3, 1e-3)
    with jax.enable_x64(True):
        out, state = run(ng.scale_by_natural_gradient(3, 1e-3), stream, jnp.float64)
        chex.assert_type([out[0], state.history, state.gram], jnp.float64)
        for g, u in zip(stream, out):
            assert relative_error(u, natural(g)) < 1e-10


@pytest.mark.parametrize("energy", [1e4, 1e5, 1e6])
def test_keeps_the_digits_that_woodbury_loses(energy):
    """Large, nearly collinear gradients and the paper's damping, in float32."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(6, 8))
    stream = [common + 0.1 * rng.normal(size=(6, 8)) for _ in range(9)]
    stream = [
        np.float32(np.sqrt(energy) * g / np.linalg.norm(g)).astype(np.float64)
        for g in stream
    ]
    out, _ = run(ng.scale_by_natural_gradient(4, 1e-3), stream)
    ours, naive = [], []
    for t in range(3, 9):
        window = stream[t - 3 : t + 1]
        exact = reference.dense_natural_gradient(window, stream[t], 1e-3)
        ours.append(relative_error(out[t], exact))
        form = reference.woodbury_natural_gradient(window, stream[t], 1e-3, np.float32)
        naive.append(relative_error(form, exact))
    assert max(ours) < 1e-3
    assert max(naive) > 30 * max(ours)


@pytest.mark.parametrize("energy", [1.0, 1e2, 1e4, 1e6])
def test_a_repeated_gradient_stays_a_descent_direction(energy):
    """Exactly collinear columns: the Gram matrix is singular up to rounding."""
    g = np.random.default_rng(0).normal(size=(6, 8))
    g *= np.sqrt(energy) / np.linalg.norm(g)
    out, _ = run(ng.scale_by_natural_gradient(20, 1e-3), [g] * 30)
    cosines = [np.sum(u * g) / np.linalg.norm(u) / np.linalg.norm(g) for u in out]
    assert min(cosines) > 0.9


def test_history_of_one_has_a_closed_form():
    stream = reference.gradients(2, 3, 3, 5)
    out, _ = run(ng.scale_by_natural_gradient(1, 0.5), stream)
    for g, u in zip(stream, out):
        chex.assert_trees_all_close(u, np.float32(g / (0.5 + np.sum(g**2))), rtol=1e-5)


def test_ring_buffer_holds_the_last_gradients_and_their_gram():
    stream = reference.gradients(3, 8, 3, 5)
    _, state = run(ng.scale_by_natural_gradient(3, 0.1), stream)
    assert int(state.count) == 8
    # Steps 6, 7 and 5 lie in slots 0, 1 and 2.
    expected = np.float32(np.stack([stream[6], stream[7], stream[5]]))
    chex.assert_trees_all_equal(np.asarray(state.history), expected)
    flat = expected.reshape(3, -1).astype(np.float64)
    chex.assert_trees_all_close(state.gram, np.float32(flat @ flat.T), rtol=1e-5)


def test_incremental_gram_does_not_drift():
    stream = reference.gradients(4, 60, 3, 4)
    _, state = run(ng.scale_by_natural_gradient(4, 0.1), stream)
    flat = np.asarray(state.history, np.float64).reshape(4, -1)
    chex.assert_trees_all_close(state.gram, np.float32(flat @ flat.T), rtol=1e-5)


def test_relative_damping_matches_the_reference_and_ignores_the_scale():
    stream = reference.gradients(5, 9, 4, 5)
    tx = ng.scale_by_natural_gradient(4, 0.1, relative_damping=True)
    natural = reference.Natural(4, 0.1, relative=True)
    out, _ = run(tx, stream)
    scaled, _ = run(tx, [256.0 * g for g in stream])
    for g, u, v in zip(stream, out, scaled):
        assert relative_error(u, natural(g)) < 1e-4
        chex.assert_trees_all_close(u, 256.0 * v, rtol=1e-5)


def test_absolute_damping_far_above_the_gradient_returns_it_over_the_damping():
    stream = [1e-4 * g for g in reference.gradients(6, 6, 4, 5)]
    out, _ = run(ng.scale_by_natural_gradient(4, 1.0), stream)
    for g, u in zip(stream, out):
        assert relative_error(u, g) < 1e-5


@pytest.mark.parametrize("relative", [False, True])
def test_zero_gradients_give_zero_and_drop_out(relative):
    stream = reference.gradients(7, 5, 3, 4)
    zero = np.zeros((3, 4))
    stream = [zero, *stream[:2], zero, *stream[2:]]
    tx = ng.scale_by_natural_gradient(3, 0.1, relative_damping=relative)
    natural = reference.Natural(3, 0.1, relative)
    out, _ = run(tx, stream)
    for g, u in zip(stream, out):
        chex.assert_trees_all_close(
            np.asarray(u, np.float64), natural(g), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_batch_axes_are_separate_fishers(batch, relative):
    sizes = 4.0 ** np.arange(np.prod(batch)).reshape(*batch, 1, 1)
    stream = [sizes * g for g in reference.gradients(8, 7, *batch, 3, 5)]
    tx = ng.scale_by_natural_gradient(3, 0.1, relative_damping=relative)
    out, _ = run(tx, stream)
    for index in np.ndindex(*batch):
        natural = reference.Natural(3, 0.1, relative)
        for g, u in zip(stream, out):
            assert relative_error(u[index], natural(g[index])) < 1e-4


def test_vectors_scalars_and_matrices_each_have_their_own_fisher():
    streams = {
        "w": reference.gradients(9, 7, 3, 5),
        "b": reference.gradients(10, 7, 6),
        "c": reference.gradients(11, 7),
    }
    stream = [{k: np.asarray(v[t]) for k, v in streams.items()} for t in range(7)]
    out, state = run(ng.scale_by_natural_gradient(3, 0.1), stream)
    chex.assert_shape(
        [state.history["w"], state.history["b"], state.history["c"]],
        [(3, 3, 5), (3, 6), (3,)],
    )
    for name, values in streams.items():
        natural = reference.Natural(3, 0.1)
        for g, u in zip(values, out):
            assert relative_error(u[name], natural(np.asarray(g))) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (5,)])
def test_a_small_history_is_a_fisher_of_rounded_gradients(dtype, shape):
    stream = reference.gradients(12, 9, *shape)
    tx = ng.scale_by_natural_gradient(3, 1.0, history_dtype=dtype)
    out, state = run(tx, stream)
    assert storage.main_part(state.history).dtype == dtype
    assert state.gram.dtype == jnp.float32
    codec = storage.Codec(jnp.dtype(dtype), axes=storage.block_axes(len(shape)))
    matrices = shape[0] if len(shape) == 3 else 1
    naturals = [reference.Natural(3, 1.0) for _ in range(matrices)]
    for g, u in zip(stream, out):
        assert u.dtype == jnp.float32
        rounded = codec.decode(codec.encode(jnp.float32(g)), jnp.float32)
        one_each = np.asarray(rounded, np.float64).reshape(matrices, *shape[-2:])
        for natural, x, y in zip(naturals, one_each, u.reshape(one_each.shape)):
            assert relative_error(y, natural(x)) < 1e-4


def test_bfloat16_updates_keep_their_dtype_and_a_float32_gram():
    stream = reference.gradients(13, 6, 4, 6)
    out, state = run(ng.scale_by_natural_gradient(3, 1.0), stream, jnp.bfloat16)
    assert out[0].dtype == state.history.dtype == jnp.bfloat16
    assert state.gram.dtype == jnp.float32
    natural = reference.Natural(3, 1.0)
    for g, u in zip(stream, out):
        rounded = np.asarray(jnp.asarray(g, jnp.bfloat16), np.float64)
        assert relative_error(u, natural(rounded)) < 1e-2


def test_chains_with_adam_outside_low_rank():
    stream = reference.gradients(14, 8, 3, 5)
    tx = optax.chain(ng.scale_by_natural_gradient(3, 0.1), optax.scale_by_adam())
    natural, adam = reference.Natural(3, 0.1), reference.Adam()
    out, _ = run(tx, stream)
    for g, u in zip(stream, out):
        assert relative_error(u, adam(natural(g))) < 1e-3


def test_trains_inside_scan():
    stream = np.float32(np.stack(reference.gradients(15, 7, 3, 5)))
    tx = ng.scale_by_natural_gradient(3, 0.1)
    expected, final = run(tx, list(stream))

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, out = jax.lax.scan(step, tx.init(jnp.zeros((3, 5))), stream)
    chex.assert_trees_all_close(out, jnp.stack(expected), rtol=1e-5)
    chex.assert_trees_all_close(state, final, rtol=1e-5)


def moved_step(policy, rotation, moved, history=3):
    """Three plain steps, then one in which the basis moved (or did not)."""
    stream = [{"w": g, "b": g[0]} for g in reference.gradients(16, 4, 2, 5)]
    tx = ng.scale_by_natural_gradient(history, 0.1, at_refresh=policy)
    _, state = run(tx, stream[:3])
    change = ng.SubspaceChange(moved, {"w": jnp.asarray(rotation), "b": None})
    g = jax.tree.map(jnp.float32, stream[3])
    updates, after = tx.update(g, state, subspace_change=change)
    return stream, updates, after


ROTATION = np.float32([[0.6, -0.7], [0.3, 0.5]])


@pytest.mark.parametrize("policy", ["rotate", "keep", "reset"])
def test_history_at_a_refresh(policy):
    stream, updates, state = moved_step(policy, ROTATION, True)
    past = [g["w"] for g in stream[1:3]]
    if policy == "rotate":
        past = [ROTATION.astype(np.float64) @ g for g in past]
    elif policy == "reset":
        past = []
    window = [*past, stream[3]["w"]]
    exact = reference.dense_natural_gradient(window, stream[3]["w"], 0.1)
    assert relative_error(updates["w"], exact) < 1e-4
    # Columns and Gram matrix stay in step, whatever the policy.
    flat = np.asarray(state.history["w"], np.float64).reshape(3, -1)
    chex.assert_trees_all_close(
        state.gram["w"], np.float32(flat @ flat.T), rtol=1e-5, atol=1e-6
    )
    # A leaf that is not projected has no basis, so nothing of it moves.
    window = [g["b"] for g in stream[1:4]]
    exact = reference.dense_natural_gradient(window, stream[3]["b"], 0.1)
    assert relative_error(updates["b"], exact) < 1e-4


@pytest.mark.parametrize("policy", ["rotate", "reset"])
def test_history_stays_where_nothing_moved(policy):
    _, updates, state = moved_step(policy, ROTATION, jnp.asarray(False))
    _, kept, kept_state = moved_step("keep", ROTATION, True)
    chex.assert_trees_all_close(updates, kept, rtol=1e-5)
    chex.assert_trees_all_close(state, kept_state, rtol=1e-5)


def test_gradients_that_are_nearly_parallel_stay_solvable():
    """Rounding of a rotated history's Gram matrix may exceed the damping."""
    key = jax.random.split(jax.random.key(0), 2)
    low = jax.random.normal(key[0], (16, 144, 128))
    whole = low @ jax.random.normal(key[1], (16, 128, 144))
    tx = ng.natural_galore(1e-3, rank=128, residual=None, history=4, history_dtype=None)
    update = jax.jit(tx.update)
    state = tx.init(whole)
    for size in np.linspace(0.5, 1, 12):
        updates, state = update(whole * np.float32(size), state)
        chex.assert_tree_all_finite((updates, state))


def test_an_indefinite_gram_matrix_leaves_the_current_gradient():
    gram = np.float32([[1.0, 1.01], [1.01, 1.0]]) * 1e6
    weights = push_through_weights(jnp.asarray(gram), jnp.int32(1), 1.0, False)
    chex.assert_trees_all_close(weights, jnp.array([0.0, 1e-6]), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rotation_of_a_small_history_keeps_the_gram_of_what_is_stored(dtype):
    stream = reference.gradients(17, 3, 2, 5)
    tx = ng.scale_by_natural_gradient(3, 0.1, history_dtype=dtype)
    _, state = run(tx, stream)
    change = ng.SubspaceChange(True, jnp.asarray(ROTATION))
    _, state = tx.update(jnp.float32(stream[0]), state, subspace_change=change)
    stored = storage.Codec(jnp.dtype(dtype)).decode(state.history, jnp.float32)
    flat = np.asarray(stored, np.float64).reshape(3, -1)
    chex.assert_trees_all_close(state.gram, np.float32(flat @ flat.T), rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_axis_that_the_gram_matrix_is_summed_along_does_not_matter(dtype):
    shape, codec = (2, 4, 6), storage.Codec(dtype and jnp.dtype(dtype))
    stream = np.float32(np.stack(reference.gradients(18, 3, *shape)))
    columns = [codec.encode(jnp.asarray(g)) for g in stream]
    history = jax.tree.map(lambda *x: jnp.stack(x), *columns)
    rotation = np.linalg.qr(np.float32(reference.gradients(19, 2, 4, 4)))[0]
    for along in (-2, -1):
        rotated, gram = rotate_history(
            history,
            jnp.zeros((2, 3, 3)),
            jnp.asarray(rotation),
            codec=codec,
            along=along,
        )
        flat = np.asarray(codec.decode(rotated, jnp.float32), np.float64)
        exact = np.einsum("sbrn,tbrn->bst", flat, flat)
        chex.assert_trees_all_close(gram, np.float32(exact), rtol=1e-5)
        assert relative_error(flat[1], rotation @ stream[1]) < 2e-2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(history=0), ValueError, "history must be at least 1, got 0"),
        (dict(history=2.0), TypeError, "static_args"),
        (dict(history=True), TypeError, "history must be an int"),
        (dict(damping=0.0), ValueError, "damping must be positive, got 0.0"),
        (dict(damping=-1e-3), ValueError, "damping must be positive"),
        (dict(damping=float("nan")), ValueError, "damping must be positive"),
        (dict(at_refresh="turn"), ValueError, "rotate.*got 'turn'"),
        (dict(history_dtype="int4"), ValueError, "history_dtype must be .*'int8'"),
    ],
)
def test_wrong_arguments_say_what_is_needed(arguments, error, match):
    with pytest.raises(error, match=match):
        ng.scale_by_natural_gradient(**arguments)
