"""The kernel of tapered formats, posits and takums: floats to codes and back, by bits.

The code of a magnitude is a string of bits cut off: first a prefix that tells how long the exponent
is, then exponent and fraction. Rounding happens on the string: `units` are the code and the bits
behind it, which is how the posit standard defines rounding. A number that is not zero never becomes
zero or NaR.
"""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.formats import TaperedFormat
from jaxq.grids import Layout, Overflow, extended_bits, where
from jaxq.rounding import Rounding

__all__ = ["decode_tapered", "encode_tapered"]

_KEPT = 22  # Bits behind the code that a rounding mode sees; the last one stands for all further.


def encode_tapered(
    x: jax.Array,
    fmt: TaperedFormat,
    rounding: Rounding,
    overflow: Overflow = None,
    random: jax.Array | None = None,
) -> jax.Array:
    """Codes of float32 or float64 values.

    Args:
      x: any shape.
      fmt: the format.
      rounding: a rounding mode.
      overflow: `"saturate"` takes infinities to the ends; else they are NaR, as NaN is. Finite
        values always saturate.
      random: random bits for the mode.

    Returns:
      Codes as signed integers of x's width, not negative.
    """
    layout = Layout.of(x.dtype)
    integer = layout.int_type
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    negative = bits < integer(0)
    extended = extended_bits(magnitude, layout)
    exponent = (extended >> integer(layout.mantissa_bits)) - integer(layout.bias)
    fraction = extended & integer((1 << layout.mantissa_bits) - 1)
    below = exponent < integer(fmt.emin)
    above = (exponent > integer(fmt.emax)) | (magnitude == layout.inf)
    exponent = lax.clamp(integer(fmt.emin), exponent, integer(fmt.emax))

    prefix, length, rest, rest_bits = _split(exponent, fmt, integer)
    tail = (rest << integer(layout.mantissa_bits)) | fraction
    kept = integer(fmt.bits - 1) - length
    dropped = rest_bits + integer(layout.mantissa_bits) - kept
    code = (prefix << kept) | (tail >> dropped)
    behind = tail & ((integer(1) << dropped) - integer(1))
    too_many = lax.max(dropped - integer(_KEPT), integer(0))
    seen = behind >> too_many
    sticky = ((seen << too_many) != behind).astype(integer)
    seen = (seen | sticky) << lax.max(integer(_KEPT) - dropped, integer(0))

    odd = code & integer(1)
    units = ((odd << integer(_KEPT)) | seen).astype(layout.float_type)
    rounded = rounding(units * layout.float_type(2.0**-_KEPT), negative, random)
    code = code - odd + rounded.astype(integer)
    top = integer(2 ** (fmt.bits - 1) - 1)
    code = lax.clamp(integer(1), code, top)
    code = where(below, integer(1), where(above, top, code))
    code = where(magnitude == integer(0), integer(0), code)
    code = where(negative, -code & integer(2**fmt.bits - 1), code)
    last = layout.inf if overflow == "saturate" else layout.inf - integer(1)
    return where(magnitude > last, top + integer(1), code)


def _split(
    exponent: jax.Array, fmt: TaperedFormat, integer: type[np.signedinteger]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """An exponent as prefix and rest: (prefix, its length, rest, its length)."""
    if fmt.exponent_bits is None:
        up = exponent >= integer(0)
        counted = lax.select(up, exponent + integer(1), -exponent)
        width = integer(8 * np.dtype(integer).itemsize - 1) - lax.clz(counted)
        regime = lax.select(up, width + integer(8), integer(7) - width)
        first = integer(1) << width
        rest = lax.select(up, counted - first, exponent + first * integer(2) - integer(1))
        return regime, lax.full_like(exponent, 4), rest, width
    k = exponent >> integer(fmt.exponent_bits)
    rest = exponent & integer(2**fmt.exponent_bits - 1)
    run = lax.max(k, integer(-1)) + integer(1)  # Ones: k + 1 of them and a zero.
    ones = (integer(2) << run) - integer(2)
    up = k >= integer(0)
    prefix = lax.select(up, ones, lax.full_like(k, 1))
    length = lax.select(up, k + integer(2), integer(1) - k)
    return prefix, length, rest, lax.full_like(k, fmt.exponent_bits)


def decode_tapered(codes: jax.Array, fmt: TaperedFormat, layout: Layout) -> jax.Array:
    """Values of codes, in the float type of a layout; NaN for NaR.

    A takum may lie beyond float32: it is infinite there, or rounded to a subnormal.
    """
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

    integer = layout.int_type
    # 16 bits are enough: no fraction of a format is longer.
    significand = (fraction >> np.uint32(16)).astype(integer) | integer(2**16)
    field = exponent.astype(integer) + integer(layout.bias)
    shifted = (significand - integer(2**16)) << integer(layout.mantissa_bits - 16)
    normal = (field << integer(layout.mantissa_bits)) | shifted
    # In units of the least subnormal.
    scale = field + integer(layout.bias + layout.mantissa_bits - 17)
    scale = lax.clamp(integer(1), scale, integer(2 * layout.bias)) << integer(layout.mantissa_bits)
    subnormal = significand.astype(layout.float_type) * layout.floats(scale)
    subnormal = lax.round(subnormal, lax.RoundingMethod.TO_NEAREST_EVEN).astype(integer)
    bits = lax.select(field < integer(1), subnormal, normal)
    bits = where(field > integer(2 * layout.bias), layout.inf, bits)
    bits = where(magnitude == np.uint32(0), integer(0), bits)
    bits = bits | where(negative & (bits != integer(0)), layout.sign, integer(0))
    return layout.floats(where(codes == np.uint32(2 ** (fmt.bits - 1)), layout.nan, bits))
