"""The fingerprint: every bit counts, no layout does, nothing but words travels."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.training.fingerprint import _fingerprint, fingerprint, structure
from tests.collectives import collectives

RANDOM = np.random.default_rng(0)
TREE = {
    "f32": jnp.asarray(RANDOM.normal(size=(16, 24)), jnp.float32),
    "bf16": jnp.asarray(RANDOM.normal(size=(8, 4, 6)), jnp.bfloat16),
    "int8": jnp.asarray(RANDOM.integers(-100, 100, (5, 3)), jnp.int8),
    "int32": jnp.int32(7),
    "bool": jnp.asarray(RANDOM.integers(0, 2, 9), bool),
    "key": jax.random.split(jax.random.key(3), 2),
}
EXPECTED = fingerprint(TREE)


def reference(tree) -> int:
    """The same sum in NumPy, for leaves of 32 bits."""
    total = 0
    for name, leaf in sorted(tree.items()):
        words = np.asarray(leaf).view(np.uint32).ravel().astype(object)
        label = zlib.crc32(f"{name} {leaf.shape} {leaf.dtype}".encode()) | 1
        mask = 2**32 - 1
        weights = [
            ((i * 2654435761 & mask) ^ (i << 7 & mask)) | 1 for i in range(len(words))
        ]
        summed = sum(int(x) * w for x, w in zip(words, weights, strict=True))
        total += label * (1 + summed)
    return total & (2**32 - 1)


def test_against_numpy():
    tree = {name: TREE[name] for name in ("f32", "int32")}
    assert fingerprint(tree) == reference(tree)


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "int32"])
def test_a_flipped_bit_is_noticed_wherever_it_is(name):
    leaf = np.asarray(TREE[name])
    flat = leaf.reshape(-1).view(np.uint8)
    places = range(0, 8 * flat.size, max(1, 8 * flat.size // 40))
    for place in places:
        changed = flat.copy()
        changed[place // 8] ^= 1 << place % 8
        value = changed.view(leaf.dtype).reshape(leaf.shape)
        # As bits: JAX may not pass a NaN's through a float.
        assert fingerprint(TREE | {name: jnp.asarray(value)}) != EXPECTED


def test_keys_and_truth_values_count():
    other = jax.random.split(jax.random.key(4), 2)
    assert fingerprint(TREE | {"key": other}) != EXPECTED
    assert fingerprint(TREE | {"bool": ~TREE["bool"]}) != EXPECTED


def test_order_and_names_count():
    x = TREE["f32"]
    assert fingerprint({"a": x}) != fingerprint({"b": x})
    assert fingerprint({"a": x}) != fingerprint({"a": x[::-1]})
    assert fingerprint({"a": x}) != fingerprint({"a": x.reshape(24, 16)})
    assert fingerprint({"a": x, "b": x + 1}) != fingerprint({"a": x + 1, "b": x})


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_layouts_do_not_count_and_only_words_travel(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    for spec in (P("x", "y"), P("y", None), P(None, ("x", "y")), P()):
        layout = {name: NamedSharding(mesh, P()) for name in TREE}
        layout |= {"f32": NamedSharding(mesh, spec)}
        layout |= {"bf16": NamedSharding(mesh, P(("x", "y")))}
        placed = jax.device_put(TREE, layout)
        assert fingerprint(placed) == EXPECTED
        compiled = _fingerprint.lower(placed).compile()
        found = list(collectives(compiled))
        assert found  # bf16 is split in all of them
        for kind, dtype, size in found:
            assert (kind, dtype) == ("all-reduce", "u32") and size <= len(TREE)


def test_wide_elements_count_as_several_words():
    with jax.enable_x64(True):
        x = jnp.asarray([1.0, 2.0], jnp.float64)
        nudged = jnp.asarray(np.nextafter([1.0, 2.0], 3.0))
        assert fingerprint({"x": x}) != fingerprint({"x": nudged})


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="complex"):
        fingerprint({"x": jnp.ones(2, jnp.complex64)})


def test_structure_is_paths_shapes_and_dtypes():
    x = TREE["f32"]
    assert structure({"a": x}) == structure({"a": x + 1})
    assert structure({"a": x}) != structure({"b": x})
    assert structure({"a": x}) != structure({"a": x.astype(jnp.bfloat16)})
    assert structure({"a": x}) != structure({"a": x[:8]})
