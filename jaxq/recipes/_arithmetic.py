"""Arithmetic with the extremes and the scales of blocks, exact on every backend."""

import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._base.cutting import Cut
from jaxq._jax import arithmetic
from jaxq._jax.arithmetic import by_vectors, divide, materialize
from jaxq._jax.reductions import reduced
from jaxq.formats import Format, IntFormat, get_format
from jaxq.numerics import cast

__all__ = [
    "E8M0",
    "absmax",
    "extrema",
    "extremum",
    "finite",
    "in_units",
    "powers",
    "signed_as",
    "span",
    "times",
    "to_scale_format",
    "zero_point_of",
]

E8M0 = get_format("float8_e8m0fnu")

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
# Smaller scales are float32 subnormals, which XLA flushes to zero.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
# Neutral element of integer minima: larger than the bits of any number and any index in a block.
_HIGHEST = np.int32(2**31 - 3)


def absmax(x: jax.Array, cut: Cut) -> jax.Array:
    """Returns the largest magnitude of each block; NaN if the block holds a NaN or an infinity.

    The maximum is taken of integers in the order of the magnitudes, because on CPU a maximum of
    floats may lose a NaN and treats float32 subnormals as zero. The absmax of an empty block is 0.
    """
    top = reduced(lax.max, _FLOAT32.bits(x) & _FLOAT32.magnitude_mask, cut, np.int32(0))
    return _FLOAT32.floats(where(top < _FLOAT32.inf, top, _FLOAT32.nan))


def extrema(x: jax.Array, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest and the largest value of each block.

    Both are NaN if the block holds a NaN or an infinity, and 0 if it is empty. They are computed on
    integers, like `absmax`.
    """
    ordered, inside = _flipped(_FLOAT32.bits(x)), cut.inside

    def largest(ordered: jax.Array) -> jax.Array:
        if inside is not None:
            ordered = where(jnp.broadcast_to(inside, x.shape), ordered, -_HIGHEST)
        return reduced(lax.max, ordered, cut, -_HIGHEST)

    # Two maxima, because over several devices XLA combines them but not a maximum and a minimum.
    low, high = ~largest(~ordered), largest(ordered)
    finite = (low > _flipped(_FLOAT32.inf | _FLOAT32.sign)) & (high < _FLOAT32.inf)
    low, high = (where(finite, _flipped(end), _FLOAT32.nan) for end in (low, high))
    empty = jnp.broadcast_to(cut.sizes == 0, low.shape)
    low, high = (where(empty, np.int32(0), end) for end in (low, high))
    return _FLOAT32.floats(low), _FLOAT32.floats(high)


def extremum(x: jax.Array, cut: Cut) -> jax.Array:
    """Returns the value of largest magnitude with its sign; the first in block order on ties."""
    top = absmax(x, cut)
    bits = _FLOAT32.bits(x)
    order = jnp.arange(math.prod(cut.block), dtype=jnp.int32).reshape(cut.block)
    order = jnp.expand_dims(order, tuple(range(0, 2 * len(cut.block), 2)))
    signed = order * np.int32(2) + lax.shift_right_logical(bits, np.int32(31))
    largest = (bits & _FLOAT32.magnitude_mask) == _FLOAT32.bits(top)
    first = reduced(lax.min, where(largest, signed, _HIGHEST), cut, _HIGHEST)
    return _FLOAT32.floats(_FLOAT32.bits(top) | first << np.int32(31))


def _flipped(bits: Any) -> Any:
    """Returns the bits of floats as integers that compare as the floats do; its own inverse."""
    return bits ^ (bits >> np.int32(31) & _FLOAT32.magnitude_mask)


def powers(amax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a power of two that scales `amax` into [2, 4), and its inverse, both normal numbers.

    Values up to `amax`, multiplied by that power, have sums and squares that neither overflow nor
    vanish. If all values are multiplied by a power of two, the scaled values stay the same.
    """
    exponent = _FLOAT32.bits(amax) & _FLOAT32.inf
    exponent = lax.clamp(_FLOAT32.field(-125), exponent, _FLOAT32.field(127)) - _FLOAT32.shifted(1)
    inverse = np.int32(2) * _FLOAT32.field(0) - exponent
    return materialize(_FLOAT32.floats(inverse)), materialize(_FLOAT32.floats(exponent))


def to_scale_format(scale: jax.Array, amax: jax.Array, scale_format: Format) -> jax.Array:
    """Rounds a scale to its format.

    The result is 0 for a block of zeros, else at least the smallest positive value of the format,
    so that a block of tiny values does not become zeros.
    """
    # Two uses of a quotient would be two kernels, because XLA on CPU does not compute it twice.
    bits = _FLOAT32.bits(scale)
    magnitude = _FLOAT32.floats(bits & _FLOAT32.magnitude_mask)
    if scale_format.name != "float32":
        magnitude = cast(magnitude, scale_format, overflow="saturate")
    if scale_format == E8M0:  # It has no zero, and its smallest value is exact.
        return magnitude
    least = np.float32(max(scale_format.min_positive, _LEAST_SCALE))
    magnitude = where(magnitude < least, least, magnitude)
    zero = (_FLOAT32.bits(amax) & _FLOAT32.magnitude_mask) == 0
    magnitude = _FLOAT32.bits(where(zero, np.float32(0), magnitude))
    return _FLOAT32.floats(magnitude | (bits & _FLOAT32.sign))


def finite(x: jax.Array) -> jax.Array:
    """Returns x with infinities replaced by the largest float32 values. NaN stays NaN."""
    bits = _FLOAT32.bits(x)
    infinite = (bits & _FLOAT32.magnitude_mask) == _FLOAT32.inf
    return _FLOAT32.floats(bits - infinite.astype(jnp.int32))


def signed_as(magnitude: jax.Array, signed: jax.Array) -> jax.Array:
    """Returns a magnitude with the sign of another number."""
    return _FLOAT32.floats(_FLOAT32.bits(magnitude) | (_FLOAT32.bits(signed) & _FLOAT32.sign))


def span(low: jax.Array, high: jax.Array, fmt: IntFormat) -> jax.Array:
    """Returns the scale (high - low) / (qmax - qmin), which maps a range to all integers."""
    steps = jnp.float32(fmt.max_int - fmt.min_int)
    # Halved first, because high - low may exceed the largest float32.
    return divide(high * 0.5 - low * 0.5, steps) * 2.0


def zero_point_of(
    low: jax.Array, scale: jax.Array, fmt: IntFormat, scale_format: Format
) -> jax.Array:
    """Returns the integer to which 0 maps, qmin - round(low / s), in [qmin, qmax]; 0 for NaN."""
    lowest, highest = np.float32(fmt.min_int), np.float32(fmt.max_int)
    units = in_units(low, scale, scale_format)
    zero_point = lowest - lax.round(units, lax.RoundingMethod.TO_NEAREST_EVEN)
    zero_point = lax.clamp(lowest, zero_point, highest)
    return where(scale >= 0, zero_point, np.float32(0))


def in_units(
    x: jax.Array, scale: jax.Array, scale_format: Format, *, reciprocal: bool = False
) -> jax.Array:
    """Returns x / scale, correctly rounded, or x times the rounded reciprocal of the scale.

    For a scale of 0, the reciprocal is FLT_MAX, as in TransformerEngine, and the quotient is x.
    """
    if scale_format == E8M0:
        return _times_power(x, scale, -1)
    if not reciprocal:
        return divide(x, where(scale == 0, np.float32(1), scale))
    return x * by_vectors(_inverse, scale)


def _inverse(scale: jax.Array) -> jax.Array:
    """Returns the rounded reciprocals of scales, at most FLT_MAX."""
    return materialize(finite(arithmetic.reciprocal(scale)))


def times(values: jax.Array, scale: jax.Array, scale_format: Format) -> jax.Array:
    """Returns values * scale, rounded once."""
    return _times_power(values, scale, 1) if scale_format == E8M0 else values * scale


def _times_power(x: jax.Array, scale: jax.Array, sign: int) -> jax.Array:
    """Returns x times a power of two, or times its inverse, which itself may be subnormal.

    Each of two steps applies half of the exponent. The bits are halved in place to save operations,
    because XLA on CPU repeats them for every few elements of a block.
    """
    bits = _FLOAT32.bits(scale)
    near = (bits >> np.int32(1) & _FLOAT32.inf) + _FLOAT32.shifted(64)
    far = (bits & _FLOAT32.inf) - near + _FLOAT32.field(0)
    if sign < 0:
        near, far = (np.int32(2) * _FLOAT32.field(0) - half for half in (near, far))
    near = where(bits > _FLOAT32.inf, _FLOAT32.nan, near)
    return x * _FLOAT32.floats(near) * _FLOAT32.floats(far)
