"""Look-ups in a quantized table, which quantize only the gathered rows if those are fewer.

If each row has its own scales, quantizing it alone gives the same values as within the table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxq._base.shapes import holds
from jaxq.products import is_stochastic
from jaxq.quantizers import fake_quant
from jaxq.recipes import PerBlock, Recipe

__all__ = ["look_up"]


def look_up(
    eqn: Any,
    gather: Callable[[jax.Array], jax.Array],
    table: jax.Array,
    recipe: Recipe,
    key: jax.Array | None,
) -> jax.Array:
    """Returns the result of a look-up in a quantized table.

    Args:
      eqn: the equation of the look-up, a `lax.gather`.
      gather: the equation as a function of the table.
      table: the table.
      recipe: the table's recipe, on the table's own axes.
      key: a key, if the recipe is stochastic.
    """
    rows = _of_rows(eqn.params, table.shape, recipe)
    if rows is None or holds(lambda: eqn.outvars[0].aval.size >= table.size):
        return gather(fake_quant(table, recipe, key=key))
    return fake_quant(gather(table), rows)


def _of_rows(params: Any, shape: tuple[int, ...], recipe: Recipe) -> Recipe | None:
    """Returns the recipe for gathered rows; None if quantizing rows alone would change values."""
    spans_rows = not recipe.scaling.is_local or recipe.outliers is not None
    fill = params["fill_value"]  # None also fills with NaN.
    if spans_rows or is_stochastic(recipe) or not (fill is None or np.isnan(fill)):
        return None
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    removed_axes = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    remaining_axes = [axis for axis in range(len(shape)) if axis not in removed_axes]
    block = recipe.cut(shape).block
    cut_axes = {*removed_axes, *(axis for axis in remaining_axes if sizes[axis] != shape[axis])}
    if any(block[axis] != 1 for axis in cut_axes) or not remaining_axes:
        return None
    lengths = tuple(block[axis] for axis in remaining_axes)
    return dataclasses.replace(recipe, granularity=PerBlock(lengths, numbers.offset_dims, pad=True))
