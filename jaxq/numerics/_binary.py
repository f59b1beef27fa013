"""The kernel that rounds float arrays to the grid of a float or integer format, bit for bit.

Each value is written as units * 2^k, where 2^k is the local spacing of the grid and `units` is
exact; a rounding mode rounds `units` to a whole number, which is multiplied by 2^k again. Integers
and fixed point are the special case of uniform spacing. The grid is described by the numbers in a
`BinaryGrid`.

Subnormals are never left to the backend: XLA on CPU flushes them in arithmetic and in comparisons.
So there are three ways to compute the units and to multiply them by the spacing again:

- narrow: every spacing is a normal number, so two multiplications by powers of two suffice;
- aligned: the grid has the exponents of the working dtype (bfloat16, tf32, float8_e8m0fnu), and the
  units are the low bits;
- wide: any other grid, including traced ones, by integer arithmetic.
"""

from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq.formats import FloatFormat, IntFormat
from jaxq.numerics._grids import BinaryGrid, is_aligned, is_narrow, is_normal
from jaxq.numerics._rounding import (
    Overflow,
    Rounding,
    is_directed,
    nearest_even,
    saturating_signs,
    to_odd,
)

__all__ = ["nearest_magnitudes", "rounds_magnitudes", "snap"]


def snap(
    x: jax.Array,
    grid: BinaryGrid,
    rounding: Rounding,
    overflow: Overflow = None,
    random: jax.Array | None = None,
) -> jax.Array:
    """Snaps floats to a binary grid.

    Args:
      x: float32 or float64 values of any shape.
      grid: the target grid.
      rounding: a rounding mode.
      overflow: as in `jaxq.cast`, except `"SatFinite"`, which callers replace by `"saturate"`.
      random: unsigned integers with the shape of x, for modes that need random bits.

    Returns:
      Values of the grid (including its inf and NaN), with the shape and dtype of x.
    """
    layout = FloatLayout.of(x.dtype)
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    args = _Snap(bits, magnitude, grid, layout, rounding, overflow, random)
    y = (_aligned if is_aligned(grid, layout) else _narrow if args.narrow else _wide)(args)
    if not (grid.inf or grid.nan or grid.negative_zero) and is_normal(grid, layout):
        return _integer(y, args)
    if grid.inf or grid.nan:
        y = _limited(y, args)
        if grid.signed and not grid.negative_zero and args.narrow:
            y = where(args.negative, layout.float_type(0) - y, y)
            return where(y == y, y, layout.floats(layout.nan | layout.sign))
        result = layout.bits(y)
    else:  # `_signed` handles NaN in the input.
        limit = layout.constant(grid.max)
        result = layout.bits(where(_exceeds(y, limit, args), limit, y))
    return layout.floats(_signed(result, args))


def rounds_magnitudes(fmt: Any) -> TypeGuard[FloatFormat | IntFormat]:
    """Returns whether `nearest_magnitudes` supports a format."""
    if not isinstance(fmt, FloatFormat | IntFormat):
        return False
    grid = BinaryGrid.of(fmt)
    return (
        is_narrow(grid, FloatLayout.of(np.dtype(np.float32)))
        and grid.signed
        and grid.zero
        and grid.max == -grid.min
    )


def nearest_magnitudes(x: jax.Array, fmt: FloatFormat | IntFormat) -> jax.Array:
    """Returns the magnitudes to which float32 numbers round, half to even and saturating.

    This takes half of the operations of `snap`. The result for NaN is undefined.

    Args:
      x: float32 numbers.
      fmt: a format for which `rounds_magnitudes` is true.
    """
    layout, grid = FloatLayout.of(x.dtype), BinaryGrid.of(fmt)
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    if isinstance(fmt, FloatFormat) and fmt.mantissa_bits and grid.emax < 100:
        # Sums with 2^23 times the spacing are multiples of the spacing.
        unit = _unit_exponents(magnitude, grid, layout)
        anchor = layout.floats(unit + layout.shifted(layout.mantissa_bits))
        whole = (layout.floats(magnitude) + anchor) - anchor
        return lax.min(whole, jnp.full_like(x, grid.max))
    args = _Snap(bits, magnitude, grid, layout, nearest_even, "saturate", None)
    return lax.min(_narrow(args), jnp.full_like(x, grid.max))


class _Snap(NamedTuple):
    """The arguments of one call of `snap`, with the elements' magnitudes.

    Attributes:
      bits: the elements as integers.
      magnitude: `bits` without the sign bit.
      grid: the target grid.
      layout: the layout of the working dtype.
      rounding: the rounding mode.
      overflow: as in `snap`.
      random: as in `snap`.
    """

    bits: jax.Array
    magnitude: jax.Array
    grid: BinaryGrid
    layout: FloatLayout
    rounding: Rounding
    overflow: Overflow
    random: jax.Array | None

    @property
    def negative(self) -> jax.Array:
        """True where the sign bit is set."""
        return self.bits < self.layout.int_type(0)

    @property
    def narrow(self) -> bool:
        """True if every spacing of the grid is a normal number."""
        return is_narrow(self.grid, self.layout)

    def rounded(self, units: jax.Array) -> jax.Array:
        """Returns units rounded to whole numbers."""
        negative: Any = self.negative if is_directed(self.rounding) else False  # Not read then.
        return self.rounding(units, negative, self.random)


def _narrow(args: _Snap) -> jax.Array:
    """Rounds magnitudes to the grid by two multiplications by powers of two."""
    extended, grid, layout = args.magnitude, args.grid, args.layout
    if is_directed(args.rounding):  # Other modes round a flushed subnormal number to 0 too.
        extended = lax.max(extended, _least_normal(extended, layout))
    unit = _unit_exponents(extended, grid, layout)
    units = layout.floats(extended) * layout.floats(layout.field(layout.bias) - unit)
    rounded = _rounded(units, unit, args)
    return rounded * layout.floats(unit)


def _aligned(args: _Snap) -> jax.Array:
    """Rounds magnitudes to the grid by rounding the bits below the last one of the grid.

    A carry moves to the next binade, or from the largest number to infinity.
    """
    magnitude, grid, layout = args.magnitude, args.grid, args.layout
    last = layout.int_type(1 << (layout.mantissa_bits - grid.mantissa_bits))
    if not grid.zero and args.rounding is not nearest_even:
        # Code 0 is half the smallest normal number. (`nearest_even` treats it as 0, so that
        # everything above it rounds to code 1, as in ml_dtypes and XLA.)
        from_half = lax.max(magnitude, last >> layout.int_type(1)) * layout.int_type(2) - last
        magnitude = lax.select(magnitude < last, from_half, magnitude)
    low = magnitude & (last * layout.int_type(2) - layout.int_type(1))
    if grid.mantissa_bits == 0 and not grid.odd_codes:  # Every normal significand is odd.
        low = magnitude & (last - layout.int_type(1)) | lax.min(magnitude & -last, last)
    units = low.astype(layout.float_type) * layout.float_type(1 / last)
    rounded = args.rounded(units).astype(layout.int_type)
    result = (magnitude - low) + rounded * last
    return layout.floats(result if grid.zero else lax.max(result, last >> layout.int_type(1)))


def _wide(args: _Snap) -> jax.Array:
    """Rounds magnitudes to the grid by integer arithmetic with exponent fields below 0."""
    magnitude, grid, layout = args.magnitude, args.grid, args.layout
    extended = extended_bits(magnitude, layout)
    # All numbers beyond the grid are equivalent, and units of the largest would overflow.
    extended = jnp.minimum(extended, layout.field(_emax(grid, layout) + 1))
    unit = jnp.asarray(_unit_exponents(extended, grid, layout))  # Sums of NumPy scalars would warn.
    least = _least_normal(magnitude, layout)
    units = layout.floats(lax.max(extended - (unit - layout.field(0)), least))
    rounded = _rounded(units, unit, args)
    return layout.floats(_ldexp_bits(rounded, unit, layout))


def _least_normal(magnitude: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns the bits of the smallest normal number, or of 0 where the magnitude is 0."""
    return lax.min(magnitude, layout.int_type(1)) << layout.int_type(layout.mantissa_bits)


def _unit_exponents(extended: jax.Array, grid: BinaryGrid, layout: FloatLayout) -> jax.Array:
    """Returns the exponent of the grid's spacing at each element, as a biased exponent field."""
    emin, emax = grid.emin, _emax(grid, layout)
    if grid.static:
        emin = max(emin, layout.least_exponent - 1)
    if grid.static and emin == emax and grid.subnormals:
        return layout.field(emin - grid.mantissa_bits)
    field = extended & layout.shifted(-1)
    if grid.static:
        unit = lax.clamp(layout.field(emin), field, layout.field(emax))
    else:  # `lax.clamp` does not batch over scalar bounds.
        unit = jnp.clip(field, layout.field(emin), layout.field(emax))
    unit = unit - layout.shifted(grid.mantissa_bits)
    if grid.subnormals:
        return unit
    return where(field < layout.field(emin), layout.field(emin), unit)


def _emax(grid: BinaryGrid, layout: FloatLayout) -> Any:
    """Returns the largest exponent common to the grid and the working dtype."""
    return (min if grid.static else jnp.minimum)(grid.emax, layout.bias)


def _rounded(units: jax.Array, unit: jax.Array, args: _Snap) -> jax.Array:
    """Rounds units to whole numbers with the parity of their codes, at least 1 without a zero."""
    grid, layout = args.grid, args.layout
    if not grid.odd_codes:
        if not grid.zero and args.rounding is nearest_even:
            # ml_dtypes and XLA round everything above the smallest value (2^-127 in
            # float8_e8m0fnu) to the next one.
            above_least = (unit == layout.field(grid.emin)) & (units > 1.0)
            units = where(above_least, layout.float_type(2), units)
        rounded = args.rounded(units)
    else:
        # Without mantissa bits, units are in [1, 2) for every code above 0. They are moved to
        # [0, 1) where the code is even, so that the parity of the whole part is that of the code.
        # (The smallest such code is odd, so units below it are not moved.)
        distance = (unit >> layout.int_type(layout.mantissa_bits)) - (grid.emin + layout.bias)
        even = distance & layout.int_type(1)
        if not grid.static:
            even = lax.select(jnp.broadcast_to(grid.mantissa_bits == 0, even.shape), even, even * 0)
        base = even.astype(layout.float_type)
        rounded = args.rounded(units - base) + base
    return rounded if grid.zero else lax.max(rounded, layout.float_type(1))


def _ldexp_bits(whole: jax.Array, unit: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns the exact bits of whole * 2^k, also if subnormal, where `unit` is the field of k."""
    bits = layout.bits(whole) + (unit - layout.field(0))
    from_least = layout.floats(unit - layout.shifted(layout.least_exponent))
    subnormal = (whole * from_least).astype(layout.int_type)
    bits = lax.select(bits < layout.shifted(1), subnormal, bits)
    return where(whole == 0, layout.int_type(0), bits)


def _integer(y: jax.Array, args: _Snap) -> jax.Array:
    """Returns the signed result for a grid without inf, NaN and -0: NaN becomes 0, others clip."""
    grid, layout = args.grid, args.layout
    y = where(args.magnitude > layout.inf, layout.float_type(0), y)
    y = where(args.negative, layout.float_type(0) - y, y)
    low, high = layout.constant(grid.min), layout.constant(grid.max)
    # Not `lax.clamp`: LLVM (JAX 0.10 to 0.12) takes three times as long to compile a minimum of
    # numbers that depend on random bits. Use it when `benchmarks/dots.py` shows equal times.
    return where(y > high, high, where(y < low, low, y))


def _limited(y: jax.Array, args: _Snap) -> jax.Array:
    """Replaces magnitudes beyond the largest value according to `overflow`."""
    grid, layout, overflow = args.grid, args.layout, args.overflow
    limit = layout.constant(grid.max)
    too_large = _exceeds(y, limit, args)
    if not grid.static or np.isinf(limit):
        too_large = too_large | (args.magnitude == layout.inf)
    p3109 = overflow in ("SatPropagate", "SatNone")
    if overflow == "saturate" or (p3109 and not grid.inf):
        return where(too_large, limit, y)
    beyond = layout.constant(np.inf if grid.inf else np.nan)
    stays = _stays(args)
    if stays is not None:
        beyond = where(stays, limit, beyond)
    return where(too_large, beyond, y)


def _exceeds(y: jax.Array, limit: Any, args: _Snap) -> jax.Array:
    """Returns a mask of magnitudes beyond a limit."""
    if args.narrow:
        return y > limit
    # `y` and `limit` may be subnormal, and XLA on CPU counts subnormals as zero in comparisons. The
    # bits of a NaN count as too large; `_signed` replaces or restores the NaN.
    return args.layout.bits(y) > args.layout.bits(limit)


def _stays(args: _Snap) -> jax.Array | None:
    """Returns a mask of elements that stay at the largest value on overflow; None if none do."""
    saturating, odd = saturating_signs(args.rounding), False
    if args.overflow in ("propagate", "SatPropagate"):
        saturating = (True, True)
    elif args.rounding is to_odd:
        odd = args.grid.odd_inf
        saturating = (odd is not True,) * 2
    if not any(saturating):
        return None
    finite = args.magnitude < args.layout.inf
    if not all(saturating):
        finite = finite & (~args.negative if saturating[0] else args.negative)
    return finite if odd is False else finite & ~odd


def _signed(result: jax.Array, args: _Snap) -> jax.Array:
    """Returns the bits of the signed result, handling NaN, -0 and unsigned formats."""
    bits, magnitude, grid, layout = args.bits, args.magnitude, args.grid, args.layout
    if not args.narrow or not (grid.nan or grid.negative_zero):
        # Integer arithmetic does not preserve NaN, and comparisons with the limit ignore it.
        nan = layout.nan if grid.nan else layout.int_type(0)
        result = where(magnitude > layout.inf, nan, result)
    zero = layout.int_type(0)
    if grid.signed:
        sign = bits & layout.sign
        if not grid.negative_zero:
            if grid.nan:  # Its code is the one of -0 in other formats.
                sign = where(result > layout.inf, layout.sign, sign)
            return lax.select(result == zero, result, result | sign)
        if grid.nan:
            return result | sign
        # As in ml_dtypes, NaN becomes the zero of the opposite sign.
        return lax.select(magnitude > layout.inf, sign ^ layout.sign, result | sign)
    # Unsigned formats cannot represent negative values, nor 0 if the format has no zero.
    if grid.zero:
        floor = zero
        outside = args.negative & (result != zero)
    else:
        floor = layout.bits(layout.constant(2.0**grid.emin))
        outside = bits <= zero
    inward = saturating_signs(args.rounding)[1]
    if grid.nan and (args.overflow is None or (args.overflow == "SatNone" and not inward)):
        return where(outside, layout.nan, result)
    if grid.nan and args.overflow in ("propagate", "SatNone"):
        floor = where(magnitude == layout.inf, layout.nan, floor)
    return where(outside & (magnitude <= layout.inf), floor, result)
