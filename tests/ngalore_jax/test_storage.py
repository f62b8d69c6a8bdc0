"""Codecs of state arrays: what is kept of a number, and what rounding does in time."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from ngalore_jax import storage
from ngalore_jax.storage import Codec, Curve, Int8

INT8, BFLOAT16 = jnp.dtype("int8"), jnp.dtype("bfloat16")
# Compiled as a whole: one small program a test, not one for every operation.
encode = jax.jit(Codec.encode, static_argnums=0)
decode = jax.jit(Codec.decode, static_argnums=(0, 2))
random_bits = jax.jit(storage.random_bits, static_argnums=(0, 2))
every_curve = pytest.mark.parametrize("curve", list(Curve))


def levels(curve):
    """The values that a block of scale 1 can hold, in float64."""
    if curve is Curve.FLOAT:
        q = np.arange(256.0)
        return np.where(q > 0, 2 ** (q // 8 - 31) * (1 + q % 8 / 8), 0)
    q = np.arange(-127.0, 128)
    return q if curve is Curve.LINEAR else q * abs(q)


def numbers(curve, shape=(3, 8, 50), seed=0):
    """Columns of very different sizes, whose rows differ by 1e4 (squares by 1e8)."""
    rng = np.random.default_rng(seed)
    rows = np.logspace(0, -4, shape[-2])[:, None]
    x = rng.normal(size=shape) * rows * 10 ** rng.uniform(-9, 9, size=shape[-1])
    if curve is Curve.FLOAT:
        # Where it has levels; what it makes of less is a test of its own.
        x = np.maximum(x**2, 2.0**-29 * np.max(x**2, axis=-2, keepdims=True))
    return jnp.asarray(x, jnp.float32)


def neighbours(curve, stored, x):
    """The levels of a block on both sides of ``x``, in float64."""
    scale = np.float64(stored.scale)[..., None, :]
    grid, y = levels(curve), np.float64(x) / scale
    above = np.clip(np.searchsorted(grid, y), 1, len(grid) - 1)
    return grid[above - 1] * scale, grid[above] * scale


@every_curve
def test_every_level_stands_for_its_value_and_is_its_own_code(curve):
    values = levels(curve)
    x = jnp.asarray(values, jnp.float32)[:, None] * 2.0**-5
    codec = Codec(INT8, curve)
    stored = encode(codec, x)
    assert np.asarray(stored.scale, np.float32) == 2.0**-5
    first = 0 if curve is Curve.FLOAT else -127
    np.testing.assert_array_equal(stored.values[:, 0], first + np.arange(len(values)))
    np.testing.assert_array_equal(decode(codec, stored, jnp.float32), x)


@every_curve
def test_to_nearest_the_error_is_at_most_half_a_level(curve):
    x, codec = numbers(curve), Codec(INT8, curve)
    stored = encode(codec, x)
    below, above = neighbours(curve, stored, x)
    error = np.abs(np.float64(decode(codec, stored, jnp.float32)) - np.float64(x))
    assert np.all(error <= (above - below) / 2 * (1 + 1e-4))


def test_relative_error_of_each_curve_as_documented():
    """At ``x`` times the largest; half of the distances that the module states."""
    for curve, bound in {
        Curve.LINEAR: lambda x: 1 / (2 * 127 * x),
        Curve.SQUARE: lambda x: 1 / (127 * x**0.5) + 1 / (2 * 127**2 * x),
        Curve.FLOAT: lambda x: 1 / 16 + 0 * x,
    }.items():
        x, codec = numbers(curve), Codec(INT8, curve)
        decoded = decode(codec, encode(codec, x), jnp.float32)
        peak = np.max(np.abs(x), axis=-2, keepdims=True)
        at = np.float64(np.abs(x) / peak)
        error = np.abs(np.float64(decoded) / np.float64(x) - 1)
        # A scale rounded up is at most two spacings of bfloat16 too large.
        assert np.all(error <= bound(at) * 1.016)


@every_curve
def test_nothing_clips_and_little_of_the_range_is_unused(curve):
    # Peaks everywhere between two powers of two, next to every bfloat16 between.
    peak = np.float32(np.linspace(1, 2, 40_001))
    peak = np.concatenate([np.nextafter(peak, 0), peak, np.nextafter(peak, 4)])
    stored = encode(Codec(INT8, curve), jnp.asarray(peak)[None])
    ratio = peak / np.float32(stored.scale)
    top = levels(curve)[-1]
    assert np.all(ratio <= top * (1 + 1e-6))
    lowest = 15 / 16 if curve is Curve.FLOAT else top * (1 - 2**-6)
    assert np.all(ratio >= lowest * (1 - 1e-6))
    assert stored.scale.dtype == BFLOAT16


@every_curve
def test_each_block_has_a_scale_of_its_own(curve):
    x, codec = numbers(curve), Codec(INT8, curve)
    stored = encode(codec, x)
    chex.assert_shape((stored.values, stored.scale), ((3, 8, 50), (3, 50)))
    other = encode(codec, x.at[1, 2, 3].set(1e20))
    same = np.ones((3, 50), bool)
    same[1, 3] = False
    np.testing.assert_array_equal(stored.scale[same], other.scale[same])
    np.testing.assert_array_equal(
        np.moveaxis(stored.values, 1, -1)[same], np.moveaxis(other.values, 1, -1)[same]
    )


@pytest.mark.parametrize(
    ("shape", "axes", "scale"),
    [
        pytest.param((4, 6), storage.block_axes(2), (6,), id="matrix"),
        pytest.param((2, 3, 4, 6), storage.block_axes(4), (2, 3, 6), id="stack"),
        pytest.param((6,), storage.block_axes(1), (), id="vector"),
        pytest.param((), storage.block_axes(0), (), id="scalar"),
        pytest.param((5, 4, 6), storage.block_axes(2), (5, 6), id="history"),
        pytest.param((5, 6), storage.block_axes(1), (5,), id="history of a vector"),
        pytest.param((5,), storage.block_axes(0), (5,), id="history of a scalar"),
        pytest.param((3, 6, 4), (-1,), (3, 6), id="basis"),
    ],
)
def test_blocks_of_every_kind_of_array(shape, axes, scale):
    x = jax.random.normal(jax.random.key(0), shape)
    codec = Codec(INT8, axes=axes)
    stored = encode(codec, x)
    chex.assert_shape((stored.values, stored.scale), (shape, scale))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        stored, codec.zeros(shape, jnp.float32, P(*[None] * len(shape)))
    )
    assert ng.state_bytes(stored) == x.size + 2 * int(np.prod(scale))
    largest = np.max(np.abs(x), axis=axes, keepdims=True)
    decoded = decode(codec, stored, jnp.float32)
    assert np.all(np.abs(decoded - x) <= largest * 1.016 / 254)


def test_a_linear_code_is_its_integers_times_the_scale():
    """What a Gram matrix of a history is computed from without decoding it."""
    codec, x = Codec(INT8), numbers(Curve.LINEAR, (5, 3, 8, 6))
    stored = encode(codec, x)
    integers = stored.values.astype(jnp.float32)
    np.testing.assert_array_equal(
        decode(codec, stored, jnp.float32),
        integers * stored.scale.astype(jnp.float32)[..., None, :],
    )


@every_curve
def test_zeros_stay_zeros(curve):
    codec, shape = Codec(INT8, curve), (3, 8, 5)
    stored = encode(codec, jnp.zeros(shape), random_bits(shape, jnp.int32(1), 2))
    chex.assert_trees_all_equal(
        stored, codec.zeros(shape, jnp.float32, P(None, None, None))
    )
    # Beside numbers that are not zero as well.
    x = numbers(curve, shape).at[:, 3].set(0)
    for count in range(20):
        bits = random_bits(shape, jnp.int32(count), 0)
        assert not np.any(decode(codec, encode(codec, x, bits), jnp.float32)[:, 3])


def test_a_positive_second_moment_is_never_zero():
    """Of the smallest float32 squares too, and rounded down at random."""
    codec = Codec(INT8, Curve.FLOAT)
    x = jnp.float32([[1.0], [1e-3], [1e-6], [1e-9], [1e-12], [1e-30]])
    for bits in (None, jnp.zeros(x.shape, jnp.uint32)):
        decoded = np.asarray(decode(codec, encode(codec, x, bits), jnp.float32))
        smallest = 2.0**-31 * 1.125
        assert np.all(decoded[x > smallest] >= 0.88 * x[x > smallest])
        np.testing.assert_array_equal(decoded[x < smallest], np.float32(smallest))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@every_curve
def test_random_rounding_is_right_on_average(dtype, curve):
    x, codec = numbers(curve, (8, 40)), Codec(dtype, curve)
    draws = 4096

    @jax.vmap
    def decoded(count):
        bits = random_bits(x.shape, count, 7)
        return decode(codec, encode(codec, x, bits), jnp.float32)

    seen = np.float64(decoded(jnp.arange(draws)))
    if dtype == INT8:
        below, above = neighbours(curve, encode(codec, x), x)
    else:
        word = np.asarray(x).view(np.uint32) & 0xFFFF0000
        below, above = (w.view(np.float32) for w in (word, word + 0x10000))
    distance = np.abs(np.float64(above) - below)
    edge = np.isclose(seen, below, rtol=1e-6) | np.isclose(seen, above, rtol=1e-6)
    assert np.all(edge | (np.abs(seen) < 1e-6 * np.max(np.abs(x), axis=0)))
    share = (np.float64(x) - below) / (np.float64(above) - below)
    deviation = distance * np.sqrt(share * (1 - share) / draws)
    error = np.abs(seen.mean(axis=0) - np.float64(x))
    assert np.all(error <= 5 * deviation + 1e-3 * distance)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_a_slow_average_follows_a_falling_energy_with_random_rounding_only(dtype):
    """An energy that falls to a hundredth, then rises by as much, over 4000 steps."""
    codec, shape = Codec(dtype, Curve.FLOAT), (8, 64)
    rows = jnp.logspace(0, -4, 8)[:, None]
    steps = jnp.arange(4000)
    energy = jnp.where(steps < 2000, 0.01, 1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def averages(random):
        def step(carry, inputs):
            nu, exact = carry
            count, e = inputs
            bits = random_bits(shape, count, 0) if random else None
            nu = 0.999 * decode(codec, nu, jnp.float32) + 0.001 * e * rows
            exact = 0.999 * exact + 0.001 * e
            ratio = jnp.mean(nu / rows, axis=1) / exact
            return (encode(codec, nu, bits), exact), ratio

        start = encode(codec, jnp.broadcast_to(rows, shape))
        return jax.lax.scan(step, (start, jnp.float32(1)), (steps, energy))[1]

    followed, frozen = averages(True), averages(False)
    # After 2000 steps 0.144 of the start; of 64 elements a row.
    assert np.all(np.abs(followed[1999] - 1) < 0.15)
    assert np.all(np.abs(followed[-1] - 1) < 0.15)
    assert np.all(frozen[1999] > 3)


def test_a_second_moment_grows_through_every_level():
    """Also the largest of its block, past the last level below a power of two."""
    codec = Codec(INT8, Curve.FLOAT)

    def step(nu, count):
        bits = random_bits((1, 256), count, 0)
        nu = decode(codec, nu, jnp.float32) * 1.001
        return encode(codec, nu, bits), jnp.mean(nu)

    start = encode(codec, jnp.ones((1, 256)))
    grown = jax.lax.scan(step, start, jnp.arange(3000))[1]
    np.testing.assert_allclose(grown[-1], 1.001**3000, rtol=0.15)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [None, jnp.uint32(2**32 - 1)])
@every_curve
def test_what_is_not_finite_stays_so(curve, bits, bad):
    x = numbers(curve, (2, 8, 5)).at[1, 2, 3].set(bad)
    bits = None if bits is None else jnp.broadcast_to(bits, x.shape)
    for dtype in (INT8, BFLOAT16):
        codec = Codec(dtype, curve)
        finite = np.isfinite(decode(codec, encode(codec, x, bits), jnp.float32))
        assert not finite[1, 2, 3]
        finite[1, :, 3] = True
        assert np.all(finite)


def test_the_largest_and_the_smallest_numbers_of_float32():
    for size in (1e-45, 1e-39, 2e-38, 1e-30, 1e37):
        x = jnp.full((4, 3), size, jnp.float32)
        for curve in Curve:
            codec = Codec(INT8, curve)
            decoded = decode(codec, encode(codec, x), jnp.float32)
            assert np.all(np.isfinite(decoded))
            if size >= 1e-30:
                np.testing.assert_allclose(decoded, x, rtol=1 / 15)


@every_curve
def test_under_jit_vmap_and_scan(curve):
    x, codec = numbers(curve), Codec(INT8, curve)
    eager = codec.encode(x)
    chex.assert_trees_all_equal(jax.jit(codec.encode)(x), eager)
    chex.assert_trees_all_equal(jax.vmap(codec.encode)(x), eager)
    scanned = jax.lax.scan(lambda _, row: (None, codec.encode(row)), None, x)[1]
    chex.assert_trees_all_equal(scanned, eager)


@every_curve
def test_float64(curve):
    with jax.enable_x64(True):
        x = jnp.asarray(np.float64(numbers(curve)))
        codec = Codec(INT8, curve)
        decoded = decode(codec, encode(codec, x), jnp.float64)
        assert decoded.dtype == jnp.float64
    again = decode(codec, encode(codec, numbers(curve)), jnp.float32)
    np.testing.assert_allclose(decoded, again, rtol=1e-6)


def test_float_dtypes_and_none():
    x = numbers(Curve.LINEAR)
    assert Codec(None).encode(x) is x
    bits = random_bits(x.shape, jnp.int32(0), 0)
    stored = encode(Codec(BFLOAT16), x)
    np.testing.assert_array_equal(stored, x.astype(jnp.bfloat16))
    # float32 has nothing to round.
    same = Codec(jnp.dtype("float32")).encode(x, bits)
    np.testing.assert_array_equal(same, x)
    assert decode(Codec(BFLOAT16), stored, jnp.float32).dtype == jnp.float32


def test_random_bits_are_uniform_and_depend_on_everything_that_names_them():
    shape = (8, 64, 96)

    def uniform(count, salt):
        return np.asarray(random_bits(shape, jnp.int32(count), salt)) / 2**32

    one = uniform(3, 1)
    np.testing.assert_array_equal(one, uniform(3, 1))
    deviation = 1 / np.sqrt(12 * one.size)
    others = [uniform(4, 1), uniform(3, 2), uniform(1, 3), np.roll(one, 1)]
    for u in (one, *others[:3]):
        assert abs(u.mean() - 0.5) < 4 * deviation
        histogram = np.histogram(u, 64, (0, 1))[0] / (u.size / 64)
        assert np.all(np.abs(histogram - 1) < 5 / np.sqrt(u.size / 64))
    # The low bits, which bfloat16 reads, as well.
    low = np.asarray(random_bits(shape, jnp.int32(3), 1)) & 0xFFFF
    assert abs(low.mean() / 0xFFFF - 0.5) < 4 * deviation
    for other in [*others, np.moveaxis(one, 0, -1).reshape(shape)]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_random_bits_of_a_mesh_are_those_of_one_device(axis_type):
    shape = (4, 8, 16)
    expected = storage.random_bits(shape, jnp.int32(5), 3)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P("x", None, "y"))
    with jax.set_mesh(mesh):

        def bits(count):
            return storage.random_bits(shape, count, 3)

        if axis_type == AxisType.Explicit:
            bits = jax.sharding.auto_axes(bits, out_sharding=sharding.spec)
        actual = jax.jit(bits, out_shardings=sharding)(jnp.int32(5))
    assert actual.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(actual, expected)


def test_shardings_of_the_parts():
    codec, spec = Codec(INT8), P("x", None, ("y", "z"))
    assert codec.specs(spec) == Int8(spec, P("x", ("y", "z")))
    assert Codec(INT8, axes=(-1,)).specs(P("x", "y", None)).scale == P("x", "y")
    assert Codec(BFLOAT16).specs(spec) == spec


def test_names_of_dtypes():
    assert storage.check_dtype("a", None) is None
    for dtype in ("int8", jnp.int8, "bfloat16", jnp.bfloat16, np.float32):
        assert storage.check_dtype("a", dtype) == jnp.dtype(dtype)
    for dtype in ("int4", jnp.int32, "uint8", "eight", bool):
        with pytest.raises(ValueError, match=r"history_dtype must be None, a float"):
            storage.check_dtype("history_dtype", dtype)
    for dtype in ("float16", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"={dtype} cannot hold small gradients"):
            storage.check_dtype("history_dtype", dtype)
    found = storage.check_dtype("basis_dtype", "float16", of_gradients=False)
    assert found == jnp.float16
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        with pytest.raises(ValueError, match=f"basis_dtype={dtype} is too coarse"):
            storage.check_dtype("basis_dtype", dtype, of_gradients=False)


def test_leaves_are_joined_to_two_trees_and_back():
    nothing = optax.MaskedNode()
    leaves = {"a": Int8(1, 2), "b": 3.0, "c": nothing}
    treedef = jax.tree.structure({"a": 0, "b": 0, "c": 0})
    joined = storage.join(treedef, list(leaves.values()))
    values, scales = {"a": 1, "b": 3.0, "c": nothing}, dict.fromkeys("bc", nothing)
    assert joined == Int8(values, {"a": 2} | scales)
    assert storage.leaves_of(treedef, joined) == list(leaves.values())
    plain = storage.join(treedef, [1, 2, nothing])
    assert plain == {"a": 1, "b": 2, "c": nothing}
    assert storage.leaves_of(treedef, plain) == [1, 2, nothing]
