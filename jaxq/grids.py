"""The kernel: a float array snapped to the grid of a format, bit for bit.

The value is written as units * 2^k, where 2^k is the spacing of the grid where the value lies and
`units` is exact; a rounding mode makes `units` whole; the product goes back. Integers and fixed
point are the case of one spacing for all. Everything that says which grid it is comes as numbers
in a `BinaryGrid`, Python's for a named format (they fold into constants) or traced to `vmap` over.

The work is done on float32, or on float64 for a float64 input: `Layout` holds what differs.

Subnormals are never left to the backend: XLA on CPU flushes them in arithmetic and in comparisons.
So there are three ways to take the units and to put them back:

- narrow: every spacing is a normal number, and two multiplications by powers of two do it;
- aligned: the grid has the exponents of the working dtype (bfloat16, tf32, float8_e8m0fnu), and the
  units are the low bits;
- wide: any other grid, traced ones included, through integers.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.formats import FloatFormat, IntFormat
from jaxq.rounding import Rounding, nearest_even, pins

__all__ = [
    "BinaryGrid",
    "Layout",
    "Overflow",
    "extended_bits",
    "float_grid",
    "int_grid",
    "is_narrow",
    "snap",
    "where",
]

Overflow = Literal["saturate", "propagate"] | None


class Layout(NamedTuple):
    """The bit layout of a working dtype."""

    float_type: type[np.floating]
    int_type: type[np.signedinteger]
    mantissa_bits: int
    bias: int

    @classmethod
    def of(cls, dtype: np.dtype) -> "Layout":
        """The layout of float32 or float64."""
        if dtype == np.float64:
            return cls(np.float64, np.int64, 52, 1023)
        return cls(np.float32, np.int32, 23, 127)

    @property
    def sign(self) -> np.signedinteger:
        """The sign bit alone."""
        return np.iinfo(self.int_type).min * self.int_type(1)

    @property
    def magnitude_mask(self) -> np.signedinteger:
        """All bits but the sign."""
        return ~self.sign

    @property
    def inf(self) -> np.signedinteger:
        """The bits of +inf."""
        return self.field(self.bias + 1)

    @property
    def nan(self) -> np.signedinteger:
        """The bits of the quiet NaN without payload."""
        return self.inf | self.int_type(1 << (self.mantissa_bits - 1))

    @property
    def least_exponent(self) -> int:
        """The exponent of the least subnormal."""
        return 1 - self.bias - self.mantissa_bits

    def field(self, exponent: Any) -> Any:
        """An exponent, biased and shifted into the place of the exponent field."""
        return self.shifted(exponent + self.bias)

    def shifted(self, exponent: Any) -> Any:
        """A difference of exponents, shifted into the place of the exponent field."""
        if isinstance(exponent, int):
            return self.int_type(exponent << self.mantissa_bits)
        return exponent.astype(self.int_type) << self.mantissa_bits

    def constant(self, value: Any) -> Any:
        """A number in the working dtype; infinite where it lies beyond."""
        if isinstance(value, jax.Array):
            return value.astype(self.float_type)
        with np.errstate(over="ignore"):
            return self.float_type(value)

    def bits(self, x: Any) -> Any:
        """The bits of floats."""
        if isinstance(x, np.floating):
            return x.view(self.int_type)
        return lax.bitcast_convert_type(x, self.int_type)

    def floats(self, bits: Any) -> Any:
        """The floats of bits."""
        if isinstance(bits, np.integer):
            return bits.view(self.float_type)
        return lax.bitcast_convert_type(bits, self.float_type)


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


def where(condition: jax.Array, a: Any, b: Any) -> jax.Array:
    """`jnp.where` for operands of one dtype, as one equation where the shapes agree."""
    shape = jnp.shape(condition)
    a, b = (v if jnp.shape(v) == shape else lax.broadcast(jnp.asarray(v), shape) for v in (a, b))
    return lax.select(condition, a, b)


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
    if not (grid.inf or grid.nan or grid.negative_zero) and _is_normal(grid, layout):
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


def extended_bits(magnitude: jax.Array, layout: Layout) -> jax.Array:
    """Bits of a magnitude with a full significand, the exponent field below 0 if need be."""
    # The bits of a subnormal are its value in units of the least one.
    lead = layout.bits(magnitude.astype(layout.float_type))
    lead = lead + layout.shifted(layout.least_exponent)
    return lax.select(magnitude < layout.shifted(1), lead, magnitude)


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


def _is_normal(grid: BinaryGrid, layout: Layout) -> bool:
    """Whether no value of a grid without -0 is subnormal: traced ones of those hold integers."""
    return not grid.static or grid.emin - grid.mantissa_bits >= 1 - layout.bias


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
