"""Adam in a moving subspace with moments in bfloat16 and int8."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from ngalore_jax.moments import rotate_moments
from ngalore_jax.storage import Codec, Curve, leaves_of, main_part
from tests.collectives import collectives

HYPER = dict(b1=0.8, b2=0.95, eps=1e-6)
SHAPES = {"w": (4, 16), "stacked": (3, 4, 16), "bias": (8,)}
DTYPES = ("bfloat16", "int8")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def gradients(steps, shapes=SHAPES, dtype=np.float32):
    """A stream whose rows differ by 100 in size."""
    rng = np.random.default_rng(0)

    def part(shape):
        rows = np.logspace(0, -2, 4)[:, None] if len(shape) > 1 else 1
        return (rng.normal(size=shape) * rows).astype(dtype)

    return [{k: part(shape) for k, shape in shapes.items()} for _ in range(steps)]


def adam(dtype, **changes):
    return ng.scale_by_subspace_adam(**{**HYPER, **changes}, moments_dtype=dtype)


@functools.cache
def update_of(dtype, at_refresh="rotate"):
    """Compiled once for all tests."""
    return jax.jit(adam(dtype, at_refresh=at_refresh).update)


def run(update, state, stream):
    updates = []
    for g in stream:
        u, state = update(g, state)
        updates.append(u)
    return updates, state


def decoded(state):
    """State with its moments as float32 arrays."""

    def decode(moments, curve):
        treedef = jax.tree.structure(main_part(moments))
        leaves = leaves_of(treedef, moments)
        return treedef.unflatten(
            [
                Codec.of(x, main_part(x).ndim, curve).decode(x, jnp.float32)
                for x in leaves
            ]
        )

    mu, nu = decode(state.mu, Curve.SQUARE), decode(state.nu, Curve.FLOAT)
    return state._replace(mu=mu, nu=nu)


def started(dtype, steps=4):
    """State after a few steps."""
    return run(update_of(dtype), adam(dtype).init(gradients(1)[0]), gradients(steps))[1]


def change(moved):
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 4, 4)))[0]
    q = jnp.asarray(q, jnp.float32)
    return ng.SubspaceChange(moved, {"w": q[0], "stacked": q, "bias": None})


def test_float32_moments_are_those_of_optax():
    stream = gradients(5)
    ours = run(update_of("float32"), adam("float32").init(stream[0]), stream)
    theirs = optax.scale_by_adam(**HYPER)
    expected = run(jax.jit(theirs.update), theirs.init(stream[0]), stream)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    # For bfloat16 gradients as well: the average is not rounded.
    low = gradients(5, dtype=jnp.bfloat16)
    state = run(update_of("float32"), adam("float32").init(low[0]), low)[1]
    high = [jax.tree.map(np.float32, g) for g in low]
    exact = run(jax.jit(theirs.update), theirs.init(high[0]), high)[1]
    chex.assert_trees_all_close(state, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leaf_dtype", [jnp.bfloat16, jnp.float32], ids=str)
@every_dtype
def test_the_state_keeps_its_types_and_optax_finds_it(dtype, leaf_dtype):
    stream = gradients(2, dtype=leaf_dtype)
    start = adam(dtype).init(stream[0])
    updates, state = run(update_of(dtype), start, stream)
    assert isinstance(state, optax.ScaleByAdamState)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[-1], stream[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(adam(dtype).init, stream[0]), state
    )
    assert int(optax.tree.get(state, "count")) == 2
    assert main_part(optax.tree.get(state, "nu")).keys() == SHAPES.keys()
    zeros = optax.tree.map_params(adam(dtype), jnp.zeros_like, state)
    chex.assert_trees_all_equal(zeros, start._replace(count=state.count))


def test_bytes():
    leaf = jax.ShapeDtypeStruct((3, 8, 100), jnp.float32)
    for dtype, a_moment in {
        None: 4 * 3 * 8 * 100,
        "bfloat16": 2 * 3 * 8 * 100,
        "int8": 3 * 8 * 100 + 2 * 3 * 100,
    }.items():
        state = jax.eval_shape(adam(dtype).init, leaf)
        assert ng.state_bytes(state) == 4 + 2 * a_moment


@every_dtype
def test_the_first_step_has_nothing_to_round(dtype):
    stream = gradients(1)
    expected = run(update_of("float32"), adam("float32").init(stream[0]), stream)[0]
    actual = run(update_of(dtype), adam(dtype).init(stream[0]), stream)[0]
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"), [("bfloat16", 0.04), ("int8", 0.2)], ids=DTYPES
)
def test_directions_stay_close_to_those_of_exact_moments(dtype, size):
    """Every row, those 1e4 times smaller in the second moment included."""
    shape, steps = (8, 128), 1500
    rows = jnp.logspace(0, -2, 8)[:, None]
    exact, rounded = (ng.scale_by_subspace_adam(moments_dtype=d) for d in (None, dtype))

    @jax.jit
    def errors(key):
        def step(states, key):
            g = rows * jax.random.normal(key, shape)
            a, first = exact.update(g, states[0])
            b, second = rounded.update(g, states[1])
            sums = (jnp.sum((a - b) ** 2, axis=1), jnp.sum(a**2, axis=1))
            return (first, second), sums

        start = (exact.init(jnp.zeros(shape)), rounded.init(jnp.zeros(shape)))
        return jax.lax.scan(step, start, jax.random.split(key, steps))

    states, (wrong, whole) = errors(jax.random.key(0))
    assert np.all(np.sqrt(np.sum(wrong, 0) / np.sum(whole, 0)) < size)
    # Right on average: of 128 elements a row.
    nu = decoded(states[1]).nu
    np.testing.assert_allclose(jnp.mean(nu / states[0].nu, axis=1), 1, atol=0.08)


@every_dtype
def test_a_noisy_quadratic_is_solved_as_with_exact_moments(dtype):
    target = jax.random.normal(jax.random.key(1), (8, 64))
    curvature = jnp.logspace(0, -1.5, 8)[:, None]

    def last_loss(dtype):
        schedule = optax.cosine_decay_schedule(0.05, 1000)
        tx = optax.chain(
            ng.scale_by_subspace_adam(moments_dtype=dtype),
            optax.scale_by_learning_rate(schedule),
        )

        def step(carry, key):
            w, state = carry
            noise = 0.1 * curvature * jax.random.normal(key, w.shape)
            u, state = tx.update(curvature * (w - target) + noise, state)
            return (w + u, state), None

        w = jnp.zeros_like(target)
        keys = jax.random.split(jax.random.key(2), 1000)
        w = jax.lax.scan(step, (w, tx.init(w)), keys)[0][0]
        return jnp.sum(curvature * (w - target) ** 2)

    start = jnp.sum(curvature * target**2)
    exact, rounded = (
        float(jax.jit(last_loss, static_argnums=0)(d)) for d in (None, dtype)
    )
    assert exact < 1e-4 * start
    assert rounded < 1.3 * exact + 1e-6 * start


@every_dtype
def test_rows_of_almost_no_gradient_do_not_explode(dtype):
    """Below every level of both moments; Adam's steps are about 1."""
    rows = jnp.float32([1, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12, 0])[:, None]
    tx = ng.scale_by_subspace_adam(
        eps=0.0 if dtype == "int8" else 1e-30, moments_dtype=dtype
    )

    def step(state, key):
        # Never zero but in the last row, where there is nothing to divide by zero.
        g = rows * (1 + jnp.abs(jax.random.normal(key, (8, 256))))
        u, state = tx.update(g.at[7].set(0), state)
        return state, jnp.max(jnp.abs(u[:7]), axis=1)

    keys = jax.random.split(jax.random.key(0), 300)
    largest = jax.lax.scan(step, tx.init(jnp.zeros((8, 256))), keys)[1]
    assert np.all(np.isfinite(largest)) and np.max(largest) < 10


@every_dtype
def test_zero_gradients_change_nothing(dtype):
    zeros = jax.tree.map(np.zeros_like, gradients(1)[0])
    start = adam(dtype).init(zeros)
    updates, state = run(update_of(dtype), start, [zeros] * 3)
    chex.assert_trees_all_equal(updates[-1], zeros)
    chex.assert_trees_all_equal(state, start._replace(count=state.count))


@every_dtype
def test_a_restored_run_goes_on_bit_for_bit(dtype, tmp_path):
    stream = gradients(6)
    tx, update = adam(dtype), update_of(dtype)
    _, state = run(update, tx.init(stream[0]), stream[:3])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(tx.init, stream[0])
        )
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(
        run(update, restored, stream[3:]), run(update, state, stream[3:])
    )


@pytest.mark.parametrize("moved", [True, jnp.asarray(True)], ids=["bool", "traced"])
@every_dtype
def test_rotation_of_the_stored_moments(dtype, moved):
    """What the next step sees is the rotated value, to a level beside it."""
    state, g = started(dtype), gradients(5)[4]
    updates, after = update_of(dtype)(g, state, subspace_change=change(moved))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    exact = ng.scale_by_subspace_adam(**HYPER)
    expected, _ = exact.update(g, decoded(state), subspace_change=change(True))
    rtol = 0.01 if dtype == "bfloat16" else 0.1
    for k in SHAPES:
        error = jnp.sqrt(jnp.mean((updates[k] - expected[k]) ** 2))
        assert error < rtol * jnp.sqrt(jnp.mean(expected[k] ** 2))
    # A leaf that is not projected has nothing to rotate.
    plain, _ = update_of(dtype)(g, state)
    chex.assert_trees_all_close(updates["bias"], plain["bias"], rtol=1e-6)
    turned = jnp.abs(updates["w"] - plain["w"])
    assert jnp.max(turned) > 0.1


@every_dtype
def test_moments_that_fall_a_little_at_each_refresh_fall(dtype):
    """Rotations that shrink: to the nearest, int8 would stay and bfloat16 fall late."""
    tx = adam(dtype, b1=0.0, b2=0.0)
    g = jnp.full((4, 4096), 0.75)
    change = ng.SubspaceChange(True, jnp.sqrt(0.99) * jnp.eye(4))
    _, state = tx.update(g, tx.init(g))
    first, second = (
        Codec.of(state.mu, 2, Curve.SQUARE),
        Codec.of(state.nu, 2, Curve.FLOAT),
    )
    mu, nu = state.mu, state.nu
    for count in range(20):
        mu, nu = rotate_moments(
            mu,
            nu,
            change.rotation,
            jnp.int32(count),
            first=first,
            second=second,
            salt=0,
        )
    fallen = jnp.mean(second.decode(nu, jnp.float32)) / 0.75**2
    np.testing.assert_allclose(fallen, 0.99**20, rtol=0.01)
    fallen = jnp.mean(first.decode(mu, jnp.float32)) / 0.75
    np.testing.assert_allclose(fallen, 0.99**10, rtol=0.01)


@every_dtype
def test_reset_starts_again(dtype):
    update, g = update_of(dtype, "reset"), gradients(5)[4]
    actual = update(g, started(dtype), subspace_change=change(True))
    fresh = update(g, adam(dtype).init(g))
    chex.assert_trees_all_close(actual, fresh, rtol=1e-6)


@every_dtype
def test_moments_of_a_subspace_under_low_rank(dtype):
    """Refreshes and steady steps in one program and in a scan, against float32."""

    def losses(dtype):
        inner = ng.scale_by_subspace_adam(moments_dtype=dtype)
        tx = optax.chain(
            ng.low_rank(inner, rank=4, update_proj_gap=5),
            optax.scale_by_learning_rate(0.05),
        )
        target = jax.random.normal(jax.random.key(0), (2, 8, 16))

        def step(carry, _):
            w, state = carry
            loss, g = jax.value_and_grad(lambda w: jnp.mean((w - target) ** 2))(w)
            u, state = tx.update(g, state)
            return (w + u, state), loss

        w = jnp.zeros_like(target)
        return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=60)[1])()

    exact, rounded = losses(None), losses(dtype)
    assert exact[-1] < 0.5 * exact[0]
    np.testing.assert_allclose(rounded, exact, rtol=0.1)


LAYOUTS = {
    "kept side": P(None, None, "x"),
    "batch": P("x"),
    "both": P("y", None, "x"),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)
@every_dtype
def test_on_a_mesh_the_same_numbers_without_communication(dtype, spec, axis_type):
    shape, steps = (4, 4, 16), 3
    tx, stream = adam(dtype), [g["w"] for g in gradients(steps, {"w": shape})]
    expected, state = run(update_of(dtype), tx.init(stream[0]), stream)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    full = P(*spec, *[None] * (3 - len(spec)))

    def placed(x):
        if x.ndim == 0:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, full if x.ndim == 3 else P(full[0], full[2]))

    with jax.set_mesh(mesh):
        stream = [jax.device_put(g, placed(g)) for g in stream]
        places = jax.tree.map(placed, state)
        start = jax.jit(tx.init, out_shardings=places)(stream[0])
        if axis_type == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, tx.init(stream[0])) == jax.tree.map(
                jax.typeof, start
            )
        program = (
            jax.jit(
                tx.update,
                out_shardings=(
                    placed(stream[0]),
                    places,
                ),
            )
            .lower(stream[0], start)
            .compile()
        )
        updates, after = run(program, start, stream)
    assert collectives(program) == []
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, start)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_equal(after, state)


@every_dtype
def test_a_split_rank_or_vector_still_gives_the_same_numbers(dtype):
    """Only here do devices have to agree on a block's largest."""
    shapes = {"w": (8, 16), "bias": (8,)}
    tx = adam(dtype)
    stream = gradients(3, {"w": (4, 16), "bias": (8,)})
    stream = [{"w": np.tile(g["w"], (2, 1)), "bias": g["bias"]} for g in stream]
    assert {k: x.shape for k, x in stream[0].items()} == shapes
    expected, state = run(update_of(dtype), tx.init(stream[0]), stream)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        stream = [jax.device_put(g, NamedSharding(mesh, P("x"))) for g in stream]
        updates, after = run(jax.jit(tx.update), tx.init(stream[0]), stream)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_equal(after, state)


def test_float64_leaves_are_computed_in_float64():
    with jax.enable_x64(True):
        g = jnp.asarray(gradients(1)[0]["w"], jnp.float64)
        for dtype in ("float64", *DTYPES):
            tx = adam(dtype)
            u, state = tx.update(g, tx.init(g))
            chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(g))
            assert u.dtype == jnp.float64
            np.testing.assert_allclose(u, g / (jnp.abs(g) + 1e-6), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_a_dtype_without_room_for_squares_is_an_error(dtype):
    with pytest.raises(ValueError, match=rf"moments_dtype={dtype} cannot hold"):
        ng.scale_by_subspace_adam(moments_dtype=dtype)


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match=r"moments_dtype must be None.*got 'int4'"):
        ng.scale_by_subspace_adam(moments_dtype="int4")
