"""The kernel of codebook formats, which finds the level of each value.

Few levels use a binary search without memory accesses: each comparison selects the threshold of the
next one. For 16 levels this takes less than two plain passes. Many levels use a table indexed by
the leading bits, which leaves at most a few comparisons.
"""

import fractions
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._base.searching import number, search, selected
from jaxq.formats import CodebookFormat
from jaxq.numerics._rounding import Rounding, nearest_away, nearest_even

__all__ = ["choose"]

_TABULATED = 32  # From this number of thresholds on, a table is faster than a search.
_BUCKETS = 8192  # A table of this size fits in the L1 cache.


def _ordered(bits: Any, layout: FloatLayout) -> Any:
    """Converts float bits to integers in the order of the floats (-0 just below 0)."""
    shift = 8 * np.dtype(layout.int_type).itemsize - 1
    return bits ^ ((bits >> layout.int_type(shift)) & layout.magnitude_mask)


def _below(threshold: fractions.Fraction, layout: FloatLayout) -> int:
    """Returns the ordered integer of the largest float strictly below a number."""
    near = layout.float_type(float(threshold))  # This rounds twice; the loops below correct it.
    while fractions.Fraction(float(near)) >= threshold:
        near = np.nextafter(near, layout.float_type(-np.inf))
    while fractions.Fraction(float(np.nextafter(near, layout.float_type(np.inf)))) < threshold:
        near = np.nextafter(near, layout.float_type(np.inf))
    # Adding 0.0 turns -0 into 0, because -0 counts as 0.
    return int(
        _ordered(np.atleast_1d(near + layout.float_type(0)).view(layout.int_type), layout)[0]
    )


@functools.cache
def _midpoints(fmt: CodebookFormat, layout: FloatLayout) -> tuple[int, ...]:
    """Returns, for each pair of neighbors, the ordered integer above which values round up."""
    levels = [fractions.Fraction(float(v)) for v in fmt.values]
    result = []
    for low, high in itertools.pairwise(levels):
        middle = (low + high) / 2
        below = _below(middle, layout)
        on_grid = fractions.Fraction(float(layout.float_type(float(middle)))) == middle
        # With ties down the midpoint itself does not round up; for 0 that includes both zeros.
        at = 0 if middle == 0 else below + 1
        result.append(at if fmt.ties == "down" and on_grid else below)
    return tuple(result)


def _picker(
    x: jax.Array, thresholds: tuple[int, ...], layout: FloatLayout
) -> Callable[[list], jax.Array]:
    """Returns a function that selects one of n + 1 items for each value.

    The index of the selected item is the number of thresholds that the value exceeds.

    Args:
      x: floats without NaN.
      thresholds: n ordered integers, ascending.
      layout: the bit layout of the floats.
    """
    if len(thresholds) >= _TABULATED:
        index = _count(x, thresholds, layout)
        return lambda items: index if _are_indices(items) else _take(np.asarray(items), index)
    limits: list[Any] = [layout.int_type(t) for t in thresholds]
    floats = [layout.floats(_ordered(limit, layout)) for limit in limits]
    if all(abs(limit) >= np.finfo(limit).tiny for limit in floats):
        # Comparing floats takes less time, and may treat subnormals as zero.
        digits = search(x, floats)
    else:
        digits = search(_ordered(layout.bits(x), layout), limits)
    return lambda items: number(digits) if _are_indices(items) else selected(digits, items)


def _are_indices(items: list) -> bool:
    """Returns whether items are int32 numbers that equal their own indices."""
    return items[0].dtype == np.int32 and items == list(range(len(items)))


def _take(table: np.ndarray, index: jax.Array) -> jax.Array:
    # An unsigned index needs no check for negative values.
    return jnp.asarray(table).at[index.astype(np.uint32)].get(mode="promise_in_bounds")


def _count(x: jax.Array, thresholds: tuple[int, ...], layout: FloatLayout) -> jax.Array:
    """Counts the thresholds that each value exceeds, by a table lookup and a binary search."""
    table, integer = _table(thresholds, layout), layout.int_type
    bits = layout.bits(x)
    sign = bits >> integer(8 * x.dtype.itemsize - 1)
    magnitude = lax.clamp(table.low, bits & layout.magnitude_mask, table.high)
    bucket = ((magnitude - table.low) >> table.shift) + (sign & integer(len(table.entries) // 2))
    entry = _take(table.entries, bucket)
    if not table.steps:
        # The low bits of the ordered integer.
        entry = entry + ((bits ^ sign) & integer((1 << int(table.shift)) - 1))
    width = integer(8 * x.dtype.itemsize - 8)
    count = lax.shift_right_logical(entry, width).astype(jnp.int32)
    for step in table.steps:
        above = _ordered(bits, layout) > _take(table.thresholds, count + (step - np.int32(1)))
        count = where(above, count + step, count)
    return count


class _Table(NamedTuple):
    """A lookup table of thresholds, indexed by the sign and the leading bits of a key."""

    low: np.signedinteger  # Magnitudes are clamped to the range from `low` to `high`.
    high: np.signedinteger
    shift: np.signedinteger
    # The number of thresholds below each bucket, in the upper 8 bits. The others complement the low
    # bits of the bucket's only threshold, so that adding those of a key that exceeds it carries
    # into the number. They are 0 without a threshold. Negative buckets come last.
    entries: np.ndarray
    thresholds: np.ndarray  # Padded with maximal values, because a search may step past the end.
    steps: tuple[np.int32, ...]  # Of a binary search in a bucket; empty if the entries suffice.


@functools.cache
def _table(thresholds: tuple[int, ...], layout: FloatLayout) -> _Table:
    """Returns the smallest table with one threshold per bucket, or one of `_BUCKETS` at most."""
    integer, ends = layout.int_type, np.iinfo(layout.int_type)
    t = np.array(thresholds, integer)
    magnitudes = np.where(t < 0, ~t, t)
    lowest, highest = int(magnitudes.min()), int(magnitudes.max())
    width = ends.bits - 8
    best = None
    for shift in range(width, -1, -1):
        # The first and the last bucket have no threshold, so clamping a key keeps its count.
        low = max((lowest >> shift) - 1, 0) << shift
        high = min(((highest >> shift) + 1) << shift, int(ends.max))
        buckets = (high - low >> shift) + 1
        if best and buckets > _BUCKETS // 2:
            break
        first = integer(low) + (np.arange(buckets, dtype=integer) << integer(shift))
        first[0] = 0
        last = np.append(first[1:] - integer(1), ends.max)
        starts = np.searchsorted(t, np.concatenate([first, ~last]))
        within = np.searchsorted(t, np.concatenate([last, ~first])) - starts
        most = max(1, int(within.max()))
        steps = tuple(np.int32(1 << bit) for bit in reversed(range(most.bit_length())))
        filled = np.append(t, np.full(steps[0], ends.max, integer))
        only = filled[np.minimum(starts, len(t))] & integer((1 << shift) - 1)
        only = np.where(within == 1, integer((1 << width) - 1) - only, integer(0))
        entries = (starts.astype(np.uint64) << np.uint64(width)).astype(integer) | only
        best = _Table(
            integer(low), integer(high), integer(shift), entries, filled, () if most == 1 else steps
        )
        if most == 1:
            break
    assert best is not None
    return best


def choose(
    x: jax.Array, fmt: CodebookFormat, rounding: Rounding, random: jax.Array | None, outputs: list
) -> jax.Array:
    """Returns, for each value, the output of the level to which it rounds.

    Args:
      x: float32 or float64 values of any shape. Values beyond the outermost levels are clipped to
        them; NaN is treated as 0.
      fmt: the codebook.
      rounding: a rounding mode. Both "nearest" modes use `fmt.ties`.
      random: random bits for the mode.
      outputs: one NumPy scalar per distinct level, in ascending order of the levels.

    Returns:
      An array with the shape of x and the dtype of the outputs.
    """
    layout = FloatLayout.of(x.dtype)
    bits = layout.bits(x)  # The only use of x, so that XLA fuses its division by the scale.
    is_nan = (bits & layout.magnitude_mask) > layout.inf
    x = layout.floats(where(is_nan, layout.int_type(0), bits))
    if rounding in (nearest_even, nearest_away):
        return _picker(x, _midpoints(fmt, layout), layout)(outputs)

    # Any other mode gets the fraction between the two neighbors in the direction of increasing
    # magnitude. If zero lies between the neighbors, the lower one counts as the nearer to zero.
    levels = [layout.float_type(v) for v in fmt.values]
    on_or_above = tuple(_below(fractions.Fraction(float(v)), layout) for v in levels[1:-1])
    pick = _picker(x, on_or_above, layout)
    low, high = pick(levels[:-1]), pick(levels[1:])
    odd = pick([layout.float_type(i % 2) for i in range(len(levels) - 1)])
    negative = high <= layout.float_type(0)
    lowest, highest = (_ordered(layout.bits(end + 0), layout) for end in (levels[0], levels[-1]))
    key = _ordered(layout.bits(x), layout)
    bits = _ordered(lax.clamp(lowest, key, highest), layout)  # Its own inverse.
    x = layout.floats(bits)
    near = lax.select(negative, high, low)
    far = lax.select(negative, low, high)
    odd = lax.select(negative, 1.0 - odd, odd)
    # A number strictly between two levels keeps a fraction in (0, 1), even a subnormal.
    least = layout.float_type(2.0**-layout.mantissa_bits)
    inside = lax.clamp(least, jnp.abs((x - near) / (far - near)), 1 - least)
    is_zero = bits & layout.magnitude_mask == 0  # True for both signs; levels have no -0.
    on_near = (bits == layout.bits(near)) | (is_zero & (near == 0.0))
    on_far = (x == far) | (is_zero & (far == 0.0))
    fraction = where(on_near, layout.float_type(0), where(on_far, layout.float_type(1), inside))
    goes_far = rounding(odd + fraction, negative, random) > odd
    low_out, high_out = pick(outputs[:-1]), pick(outputs[1:])
    return lax.select(goes_far ^ negative, high_out, low_out)
