"""Assignment of the matrices of a stack of experts to leaves and to recipes."""

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import Product, QuantizedWeight, expert_axis
from jaxq.ptq._collectors import Layout
from jaxq.quantizers import Levels
from jaxq.recipes import Recipe

__all__ = ["align_levels", "by_leaf", "by_recipe", "levels_for"]


def by_leaf(product: Product, weight: QuantizedWeight, layout: Layout) -> dict[int, np.ndarray]:
    """Returns for each leaf its share of each matrix, float64 `[matrices]`.

    If a matrix consists of several leaves, they have equal shares.
    """
    leaves = tuple(weight.origin.leaves.values())
    axis = expert_axis(product, weight.operand)
    if axis is None or axis not in layout.axes.batch:
        return {leaf: np.full(layout.sizes[0], 1 / len(leaves)) for leaf in leaves}
    places = _places(layout, axis)
    found = {leaf: np.zeros(layout.sizes[0]) for leaf in leaves}
    for piece in weight.origin.pieces:
        start = piece.at[axis]
        found[piece.leaf] += (start <= places) & (places < start + piece.box[axis])
    return found


def by_recipe(weight: QuantizedWeight, layout: Layout) -> list[tuple[Recipe, np.ndarray]]:
    """Returns the recipes of a weight, each with the indices of its matrices.

    No expert may stay a float.
    """
    if weight.experts is None:
        return [(weight.recipe, np.arange(layout.sizes[0]))]
    places = _places(layout, weight.experts.axis)
    found: dict[Recipe, np.ndarray] = {}
    for start, stop, recipe in weight.experts.parts:
        assert recipe is not None
        own = (start <= places) & (places < stop)
        found[recipe] = found.get(recipe, np.zeros(places.shape, bool)) | own
    return [(recipe, np.flatnonzero(mask)) for recipe, mask in found.items()]


def _places(layout: Layout, axis: int) -> np.ndarray:
    """Returns the index of each matrix along a batch axis."""
    lengths = [layout.shape[a] for a in layout.axes.batch]
    return np.indices(lengths)[layout.axes.batch.index(axis)].reshape(-1)


def align_levels(found: list[Levels]) -> list[Levels]:
    """Returns levels that have the same fields, with values for the missing ones.

    Missing zero points and minima become 0, and missing outliers NaN.
    """
    fills = {"zero_point": 0, "minimum": 0, "outlier": np.nan}

    def filled(levels: Levels, name: str) -> jax.Array | None:
        own = getattr(levels, name)
        others = any(getattr(other, name) is not None for other in found)
        return jnp.full_like(levels.step, fills[name]) if own is None and others else own

    return [levels._replace(**{name: filled(levels, name) for name in fills}) for levels in found]


def levels_for(levels: Any, recipe: Recipe) -> Levels:
    """Returns levels without fields that a recipe does not have; the inverse of `align_levels`."""
    offset = recipe.scaling.zero_point
    return Levels(
        step=levels.step,
        zero_point=levels.zero_point if offset == "integer" else None,
        minimum=levels.minimum if offset == "minimum" else None,
        outlier=levels.outlier if recipe.outliers is not None else None,
    )
