"""What `quantize` and `fake_quant` share: a split tensor, its scales, its numbers on the grid.

x -> range -> scale -> x / scale -> snap to the grid
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, where
from jaxq.blocks import Cut
from jaxq.calibrators import get_calibrator
from jaxq.casting import cast, enclosing, encode
from jaxq.formats import Format, IntFormat
from jaxq.grids import BinaryGrid
from jaxq.ranges import Range
from jaxq.recipes import Quantizer
from jaxq.reductions import summed
from jaxq.rounding import Rounding
from jaxq.scaling import SCALES, held, in_units, kept, span, times, zero_point_of

__all__ = [
    "Scales",
    "codes",
    "given_scales",
    "interval",
    "limits",
    "measured",
    "numbers",
    "restored",
    "scales_of",
]

_FLOAT32 = Layout.of(np.dtype(np.float32))

_UNROLLED = 4  # XLA on CPU runs the body of a loop on one core.

# All whole numbers that float32 has without gaps.
_WHOLE = BinaryGrid(24, 24, 24, 2.0**24, 2.0**24, inf=False, nan=False, negative_zero=False)


class Scales(NamedTuple):
    """Everything about the blocks of a tensor; arrays in the form that `Cut.spread` gives."""

    divisor: jax.Array  # What elements are divided by,
    step: jax.Array  # and multiplied by: the scale as stored.
    stored: jax.Array  # The scale on the grid of its format, which a second level leads back from.
    second: tuple[jax.Array, ...]
    zero_point: jax.Array | None  # In units of the scale; or the stored minimum.
    minimum: jax.Array | None  # What is subtracted before the division.
    low: jax.Array  # The range that the scales cover.
    high: jax.Array


def measured(x: jax.Array, key: jax.Array | None, recipe: Quantizer, cut: Cut) -> Scales:
    """The scales that a split float32 tensor gets from its own numbers."""
    calibrator = get_calibrator(recipe.range)
    two_sided = recipe.zero_point is not None
    state = calibrator.measure(x, cut, two_sided)
    low, high = calibrator.finalize(state, recipe.element, two_sided)
    factor = _searched(x, (low, high), key, recipe, cut) if recipe.search else None
    return scales_of(low, high, recipe, factor)


def scales_of(
    low: jax.Array, high: jax.Array, recipe: Quantizer, factor: jax.Array | None = None
) -> Scales:
    """The scales for a range.

    Args:
      low: the lower end of each block's range.
      high: the upper end.
      recipe: the recipe.
      factor: what to multiply the ends by; None for nothing.
    """
    fmt, scale_format = recipe.element, recipe.held
    if recipe.zero_point == "integer":
        low, high = lax.min(low, np.float32(0)), lax.max(high, np.float32(0))
    ends = (low, high) if factor is None else (low * factor, high * factor)
    if recipe.zero_point is not None:
        assert isinstance(fmt, IntFormat)  # The recipe has checked it.
        quotient, amax = span(*ends, fmt), lax.max(ends[1], -ends[0])
    else:
        quotient, amax = SCALES[recipe.scale](ends[1], fmt), ends[1]
    second: tuple[jax.Array, ...] = ()
    if recipe.second_level is not None:
        level = recipe.second_level
        stored, second = level.hold(quotient, high, amax, fmt, scale_format)
        step = level.join(stored, second)
    elif recipe.stored_scale:
        step = stored = kept(held(quotient, amax, scale_format))
    else:
        step = stored = kept(cast(quotient, scale_format))
    divisor = step if recipe.stored_scale else kept(quotient)
    zero_point = minimum = None
    if recipe.zero_point == "integer":
        assert isinstance(fmt, IntFormat)
        zero_point = kept(zero_point_of(ends[0], step, fmt, scale_format))
    elif recipe.zero_point == "minimum":
        zero_point = kept(cast(ends[0], scale_format))
        minimum = zero_point if recipe.stored_scale else ends[0]
    if recipe.zero_point is None:
        high = jnp.abs(ends[1])
        ends = (-high if fmt.min < 0 else jnp.zeros_like(high), high)
    return Scales(divisor, step, stored, second, zero_point, minimum, *ends)


def given_scales(scale: jax.Array, zero_point: jax.Array | None, recipe: Quantizer) -> Scales:
    """Scales that are given, as their format holds them, and the range that they cover."""
    fmt, scale_format = recipe.element, recipe.held
    step = kept(held(scale, scale, scale_format))
    minimum, (low, high) = None, limits(fmt)
    if zero_point is not None and recipe.zero_point == "integer":
        zero_point = lax.round(zero_point, lax.RoundingMethod.TO_NEAREST_EVEN)
        zero_point = kept(lax.clamp(low, zero_point, high))
        low, high = low - zero_point, high - zero_point
    elif zero_point is not None:
        minimum = zero_point = kept(cast(zero_point, scale_format))
    low, high = (
        times(jnp.broadcast_to(end, step.shape), step, scale_format) for end in (low, high)
    )
    if minimum is not None:
        low, high = low + minimum, high + minimum
    return Scales(step, step, step, (), zero_point, minimum, low, high)


def numbers(x: jax.Array, scales: Scales, key: jax.Array | None, recipe: Quantizer) -> jax.Array:
    """A split float32 tensor in units of its scales, on the grid, the zero point taken away."""
    return _on_grid(_in_units(x, scales, recipe), scales, recipe.rounding, key, recipe)


def codes(x: jax.Array, scales: Scales, key: jax.Array | None, recipe: Quantizer) -> jax.Array:
    """The codes of a split float32 tensor, those of `numbers` with the zero point added."""
    if recipe.zero_point == "integer":
        assert scales.zero_point is not None
        return encode(numbers(x, scales, key, recipe) + scales.zero_point, recipe.element)
    units = _in_units(x, scales, recipe)
    return encode(units, recipe.element, rounding=recipe.rounding, overflow="saturate", key=key)


def interval(x: jax.Array, scales: Scales, recipe: Quantizer) -> tuple[jax.Array, jax.Array]:
    """The two values between which each number of a split float32 tensor lies: below, above."""

    def snap(units: jax.Array, mode: Rounding) -> jax.Array:
        return _on_grid(units, scales, mode, None, recipe)

    pair = enclosing(_in_units(x, scales, recipe), *_ends(scales, recipe), snap)
    one, other = (restored(v, scales.step, scales.zero_point, recipe) for v in pair)
    return lax.min(one, other), lax.max(one, other)  # A scale may be negative.


def _in_units(x: jax.Array, scales: Scales, recipe: Quantizer) -> jax.Array:
    """A tensor less its minimum, in units of its scales."""
    if scales.minimum is not None:
        x = x - scales.minimum
    return in_units(x, scales.divisor, recipe.held, reciprocal=recipe.reciprocal)


def _ends(scales: Scales, recipe: Quantizer) -> tuple[jax.Array, jax.Array]:
    """The ends of the grid, the zero point taken away."""
    low, high = limits(recipe.element)
    if recipe.zero_point != "integer":
        return jnp.asarray(low), jnp.asarray(high)
    assert scales.zero_point is not None
    return low - scales.zero_point, high - scales.zero_point


def limits(fmt: Format) -> tuple[np.float32, np.float32]:
    """The lowest and largest values of a format; infinite where they lie beyond float32."""
    with np.errstate(over="ignore"):
        return np.float32(fmt.min), np.float32(fmt.max)


def _on_grid(
    units: jax.Array,
    scales: Scales,
    rounding: str | Rounding,
    key: jax.Array | None,
    recipe: Quantizer,
) -> jax.Array:
    """Units rounded to the grid, the zero point taken away."""
    if recipe.zero_point != "integer":
        return cast(units, recipe.element, rounding=rounding, overflow="saturate", key=key)
    # Rounded first and the zero point added after: the other order rounds half to another side.
    lowest, highest = _ends(scales, recipe)
    inside = lax.max(units, jnp.broadcast_to(lowest, units.shape))
    inside = lax.min(inside, jnp.broadcast_to(highest, units.shape))
    return cast(inside, _WHOLE, rounding=rounding, key=key)


def restored(
    values: jax.Array, step: jax.Array, zero_point: jax.Array | None, recipe: Quantizer
) -> jax.Array:
    """Numbers on the grid, the integer zero point taken away, times their scales."""
    y = times(values, step, recipe.held)
    if recipe.zero_point != "minimum":
        return y
    assert zero_point is not None
    return y + zero_point  # The product is exact: the recipe's widths are small enough.


def _searched(
    x: jax.Array, ends: Range, key: jax.Array | None, recipe: Quantizer, cut: Cut
) -> jax.Array:
    """The factor of each block's range that gives the least squared error; of equals the first."""
    low, high = ends
    amax = lax.max(jnp.abs(low), jnp.abs(high))

    def step(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[tuple, None]:
        least, chosen = best
        scales = scales_of(low, high, recipe, factor)
        values = numbers(x, scales, key, recipe)
        y = restored(values, scales.step, scales.zero_point, recipe)
        error = _squared_error(x, y, amax, cut)
        better = error < least
        return (where(better, error, least), where(better, factor, chosen)), None

    factors = jnp.asarray(recipe.search, jnp.float32)
    start = jnp.full_like(amax, np.inf), jnp.full_like(amax, recipe.search[0])
    return kept(lax.scan(step, start, factors, unroll=len(factors) <= _UNROLLED)[0][1])


def _squared_error(x: jax.Array, y: jax.Array, amax: jax.Array, cut: Cut) -> jax.Array:
    """The sum of squared errors of each block, in units that depend on amax alone.

    In integers, whose sums have no order: equal errors, which are frequent where data lie on grids,
    stay equal in every program. Blocks longer than 128 on the last axis are finished in float32.
    """
    # Errors relative to the power of two above amax, as multiples of 2^-22.
    exponent = _FLOAT32.bits(amax) & _FLOAT32.field(_FLOAT32.bias + 1)
    exponent = lax.clamp(_FLOAT32.field(-100), exponent, _FLOAT32.field(_FLOAT32.bias))
    inverse = _FLOAT32.floats(_FLOAT32.field(21) + (_FLOAT32.field(0) - exponent))
    a, b = (_whole(v * inverse) for v in (x, y))
    distance = (a - b).astype(jnp.float32)
    if not cut.block:
        return distance * distance
    last = cut.block[-1]
    step = next(d for d in range(max(1, min(last, 128)), 0, -1) if last % d == 0)
    room = 30 - math.ceil(math.log2(step))  # Bits that a square may have.
    squares = _whole(distance * distance * np.float32(2.0 ** (room - 44)))
    parts = squares.reshape(*squares.shape[:-1], last // step, step)
    sums = summed(parts).astype(jnp.float32)
    return jnp.sum(sums, axis=cut.axes, keepdims=True)


def _whole(x: jax.Array) -> jax.Array:
    """The nearest integers."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
