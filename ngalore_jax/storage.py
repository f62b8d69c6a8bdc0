r"""State in few bytes: bfloat16, or int8 with one scale per block.

A :class:`Codec` turns an array into what a state holds, and back. Three curves say what
an integer :math:`q` stands for in a block of scale :math:`s`:

==========  =======================================  ==================================
curve       value                                    for
==========  =======================================  ==================================
``LINEAR``  :math:`q s`                              gradients, a basis
``SQUARE``  :math:`q |q| s`                          a first moment
``FLOAT``   :math:`2^{\lfloor q/8 \rfloor - 31}      a second moment: a float of 5
            (1 + (q \bmod 8)/8)\, s`; 0 for 0        exponent and 3 mantissa bits, no
                                                     sign, :math:`s` a power of two
==========  =======================================  ==================================

A block runs along the rank: the ``r`` numbers of one column of ``(..., r, n)``, of one
row of a basis ``(..., m, r)``. A mesh splits that axis only where it cannot split
``n`` (:mod:`ngalore_jax.sharding`); elsewhere encoding communicates nothing. At ``x``
times the block's largest number, neighbouring levels are about :math:`1/(127 x)`,
:math:`2/(127 \sqrt x)` and, down to :math:`2^{-30}`, 1/15 to 1/8 apart, relative to
what they stand for. Adam divides by the root of a second moment, so there the relative
error counts, and a positive number never becomes zero, which is how linear levels fail
(arXiv 2309.01507): the smallest is raised.

A slow average needs more than the nearest level: with a decay of 0.999 a step moves it
by less than half of bfloat16's spacing, and rounded to nearest it never moves. Given
random bits, :meth:`Codec.encode` rounds up or down so that what is decoded is right on
average. Each such rounding adds noise, by far the most where a changed scale has moved
the levels under a number that has hardly changed. Those of ``FLOAT`` do not move: a
float times a power of two has the same mantissa.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngalore_jax import sharding

_INT8 = jnp.dtype("int8")
_SCALE_DTYPE = jnp.bfloat16
_LEVELS = 127  # -128 is not used
_MANTISSA_BITS = 3
# What the first bits of a float32 in [1, 2) have more than ``q`` of the same size has.
_FLOAT_OFFSET = (127 - 31) << _MANTISSA_BITS


class Int8(NamedTuple):
    """An array as 8-bit integers: ``r + 2`` bytes for a block of ``r`` elements.

    In a state, those of all leaves: two trees.
    """

    values: Any  # (..., r, n) int8, or uint8 where the curve has no sign
    scale: Any  # (..., n) bfloat16: the block's axis is gone


Stored = jax.Array | Int8


def join(treedef: Any, leaves: Sequence[Any]) -> Any:
    """What a state holds of all leaves: a tree of arrays, or an ``Int8`` of two.

    Never a tree of ``Int8``: who maps a function over it, or wraps every leaf as
    ``nnx.Optimizer`` does, finds an array in each place (``MaskedNode()`` in that of
    the scales of a leaf that has none).
    """
    if not any(isinstance(leaf, Int8) for leaf in leaves):
        return treedef.unflatten(leaves)
    nothing = optax.MaskedNode()
    parts = [leaf if isinstance(leaf, Int8) else Int8(leaf, nothing) for leaf in leaves]
    return Int8(*(treedef.unflatten(part) for part in zip(*parts, strict=True)))


def leaves_of(treedef: Any, joined: Any) -> list[Any]:
    """Inverse of :func:`join`."""
    if not isinstance(joined, Int8):
        return treedef.flatten_up_to(joined)
    pairs = zip(*map(treedef.flatten_up_to, joined), strict=True)
    return [
        values if isinstance(scale, optax.MaskedNode) else Int8(values, scale)
        for values, scale in pairs
    ]


class Curve(enum.Enum):
    """What the integers stand for; see the module."""

    LINEAR = enum.auto()
    SQUARE = enum.auto()
    FLOAT = enum.auto()


def check_dtype(
    name: str, dtype: jax.typing.DTypeLike | None, *, of_gradients: bool = True
) -> jnp.dtype | None:
    """The storage dtype that an argument names.

    Args:
      name: The argument.
      dtype: Its value.
      of_gradients: Whether what is stored may be as small as gradients are.

    Raises:
      ValueError: If it is neither None, a float nor ``"int8"``, or too narrow.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not (jnp.issubdtype(found, jnp.floating) or found == _INT8):
        raise ValueError(
            f"{name} must be None, a float dtype such as 'bfloat16', or 'int8', got "
            f"{dtype!r}."
        )
    if (
        of_gradients
        and jnp.issubdtype(found, jnp.floating)
        and jnp.finfo(found).minexp > jnp.finfo(jnp.float32).minexp
    ):
        raise ValueError(
            f"{name}={found.name} cannot hold small gradients or their squares; "
            "'bfloat16' takes no more than two bytes either, 'int8' about one."
        )
    if found != _INT8 and found.itemsize < 2:
        raise ValueError(f"{name}={found.name} is too coarse; 'int8' is as small.")
    return found


def is_narrow(dtype: jnp.dtype | None) -> bool:
    """Whether a checked storage dtype keeps less than float32 does."""
    return dtype is not None and dtype.itemsize < 4


def main_part(stored: Any) -> Any:
    """The part that has the shape and the sharding of the array, or of all of them."""
    return stored.values if isinstance(stored, Int8) else stored


def block_axes(ndim: int) -> tuple[int, ...]:
    """The block of a leaf ``(..., r, n)``; one of fewer dimensions is one block.

    That one is coarse, being long, and one that a mesh splits needs the largest of all
    its parts, one number between devices.
    """
    return (-2,) if ndim >= 2 else (-1,) * ndim


@dataclasses.dataclass(frozen=True)
class Codec:
    """How an array is stored.

    Attributes:
      dtype: A float dtype, ``int8``, or None for the array as it comes.
      curve: What the integers stand for. A float dtype ignores it.
      axes: Negative axes that make up a block. :func:`block_axes` of a leaf serve a
        history of it too, slots in front.
    """

    dtype: jnp.dtype | None
    curve: Curve = Curve.LINEAR
    axes: tuple[int, ...] = (-2,)

    @classmethod
    def of(cls, stored: Stored, ndim: int, curve: Curve = Curve.LINEAR) -> "Codec":
        """The codec that made what is stored of a leaf of ``ndim`` dimensions."""
        dtype = _INT8 if isinstance(stored, Int8) else stored.dtype
        return cls(dtype, curve, block_axes(ndim))

    def zeros(self, shape: tuple[int, ...], dtype: Any, spec: sharding.Spec) -> Stored:
        """What encoding zeros of this shape, dtype and sharding gives."""
        if self.dtype != _INT8:
            return sharding.zeros(shape, self.dtype or dtype, spec)
        specs = self.specs(spec)
        kept = tuple(shape[axis] for axis in self._kept(len(shape)))
        values_dtype = jnp.uint8 if self.curve is Curve.FLOAT else jnp.int8
        return Int8(
            sharding.zeros(shape, values_dtype, specs.values),
            sharding.zeros(kept, _SCALE_DTYPE, specs.scale),
        )

    def specs(self, spec: sharding.Spec) -> Any:
        """Shardings of the parts, from the array's with an entry per axis."""
        if self.dtype != _INT8:
            return spec
        kept = self._kept(len(spec))
        return Int8._make([spec, sharding.Spec(*[spec[axis] for axis in kept])])

    def specs_of(self, stored: Stored) -> Any:
        """Shardings of the parts of what is stored."""
        return self.specs(sharding.spec_of(main_part(stored)))

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> Stored:
        """What the state holds of ``x``.

        In int8, a block with a NaN or an Inf comes back without a finite number.

        Args:
          x: Floats, of float32's range for int8, not negative for ``FLOAT``.
          bits: Random uint32 of its shape, as from :func:`random_bits`: the mean over
            them of what is decoded is ``x``. None rounds to the nearest level.
        """
        if self.dtype is None:
            return x
        if self.dtype != _INT8:
            return _to_float(x, self.dtype, bits)
        peak = jnp.max(jnp.abs(x), axis=self.axes, keepdims=True)
        power = 2 if self.curve is Curve.SQUARE else 1
        if self.curve is Curve.FLOAT:
            scale = _power_of_two(peak.astype(jnp.float32)).astype(x.dtype)
        else:
            scale = _bfloat16_above(peak / _LEVELS**power)
        # Last of all a division, or the compiler redoes all of the above for every
        # element. Where the scale is zero so are, to float32, the elements.
        inverse = 1 / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
        if self.curve is Curve.FLOAT:
            values = _float_levels(x * inverse, bits)
        else:
            values = _signed_levels(x * inverse, power, bits)
        return Int8(values, jnp.squeeze(scale, self.axes).astype(_SCALE_DTYPE))

    def decode(self, stored: Stored, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The values, in ``dtype``."""
        if not isinstance(stored, Int8):
            return stored.astype(dtype)
        scale = jnp.expand_dims(stored.scale.astype(dtype), self.axes)
        if self.curve is Curve.FLOAT:
            word = (stored.values.astype(jnp.int32) + _FLOAT_OFFSET) << (
                jnp.finfo(jnp.float32).nmant - _MANTISSA_BITS
            )
            value = jax.lax.bitcast_convert_type(word, jnp.float32).astype(dtype)
            return jnp.where(stored.values == 0, 0, value) * scale
        level = stored.values.astype(dtype)
        return level * scale * (1 if self.curve is Curve.LINEAR else jnp.abs(level))

    def slice(self, stored: Stored, index: jax.Array, axis: int) -> Stored:
        """What is stored of one index of a negative axis, which stays, 1 long."""
        if not isinstance(stored, Int8):
            return jax.lax.dynamic_slice_in_dim(stored, index, 1, axis)
        values = jax.lax.dynamic_slice_in_dim(stored.values, index, 1, axis)
        kept = self._kept(stored.values.ndim)
        if axis % stored.values.ndim not in kept:
            return Int8(values, stored.scale)
        scale_axis = kept.index(axis % stored.values.ndim)
        scale = jax.lax.dynamic_slice_in_dim(stored.scale, index, 1, scale_axis)
        return Int8(values, scale)

    def _kept(self, ndim: int) -> list[int]:
        block = {axis % ndim for axis in self.axes}
        return [axis for axis in range(ndim) if axis not in block]


def random_bits(shape: tuple[int, ...], count: jax.Array, salt: int) -> jax.Array:
    """Uint32 of ``shape``, a function of ``count``, ``salt`` and index alone.

    So a run that goes on from a checkpoint, or on another mesh, rounds as before, and
    each device makes those of its own part; a stack of layers does not round as its
    layers would one by one. Two rounds of shift and multiply
    (``lowbias32`` of Chris Wellons) disappear in the loop that rounds, where those of
    ``jax.random.bits`` would be most of an update. For rounding, not for statistics.
    """
    start = _mix(_mix(jnp.uint32(salt)) + count.astype(jnp.uint32))
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += along * jnp.uint32(stride)
    return _mix(start + index)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _signed_levels(y: jax.Array, power: int, bits: jax.Array | None) -> jax.Array:
    """Levels whose values, in units of the scale, are their signed powers."""
    size = jnp.abs(y)
    level = jnp.floor(size if power == 1 else jnp.sqrt(size))
    below, above = level**power, (level + 1) ** power
    uniform = 0.5
    if bits is not None:
        uniform = (bits >> 8).astype(jnp.int32).astype(y.dtype) * 2.0**-24
    # By distance in value, not in level, or the mean would not be the value.
    level = jnp.where(uniform * (above - below) < size - below, level + 1, level)
    level = jnp.minimum(level, _LEVELS)
    return jnp.where(y < 0, -level, level).astype(jnp.int8)


def _float_levels(y: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Levels of ``y`` in [0, 2): the first bits of a float32, as an integer."""
    word = _word(y.astype(jnp.float32), _MANTISSA_BITS, bits)
    level = (word >> (jnp.finfo(jnp.float32).nmant - _MANTISSA_BITS)).astype(jnp.int32)
    smallest = (y > 0).astype(jnp.int32)
    return jnp.clip(level - _FLOAT_OFFSET, smallest, 255).astype(jnp.uint8)


def _to_float(x: jax.Array, dtype: jnp.dtype, bits: jax.Array | None) -> jax.Array:
    info = jnp.finfo(dtype)
    if bits is None or info.nmant >= jnp.finfo(jnp.float32).nmant:
        return x.astype(dtype)
    word = _word(x.astype(jnp.float32), info.nmant, bits)
    rounded = jax.lax.bitcast_convert_type(word, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _word(x: jax.Array, mantissa_bits: int, bits: jax.Array | None) -> jax.Array:
    """The bits of a float32 rounded in size to ``mantissa_bits``, the rest zero."""
    unit = 1 << (jnp.finfo(jnp.float32).nmant - mantissa_bits)
    mask = jnp.uint32(unit - 1)
    added = jnp.uint32(unit // 2) if bits is None else bits & mask
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) + added) & ~mask


def _bfloat16_above(x: jax.Array) -> jax.Array:
    """The nearest bfloat16 or the next that is not below ``x >= 0``, in its dtype."""
    # Half a spacing of bfloat16 is at most 2^-8. Not by astype and back, which the
    # compiler may take for the identity.
    x = jax.lax.reduce_precision(x * (1 + 2.0**-8), exponent_bits=8, mantissa_bits=7)
    # Its inverse overflows where it is subnormal. A NaN stays.
    return jnp.where(x < jnp.finfo(_SCALE_DTYPE).tiny, 0, x)


def _power_of_two(peak: jax.Array) -> jax.Array:
    """The power of two of which ``peak >= 0`` is above 15/16 and at most 1.875."""
    # Above 1.875 there is no level to round up to, and an average would grow no more.
    up = _word(peak, _MANTISSA_BITS, jnp.full(peak.shape, 2**32 - 1, jnp.uint32))
    exponent = jax.lax.bitcast_convert_type(up & jnp.uint32(0xFF << 23), jnp.float32)
    return jnp.where(jnp.isfinite(peak), exponent, peak)
