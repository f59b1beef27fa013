"""Numeric descriptions of float and integer grids, as Python numbers or traced scalars.

Python numbers, used for named formats, become constants of the program. With traced scalars,
`jax.vmap` evaluates many formats in one compiled call.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import flags, integer
from jaxq._base.bits import FloatLayout
from jaxq._jax.serialization import pytree
from jaxq.formats import FloatFormat, IntFormat

__all__ = ["BinaryGrid", "float_grid", "int_grid", "is_aligned", "is_narrow", "is_normal"]


@pytree(static=("inf", "nan", "negative_zero", "signed", "zero", "subnormals", "odd_codes"))
@dataclasses.dataclass(frozen=True)
class BinaryGrid:
    """A grid of floats or integers, described by Python numbers or traced scalars.

    Grids are created by `float_grid` and `int_grid`. `jaxq.cast` accepts them instead of a format,
    and so does `jaxq.Recipe`, for `jaxq.fake_quant` and `jaxq.neighbors`. They are pytrees:
    `jax.vmap` over the leaves evaluates many formats in one compiled call.

    Attributes:
      mantissa_bits: the number of mantissa bits; the spacing at exponent e is
        2^(e - mantissa_bits).
      emin: the exponent below which the spacing no longer decreases.
      emax: the exponent above which the spacing no longer increases; every value is below
        2^(emax + 1).
      max: the largest value.
      lowest: the largest magnitude of the negative values; 0 if there are none.
      inf: True if overflow gives an infinity.
      nan: True if there is a NaN. Overflow gives NaN if there is no infinity.
      negative_zero: True if -0 is distinct from 0.
      signed: True if negative values are kept; if not, they become NaN, or 0 without a NaN.
      zero: True if there is a zero; if not, underflow gives 2^emin, and zero becomes NaN.
      subnormals: True if there are values between 0 and 2^emin.
      odd_codes: True if, without mantissa bits, "even" refers to the code instead of the
        significand.

    Example:
      >>> import jaxq
      >>> grid = BinaryGrid.of(jaxq.get_format("float8_e4m3fn"))
      >>> grid.max, grid.emin, grid.static
      (448.0, -6, True)
    """

    mantissa_bits: Any
    emin: Any
    emax: Any
    max: Any
    lowest: Any
    inf: bool
    nan: bool
    negative_zero: bool
    signed: bool = True
    zero: bool = True
    subnormals: bool = True
    odd_codes: bool = False

    @classmethod
    def of(cls, fmt: FloatFormat | IntFormat) -> "BinaryGrid":
        """Returns the grid of a format, described by Python numbers."""
        if isinstance(fmt, IntFormat):
            top = fmt.bits - fmt.fraction_bits  # No value is beyond 2^top.
            lowest = abs(fmt.min)
            return cls(fmt.bits, top, top, fmt.max, lowest, False, False, False, fmt.signed)
        return cls(
            fmt.mantissa_bits,
            fmt.emin,
            fmt.emax,
            fmt.max,
            fmt.max if fmt.signed else 0.0,
            fmt.inf,
            fmt.nan is not None,
            fmt.negative_zero,
            fmt.signed,
            fmt.zero,
            fmt.subnormals or fmt.mantissa_bits == 0,
            fmt.mantissa_bits == 0 and fmt.parity == "code",
        )

    @property
    def min(self) -> Any:
        """The lowest value."""
        return 0 - self.lowest

    @property
    def name(self) -> str:
        """The name used in messages in place of that of a format."""
        return "BinaryGrid"

    @property
    def scaled_max(self) -> Any:
        """The value to which quantizers scale the amax of a block, as in `FloatFormat`."""
        layout = FloatLayout.of(np.dtype(np.float32))
        m = jnp.asarray(self.mantissa_bits, jnp.int32)
        mantissa = ((jnp.int32(1) << m) - 1) << jnp.maximum(23 - m, 0)
        lowest_binade = layout.field(jnp.maximum(jnp.asarray(self.emin, jnp.int32), 0)) | mantissa
        return jnp.where(jnp.asarray(self.emax) < 128, self.max, layout.floats(lowest_binade))

    @property
    def odd_inf(self) -> Any:
        """True if there is an infinity with an odd code, which `to_odd` can return."""
        if not self.inf:
            return False
        if not self.nan or (self.signed and not self.negative_zero):
            return True  # The code of infinity is all ones.
        return (self.mantissa_bits == 0) & ((self.emax - self.emin + int(self.zero)) % 2 == 0)

    @property
    def static(self) -> bool:
        """True if every number is a Python number."""
        return all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(self))


def float_grid(
    exponent_bits: Any,
    mantissa_bits: Any,
    *,
    bias: Any = None,
    inf: bool = True,
    nan: bool = True,
) -> BinaryGrid:
    """Returns the grid of a signed float format whose widths may be traced.

    It is the grid of `FloatFormat(..., exponent_bits, mantissa_bits, bias, inf, nan)`, where `nan`
    is `"ieee"` if there is an infinity (an all-ones exponent then has no finite values),
    `"all_ones"` if there is only a NaN, and None if there is neither.

    Args:
      exponent_bits: the width of the exponent field, 1 to 8: an int or a scalar int32 array.
      mantissa_bits: the width of the mantissa field, 0 to 23, or 1 to 23 if `nan` is true: an int
        or a scalar int32 array.
      bias: the exponent bias; None means 2^(exponent_bits - 1) - 1.
      inf: True if there is an infinity; it requires `nan`.
      nan: True if there is a NaN.

    Returns:
      A grid for `jaxq.cast`, or for a `jaxq.Recipe` that `jaxq.fake_quant` takes.

    Raises:
      ValueError: if `inf` is true and `nan` is false, or a width that is a Python integer is out of
        range.
      TypeError: if a width is not an integer.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> widths = jnp.arange(1, 4)
      >>> jax.vmap(lambda m: jaxq.cast(jnp.float32(1.3), float_grid(4, m)))(widths).tolist()
      [1.5, 1.25, 1.25]
    """
    if inf and not nan:
        raise ValueError(
            "float_grid: inf=True needs nan=True, as in IEEE 754, got nan=False. Pass nan=True."
        )
    flags("float_grid", "Omit it for the default.", inf=inf, nan=nan)
    e = _width("float_grid", "exponent_bits", exponent_bits, 1, 8)
    m = _width("float_grid", "mantissa_bits", mantissa_bits, int(nan), 23)
    one = jnp.int32(1)
    offset = (
        (one << (e - 1)) - 1
        if bias is None
        else _width("float_grid", "bias", bias, -(2**16), 2**16)
    )
    top = (one << (e + m)) - 1
    max_code = ((one << e) - 1 << m) - 1 if inf else top - int(nan)
    emin = 1 - offset
    exponent, mantissa = max_code >> m, max_code & ((one << m) - 1)
    layout = FloatLayout.of(np.dtype(np.float32))
    emax = jnp.maximum(exponent - offset, emin)
    normal = layout.floats(layout.field(emax) | (mantissa << (23 - m)))
    normal = jnp.where(emax > layout.bias, jnp.inf, normal)
    scale = layout.floats(layout.field(emin - m))
    largest = jnp.where(exponent > 0, normal, mantissa.astype(jnp.float32) * scale)
    return BinaryGrid(m, emin, emax, largest, largest, inf, nan, True, odd_codes=True)


def int_grid(bits: Any, *, signed: bool = True, narrow: bool = False) -> BinaryGrid:
    """Returns the grid of an integer format whose width may be traced.

    Args:
      bits: the width, 1 to 16: an int or a scalar int32 array.
      signed: True if integers are in two's complement, False if they are unsigned.
      narrow: True if the lowest value is omitted, as in `IntFormat`.

    Returns:
      A grid for `jaxq.cast`, or for a `jaxq.Recipe` that `jaxq.fake_quant` takes.

    Raises:
      ValueError: if `bits` is a Python integer and is out of range.
      TypeError: if `bits` is not an integer.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> jax.vmap(lambda b: jaxq.cast(jnp.float32(9.4), int_grid(b)))(jnp.arange(3, 6))
      Array([3., 7., 9.], dtype=float32)
    """
    flags("int_grid", "Omit it for the default.", signed=signed, narrow=narrow)
    b = _width("int_grid", "bits", bits, 1, 16)
    magnitude = jnp.int32(1) << (b - int(signed))
    largest = (magnitude - 1).astype(jnp.float32)
    lowest = (magnitude - int(narrow)).astype(jnp.float32) if signed else jnp.zeros_like(largest)
    return BinaryGrid(b, b, b, largest, lowest, False, False, False, signed)


def _width(owner: str, argument: str, value: Any, least: int, most: int) -> jax.Array:
    """Returns a width as an int32 array; the range of an array is not checked."""
    if not isinstance(value, jax.Array | np.ndarray):
        remedy = "Widths that vary may be int32 arrays."
        value = integer(owner, argument, value, remedy, least=least, most=most)
    elif not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{owner}: `{argument}` must be an integer or an array of integers, got {value.dtype}. "
            f"Convert it first: {argument}.astype(jnp.int32)."
        )
    return jnp.asarray(value, jnp.int32)


def is_narrow(grid: BinaryGrid, layout: FloatLayout) -> bool:
    """Returns whether units and spacings are normal numbers for every input.

    The margin of 26 exceeds the number of bits below the unit that any rounding mode reads, so that
    smaller magnitudes round in the same way as the smallest normal number.
    """
    if not grid.static:
        return False
    lowest_unit = grid.emin - grid.mantissa_bits
    return 1 - layout.bias + 26 <= lowest_unit <= 0 and grid.emax < layout.bias


def is_aligned(grid: BinaryGrid, layout: FloatLayout) -> bool:
    """Returns whether the grid consists of the working dtype's numbers with zero low bits."""
    if not grid.static or grid.mantissa_bits > layout.mantissa_bits:
        return False
    least_normal = 1 - layout.bias
    if not grid.zero:
        return grid.mantissa_bits == 0 and grid.emin == least_normal - 1
    return (
        grid.subnormals and grid.emin == least_normal and (grid.mantissa_bits > 0 or grid.odd_codes)
    )


def is_normal(grid: BinaryGrid, layout: FloatLayout) -> bool:
    """Returns whether no value of a grid without -0 is subnormal; traced grids are of integers."""
    return not grid.static or grid.emin - grid.mantissa_bits >= 1 - layout.bias
