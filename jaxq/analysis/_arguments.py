"""Formats and recipes as arguments of the analysis functions; the limits and spacing of a grid.

A format or its name means a cast without a scale. A recipe or its name means `jaxq.fake_quant`.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout
from jaxq._base.registry import suggestion
from jaxq.formats import (
    FORMATS,
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    TaperedFormat,
    get_format,
)
from jaxq.numerics import floats
from jaxq.recipes import RECIPES, Recipe, get_recipe

__all__ = [
    "FormatOrRecipe",
    "RoundingLimits",
    "check_arguments",
    "format_or_recipe",
    "rounding_limits",
    "significant_bits",
    "spacing_exponent",
]

FormatOrRecipe: TypeAlias = str | Format | Recipe

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_MAX_LISTED_BITS = 16  # Formats with more bits have too many values to list.


def format_or_recipe(given: FormatOrRecipe) -> Format | Recipe:
    """Returns the format or the recipe with a name.

    Raises:
      ValueError: if neither a format nor a recipe has that name.
      TypeError: if the argument is not a name, a format or a recipe.
    """
    if isinstance(given, Recipe | Format):
        return given
    if not isinstance(given, str):
        raise TypeError(
            "A recipe or format must be a name, a jaxq.Recipe or a format, got "
            f"{type(given).__name__}. Use a name in jaxq.recipes.RECIPES or jaxq.formats.FORMATS."
        )
    if given in FORMATS:
        return get_format(given)
    if given in RECIPES:
        return get_recipe(given)
    hint = suggestion(given, RECIPES, FORMATS, most=3)
    raise ValueError(f"No recipe or format is named {given!r}. {hint}")


def check_arguments(
    name: str, x: jax.typing.ArrayLike, recipe: FormatOrRecipe
) -> tuple[jax.Array, Any]:
    """Checks the arguments of an analysis function; returns the array and the format or recipe."""
    return floats(name, x, float64=False), format_or_recipe(recipe)


class RoundingLimits(NamedTuple):
    """The limits beyond which rounding to nearest clips a number or turns it into 0.

    Attributes:
      low: numbers below it are clipped.
      high: numbers above it are clipped.
      largest_flushed_negative: the magnitude of the lowest number that becomes 0; -1 if only 0
        itself does.
      largest_flushed_positive: the largest number that becomes 0; -1 if only 0 itself does.
    """

    low: np.float32 | jax.Array
    high: np.float32 | jax.Array
    largest_flushed_negative: np.float32 | jax.Array
    largest_flushed_positive: np.float32 | jax.Array


@functools.cache
def rounding_limits(fmt: Format) -> RoundingLimits:
    """Returns the limits of rounding to nearest in a format.

    Numbers are clipped half a step beyond the lowest and the largest value. A number exactly at
    such a limit is clipped if its tie rounds outward. An unsigned float format with a NaN maps
    negative numbers to NaN, so all of them are clipped.
    """
    low, high = _clip_limits(fmt)
    negative, positive = _flush_limits(fmt, low, high)
    outward = _ties_round_outward(fmt)
    return RoundingLimits(
        low=_largest_unclipped(low, outward),
        high=_largest_unclipped(high, outward),
        largest_flushed_negative=np.float32(negative),
        largest_flushed_positive=np.float32(positive),
    )


def _clip_limits(fmt: Format) -> tuple[float, float]:
    """Returns the numbers half a step beyond a format's lowest and largest values."""
    low_step, high_step = 0.0, 0.0
    if fmt.bits <= _MAX_LISTED_BITS:
        low_step, high_step = fmt.values[1] - fmt.values[0], fmt.values[-1] - fmt.values[-2]
    if isinstance(fmt, FloatFormat):  # Above a power of two the next step is wider.
        high_step = math.ldexp(1.0, fmt.emax - fmt.mantissa_bits)
        if fmt.signed:
            low_step = high_step
        elif fmt.nan is not None:
            return 0.0, fmt.max + high_step / 2
    return fmt.min - low_step / 2, fmt.max + high_step / 2


def _flush_limits(fmt: Format, low: float, high: float) -> tuple[float, float]:
    """Returns the largest magnitudes of negative and of positive numbers that become 0.

    Args:
      fmt: the format.
      low: the lower limit of clipping, which limits the flushed numbers if no value is negative.
      high: the upper limit of clipping, which limits them if no value is positive.
    """
    if fmt.bits > _MAX_LISTED_BITS:
        return fmt.min_positive / 2, fmt.min_positive / 2
    values = fmt.values
    if isinstance(fmt, TaperedFormat) or not np.any(values == 0):
        return -1.0, -1.0
    zero = int(np.flatnonzero(values == 0)[0])
    has_negative, has_positive = zero > 0, zero + 1 < len(values)
    negative = -values[zero - 1] / 2 if has_negative else -low
    positive = values[zero + 1] / 2 if has_positive else high
    if isinstance(fmt, CodebookFormat):  # Ties round in one direction, whatever the sign.
        if fmt.ties == "down" and has_negative:
            negative = float(np.nextafter(np.float32(negative), np.float32(0)))
        elif fmt.ties != "down" and has_positive:
            positive = float(np.nextafter(np.float32(positive), np.float32(0)))
    return negative, positive


def _ties_round_outward(fmt: Format) -> bool:
    """Returns whether a number half a step beyond the largest value rounds away from it."""
    if not isinstance(fmt, FloatFormat):
        return False
    return not (fmt.mantissa_bits or fmt.parity == "code") or fmt.max_code % 2 == 1


def _largest_unclipped(limit: float, outward: bool) -> np.float32:
    """Returns the float32 of largest magnitude that is not clipped at a limit.

    This is the limit itself, or its neighbor toward 0 if a tie at the limit rounds outward.
    """
    largest = float(np.finfo(np.float32).max)
    near = np.float32(min(max(limit, -largest), largest))
    clips = outward and float(near) == limit and limit != 0
    return np.nextafter(near, np.float32(0)) if clips else near


def spacing_exponent(x: jax.Array, fmt: Format) -> jax.Array:
    """Returns the int32 exponents k of the spacing 2^k between a format's values at each number.

    The spacing is exact for floats and integers; for codebooks, posits and takums it is the
    largest power of two that does not exceed the distance between the two values around the number.
    """
    if isinstance(fmt, IntFormat):
        return jnp.full(x.shape, -fmt.fraction_bits, jnp.int32)
    if isinstance(fmt, FloatFormat):
        magnitude = _FLOAT32.bits(x) & _FLOAT32.magnitude_mask
        exponent = (magnitude >> np.int32(23)) - np.int32(127)
        low, high = (np.int32(max(min(e, 127), -127)) for e in (fmt.emin, fmt.emax))
        return lax.clamp(low, exponent, high) - np.int32(fmt.mantissa_bits)
    values = fmt.values
    steps = np.frexp(np.diff(values))[1].astype(np.int32) - 1
    steps = np.clip(steps, -126, 127).astype(np.int32)
    with np.errstate(over="ignore"):
        inner = np.clip(values, -3e38, 3e38).astype(np.float32)[1:-1]
    return jnp.asarray(steps)[jnp.searchsorted(jnp.asarray(inner), x, side="right")]


def significant_bits(fmt: Format) -> float:
    """Returns the largest number of significant bits of a format, log2(1 + max v / (v' - v)).

    Here v' is the next value after v > 0. A float with m mantissa bits has m + 1 significant bits;
    an integer format has nearly as many as it has bits.

    Example:
      >>> significant_bits(get_format("bfloat16")), significant_bits(get_format("nf4"))
      (8.0, 2.2...)
    """
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa_bits + 1.0
    sides = (values[values > 0] for values in (fmt.values, -fmt.values[::-1]))
    ratios = [np.max(side[:-1] / np.diff(side), initial=0) for side in sides]
    return float(np.log2(1 + max(ratios)))
