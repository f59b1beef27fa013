"""Scales: from the range of a block to the number that maps it onto a format's grid, and back.

A scale rule is a function from the largest magnitude of a block, and the element format, to a
float32 number. To add one: a function like those below, listed in `SCALES`.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, extended_bits, where
from jaxq.blocks import Cut
from jaxq.casting import cast
from jaxq.catalog import get_format
from jaxq.formats import FloatFormat, Format, IntFormat
from jaxq.reductions import reduced
from jaxq.sealed import by_platform

__all__ = [
    "E8M0",
    "POWERS_OF_TWO",
    "SCALES",
    "Scale",
    "absmax",
    "divide",
    "extrema",
    "extremum",
    "held",
    "in_units",
    "kept",
    "span",
    "times",
    "zero_point_of",
]

E8M0 = get_format("float8_e8m0fnu")

Scale: TypeAlias = Callable[[jax.Array, Format], jax.Array]

_FLOAT32 = Layout.of(np.dtype(np.float32))
# Dividing by anything smaller would meet float32 subnormals, which XLA flushes.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
# What counts for no minimum: a NaN's bits, and no place in a block.
_HIGHEST = np.int32(2**31 - 3)


def absmax(x: jax.Array, cut: Cut) -> jax.Array:
    """The largest magnitude; NaN where a NaN or an infinity is.

    Taken as integers in the order of the magnitudes: a maximum of floats may lose a NaN, and sees
    float32 subnormals as zero, on CPU. An empty block has 0.
    """
    top = reduced(lax.max, _FLOAT32.bits(x) & _FLOAT32.magnitude_mask, cut, np.int32(0))
    return _FLOAT32.floats(where(top < _FLOAT32.inf, top, _FLOAT32.nan))


def extrema(x: jax.Array, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """Lowest and largest values; both NaN where a NaN or an infinity is, both 0 of an empty block.

    As integers, like `absmax`.
    """
    ordered, inside = _flipped(_FLOAT32.bits(x)), cut.inside

    def largest(ordered: jax.Array) -> jax.Array:
        if inside is not None:
            ordered = where(jnp.broadcast_to(inside, x.shape), ordered, -_HIGHEST)
        return reduced(lax.max, ordered, cut, -_HIGHEST)

    # Two maxima: over several devices XLA takes both at once, but not a maximum and a minimum.
    low, high = ~largest(~ordered), largest(ordered)
    finite = (low > _flipped(_FLOAT32.inf | _FLOAT32.sign)) & (high < _FLOAT32.inf)
    low, high = (where(finite, _flipped(end), _FLOAT32.nan) for end in (low, high))
    empty = np.asarray(cut.sizes == 0)
    low, high = (where(jnp.broadcast_to(empty, low.shape), np.int32(0), e) for e in (low, high))
    return _FLOAT32.floats(low), _FLOAT32.floats(high)


def extremum(x: jax.Array, cut: Cut) -> jax.Array:
    """The number of largest magnitude, with its sign; of several the first in the block's order."""
    top = absmax(x, cut)
    bits = _FLOAT32.bits(x)
    order = np.arange(math.prod(cut.block), dtype=np.int32).reshape(cut.block)
    order = np.expand_dims(order, tuple(range(0, 2 * len(cut.block), 2)))
    signed = order * np.int32(2) + lax.shift_right_logical(bits, np.int32(31))
    largest = (bits & _FLOAT32.magnitude_mask) == _FLOAT32.bits(top)
    first = reduced(lax.min, where(largest, signed, _HIGHEST), cut, _HIGHEST)
    return _FLOAT32.floats(_FLOAT32.bits(top) | first << np.int32(31))


def _flipped(bits: Any) -> Any:
    """Bits of floats as integers that compare as the floats do; its own inverse."""
    return bits ^ (bits >> np.int32(31) & _FLOAT32.magnitude_mask)


def kept(x: jax.Array) -> jax.Array:
    """One number a block as it is, but computed once.

    XLA on CPU computes such a number anew for every element that needs it, unless an operation
    comes last that it holds to be expensive: a remainder, by what no bits here exceed.
    """
    bits = lax.rem(lax.bitcast_convert_type(x, jnp.uint32), np.uint32(2**32 - 1))
    return lax.bitcast_convert_type(bits, jnp.float32)


def to_max(amax: jax.Array, fmt: Format) -> jax.Array:
    """The quotient amax / max: the largest magnitude becomes the format's largest value."""
    return divide(amax, jnp.float32(fmt.max))


def to_min(amax: jax.Array, fmt: Format) -> jax.Array:
    """The quotient amax / min of a signed extremum, which becomes the format's lowest value."""
    return _signed_as(divide(jnp.abs(amax), jnp.float32(-fmt.min)), -amax)


def half(amax: jax.Array, fmt: Format) -> jax.Array:
    """The quotient amax / (max + 1/2), for integers: torchao's, half a step beyond the largest."""
    assert isinstance(fmt, IntFormat)  # The recipe has checked it.
    return divide(amax, jnp.float32(fmt.max + math.ldexp(0.5, -fmt.fraction_bits)))


def floor(amax: jax.Array, fmt: Format) -> jax.Array:
    """2^(floor(log2 amax) - emax), the rule of OCP's Microscaling Formats (MX) 1.0."""
    return _power_of_two(amax, _emax(fmt), 0)


def ceil(amax: jax.Array, fmt: Format) -> jax.Array:
    """2^(ceil(log2 amax) - emax)."""
    return _power_of_two(amax, _emax(fmt), 2**23 - 1)


def even(amax: jax.Array, fmt: Format) -> jax.Array:
    """As `floor`, after amax is rounded to the element's own precision, half up."""
    assert isinstance(fmt, FloatFormat | IntFormat)  # The recipe has checked it.
    floating = isinstance(fmt, FloatFormat)
    digits = fmt.mantissa_bits if floating else fmt.max_int.bit_length() - 1
    return _power_of_two(amax, _emax(fmt), 1 << (23 - digits) >> 1)


def rceil(amax: jax.Array, fmt: Format) -> jax.Array:
    """The power of two at or above amax * fl(1 / max), as NVIDIA's conversions have it."""
    # A small product is lifted out of the subnormals.
    lift = where(amax < np.float32(2.0**-60), np.int32(60), np.int32(0))
    product = amax * _FLOAT32.floats(_FLOAT32.field(lift)) * np.float32(1 / fmt.max)
    return _power_of_two(product, lift, 2**23 - 1)


SCALES: MappingProxyType[str, Scale] = MappingProxyType(
    {
        "max": to_max,
        "min": to_min,
        "half": half,
        "floor": floor,
        "ceil": ceil,
        "even": even,
        "rceil": rceil,
    }
)
# Those that give powers of two, whatever the format that holds them.
POWERS_OF_TWO = (floor, ceil, even, rceil)


def _emax(fmt: Format) -> int:
    """The exponent of the largest value."""
    return math.frexp(fmt.max)[1] - 1


def _power_of_two(amax: jax.Array, emax: int | jax.Array, carry: int) -> jax.Array:
    """2^(e - emax) from the bits of amax with a carry added, within float8_e8m0fnu."""
    magnitude = _FLOAT32.bits(amax)
    exponent = (extended_bits(magnitude, _FLOAT32) + np.int32(carry)) >> np.int32(23)
    exponent = lax.clamp(np.int32(0), exponent - emax, np.int32(254))
    bits = where(exponent == 0, np.int32(1 << 22), exponent << np.int32(23))
    return _FLOAT32.floats(where(magnitude > _FLOAT32.inf, _FLOAT32.nan, bits))


def held(scale: jax.Array, amax: jax.Array, scale_format: Format) -> jax.Array:
    """A scale as its format holds it: 0 for a block of zeros, else at least the least positive one.

    The floor keeps a block of tiny numbers from becoming zeros.
    """
    magnitude = jnp.abs(scale)
    if scale_format.name != "float32":
        magnitude = cast(magnitude, scale_format, overflow="saturate")
    if scale_format == E8M0:  # It has no zero, and its least value is exact.
        return magnitude
    least = np.float32(max(scale_format.tiny, _LEAST_SCALE))
    magnitude = where(magnitude < least, least, magnitude)
    zero = (_FLOAT32.bits(amax) & _FLOAT32.magnitude_mask) == 0
    return _signed_as(where(zero, np.float32(0), magnitude), scale)


def _signed_as(magnitude: jax.Array, of: jax.Array) -> jax.Array:
    """A magnitude with the sign of another number."""
    return _FLOAT32.floats(_FLOAT32.bits(magnitude) | (_FLOAT32.bits(of) & _FLOAT32.sign))


def span(low: jax.Array, high: jax.Array, fmt: IntFormat) -> jax.Array:
    """The scale (high - low) / (qmax - qmin): all integers of a format over a range."""
    steps = jnp.float32(fmt.max_int - fmt.min_int)
    # By halves, as a range may be wider than the largest float32.
    return divide(high * 0.5 - low * 0.5, steps) * 2.0


def zero_point_of(
    low: jax.Array, scale: jax.Array, fmt: IntFormat, scale_format: Format
) -> jax.Array:
    """The integer qmin - rne(low / s), within [qmin, qmax], that 0 maps to exactly; 0 for NaN."""
    lowest, highest = np.float32(fmt.min_int), np.float32(fmt.max_int)
    units = in_units(low, scale, scale_format)
    zero_point = lowest - lax.round(units, lax.RoundingMethod.TO_NEAREST_EVEN)
    zero_point = lax.clamp(lowest, zero_point, highest)
    return where(scale >= 0, zero_point, np.float32(0))


def in_units(
    x: jax.Array, scale: jax.Array, scale_format: Format, *, reciprocal: bool = False
) -> jax.Array:
    """The quotient, correctly rounded, or x times the rounded reciprocal.

    A scale of 0 has the reciprocal FLT_MAX, as in TransformerEngine; and x divided by it is x.
    """
    if scale_format == E8M0:
        return _times_power(x, scale, -1)
    divisor = where(scale == 0, np.float32(1), scale)
    if not reciprocal:
        return divide(x, divisor)
    largest = np.finfo(np.float32).max
    inverse = lax.min(divide(jnp.ones_like(divisor), jnp.abs(divisor)), largest)
    return x * kept(_signed_as(where(scale == 0, largest, inverse), scale))


def times(values: jax.Array, scale: jax.Array, scale_format: Format) -> jax.Array:
    """Values * scale, rounded once."""
    return _times_power(values, scale, 1) if scale_format == E8M0 else values * scale


def _times_power(x: jax.Array, scale: jax.Array, sign: int) -> jax.Array:
    """X times a power of two, or its inverse, in two steps: it may be subnormal itself.

    Each step has half of the exponent, halved where it stands: few operations, as XLA on CPU does
    them anew for every few elements of a block.
    """
    bits = _FLOAT32.bits(scale)
    near = (bits >> np.int32(1) & _FLOAT32.inf) + _FLOAT32.shifted(64)
    far = (bits & _FLOAT32.inf) - near + _FLOAT32.field(0)
    if sign < 0:
        near, far = (np.int32(2) * _FLOAT32.field(0) - half for half in (near, far))
    near = where(bits > _FLOAT32.inf, _FLOAT32.nan, near)
    return x * _FLOAT32.floats(near) * _FLOAT32.floats(far)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Correctly rounded quotients of finite (or NaN) float32 by positive ones, on every backend.

    XLA does not give them. It multiplies by the reciprocal when the divisor is a constant or a
    broadcast, and its division on GPU is up to two ulps off
    (https://github.com/openxla/xla/issues/37181). Subnormal operands and quotients count as zero.
    """
    b = jnp.broadcast_to(b, a.shape)
    return by_platform(_divide_by_array, _divide_in_integers, a, b)


def _divide_by_array(a: jax.Array, b: jax.Array) -> jax.Array:
    """`divide` where division itself is correctly rounded, once XLA sees no broadcast."""
    return a / (b + a * np.float32(0))


def _divide_in_integers(a: jax.Array, b: jax.Array, quotient: Callable = lax.div) -> jax.Array:
    """`divide` from any quotient of significands that is off by at most 3 ulps."""
    layout = Layout.of(np.dtype(np.float32))
    low, one = np.int32(2**23 - 1), layout.field(0)
    a_bits, b_bits = layout.bits(a) & layout.magnitude_mask, layout.bits(b)
    a_significand, b_significand = (bits & low | np.int32(2**23) for bits in (a_bits, b_bits))
    below = (a_significand < b_significand).astype(jnp.int32)
    near = quotient(layout.floats(a_bits & low | one), layout.floats(b_bits & low | one))
    # 24 bits of quotient, too low by 0 to 6, and what then remains: products wrap, their
    # difference does not.
    whole = (near * (1 + below).astype(jnp.float32) * np.float32(2**23)).astype(jnp.int32) - 3
    rest = (a_significand << (23 + below)) - whole * b_significand
    for step in (4, 2, 1):
        more = (rest >= b_significand * step).astype(jnp.int32) * step
        whole, rest = whole + more, rest - b_significand * more
    whole = whole + (2 * rest > b_significand).astype(jnp.int32)  # A quotient is never half way.
    exponent = (a_bits >> 23) - (b_bits >> 23) - below + (whole >> 24) + layout.bias
    magnitude = (exponent << 23) + (whole & low)
    magnitude = where(exponent > 2 * layout.bias, layout.inf, magnitude)
    magnitude = where((exponent < 1) | (a_bits <= low), np.int32(0), magnitude)
    magnitude = where((a_bits < layout.inf) & (b_bits < layout.inf), magnitude, layout.nan)
    return layout.floats(magnitude | (layout.bits(a) & layout.sign))
