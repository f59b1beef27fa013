"""Formats and recipes as arguments of the analysis functions; the ends and spacing of a grid.

A format or its name means a cast without a scale. A recipe or its name means `jaxq.fake_quant`.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import Layout
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
    "Ends",
    "FormatOrRecipe",
    "checked",
    "ends",
    "format_or_recipe",
    "significant_bits",
    "spacing_exponent",
]

FormatOrRecipe: TypeAlias = str | Format | Recipe

_FLOAT32 = Layout.of(np.dtype(np.float32))


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


def checked(name: str, x: jax.typing.ArrayLike, recipe: FormatOrRecipe) -> tuple[jax.Array, Any]:
    """Returns the checked array and the format or recipe of an analysis function's arguments."""
    return floats(name, x, float64=False), format_or_recipe(recipe)


class Ends(NamedTuple):
    """The intervals in which rounding to nearest clips a number or turns it into 0.

    Attributes:
      low: numbers below it are clipped.
      high: numbers above it are clipped.
      negative: the magnitude of the lowest number that becomes 0; -1 if only 0 itself does.
      positive: the largest number that becomes 0; -1 if only 0 itself does.
    """

    low: np.float32 | jax.Array
    high: np.float32 | jax.Array
    negative: np.float32 | jax.Array
    positive: np.float32 | jax.Array


@functools.cache
def ends(fmt: Format) -> Ends:
    """Returns the ends of a format's grid, half a step beyond its lowest and largest values.

    A number exactly at an end is clipped if its tie rounds outwards. An unsigned float format with
    a NaN maps negative numbers to NaN, so all of them are clipped.
    """
    listed = fmt.bits <= 16
    outward, values, steps = False, np.zeros(2), (0.0, 0.0)
    if isinstance(fmt, FloatFormat):
        odd = fmt.max_code % 2 if fmt.mantissa_bits or fmt.parity == "code" else 1
        outward = odd == 1
    if listed:
        values = fmt.values
        steps = values[1] - values[0], values[-1] - values[-2]
    if isinstance(fmt, FloatFormat):  # Above a power of two the next step is wider.
        wide = math.ldexp(1.0, fmt.emax - fmt.mantissa_bits)
        steps = wide if fmt.signed else values[1] - values[0], wide
    negative_is_nan = isinstance(fmt, FloatFormat) and not fmt.signed and fmt.nan is not None
    low = 0.0 if negative_is_nan else fmt.min - steps[0] / 2
    high = fmt.max + steps[1] / 2
    bounds = [_within(end, outward) for end in (low, high)]
    flush = (-1.0, -1.0)
    if not isinstance(fmt, TaperedFormat) and listed and bool(np.any(values == 0)):
        zero = int(np.flatnonzero(values == 0)[0])
        near = [
            -values[zero - 1] if zero else -2 * low,
            values[zero + 1] if zero + 1 < len(values) else 2 * high,
        ]
        flush = (near[0] / 2, near[1] / 2)
        if isinstance(fmt, CodebookFormat):  # Ties round in one direction, whatever the sign.
            out = 0 if fmt.ties == "down" else 1
            if (zero > 0, zero + 1 < len(values))[out]:  # There are no ties beyond the ends.
                inner = float(np.nextafter(np.float32(flush[out]), np.float32(0)))
                flush = (inner, flush[1]) if out == 0 else (flush[0], inner)
    elif not listed:
        flush = (fmt.min_positive / 2,) * 2
    return Ends(bounds[0], bounds[1], np.float32(flush[0]), np.float32(flush[1]))


def _within(end: float, outward: bool) -> np.float32:
    """Returns the float32 of largest magnitude that is not clipped at an end of the grid.

    This is the end itself, or its neighbor toward 0 if a tie at the end rounds outward.
    """
    largest = float(np.finfo(np.float32).max)
    near = np.float32(min(max(end, -largest), largest))
    clips = outward and float(near) == end and end != 0
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
