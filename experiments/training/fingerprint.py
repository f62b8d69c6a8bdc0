r"""A number that changes when any bit of a tree of arrays does.

For the 32-bit words :math:`x_i` of a leaf (narrower elements count as a word each,
wider ones as several) and odd weights :math:`w_i` that depend on the position,

.. math:: f = \sum_{\text{leaves}} c \, (1 + \sum_i w_i x_i) \pmod{2^{32}}

with an odd :math:`c` from the leaf's path, shape and dtype. A flipped bit changes
:math:`f` for sure, for a power of two times an odd number is no multiple of
:math:`2^{32}`; any other damage goes unnoticed once in :math:`2^{32}`. Integer sums
wrap alike in every order, so that the mesh and the layout do not matter.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(tree: Any) -> int:
    """Returns the fingerprint of a tree of arrays, an unsigned 32-bit integer.

    It is computed where the arrays are, in one compiled pass that reads every element
    once; only one word a leaf travels between devices. All processes call it, and all
    get the same.

    Args:
        tree: Arrays of any real dtype, or of PRNG keys.

    Raises:
        TypeError: A leaf is complex.
    """
    return int(_fingerprint(tree))


def structure(tree: Any) -> int:
    """Returns a checksum of the paths, shapes and dtypes of a tree's leaves."""
    names = [_name(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    return zlib.crc32("\n".join(names).encode())


@jax.jit
def _fingerprint(tree: Any) -> jax.Array:
    total = jnp.uint32(0)
    for path, leaf in jax.tree.leaves_with_path(tree):
        factor = jnp.uint32(zlib.crc32(_name(path, leaf).encode()) | 1)
        total += factor * (1 + _weighted_sum(_words(leaf)))
    return total


def _name(path: jax.tree_util.KeyPath, leaf: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{name} {leaf.shape} {leaf.dtype}"


def _words(x: jax.Array) -> jax.Array:
    """Bits of `x` as uint32; an axis is added for elements of 64 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"no fingerprint of complex numbers, got {x.dtype}.")
    bits = jax.dtypes.itemsize_bits(x.dtype)
    word = jnp.dtype(f"uint{min(bits, 32)}")
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _weighted_sum(words: jax.Array) -> jax.Array:
    weights = jnp.zeros_like(words)
    for axis, size in enumerate(words.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        weights = weights * jnp.uint32(size) + position
    # Spread over all bits (Knuth's multiplicative hash), then made odd.
    weights = (weights * jnp.uint32(2654435761)) ^ (weights << 7) | jnp.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)
