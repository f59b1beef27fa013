"""The representable values (levels) of each element of a quantized tensor, for solvers.

A solver that chooses codes other than the nearest ones starts from a `Quantized`, keeps its scales,
rounds values to `levels`, and stores the result by `with_levels`. `rescaled` changes the scales.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax import numpy as jnp

from jaxq.numerics import Rounding, decode, enclosing, encode, pack
from jaxq.quantizers._quantized import WHOLE_BYTES, Quantized, decoded
from jaxq.quantizers._snapping import ends_of, on_grid, restored
from jaxq.recipes import Recipe, in_units

__all__ = [
    "Levels",
    "block_indices",
    "enclosing_grid_values",
    "grid_values_of",
    "levels",
    "per_element",
    "rescaled",
    "snap",
    "values_of",
    "with_levels",
    "with_minima",
]


class Levels(NamedTuple):
    """The stored scale of every element, with its zero point or minimum if it has one.

    The levels of an element are `step * (grid value - zero_point) + minimum`. An outlier, which is
    stored separately, has its stored value as its only level.

    Attributes:
      step: the scales.
      zero_point: the zero points, or None.
      minimum: the minima, or None.
      outlier: the values of outliers, NaN for all other elements; None for a recipe without them.

    Example:
      >>> import jax.numpy as jnp
      >>> Levels(jnp.full(3, 0.5), zero_point=None, minimum=None).step.tolist()
      [0.5, 0.5, 0.5]
    """

    step: jax.Array
    zero_point: jax.Array | None
    minimum: jax.Array | None
    outlier: jax.Array | None = None


def levels(q: Quantized) -> Levels:
    """Returns the levels of each element, as float32 arrays of the tensor's shape."""
    result = Levels(per_element(q, q.scales), None, None)
    if q.zero_point is not None and q.recipe.scaling.zero_point == "integer":
        result = result._replace(zero_point=per_element(q, q.zero_point.astype(jnp.float32)))
    elif (minimum := q.minima) is not None:
        result = result._replace(minimum=per_element(q, minimum))
    if q.recipe.outliers is not None:
        nothing = jnp.full_like(result.step, jnp.nan)
        result = result._replace(outlier=q.recipe.outliers.put(nothing, q.outliers))
    return result


def block_indices(q: Quantized) -> jax.Array:
    """Returns the index of the block of each element, in the order of the scales; int32."""
    counts = q.cut.counts
    return per_element(q, jnp.arange(math.prod(counts), dtype=jnp.int32).reshape(counts))


def per_element(q: Quantized, x: jax.Array) -> jax.Array:
    """Returns one value per block as one value per element."""
    split = q.cut.align_scales(x)
    pairs = zip(q.cut.counts, q.cut.block, strict=True)
    return q.cut.merge(jnp.broadcast_to(split, [n for pair in pairs for n in pair]))


def grid_values_of(q: Quantized) -> jax.Array:
    """Returns the grid values of the codes, minus the zero points."""
    values, zero_point = decode(q.unpack(), q.recipe.element), levels(q).zero_point
    return values if zero_point is None else values - zero_point


def snap(x: jax.Array, levels: Levels, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Rounds values to the levels, by the recipe's rounding.

    Args:
      x: the values, float32.
      levels: their levels, of the same shape.
      recipe: the recipe of the levels.

    Returns:
      The grid values, minus the zero points, and the levels that they represent, which are bitwise
      those of `dequantize`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> levels = Levels(jnp.full(3, 0.5), zero_point=None, minimum=None)
      >>> grid_values, values = snap(jnp.array([0.4, -1.1, 9.0]), levels, jaxq.Recipe("int4"))
      >>> grid_values.tolist(), values.tolist()
      ([1.0, -2.0, 7.0], [0.5, -1.0, 3.5])
    """
    step, zero_point, minimum, _ = levels
    x = x if minimum is None else x - minimum
    units = in_units(x, step, recipe.scale_format)
    grid_values = on_grid(units, zero_point, recipe.rounding, None, recipe)
    return grid_values, values_of(grid_values, levels, recipe)


def enclosing_grid_values(
    x: jax.Array, levels: Levels, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """Returns the two grid values, minus the zero point, that enclose each value.

    For values beyond the grid, these are the two outermost grid values.

    Args:
      x: the values, float32.
      levels: their levels, of the same shape.
      recipe: the recipe of the levels.

    Returns:
      The lower and the upper grid values, float32.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> levels = Levels(jnp.full(2, 0.5), zero_point=None, minimum=None)
      >>> low, high = enclosing_grid_values(jnp.array([0.4, 9.0]), levels, jaxq.Recipe("int4"))
      >>> low.tolist(), high.tolist()
      ([0.0, 6.0], [1.0, 7.0])
    """
    step, zero_point, minimum, _ = levels
    units = in_units(x if minimum is None else x - minimum, step, recipe.scale_format)

    def snap(units: jax.Array, mode: Rounding) -> jax.Array:
        return on_grid(units, zero_point, mode, None, recipe)

    return enclosing(units, *ends_of(zero_point, recipe), snap)


def values_of(grid_values: jax.Array, levels: Levels, recipe: Recipe) -> jax.Array:
    """Returns the levels that grid values represent, bitwise those of `dequantize`.

    Args:
      grid_values: the grid values minus the zero points.
      levels: the levels, of the same shape.
      recipe: the recipe of the levels.

    Returns:
      The values, float32.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> levels = Levels(jnp.full(2, 0.5), zero_point=None, minimum=None)
      >>> values_of(jnp.array([1.0, -2.0]), levels, jaxq.Recipe("int4")).tolist()
      [0.5, -1.0]
    """
    values = restored(grid_values, levels.step, levels.minimum, recipe)
    if levels.outlier is None:
        return values
    return jnp.where(jnp.isnan(levels.outlier), values, levels.outlier)


def with_levels(q: Quantized, grid_values: jax.Array) -> Quantized:
    """Returns a quantized tensor with other codes.

    Args:
      q: the tensor.
      grid_values: the grid values minus the zero point, as `snap` returns them.
    """
    zero_point, fmt = levels(q).zero_point, q.recipe.element
    codes = encode(grid_values if zero_point is None else grid_values + zero_point, fmt)
    codes = codes.reshape(codes.shape or (1,))
    return dataclasses.replace(q, codes=codes if fmt.bits in WHOLE_BYTES else pack(codes, fmt.bits))


def rescaled(q: Quantized, factor: jax.typing.ArrayLike) -> Quantized:
    """Returns a quantized tensor with other scales and the same codes.

    Args:
      q: the tensor; its scaling has no second level in blocks.
      factor: float32 factors of the stored scales, broadcastable to their shape. The products are
        rounded to the scale format.

    Returns:
      The tensor.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> q = jaxq.quantize(jnp.array([0.5, -1.0]), jaxq.Recipe("int2"))
      >>> rescaled(q, 0.5).dequantize().tolist()
      [0.0, -0.5]
    """
    fmt = q.recipe.scale_format
    scale = q.recipe.scaling.rounded(decoded(q.scale, q) * factor)
    return dataclasses.replace(q, scale=scale if fmt.name == "float32" else encode(scale, fmt))


def with_minima(q: Quantized, minimum: jax.Array) -> Quantized:
    """Returns a quantized tensor with other minima and the same codes and scales.

    Args:
      q: the tensor; its scaling stores a minimum for each block.
      minimum: float32 minima, in the shape of the scales, which are rounded to the scale format.

    Returns:
      The tensor.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> recipe = jaxq.Recipe("uint2", scaling=jaxq.recipes.ScaleAndMin())
      >>> q = jaxq.quantize(jnp.array([1.0, 2.0, 3.0, 4.0]), recipe)
      >>> with_minima(q, jnp.array([0.5])).dequantize().tolist()
      [0.5, 1.5, 2.5, 3.5]
    """
    return dataclasses.replace(q, zero_point=encode(minimum, q.recipe.scale_format))
