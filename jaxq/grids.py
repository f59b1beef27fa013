"""Grids of floats and integers as numbers: Python's for a named format, or traced ones.

Numbers of Python's fold into the program as constants; over traced ones `jax.vmap` evaluates many
formats in one compiled call.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.bits import Layout
from jaxq.formats import FloatFormat, IntFormat

__all__ = ["BinaryGrid", "float_grid", "int_grid", "is_aligned", "is_narrow", "is_normal"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinaryGrid:
    """A grid of floats or integers as numbers, each Python's or a traced scalar.

    Made by `float_grid` and `int_grid`; `jaxq.cast` accepts it in the place of a format. A pytree,
    so that `jax.vmap` over its leaves evaluates many formats in one compiled call.

    Attributes:
      mantissa_bits: the spacing at exponent e is 2^(e - mantissa_bits).
      emin: below this exponent the spacing no longer shrinks.
      emax: above this exponent it no longer grows; every value is below 2^(emax + 1).
      max: the largest value.
      lowest: the largest magnitude of the negative values; 0 when there are none.
      inf: overflow gives an infinity.
      nan: there is a NaN, which overflow gives when there is no infinity.
      negative_zero: -0 is kept.
      signed: a negative value keeps its sign; else it is NaN, or 0 without a NaN.
      zero: there is a zero; else underflow goes to 2^emin, and a zero is NaN.
      subnormals: there are values between 0 and 2^emin.
      odd_codes: without mantissa bits, "even" means the code and not the significand.
    """

    mantissa_bits: Any
    emin: Any
    emax: Any
    max: Any
    lowest: Any
    inf: bool = dataclasses.field(metadata={"static": True})
    nan: bool = dataclasses.field(metadata={"static": True})
    negative_zero: bool = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(default=True, metadata={"static": True})
    zero: bool = dataclasses.field(default=True, metadata={"static": True})
    subnormals: bool = dataclasses.field(default=True, metadata={"static": True})
    odd_codes: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, fmt: FloatFormat | IntFormat) -> "BinaryGrid":
        """The grid of a format, all Python numbers."""
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
    def static(self) -> bool:
        """Whether every number is Python's."""
        return all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(self))


def float_grid(
    exponent_bits: Any,
    mantissa_bits: Any,
    *,
    bias: Any = None,
    inf: bool = True,
    nan: bool = True,
) -> BinaryGrid:
    """The grid of a signed float format whose widths may be traced.

    It is the grid of `FloatFormat(..., exponent_bits, mantissa_bits, bias, inf, nan)` with
    `nan="ieee"` when there is an infinity, so that an all-ones exponent holds no values, with
    `nan="all_ones"` when there is a NaN only, and with neither when there is neither.

    Args:
      exponent_bits: 1 to 8, an int or a scalar int32 array.
      mantissa_bits: 0 to 23, likewise; at least 1 where `nan` is true.
      bias: None means 2^(exponent_bits - 1) - 1.
      inf: whether there is an infinity; it needs `nan`.
      nan: whether there is a NaN.

    Returns:
      A grid for `jaxq.cast` to float32 input.

    Raises:
      ValueError: `inf` without `nan`.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> widths = jnp.arange(1, 4)
      >>> jax.vmap(lambda m: jaxq.cast(jnp.float32(1.3), float_grid(4, m)))(widths).tolist()
      [1.5, 1.25, 1.25]
    """
    if inf and not nan:
        raise ValueError("float_grid: inf=True needs nan=True, as in IEEE 754, got nan=False.")
    e, m = jnp.asarray(exponent_bits, jnp.int32), jnp.asarray(mantissa_bits, jnp.int32)
    one = jnp.int32(1)
    offset = (one << (e - 1)) - 1 if bias is None else jnp.asarray(bias, jnp.int32)
    top = (one << (e + m)) - 1
    max_code = ((one << e) - 1 << m) - 1 if inf else top - int(nan)
    emin = 1 - offset
    exponent, mantissa = max_code >> m, max_code & ((one << m) - 1)
    layout = Layout.of(np.dtype(np.float32))
    emax = jnp.maximum(exponent - offset, emin)
    normal = layout.floats(layout.field(emax) | (mantissa << (23 - m)))
    normal = jnp.where(emax > layout.bias, jnp.inf, normal)
    scale = layout.floats(layout.field(emin - m))
    largest = jnp.where(exponent > 0, normal, mantissa.astype(jnp.float32) * scale)
    return BinaryGrid(m, emin, emax, largest, largest, inf, nan, True, odd_codes=True)


def int_grid(bits: Any, *, signed: bool = True, narrow: bool = False) -> BinaryGrid:
    """The grid of an integer format whose width may be traced.

    Args:
      bits: 1 to 16, an int or a scalar int32 array.
      signed: two's complement when True.
      narrow: leaves out the lowest value, as in `IntFormat`.

    Returns:
      A grid for `jaxq.cast` to float32 input.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> jax.vmap(lambda b: jaxq.cast(jnp.float32(9.4), int_grid(b)))(jnp.arange(3, 6))
      Array([3., 7., 9.], dtype=float32)
    """
    b = jnp.asarray(bits, jnp.int32)
    magnitude = jnp.int32(1) << (b - int(signed))
    largest = (magnitude - 1).astype(jnp.float32)
    lowest = (magnitude - int(narrow)).astype(jnp.float32) if signed else jnp.zeros_like(largest)
    return BinaryGrid(b, b, b, largest, lowest, False, False, False, signed)


def is_narrow(grid: BinaryGrid, layout: Layout) -> bool:
    """Whether units and spacings are normal numbers for every input.

    The margin of 26 is more than the bits that any rounding mode reads behind the unit, so that a
    smaller magnitude counts the same as the smallest normal number.
    """
    if not grid.static:
        return False
    lowest_unit = grid.emin - grid.mantissa_bits
    return 1 - layout.bias + 26 <= lowest_unit <= 0 and grid.emax < layout.bias


def is_aligned(grid: BinaryGrid, layout: Layout) -> bool:
    """Whether the grid's numbers are those of the working dtype with low bits zero."""
    if not grid.static or grid.mantissa_bits > layout.mantissa_bits:
        return False
    least_normal = 1 - layout.bias
    if not grid.zero:
        return grid.mantissa_bits == 0 and grid.emin == least_normal - 1
    return (
        grid.subnormals and grid.emin == least_normal and (grid.mantissa_bits > 0 or grid.odd_codes)
    )


def is_normal(grid: BinaryGrid, layout: Layout) -> bool:
    """Whether no value of a grid without -0 is subnormal: traced ones of those hold integers."""
    return not grid.static or grid.emin - grid.mantissa_bits >= 1 - layout.bias
