"""Conversions between values and codes.

All of these except `nearest_codes` are exact: rounding happens before, in `_binary`, `_codebooks`
and `_tapered`.
"""

import functools
import math
from typing import TypeGuard

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import array, described
from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq._base.searching import selected
from jaxq._jax.meshes import as_first, automatic
from jaxq._jax.opaque import opaque
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat, get_format
from jaxq.numerics._grids import BinaryGrid, is_narrow
from jaxq.numerics._rounding import Overflow
from jaxq.numerics._tapered import decode_tapered

__all__ = [
    "code_dtype",
    "codes_of",
    "decode",
    "integer_codes",
    "nearest_codes",
    "rounds_to_codes",
    "unsigned",
]

_SELECTED = 4  # Codes of up to this number of bits are decoded faster by selections.


def code_dtype(fmt: Format) -> np.dtype:
    """Returns the unsigned dtype that holds the codes of a format."""
    return np.dtype("uint8" if fmt.bits <= 8 else "uint16" if fmt.bits <= 16 else "uint32")


def codes_of(
    y: jax.Array, fmt: FloatFormat | IntFormat, x: jax.Array, overflow: Overflow
) -> jax.Array:
    """Returns the codes of float32 or float64 values of a format.

    Args:
      y: values on the format's grid.
      fmt: the format.
      x: the values that were rounded to `y`.
      overflow: the overflow mode of that rounding. It determines the codes of infinities for
        formats whose range exceeds that of the dtype of `y`.
    """
    layout = FloatLayout.of(y.dtype)
    integer = layout.int_type
    if isinstance(fmt, IntFormat):
        return integer_codes(y, fmt)
    bits = layout.bits(y)
    magnitude = bits & layout.magnitude_mask
    narrow = is_narrow(BinaryGrid.of(fmt), layout)
    extended = magnitude if narrow else extended_bits(magnitude, layout)
    # Like the bits of floats, codes are ordered by magnitude and evenly spaced in each binade.
    first = integer((fmt.emin + layout.bias - int(fmt.zero)) << fmt.mantissa_bits)
    codes = (extended >> integer(layout.mantissa_bits - fmt.mantissa_bits)) - first
    if fmt.zero and fmt.emin <= layout.least_exponent:  # All numbers but 0 are normal there.
        codes = where(magnitude == 0, integer(0), codes)
    elif fmt.zero:
        # Below the smallest normal value the code is the value in units of the smallest subnormal.
        # Adding `anchor` places this integer in the low bits of the float.
        unit = fmt.emin - fmt.mantissa_bits
        if not narrow:  # The smallest subnormal may be a float subnormal, so multiples are added.
            extended, unit = lax.max(extended - layout.shifted(unit), integer(0)), 0
        anchor = layout.float_type(2.0 ** (layout.mantissa_bits + unit))
        counted = layout.bits(layout.floats(extended) + anchor) - layout.bits(anchor)
        codes = lax.select(codes < integer(2**fmt.mantissa_bits), counted, codes)
    if fmt.emax > layout.bias:
        # An infinity that results from a finite value is the power of two above the largest float.
        code = fmt.max_code + int(fmt.inf and overflow != "saturate")
        infinite = (layout.bits(x) & layout.magnitude_mask) == layout.inf
        codes = where(infinite & (magnitude == layout.inf), integer(code), codes)
    elif fmt.inf_code is not None:
        codes = where(magnitude == layout.inf, integer(fmt.inf_code), codes)
    if fmt.nan_code is not None:
        codes = where(magnitude > layout.inf, integer(fmt.nan_code), codes)
    if fmt.signed:
        sign = np.uint64(2 ** (fmt.bits - 1)).astype(integer)
        codes = codes | (bits >> integer(8 * np.dtype(integer).itemsize - fmt.bits) & sign)
    return codes.astype(code_dtype(fmt))


def rounds_to_codes(fmt: Format, layout: FloatLayout) -> TypeGuard[FloatFormat]:
    """Returns whether `nearest_codes` supports a format."""
    return (
        isinstance(fmt, FloatFormat)
        and (fmt.signed and fmt.subnormals and fmt.zero)
        and 0 < fmt.mantissa_bits < layout.mantissa_bits
        and fmt.nan != "negative_zero"
        and is_narrow(BinaryGrid.of(fmt), layout)
    )


def nearest_codes(x: jax.Array, fmt: FloatFormat, overflow: Overflow) -> jax.Array:
    """Returns the codes of the nearest values, half to even, without computing these values.

    Args:
      x: float32 or float64 numbers.
      fmt: a format for which `rounds_to_codes` is true.
      overflow: None or "saturate", as in `jaxq.encode`.
    """
    layout = FloatLayout.of(x.dtype)
    integer = layout.int_type
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    # The code is the upper part of the bits, with another bias: a carry moves to the next code.
    dropped = integer(layout.mantissa_bits - fmt.mantissa_bits)
    last = (magnitude >> dropped) & integer(1)
    below_half = integer((1 << int(dropped) - 1) - 1)
    first = integer((fmt.emin + layout.bias - 1) << fmt.mantissa_bits)
    codes = ((magnitude + (last + below_half)) >> dropped) - first
    # Below the smallest normal value, the code counts multiples of the smallest subnormal. Adding
    # `anchor` rounds the number to such a multiple and places the count in the low bits.
    anchor = layout.float_type(2.0 ** (layout.mantissa_bits + fmt.emin - fmt.mantissa_bits))
    counted = layout.bits(layout.floats(magnitude) + anchor) - layout.bits(anchor)
    codes = where(magnitude < layout.field(fmt.emin), counted, codes)
    beyond = fmt.max_code
    if overflow is None and fmt.inf_code is not None:
        beyond = fmt.inf_code
    elif overflow is None and fmt.nan_code is not None:
        beyond = fmt.nan_code
    if beyond <= fmt.max_code + 1:
        codes = lax.min(codes, integer(beyond))
    else:
        codes = where(codes > integer(fmt.max_code), integer(beyond), codes)
    is_nan = magnitude > layout.inf
    sign = bits >> integer(8 * np.dtype(integer).itemsize - fmt.bits)
    if fmt.nan_code is None:  # As in `snap`, NaN becomes the zero of the opposite sign.
        codes, sign = where(is_nan, integer(0), codes), where(is_nan, ~sign, sign)
    else:
        codes = where(is_nan, integer(fmt.nan_code), codes)
    return (codes | (sign & integer(1 << (fmt.bits - 1)))).astype(code_dtype(fmt))


def integer_codes(y: jax.Array, fmt: IntFormat) -> jax.Array:
    """Returns the codes of float32 or float64 values of an integer or fixed-point format."""
    layout = FloatLayout.of(y.dtype)
    # Adding 1.5 * 2^k, whose last bit is the format's last bit, places the integer code in the low
    # bits of the float, in two's complement.
    anchor = layout.float_type(1.5 * 2.0 ** (layout.mantissa_bits - fmt.fraction_bits))
    codes = layout.bits(y + anchor) & layout.int_type(2**fmt.bits - 1)
    return codes.astype(code_dtype(fmt))


@functools.cache
def level_codes(fmt: CodebookFormat) -> list[np.int32]:
    """Returns the code of each distinct level, ascending, or its first code if it has several."""
    levels = np.asarray(fmt.levels)
    return [np.int32(np.flatnonzero(levels == v)[0]) for v in fmt.values]


@functools.cache
def _code_values(fmt: Format) -> np.ndarray:
    """Returns the values of all codes (at most 16 bits) as float64, with NaN for unused codes."""
    if isinstance(fmt, CodebookFormat):
        table = np.full(2**fmt.bits, np.nan)
        table[: len(fmt.levels)] = fmt.levels
        return table
    assert isinstance(fmt, FloatFormat)
    magnitudes = np.full(2 ** (fmt.bits - int(fmt.signed)), np.nan)
    magnitudes[: fmt.max_code + 1] = [fmt.magnitude(c) for c in range(fmt.max_code + 1)]
    if fmt.inf_code is not None:
        magnitudes[fmt.inf_code] = np.inf
    if not fmt.signed:
        return magnitudes
    table = np.concatenate([magnitudes, -magnitudes])
    if fmt.nan == "negative_zero":
        table[2 ** (fmt.bits - 1)] = -np.nan
    return table


def decode(
    codes: jax.typing.ArrayLike,
    fmt: "str | Format | np.dtype | type",
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns the values of codes.

    Args:
      codes: unsigned integers of any shape, one code per element, as returned by `jaxq.encode`.
        Bits above the format's width are ignored.
      fmt: the format, in any form that `jaxq.get_format` accepts.
      dtype: the dtype of the result: float32, or float64 with x64 enabled.

    Returns:
      Values with the shape of the codes. They are exact in float32 for every format whose values
      float32 can represent; a value beyond its range (only in formats with more than 8 exponent
      bits) becomes infinite or the nearest subnormal. Codes without a value give NaN.

    Raises:
      TypeError: if the codes are not unsigned integers, or `dtype` is not float32 or float64.
      ValueError: if the dtype of the codes is narrower than the format.

    Example:
      >>> import jax.numpy as jnp
      >>> decode(jnp.uint8([0x08, 0x7E, 0xFE]), "float8_e4m3fn")
      Array([ 1.5625e-02,  4.4800e+02, -4.4800e+02], dtype=float32)
    """
    fmt = get_format(fmt)
    codes = unsigned("decode", "codes", codes)
    if 8 * codes.dtype.itemsize < fmt.bits:
        raise ValueError(
            f"decode: `codes` must have a dtype of at least {fmt.bits} bits for {fmt.name}, got "
            f"codes of {codes.dtype}. Pass codes as jaxq.encode returns them."
        )
    try:
        result_dtype = None if dtype is None else jnp.dtype(dtype)
    except (TypeError, ValueError):
        result_dtype = None
    if result_dtype not in (jnp.float32, jnp.float64):
        got = described(dtype) if result_dtype is None else result_dtype
        raise TypeError(f"decode: `dtype` must be float32 or float64, got {got}. Use float32.")
    return _decode(codes, fmt, jax.dtypes.canonicalize_dtype(result_dtype))


def unsigned(name: str, argument: str, codes: jax.typing.ArrayLike) -> jax.Array:
    """Returns the argument of a function as an array, after checking that it has unsigned integers.

    Raises:
      TypeError: if it has not.
    """
    requirement, remedy = "unsigned integers", "Pass codes, as jaxq.encode returns them."
    codes = array(name, argument, codes, requirement, remedy)
    if not jnp.issubdtype(codes.dtype, jnp.unsignedinteger):
        raise TypeError(
            f"{name}: `{argument}` must be unsigned integers, got {codes.dtype}. Convert them "
            f"first, such as {argument}.astype(jnp.uint8)."
        )
    return codes


def _looked_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Returns the table's value for each code, by selections on the bits of the code."""
    codes = codes.astype(jnp.int32)
    bits = len(table).bit_length() - 1
    digits = [(codes << np.int32(shift)) < np.int32(0) for shift in range(32 - bits, 32)]
    return selected(digits, list(table))


@functools.partial(jax.jit, static_argnames=("fmt", "dtype"))
@automatic(as_first)
def _decode(codes: jax.Array, fmt: Format, dtype: np.dtype) -> jax.Array:
    layout = FloatLayout.of(dtype)
    if fmt.bits < 8 * codes.dtype.itemsize:
        codes = codes & codes.dtype.type(2**fmt.bits - 1)
    if isinstance(fmt, TaperedFormat):
        return decode_tapered(codes, fmt, layout)
    if isinstance(fmt, IntFormat):
        integers = codes.astype(layout.int_type)
        if fmt.signed:
            half = layout.int_type(2 ** (fmt.bits - 1))
            integers = (integers ^ half) - half
        scale = layout.float_type(2.0**-fmt.fraction_bits)
        return integers.astype(layout.float_type) * scale
    if isinstance(fmt, FloatFormat) and fmt.nan == "ieee" and fmt.inf:
        cut_short = fmt.exponent_bits == 8 and fmt.bias == layout.bias
        if cut_short and fmt.signed and fmt.subnormals:  # Codes are the upper bits of a float32.
            shifted = codes.astype(jnp.uint32) << np.uint32(32 - fmt.bits)
            return lax.bitcast_convert_type(shifted, jnp.float32)
    if not (isinstance(fmt, FloatFormat) and is_narrow(BinaryGrid.of(fmt), layout)):
        with np.errstate(over="ignore"):
            table = _code_values(fmt).astype(layout.float_type)
        if fmt.bits <= _SELECTED:
            return opaque(functools.partial(_looked_up, table), codes)
        return jnp.asarray(table)[codes]

    integers = codes.astype(layout.int_type)
    magnitude = integers & layout.int_type(2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1)
    shift = layout.mantissa_bits - fmt.mantissa_bits
    offset = layout.field(fmt.emin) - layout.shifted(int(fmt.zero))
    values = layout.floats((magnitude << shift) + offset)
    if fmt.zero:
        unit = layout.float_type(math.ldexp(1.0, fmt.emin - fmt.mantissa_bits))
        low = magnitude < layout.int_type(2**fmt.mantissa_bits)
        small = magnitude.astype(layout.float_type) * unit
        values = where(low, small if fmt.subnormals else layout.float_type(0), values)
    if fmt.inf_code is not None:
        values = where(magnitude == fmt.inf_code, layout.float_type(np.inf), values)
    if fmt.nan is not None and fmt.nan != "negative_zero":
        first_nan = fmt.max_code + 1 + int(fmt.inf)
        values = where(magnitude >= first_nan, layout.float_type(np.nan), values)
    if not fmt.signed:
        return values
    sign = (integers >> (fmt.bits - 1)) << (8 * np.dtype(layout.int_type).itemsize - 1)
    values = layout.floats(layout.bits(values) | sign)
    if fmt.nan == "negative_zero":
        # NaN has the sign of its code, as in ml_dtypes.
        values = where(integers == fmt.nan_code, layout.floats(layout.nan | layout.sign), values)
    return values
