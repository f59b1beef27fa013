"""The kernel of tapered formats, posits and takums: floats to codes and back, by bits.

The code of a magnitude is a string of bits cut off: a prefix that tells how long the exponent is,
then the rest of the exponent and the fraction. These stand in a float's own bits, one after the
other, so the string is cut where the float is: `units` are the bits behind the cut and the last one
before it, which is how the posit standard defines rounding, and a carry goes up to the next code by
itself. A number that is not zero never becomes zero or NaR.
"""

import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, extended_bits, where
from jaxq.formats import TaperedFormat
from jaxq.rounding import Overflow, Rounding

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
      x: float32 or float64, any shape.
      fmt: the format.
      rounding: a rounding mode.
      overflow: `"saturate"` takes infinities to the ends; else they are NaN. Finite values always
        saturate.
      random: random bits for the mode.

    Returns:
      Values of the format, NaN for NaR, shape and dtype of x. A takum may lie beyond float32: it is
      infinite there, or rounded to a subnormal.
    """
    layout = Layout.of(x.dtype)
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
    """Codes of the values that `snap_tapered` would give.

    Args:
      x: as in `snap_tapered`.
      fmt: as in `snap_tapered`.
      rounding: as in `snap_tapered`.
      overflow: as in `snap_tapered`.
      random: as in `snap_tapered`.

    Returns:
      Codes as signed integers of x's width, not negative.
    """
    layout = Layout.of(x.dtype)
    integer = layout.int_type
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    y = _snapped(bits, magnitude, fmt, layout, rounding, random)
    string, size, dropped = _split(y, fmt, layout)
    if fmt.exponent_bits is None:
        width = size - integer(layout.mantissa_bits)
        prefix = where(y < integer(0), integer(7) - width, width + integer(8))
    else:  # k + 1 ones and a zero, or -k zeros and a one.
        k = y >> size
        ones = (integer(4) << lax.max(k, integer(0))) - integer(2)
        prefix = where(k < integer(0), integer(1), ones)
    tail = string & ((integer(1) << size) - integer(1))
    top = integer(2 ** (fmt.bits - 1) - 1)
    code = lax.min((prefix << (size - dropped)) | (tail >> dropped), top)
    code = where(bits < integer(0), -code & integer(2**fmt.bits - 1), code)
    code = where(magnitude == integer(0), integer(0), code)
    return where(magnitude > _last_number(overflow, layout), top + integer(1), code)


def _last_number(overflow: Overflow, layout: Layout) -> np.signedinteger:
    """Bits of the largest magnitude that is not NaR."""
    return layout.inf if overflow == "saturate" else layout.inf - layout.int_type(1)


def _is_narrow(fmt: TaperedFormat, layout: Layout) -> bool:
    """Whether every value of a format is a normal number."""
    return -layout.bias < fmt.emin and fmt.emax < layout.bias


def _snapped(
    bits: jax.Array,
    magnitude: jax.Array,
    fmt: TaperedFormat,
    layout: Layout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Logarithms of the magnitudes on the grid, as `_logarithm` has them; the least for 0."""
    integer, m = layout.int_type, layout.mantissa_bits
    least, most = (_logarithm(end, layout) for end in (fmt.tiny, fmt.max))
    extended = magnitude if _is_narrow(fmt, layout) else extended_bits(magnitude, layout)
    exact = lax.clamp(least, extended - layout.field(0), most)
    if not _is_narrow(fmt, layout):  # Values lie beyond the float's infinity.
        exact = where(magnitude == layout.inf, most, exact)
    string, _, dropped = _split(exact, fmt, layout)
    low = string & ((integer(2) << dropped) - integer(1))
    seen = low
    if fmt.exponent_bits != 0:  # More bits than a float holds: the last one stands for the further.
        too_many = lax.max(dropped - integer(m), integer(0))
        further = low & ((integer(1) << too_many) - integer(1))
        seen = (low ^ further) | (lax.min(further, integer(1)) << too_many)
    scale = layout.floats(layout.field(0) - (dropped << integer(m)))
    rounded = rounding(seen.astype(layout.float_type) * scale, bits < integer(0), random)
    return lax.clamp(least, exact - low + (rounded.astype(integer) << dropped), most)


def _split(
    y: jax.Array, fmt: TaperedFormat, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a code ends in the bits of a magnitude.

    Args:
      y: magnitudes, as `_logarithm` has them.
      fmt: the format.
      layout: of the floats.

    Returns:
      The string, whose low bits stand behind the prefix; how many do; and how many of those the
      code has no room for. The bit before these is 1 where the code is odd.
    """
    integer, m = layout.int_type, layout.mantissa_bits
    if fmt.exponent_bits is None:
        # The prefix counts the bits of c + 1 or of -c behind its leading one.
        sign = y >> integer(8 * np.dtype(integer).itemsize - 1)
        counted = ((y >> integer(m)) ^ sign) + integer(1)
        width = integer(8 * np.dtype(integer).itemsize - 1) - lax.clz(counted)
        string = y + ((sign | integer(1)) << integer(m))
        return string, width + integer(m), width + integer(m + 5 - fmt.bits)
    size = m + fmt.exponent_bits
    k = y >> integer(size)
    length = lax.max(k + integer(2), integer(1) - k)
    dropped = lax.min(length + integer(size + 1 - fmt.bits), integer(size))
    # Where the prefix fills the code, its last bit tells odd from even: k's own, or the other one.
    string = y + integer((fmt.bits + 1) % 2 << size)
    return string, lax.full_like(k, size), dropped


def _logarithm(value: float, layout: Layout) -> np.signedinteger:
    """A positive number's exponent and fraction as one integer: a float's bits without the bias.

    There is room for every exponent of a format, also where the floats have none.
    """
    significand, exponent = math.frexp(value)
    fraction = int(math.ldexp(2 * significand - 1, layout.mantissa_bits))
    return layout.shifted(exponent - 1) + layout.int_type(fraction)


def _collapsed(y: jax.Array, layout: Layout) -> jax.Array:
    """Bits of floats from logarithms: subnormal or infinite where there are no others."""
    integer, m = layout.int_type, layout.mantissa_bits
    first, low = layout.shifted(1 - layout.bias), integer((1 << m) - 1)
    # The significand in units of the least subnormal.
    scale = (lax.clamp(layout.shifted(-m - 2), y - first, integer(0)) & ~low) + layout.field(0)
    significand = ((y & low) | (low + integer(1))).astype(layout.float_type)
    subnormal = significand * layout.floats(scale)
    subnormal = lax.round(subnormal, lax.RoundingMethod.TO_NEAREST_EVEN).astype(integer)
    normal = lax.min(y, layout.shifted(layout.bias + 1)) + layout.field(0)
    return lax.select(y < first, subnormal, normal)


def decode_tapered(codes: jax.Array, fmt: TaperedFormat, layout: Layout) -> jax.Array:
    """Values of codes, in the float type of a layout; NaN for NaR; beyond it as `snap_tapered`."""
    width = np.uint32(32)
    codes = codes.astype(jnp.uint32)
    negative = (codes >> np.uint32(fmt.bits - 1)) == np.uint32(1)
    magnitude = where(negative, (np.uint32(0) - codes), codes) & np.uint32(2**fmt.bits - 1)
    string = magnitude << np.uint32(33 - fmt.bits)  # Without the sign, at the top.
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
    # 16 bits are enough: no fraction of a format is longer.
    fraction = (fraction >> np.uint32(16)).astype(layout.int_type)
    y = layout.shifted(exponent) + (fraction << layout.int_type(layout.mantissa_bits - 16))
    bits = y + layout.field(0) if _is_narrow(fmt, layout) else _collapsed(y, layout)
    bits = where(magnitude == np.uint32(0), layout.int_type(0), bits)
    bits = bits | where(negative & (bits != layout.int_type(0)), layout.sign, layout.int_type(0))
    return layout.floats(where(codes == np.uint32(2 ** (fmt.bits - 1)), layout.nan, bits))
