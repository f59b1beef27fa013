"""The kernel of tapered formats (posits and takums), which converts floats and codes on bits.

The code of a magnitude is a truncated bit string: a prefix that determines the length of the
exponent, then the rest of the exponent and the fraction. Exponent and fraction are adjacent in the
bits of a float too, so the float is rounded where the string is truncated: `units` are the bits
after the cut and the last bit before it, as in the rounding of the posit standard, and a carry
moves to the next code automatically. A nonzero number never becomes zero or NaR.
"""

import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq.formats import TaperedFormat
from jaxq.numerics._rounding import Overflow, Rounding, nearest_even

__all__ = ["decode_tapered", "encode_tapered", "snap_tapered"]


def snap_tapered(
    x: jax.Array,
    fmt: TaperedFormat,
    rounding: Rounding,
    overflow: Overflow = None,
    random: jax.Array | None = None,
) -> jax.Array:
    """Snaps floats to a tapered format.

    Args:
      x: float32 or float64 values of any shape.
      fmt: the format.
      rounding: a rounding mode.
      overflow: None and `"propagate"` turn infinities into NaN; other modes saturate them. Finite
        values always saturate.
      random: random bits for the mode.

    Returns:
      Values of the format, with NaN for NaR, in the shape and dtype of x. A takum beyond the range
      of float32 becomes infinite or is rounded to a subnormal.
    """
    layout = FloatLayout.of(x.dtype)
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    y = _snapped(bits, magnitude, fmt, layout, rounding, random)
    is_zero = magnitude == layout.int_type(0)
    if _is_narrow(fmt, layout):
        y = y + layout.field(0)
    else:
        y = _collapsed(y, layout)
        is_zero = is_zero | (y == layout.int_type(0))
    y = where(is_zero, layout.int_type(0), y | (bits & layout.sign))
    return layout.floats(where(magnitude > _last_number(overflow, layout), layout.nan, y))


def encode_tapered(
    x: jax.Array,
    fmt: TaperedFormat,
    rounding: Rounding,
    overflow: Overflow = None,
    random: jax.Array | None = None,
) -> jax.Array:
    """Returns the codes of the values that `snap_tapered` returns.

    Args:
      x: as in `snap_tapered`.
      fmt: as in `snap_tapered`.
      rounding: as in `snap_tapered`.
      overflow: as in `snap_tapered`.
      random: as in `snap_tapered`.

    Returns:
      Codes as non-negative values of the signed integer dtype with the width of x.
    """
    layout = FloatLayout.of(x.dtype)
    integer = layout.int_type
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    y = _snapped(bits, magnitude, fmt, layout, rounding, random)
    string, size, dropped = _split(y, fmt, layout)
    if fmt.exponent_bits is None:
        width = size - integer(layout.mantissa_bits)
        prefix = where(y < integer(0), integer(7) - width, width + integer(8))
    else:  # The prefix is k + 1 ones and a zero, or -k zeros and a one.
        k = y >> size
        ones = (integer(4) << lax.max(k, integer(0))) - integer(2)
        prefix = where(k < integer(0), integer(1), ones)
    tail = string & ((integer(1) << size) - integer(1))
    top = integer(2 ** (fmt.bits - 1) - 1)
    code = lax.min((prefix << (size - dropped)) | (tail >> dropped), top)
    code = where(bits < integer(0), -code & integer(2**fmt.bits - 1), code)
    code = where(magnitude == integer(0), integer(0), code)
    return where(magnitude > _last_number(overflow, layout), top + integer(1), code)


def _last_number(overflow: Overflow, layout: FloatLayout) -> np.signedinteger:
    """Returns the bits of the largest magnitude that is not converted to NaR."""
    return layout.inf - layout.int_type(overflow in (None, "propagate"))


def _is_narrow(fmt: TaperedFormat, layout: FloatLayout) -> bool:
    """Returns whether every nonzero value of a format is a normal number of the working dtype."""
    return -layout.bias < fmt.emin and fmt.emax < layout.bias


def _snapped(
    bits: jax.Array,
    magnitude: jax.Array,
    fmt: TaperedFormat,
    layout: FloatLayout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Returns the rounded magnitudes in the form of `_logarithm`, with the smallest for 0."""
    integer, m = layout.int_type, layout.mantissa_bits
    least, most = (_logarithm(end, layout) for end in (fmt.min_positive, fmt.max))
    extended = magnitude if _is_narrow(fmt, layout) else extended_bits(magnitude, layout)
    exact = lax.clamp(least, extended - layout.field(0), most)
    if not _is_narrow(fmt, layout):  # The format has values beyond the range of the floats.
        exact = where(magnitude == layout.inf, most, exact)
    string, _, dropped = _split(exact, fmt, layout)
    if rounding is nearest_even:  # Half a unit is added, or a little less if the code is even.
        ones = ~(integer(-1) << dropped)
        odd = string >> dropped & integer(1)
        # The ends of the clamp have codes, so no result is beyond them.
        return ((string + (ones >> integer(1)) + odd) & ~ones) - (string - exact)
    low = string & ((integer(2) << dropped) - integer(1))
    seen = low
    if fmt.exponent_bits != 0:  # More bits than a float holds are merged into one sticky bit.
        too_many = lax.max(dropped - integer(m), integer(0))
        further = low & ((integer(1) << too_many) - integer(1))
        seen = (low ^ further) | (lax.min(further, integer(1)) << too_many)
    scale = layout.floats(layout.field(0) - (dropped << integer(m)))
    rounded = rounding(seen.astype(layout.float_type) * scale, bits < integer(0), random)
    return lax.clamp(least, exact - low + (rounded.astype(integer) << dropped), most)


def _split(
    y: jax.Array, fmt: TaperedFormat, layout: FloatLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the position in the bits of each magnitude at which its code ends.

    Args:
      y: magnitudes in the form of `_logarithm`.
      fmt: the format.
      layout: the bit layout of the floats.

    Returns:
      The bit string, whose low bits follow the prefix; the number of these bits; and the number of
      them that do not fit in the code. The bit above those is the parity of the code: 1 if it is
      odd.
    """
    integer, m = layout.int_type, layout.mantissa_bits
    if fmt.exponent_bits is None:
        # The prefix gives the number of bits of c + 1 or of -c below the leading one.
        sign = y >> integer(8 * np.dtype(integer).itemsize - 1)
        counted = ((y >> integer(m)) ^ sign) + integer(1)
        width = integer(8 * np.dtype(integer).itemsize - 1) - lax.clz(counted)
        string = y + ((sign | integer(1)) << integer(m))
        return string, width + integer(m), width + integer(m + 5 - fmt.bits)
    size = m + fmt.exponent_bits
    k = y >> integer(size)
    length = lax.max(k + integer(2), integer(1) - k)
    dropped = lax.min(length + integer(size + 1 - fmt.bits), integer(size))
    # If the prefix fills the code, its last bit is the parity: the parity of k or its opposite.
    string = y + integer((fmt.bits + 1) % 2 << size)
    return string, lax.full_like(k, size), dropped


def _logarithm(value: float, layout: FloatLayout) -> np.signedinteger:
    """Returns the exponent and fraction of a positive number as one integer.

    It equals the bits of a float with a bias of 0, but can hold every exponent of a format.
    """
    significand, exponent = math.frexp(value)
    fraction = int(math.ldexp(2 * significand - 1, layout.mantissa_bits))
    return layout.shifted(exponent - 1) + layout.int_type(fraction)


def _collapsed(y: jax.Array, layout: FloatLayout) -> jax.Array:
    """Converts logarithms to float bits, subnormal or infinite where out of the normal range."""
    first = layout.shifted(1 - layout.bias)
    # Subnormals are counted in the bits of a sum: the value, times a power of two that makes it
    # normal, plus the power of two whose last bit stands for the smallest subnormal.
    up = layout.bias // 2
    anchor = layout.field(up + 1 - layout.bias)
    least = layout.shifted(layout.least_exponent - 2)
    scaled = layout.floats(lax.max(y, least) + layout.field(up))
    subnormal = layout.bits(scaled + layout.floats(anchor)) - anchor
    normal = lax.min(y, layout.shifted(layout.bias + 1)) + layout.field(0)
    return lax.select(y < first, subnormal, normal)


def decode_tapered(codes: jax.Array, fmt: TaperedFormat, layout: FloatLayout) -> jax.Array:
    """Returns the values of codes in the float type of a layout, out of range as `snap_tapered`."""
    width = np.uint32(32)
    codes = codes.astype(jnp.uint32)
    negative = (codes >> np.uint32(fmt.bits - 1)) == np.uint32(1)
    magnitude = where(negative, (np.uint32(0) - codes), codes) & np.uint32(2**fmt.bits - 1)
    string = magnitude << np.uint32(33 - fmt.bits)  # Without the sign, left-aligned.
    up = string >= np.uint32(2**31)
    if fmt.exponent_bits is None:
        regime = string >> np.uint32(28) & np.uint32(7)
        size = where(up, regime, np.uint32(7) - regime)
        tail = string << np.uint32(4)
    else:
        run = lax.clz(where(up, ~string, string))
        size = lax.full_like(run, fmt.exponent_bits)
        tail = string << (run + np.uint32(1))
    rest = lax.shift_right_logical(tail, width - size).astype(jnp.int32)
    fraction = lax.shift_left(tail, size)
    if fmt.exponent_bits is None:
        first = np.int32(1) << size.astype(jnp.int32)
        exponent = where(up, first - np.int32(1), np.int32(1) - first * np.int32(2)) + rest
    else:
        k = where(up, run.astype(jnp.int32) - np.int32(1), -run.astype(jnp.int32))
        exponent = (k << np.int32(fmt.exponent_bits)) + rest
    # 16 bits are enough for the fraction of every format.
    fraction = (fraction >> np.uint32(16)).astype(layout.int_type)
    y = layout.shifted(exponent) + (fraction << layout.int_type(layout.mantissa_bits - 16))
    bits = y + layout.field(0) if _is_narrow(fmt, layout) else _collapsed(y, layout)
    bits = where(magnitude == np.uint32(0), layout.int_type(0), bits)
    bits = bits | where(negative & (bits != layout.int_type(0)), layout.sign, layout.int_type(0))
    return layout.floats(where(codes == np.uint32(2 ** (fmt.bits - 1)), layout.nan, bits))
