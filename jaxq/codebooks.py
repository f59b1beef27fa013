"""Codebook formats: which level a value goes to.

Values are compared as integers in the order of the floats, so that a float32 subnormal is never
taken for zero. A chain of one comparison for every two levels takes less than two plain passes for
16 levels; for many, a table indexed by the leading bits leaves one or a few comparisons to do.
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

from jaxq.bits import Layout, where
from jaxq.formats import CodebookFormat
from jaxq.rounding import Rounding, nearest_away, nearest_even

__all__ = ["choose"]

_CHAINED = 32  # From this many thresholds on a table is faster than a chain.
_BUCKETS = 8192  # A table of this size stays in the nearest cache.


def _ordered(bits: Any, layout: Layout) -> Any:
    """Float bits as integers that compare as the floats do (-0 just below 0)."""
    shift = 8 * np.dtype(layout.int_type).itemsize - 1
    return bits ^ ((bits >> layout.int_type(shift)) & layout.magnitude_mask)


def _below(threshold: fractions.Fraction, layout: Layout) -> int:
    """The ordered integer of the largest float strictly below a number."""
    near = layout.float_type(float(threshold))  # Correctly rounded twice, then mended.
    while fractions.Fraction(float(near)) >= threshold:
        near = np.nextafter(near, layout.float_type(-np.inf))
    while fractions.Fraction(float(np.nextafter(near, layout.float_type(np.inf)))) < threshold:
        near = np.nextafter(near, layout.float_type(np.inf))
    # + 0.0: -0 counts as 0, and so its ordered integer is that of 0 here.
    return int(
        _ordered(np.atleast_1d(near + layout.float_type(0)).view(layout.int_type), layout)[0]
    )


@functools.cache
def _midpoints(fmt: CodebookFormat, layout: Layout) -> tuple[int, ...]:
    """For each pair of neighbours, the ordered integer that a value must exceed to go up."""
    levels = [fractions.Fraction(float(v)) for v in fmt.values]
    result = []
    for low, high in itertools.pairwise(levels):
        middle = (low + high) / 2
        below = _below(middle, layout)
        on_grid = fractions.Fraction(float(layout.float_type(float(middle)))) == middle
        # From the middle itself nothing goes up, and of both zeros 0 is the higher one.
        at = 0 if middle == 0 else below + 1
        result.append(at if fmt.ties == "down" and on_grid else below)
    return tuple(result)


def _picker(
    key: jax.Array, thresholds: tuple[int, ...], layout: Layout
) -> Callable[[list], jax.Array]:
    """A function that gives, of n + 1 items, each key the one behind the thresholds it exceeds.

    Args:
      key: ordered integers.
      thresholds: n of them, ascending.
      layout: of the floats.
    """
    if len(thresholds) >= _CHAINED:
        index = _count(key, thresholds, layout)
        return lambda items: _take(np.asarray(items), index)

    limits = [layout.int_type(t) for t in thresholds]
    if len(limits) % 2 == 0:  # One more, which nothing exceeds.
        limits.append(layout.magnitude_mask)
    half = len(limits) // 2
    upper = lax.gt(key, lax.full(key.shape, limits[half]))

    def at(high: Any, low: Any) -> jax.Array:
        """What stands at one place of the upper half and of the lower one."""
        return lax.select(upper, lax.full(key.shape, high), lax.full(key.shape, low))

    def chain(items: list) -> jax.Array:
        """Both halves at once: comparisons cost more than selections."""
        items = [*items, *items[-1:] * (len(limits) - len(thresholds))]
        found = at(items[half + 1], items[0])
        for i in range(half):
            above = lax.gt(key, at(limits[half + 1 + i], limits[i]))
            found = lax.select(above, at(items[half + 2 + i], items[i + 1]), found)
        return found

    return chain


def _take(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def _count(key: jax.Array, thresholds: tuple[int, ...], layout: Layout) -> jax.Array:
    """How many of many thresholds each key exceeds: a look-up, then a search among what is left."""
    table = _table(thresholds, layout)
    sign = layout.int_type(8 * key.dtype.itemsize - 1)
    magnitude = lax.clamp(table.low, key ^ (key >> sign), table.high)
    bucket = ((magnitude - table.low) >> table.shift).astype(jnp.int32)
    bucket = where(key < 0, bucket + np.int32(len(table.starts) // 2), bucket)
    count = _take(table.starts, bucket).astype(jnp.int32)
    for step in table.steps:
        above = key > _take(table.thresholds, count + (step - np.int32(1)))
        count = where(above, count + step, count)
    return count


class _Table(NamedTuple):
    """Where to look among thresholds, by a key's sign and the leading bits of its magnitude."""

    low: np.signedinteger  # Magnitudes below it and above `high` are in the buckets of those.
    high: np.signedinteger
    shift: np.signedinteger
    starts: np.ndarray  # How many thresholds lie below a bucket; the buckets below 0 come last.
    thresholds: np.ndarray  # With as many at the end that no key exceeds as a step goes beyond.
    steps: tuple[np.int32, ...]  # Of a binary search within a bucket.


@functools.cache
def _table(thresholds: tuple[int, ...], layout: Layout) -> _Table:
    """The smallest table with one threshold a bucket, or that of `_BUCKETS` at most."""
    integer, ends = layout.int_type, np.iinfo(layout.int_type)
    t = np.array(thresholds, integer)
    magnitudes = np.where(t < 0, ~t, t)
    low, high = magnitudes.min(), magnitudes.max()
    best = None
    for shift in range(ends.bits - 2, -1, -1):
        buckets = (int(high - low) >> shift) + 1
        if best and buckets > _BUCKETS // 2:
            break
        first = low + (np.arange(buckets, dtype=integer) << integer(shift))
        first[0] = 0
        last = np.append(first[1:] - integer(1), ends.max)
        starts = np.searchsorted(t, np.concatenate([first, ~last]))
        most = int((np.searchsorted(t, np.concatenate([last, ~first])) - starts).max())
        steps = tuple(np.int32(1 << bit) for bit in reversed(range(most.bit_length())))
        filled = np.append(t, np.full(steps[0], ends.max, integer))
        best = _Table(low, high, integer(shift), starts.astype(np.uint8), filled, steps)
        if most == 1:
            break
    assert best is not None
    return best


def choose(
    x: jax.Array, fmt: CodebookFormat, rounding: Rounding, random: jax.Array | None, outputs: list
) -> jax.Array:
    """For each value, the output that belongs to the level it rounds to.

    Args:
      x: float32 or float64, any shape. Beyond the outermost levels it goes to them; NaN goes where
        0 does.
      fmt: the codebook.
      rounding: a mode. Both nearest ones follow `fmt.ties`.
      random: random bits for the mode.
      outputs: one NumPy scalar a distinct level, in ascending order of the levels.

    Returns:
      An array of x's shape and the outputs' dtype.
    """
    layout = Layout.of(x.dtype)
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    bits = where(magnitude > layout.inf, layout.int_type(0), bits)
    key = _ordered(bits, layout)
    if rounding in (nearest_even, nearest_away):
        return _picker(key, _midpoints(fmt, layout), layout)(outputs)

    # Any other mode sees the fraction between the two neighbours, in the direction of magnitude; of
    # neighbours on both sides of zero the lower one counts as the nearer to it.
    levels = [layout.float_type(v) for v in fmt.values]
    on_or_above = tuple(_below(fractions.Fraction(float(v)), layout) for v in levels[1:-1])
    pick = _picker(key, on_or_above, layout)
    low, high = pick(levels[:-1]), pick(levels[1:])
    odd = pick([layout.float_type(i % 2) for i in range(len(levels) - 1)])
    negative = high <= layout.float_type(0)
    lowest, highest = (_ordered(layout.bits(end + 0), layout) for end in (levels[0], levels[-1]))
    bits = _ordered(lax.clamp(lowest, key, highest), layout)  # Its own inverse.
    x = layout.floats(bits)
    near = lax.select(negative, high, low)
    far = lax.select(negative, low, high)
    odd = lax.select(negative, 1.0 - odd, odd)
    # A number between two levels stays between them, however close: also a subnormal.
    least = layout.float_type(2.0**-layout.mantissa_bits)
    inside = lax.clamp(least, jnp.abs((x - near) / (far - near)), 1 - least)
    is_zero = bits & layout.magnitude_mask == 0  # Of either sign; levels have no -0.
    on_near = (bits == layout.bits(near)) | (is_zero & (near == 0.0))
    on_far = (x == far) | (is_zero & (far == 0.0))
    fraction = where(on_near, layout.float_type(0), where(on_far, layout.float_type(1), inside))
    goes_far = rounding(odd + fraction, negative, random) > odd
    low_out, high_out = pick(outputs[:-1]), pick(outputs[1:])
    return lax.select(goes_far ^ negative, high_out, low_out)
