"""The values and scales of a quantized tensor without a gradient, which all quantizers share."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import where
from jaxq._base.cutting import Cut
from jaxq._jax.meshes import as_first, automatic
from jaxq._jax.opaque import opaque
from jaxq.numerics import BinaryGrid, as_dtype, widen
from jaxq.quantizers._arguments import ErrorWeights, Given, checked, given_scales
from jaxq.quantizers._parts import join_parts
from jaxq.quantizers._snapping import grid_values, interval, measured, restored
from jaxq.recipes import Recipe, Scales

__all__ = ["Simulated", "Values", "quantized_values", "scales_of", "simulate"]


class Values(NamedTuple):
    """The quantized values of a split tensor, with intermediate results.

    Attributes:
      y: the values, in the tensor's dtype.
      wide: the values in float32, before they are rounded to the tensor's dtype.
      low: the low end of the range; -inf at outliers.
      high: the high end of the range; inf at outliers.
      below: the lower neighbor on the grid of each element; None if not needed.
      above: the upper neighbor; None if not needed.
      grid_values: the values in units of the scales, minus the zero point.
      scales: the scales.
      is_outlier: the mask of outliers; None for a recipe without outliers.
    """

    y: jax.Array
    wide: jax.Array
    low: jax.Array
    high: jax.Array
    below: jax.Array | None
    above: jax.Array | None
    grid_values: jax.Array
    scales: Scales
    is_outlier: jax.Array | None


class Simulated(NamedTuple):
    """A quantized tensor and its scales.

    Attributes:
      values: the values, as `fake_quant` returns them.
      scales: the scales that were used, in the layout of `Cut.align_scales`.
    """

    values: jax.Array
    scales: Scales


def simulate(
    x: jax.typing.ArrayLike,
    recipe: Recipe,
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> Simulated:
    """Returns the values of `fake_quant`, without a gradient, and the scales used.

    In a program that computes `fake_quant` of the same tensor, XLA computes both only once.

    Args:
      x: as in `fake_quant`.
      recipe: a recipe without traced widths.
      scale: as in `fake_quant`.
      zero_point: as in `fake_quant`.
      key: as in `fake_quant`.
    """
    array, recipe = checked("fake_quant", x, recipe, None)
    given = given_scales("fake_quant", array.shape, recipe, scale, zero_point)
    return _simulate(lax.stop_gradient(array), lax.stop_gradient(given), key, recipe)


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(as_first)
def _simulate(
    x: jax.Array, given: Given | None, key: jax.Array | None, recipe: Recipe
) -> Simulated:
    values = opaque(
        functools.partial(quantized_values, recipe=recipe, around=False), x, given, None, key
    )
    return Simulated(recipe.cut(x.shape).merge(values.y), values.scales)


def quantized_values(
    x: jax.Array,
    given: Given | ErrorWeights | None,
    grid: BinaryGrid | None,
    key: jax.Array | None,
    recipe: Recipe,
    around: bool,
) -> Values:
    """Returns the quantized values of a tensor, with the neighbors if `around` is True."""
    recipe = join_parts(grid, recipe)
    cut, rest = recipe.cut(x.shape), x
    outliers, is_outlier = (), None
    if recipe.outliers is not None:
        rest, outliers = recipe.outliers.take(x)
    rest = widen(cut.split(rest))
    scales = scales_of(rest, given, key, recipe, cut)
    values = grid_values(rest, scales, key, recipe, given=isinstance(given, Given))
    y = restored(values, scales.step, scales.minimum, recipe)
    below, above = interval(rest, scales, recipe) if around else (None, None)
    low, high = scales.low, scales.high
    if recipe.outliers is not None:  # Outliers are not clipped.
        y = cut.split(recipe.outliers.put(cut.merge(y), outliers))
        is_outlier = cut.split(recipe.outliers.mask(x.shape, outliers))
        low, high = (
            where(is_outlier, np.float32(none), jnp.broadcast_to(end, is_outlier.shape))
            for none, end in ((-np.inf, low), (np.inf, high))
        )
        if below is not None and above is not None:
            below, above = where(is_outlier, y, below), where(is_outlier, y, above)
    return Values(
        y=as_dtype(y, x.dtype, overflow="propagate"),
        wide=y,
        low=low,
        high=high,
        below=below,
        above=above,
        grid_values=values,
        scales=scales,
        is_outlier=is_outlier,
    )


def scales_of(
    x: jax.Array,
    given: Given | ErrorWeights | None,
    key: jax.Array | None,
    recipe: Recipe,
    cut: Cut,
) -> Scales:
    """Uses the user's scales, broadcast over blocks, if given; otherwise computes them."""
    if isinstance(given, ErrorWeights):
        weights = cut.split(jnp.broadcast_to(given.weights, cut.shape))
        return measured(x, key, recipe, cut, weights)
    if given is None:
        return measured(x, key, recipe, cut)
    scale, zero_point = (
        None if a is None else cut.align_scales(jnp.broadcast_to(a, cut.counts)) for a in given
    )
    assert scale is not None
    return recipe.scaling.given(scale, zero_point, recipe.element)
