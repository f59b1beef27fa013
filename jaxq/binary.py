"""The kernel: a float array snapped to the grid of a float or integer format, bit for bit.

The value is written as units * 2^k, where 2^k is the spacing of the grid where the value lies and
`units` is exact; a rounding mode makes `units` whole; the product goes back. Integers and fixed
point are the case of one spacing for all. Everything that says which grid it is comes as numbers
in a `BinaryGrid`.

Subnormals are never left to the backend: XLA on CPU flushes them in arithmetic and in comparisons.
So there are three ways to take the units and to put them back:

- narrow: every spacing is a normal number, and two multiplications by powers of two do it;
- aligned: the grid has the exponents of the working dtype (bfloat16, tf32, float8_e8m0fnu), and the
  units are the low bits;
- wide: any other grid, traced ones included, through integers.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, extended_bits, where
from jaxq.grids import BinaryGrid, is_aligned, is_narrow, is_normal
from jaxq.rounding import Overflow, Rounding, nearest_even, pins

__all__ = ["snap"]


def snap(
    x: jax.Array,
    grid: BinaryGrid,
    rounding: Rounding,
    overflow: Overflow = None,
    random: jax.Array | None = None,
) -> jax.Array:
    """Snaps floats to a binary grid.

    Args:
      x: float32 or float64, any shape.
      grid: where to.
      rounding: a rounding mode.
      overflow: None, `"saturate"` or `"propagate"`, as in `jaxq.cast`.
      random: unsigned integers of x's shape, for a mode that needs them.

    Returns:
      Values of the grid (and its inf and NaN), shape and dtype of x.
    """
    layout = Layout.of(x.dtype)
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    negative = bits < layout.int_type(0)
    way = _aligned if is_aligned(grid, layout) else _narrow if is_narrow(grid, layout) else _wide
    y = way(magnitude, negative, grid, layout, rounding, random)
    if not (grid.inf or grid.nan or grid.negative_zero) and is_normal(grid, layout):
        return _integer(y, magnitude, negative, grid, layout)
    if grid.inf or grid.nan:
        y = _limited(y, magnitude, negative, grid, layout, pins(rounding), overflow)
        if grid.signed and not grid.negative_zero and is_narrow(grid, layout):
            return where(negative, layout.float_type(0) - y, y)
        result = layout.bits(y)
    else:  # `_signed` sees a NaN in the input.
        result = lax.min(layout.bits(y), layout.bits(layout.constant(grid.max)))
    return layout.floats(_signed(result, bits, magnitude, negative, grid, layout, overflow))


def _narrow(
    magnitude: jax.Array,
    negative: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Magnitudes on the grid, through two multiplications by powers of two."""
    extended = lax.max(magnitude, _least_normal(magnitude, layout))
    unit = _unit_exponents(extended, grid, layout)
    units = layout.floats(extended) * layout.floats(layout.field(layout.bias) - unit)
    rounded = _rounded(units, negative, unit, grid, layout, rounding, random)
    return rounded * layout.floats(unit)


def _aligned(
    magnitude: jax.Array,
    negative: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Magnitudes on the grid, through the bits behind the last one that it keeps.

    A carry out of them goes up to the next binade, and past the largest number to infinity.
    """
    last = layout.int_type(1 << (layout.mantissa_bits - grid.mantissa_bits))
    if not grid.zero and rounding is not nearest_even:
        # Code 0 is half the smallest normal number. (`nearest_even` takes it for 0, which sends all
        # above it to code 1: so do ml_dtypes and XLA.)
        from_half = lax.max(magnitude, last >> layout.int_type(1)) * layout.int_type(2) - last
        magnitude = lax.select(magnitude < last, from_half, magnitude)
    low = magnitude & (last * layout.int_type(2) - layout.int_type(1))
    if grid.mantissa_bits == 0 and not grid.odd_codes:  # Every normal significand is odd.
        low = magnitude & (last - layout.int_type(1)) | lax.min(magnitude & -last, last)
    units = low.astype(layout.float_type) * layout.float_type(1 / last)
    rounded = rounding(units, negative, random).astype(layout.int_type)
    result = (magnitude - low) + rounded * last
    return layout.floats(result if grid.zero else lax.max(result, last >> layout.int_type(1)))


def _wide(
    magnitude: jax.Array,
    negative: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Magnitudes on the grid, through integers whose exponent field may be below 0."""
    extended = extended_bits(magnitude, layout)
    # Beyond the grid all numbers are alike; the units of the largest have no exponent.
    extended = jnp.minimum(extended, layout.field(_emax(grid, layout) + 1))
    unit = jnp.asarray(_unit_exponents(extended, grid, layout))  # Sums of NumPy's would warn.
    least = _least_normal(magnitude, layout)
    units = layout.floats(lax.max(extended - (unit - layout.field(0)), least))
    rounded = _rounded(units, negative, unit, grid, layout, rounding, random)
    return layout.floats(_ldexp_bits(rounded, unit, layout))


def _least_normal(magnitude: jax.Array, layout: Layout) -> jax.Array:
    """Bits of the smallest normal number, or of 0 where the magnitude is 0."""
    return lax.min(magnitude, layout.int_type(1)) << layout.int_type(layout.mantissa_bits)


def _unit_exponents(extended: jax.Array, grid: BinaryGrid, layout: Layout) -> jax.Array:
    """The exponent of the grid's spacing at each element, as a biased field in place."""
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


def _emax(grid: BinaryGrid, layout: Layout) -> Any:
    """The largest exponent that values of the grid and of the working dtype have."""
    return (min if grid.static else jnp.minimum)(grid.emax, layout.bias)


def _rounded(
    units: jax.Array,
    negative: jax.Array,
    unit: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    rounding: Rounding,
    random: jax.Array | None,
) -> jax.Array:
    """Units made whole, so that even numbers are even codes; at least 1 where there is no zero."""
    if not grid.odd_codes:
        if not grid.zero and rounding is nearest_even:
            # ml_dtypes and XLA take everything above the least value (2^-127, of float8_e8m0fnu)
            # to the next one.
            above_least = (unit == layout.field(grid.emin)) & (units > 1.0)
            units = where(above_least, layout.float_type(2), units)
        rounded = rounding(units, negative, random)
    else:
        # Without mantissa bits units are in [1, 2) for every code above 0: they go to [0, 1) where
        # the code is even.
        # (The least of them is odd, so numbers below it are not moved.)
        distance = (unit >> layout.int_type(layout.mantissa_bits)) - (grid.emin + layout.bias)
        even = distance & layout.int_type(1)
        if not grid.static:
            even = lax.select(jnp.broadcast_to(grid.mantissa_bits == 0, even.shape), even, even * 0)
        base = even.astype(layout.float_type)
        rounded = rounding(units - base, negative, random) + base
    return rounded if grid.zero else lax.max(rounded, layout.float_type(1))


def _ldexp_bits(whole: jax.Array, unit: jax.Array, layout: Layout) -> jax.Array:
    """Bits of whole * 2^k, exact, where `unit` is the field of k; subnormal results included."""
    bits = layout.bits(whole) + (unit - layout.field(0))
    from_least = layout.floats(unit - layout.shifted(layout.least_exponent))
    subnormal = (whole * from_least).astype(layout.int_type)
    bits = lax.select(bits < layout.shifted(1), subnormal, bits)
    return where(whole == 0, layout.int_type(0), bits)


def _integer(
    y: jax.Array, magnitude: jax.Array, negative: jax.Array, grid: BinaryGrid, layout: Layout
) -> jax.Array:
    """The result for a grid without inf, NaN and -0: NaN becomes 0, all else the nearest end."""
    y = where(magnitude > layout.inf, layout.float_type(0), y)
    y = where(negative, layout.float_type(0) - y, y)
    low, high = layout.constant(grid.min), layout.constant(grid.max)
    return lax.clamp(low, y, high) if grid.static else jnp.clip(y, low, high)


def _limited(
    y: jax.Array,
    magnitude: jax.Array,
    negative: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    pinned: tuple[bool, bool],
    overflow: Overflow,
) -> jax.Array:
    """Magnitudes with those beyond the largest replaced as `overflow` says."""
    limit = layout.constant(grid.max)
    if is_narrow(grid, layout):
        too_large = y > limit
    else:  # Both may be subnormal. A NaN counts as too large here; `_signed` puts it back.
        too_large = layout.bits(y) > layout.bits(limit)
    if not grid.static or np.isinf(limit):
        too_large = too_large | (magnitude == layout.inf)
    if overflow == "saturate":
        return where(too_large, limit, y)
    if overflow == "propagate":
        pinned = (True, True)
    beyond = layout.constant(np.inf if grid.inf else np.nan)
    if any(pinned):
        stays = magnitude < layout.inf
        if not all(pinned):
            stays = stays & (~negative if pinned[0] else negative)
        beyond = where(stays, limit, beyond)
    return where(too_large, beyond, y)


def _signed(
    result: jax.Array,
    bits: jax.Array,
    magnitude: jax.Array,
    negative: jax.Array,
    grid: BinaryGrid,
    layout: Layout,
    overflow: Overflow,
) -> jax.Array:
    """Bits of the signed result, with what NaN, -0 and unsigned formats need."""
    if not is_narrow(grid, layout) or not (grid.nan or grid.negative_zero):
        # Integers know nothing of NaN, and a comparison with the limit lets it pass.
        nan = layout.nan if grid.nan else layout.int_type(0)
        result = where(magnitude > layout.inf, nan, result)
    zero = layout.int_type(0)
    if grid.signed:
        sign = bits & layout.sign
        if not grid.negative_zero:
            return lax.select(result == zero, result, result | sign)
        if grid.nan:
            return result | sign
        # As ml_dtypes does it: a NaN becomes the zero of the other sign.
        return lax.select(magnitude > layout.inf, sign ^ layout.sign, result | sign)
    # Unsigned: what lies below zero, and zero where there is none, is no value of the format.
    if grid.zero:
        floor = zero
        outside = negative & (result != zero)
    else:
        floor = layout.bits(layout.constant(2.0**grid.emin))
        outside = bits <= zero
    if grid.nan and overflow is None:
        return where(outside, layout.nan, result)
    if grid.nan and overflow == "propagate":
        floor = where(magnitude == layout.inf, layout.nan, floor)
    return where(outside & (magnitude <= layout.inf), floor, result)
