"""The steps that `quantize` and `fake_quant` share: scales and grid values of a split tensor.

x -> range -> scale -> x / scale -> snap to the grid
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import materialize, rounded, uses_vectors
from jaxq._jax.reductions import summed
from jaxq.formats import FloatFormat, IntFormat, get_format
from jaxq.numerics import (
    BinaryGrid,
    HalfUp,
    Rounding,
    cast,
    enclosing,
    encode,
    get_rounding,
    integer_codes,
    nearest_magnitudes,
    rounds_magnitudes,
)
from jaxq.recipes import (
    E8M0,
    Range,
    Recipe,
    Scales,
    absmax,
    finite,
    in_units,
    limits,
    powers,
    times,
)

__all__ = [
    "codes",
    "ends_of",
    "grid_values",
    "interval",
    "measured",
    "on_grid",
    "restored",
    "units_of",
]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))

# Short searches have no loop, whose body XLA on CPU runs on one core. They compute all errors at
# once, because XLA would fuse the last sum of errors into the comparison and not vectorize it.
_AT_ONCE = 4

# All integers that float32 represents without gaps.
_WHOLE = BinaryGrid(24, 24, 24, 2.0**24, 2.0**24, inf=False, nan=False, negative_zero=False)


def measured(
    x: jax.Array,
    key: jax.Array | None,
    recipe: Recipe,
    cut: Cut,
    importance: jax.Array | None = None,
) -> Scales:
    """Returns the scales computed from a split float32 tensor itself."""
    scaling, fmt = recipe.scaling, recipe.element
    if scaling.searches_elements or importance is not None:
        return scaling.of_elements(x, cut, fmt, importance)
    ends = scaling.calibrator.finalize(recipe.measure(x, cut), fmt, scaling.two_sided)
    factor = _searched(x, ends, key, recipe, cut) if scaling.search else None
    return scaling.scales(ends, fmt, factor)


def grid_values(
    x: jax.Array, scales: Scales, key: jax.Array | None, recipe: Recipe, *, given: bool = False
) -> jax.Array:
    """Returns the grid values of a split float32 tensor, minus the zero point.

    Args:
      x: the tensor.
      scales: its scales.
      key: a key for random rounding, or None.
      recipe: the recipe.
      given: True if the scales were not computed from the tensor, so that a NaN may have a scale
        that is a number.
    """
    default = recipe.rounding == "nearest_even" or isinstance(recipe.rounding, HalfUp)
    if scales.grid_values is not None and default:
        return scales.grid_values
    units = units_of(x, scales, recipe)
    if (given or scales.grid_values is not None) and _lacks_nan(recipe):
        units = _positive_nan(units)
    return on_grid(units, scales.zero_point, recipe.rounding, key, recipe)


def codes(x: jax.Array, scales: Scales, key: jax.Array | None, recipe: Recipe) -> jax.Array:
    """Returns the codes of the `grid_values` of a split float32 tensor plus its zero points."""
    if scales.zero_point is not None:
        assert isinstance(recipe.element, IntFormat)  # The scaling has checked it.
        whole = grid_values(x, scales, key, recipe) + scales.zero_point
        return integer_codes(where(whole == whole, whole, np.float32(0)), recipe.element)
    if scales.grid_values is not None:
        return encode(grid_values(x, scales, key, recipe), recipe.element)
    units = units_of(x, scales, recipe)
    units = _positive_nan(units) if isinstance(recipe.element, FloatFormat) else units
    return encode(units, recipe.element, rounding=recipe.rounding, overflow="saturate", key=key)


def interval(x: jax.Array, scales: Scales, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Returns the values (below, above) that enclose each element of a split float32 tensor."""

    def snap(units: jax.Array, mode: Rounding) -> jax.Array:
        return on_grid(units, scales.zero_point, mode, None, recipe)

    units = units_of(x, scales, recipe)
    units = _positive_nan(units) if _lacks_nan(recipe) else units
    pair = enclosing(units, *ends_of(scales.zero_point, recipe), snap)
    first, second = (restored(v, scales.step, scales.minimum, recipe) for v in pair)
    # Not a minimum, which may lose the NaN that zero times an infinite scale is.
    negative = jnp.broadcast_to(scales.step < 0, first.shape)
    return where(negative, second, first), where(negative, first, second)


def units_of(x: jax.Array, scales: Scales, recipe: Recipe) -> jax.Array:
    """Returns a split tensor minus its minimum, in units of its scales."""
    if scales.origin is not None:
        x = x - scales.origin
    scaling = recipe.scaling
    divisor_format = recipe.scale_format if scaling.stored else get_format("float32")
    return in_units(x, scales.divisor, divisor_format, reciprocal=scaling.reciprocal)


def _lacks_nan(recipe: Recipe) -> bool:
    """Returns whether the element format is a float format without NaN, which maps NaN to zero."""
    fmt = recipe.element
    return not fmt.nan if isinstance(fmt, FloatFormat | BinaryGrid) else False


def _positive_nan(units: jax.Array) -> jax.Array:
    """Returns an array in which every NaN is positive, as its sign differs between backends."""
    bits = _FLOAT32.bits(units)
    nan = (bits & _FLOAT32.magnitude_mask) > _FLOAT32.inf
    return _FLOAT32.floats(where(nan, _FLOAT32.nan, bits))


def ends_of(zero_point: jax.Array | None, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Returns the ends of the grid minus the zero point."""
    low, high = limits(recipe.element)
    if zero_point is None:
        return jnp.asarray(low), jnp.asarray(high)
    return low - zero_point, high - zero_point


def on_grid(
    units: jax.Array,
    zero_point: jax.Array | None,
    rounding: str | Rounding,
    key: jax.Array | None,
    recipe: Recipe,
) -> jax.Array:
    """Returns units rounded to the grid minus the zero point."""
    if zero_point is None:
        return cast(units, recipe.element, rounding=rounding, overflow="saturate", key=key)
    # The units are rounded before the zero point is added, because the other order rounds ties
    # differently. They are rounded before the ends are applied, because XLA on CPU counts
    # subnormals as zero in a maximum.
    lowest, highest = ends_of(zero_point, recipe)
    whole = cast(units, _WHOLE, rounding=rounding, key=key)
    whole = lax.max(whole, jnp.broadcast_to(lowest, units.shape))
    return lax.min(whole, jnp.broadcast_to(highest, units.shape))


def restored(
    values: jax.Array, step: jax.Array, minimum: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """Returns values on the grid, minus any integer zero point, times their scales, plus minima.

    Results beyond float32 become its largest value, so that no finite input gives an infinity. An
    infinite scale gives infinities, as in GGUF, where a scale may overflow float16.
    """
    fmt, scale_format = recipe.element, recipe.scale_format
    traced = isinstance(fmt, BinaryGrid)
    if traced or fmt.max >= 2.0**128:
        values = finite(values)
    y = times(values, step, scale_format)
    if minimum is not None:
        y = y + minimum  # The product is exact, because the scaling has checked the widths.
    bounded = _is_bounded(recipe)
    if traced:
        return where(jnp.broadcast_to(bounded, y.shape), y, finite(y))
    if bounded:
        return y  # Only an infinite scale makes this infinite.
    return finite(y)


def _is_bounded(recipe: Recipe) -> Any:
    """Returns whether grid values times finite scales are finite; an array for a traced grid."""
    fmt = recipe.element
    return (fmt.max - fmt.min) * recipe.scaling.largest_scale < 2.0**127


class _Best(NamedTuple):
    """The least squared error of each block so far, and the factor that gave it."""

    error: jax.Array
    factor: jax.Array


def _searched(
    x: jax.Array, ends: Range, key: jax.Array | None, recipe: Recipe, cut: Cut
) -> jax.Array:
    """Returns the factor of each block's range with the least squared error; the first on ties."""
    amax = lax.max(*map(jnp.abs, ends))
    # Ranges other than the absmax may clip elements.
    top = amax if recipe.scaling.range == "absmax" else absmax(x, cut)
    down, _ = powers(top)

    def error(factor: jax.Array) -> jax.Array:
        scales = recipe.scaling.scales(ends, recipe.element, factor)
        return _squared_error(_distance(x, scales, down, key, recipe), cut)

    def better(best: _Best, other: _Best) -> _Best:
        is_better = other.error < best.error
        return _Best(*(where(is_better, b, a) for a, b in zip(best, other, strict=True)))

    search = recipe.scaling.search
    factors = jnp.asarray(search, jnp.float32)
    if len(search) > _AT_ONCE:
        best = _Best(jnp.full_like(amax, np.inf), jnp.full_like(amax, search[0]))

        def step(best: _Best, factor: jax.Array) -> tuple[_Best, None]:
            return better(best, _Best(error(factor).reshape(amax.shape), factor)), None

        return materialize(lax.scan(step, best, factors)[0].factor)

    first, *others = jax.vmap(error)(factors)
    best = _Best(first, jnp.full_like(first, search[0]))
    for other, factor in zip(others, search[1:], strict=True):
        best = better(best, _Best(other, jnp.float32(factor)))
    return materialize(best.factor).reshape(amax.shape)


def _distance(
    x: jax.Array, scales: Scales, down: jax.Array, key: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """Returns the distance of each element to its quantized value, times `down`, up to the sign.

    It is in units of 2^-10. Where magnitudes alone are rounded, it is infinite or NaN for a scale
    of 0.
    """
    fmt, unit = recipe.element, np.float32(2.0**10)
    symmetric = scales.zero_point is None and scales.minimum is None and scales.grid_values is None
    default = get_rounding(recipe.rounding) is get_rounding("nearest_even")
    power_of_two = recipe.scale_format == E8M0  # Its least scale is subnormal.
    if not (symmetric and default and rounds_magnitudes(fmt)) or power_of_two:
        y = restored(grid_values(x, scales, key, recipe), scales.step, scales.minimum, recipe)
        # `rounded` separates the product from the difference. LLVM would otherwise fuse them into
        # one rounding.
        return (x * down - rounded(y * down)) * unit
    magnitude = jnp.abs(units_of(x, scales, recipe))
    # A scale of 0 quantizes to 0, which is no better than the least scale above it.
    factor = where(scales.step == 0, np.float32(np.inf), scales.step * down * unit)
    return (magnitude - nearest_magnitudes(magnitude, fmt)) * materialize(factor)


def _squared_error(distance: jax.Array, cut: Cut) -> jax.Array:
    """Returns the sum of squared distances, in units of 2^-10 and below 2^12, of each block.

    On a single device, the result is a vector if the blocks lie along the last axis.
    Integers are summed, so the result does not depend on the order of summation. Equal errors,
    which are frequent for data on a grid, therefore stay equal in every program. For blocks
    longer than 128 on the last axis, partial sums are added in float32.
    """
    if not cut.block:
        return distance * distance
    # The addition rounds a square to an even number, half of which it places in the low bits. An
    # infinity or NaN, of a scale that is infinite or 0, becomes the largest number.
    anchor = np.float32(2.0**24)
    bits = lax.bitcast_convert_type(distance * distance, jnp.uint32)
    square = lax.bitcast_convert_type(lax.min(bits, anchor.view(np.uint32)), jnp.float32)
    squares = _FLOAT32.bits(square + anchor) - _FLOAT32.bits(anchor)
    (*leading, last), axes = squares.shape, cut.axes
    # XLA on CPU (JAX 0.10 and 0.12) does not vectorize code that reads the sums in another shape.
    as_vector = uses_vectors(squares.shape) and all(squares.shape[a] == 1 for a in axes[:-1])
    if as_vector:
        leading, axes = [math.prod(leading)], (1,)
    step = next(d for d in range(max(1, min(last, 128)), 0, -1) if last % d == 0)
    sums = summed(squares.reshape(*leading, last // step, step)).astype(jnp.float32)
    return jnp.sum(sums, axis=axes, keepdims=not as_vector)
