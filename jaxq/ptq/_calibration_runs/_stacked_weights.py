"""Stacked weights, such as experts: the leaves, recipes and levels of their matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import Product, WeightToQuantize, expert_axis
from jaxq.ptq._statistics import MatrixLayout
from jaxq.quantizers import Levels
from jaxq.recipes import Recipe

__all__ = ["align_levels", "leaf_shares", "levels_for", "matrices_by_recipe"]


def leaf_shares(
    product: Product, weight: WeightToQuantize, layout: MatrixLayout
) -> dict[int, np.ndarray]:
    """Returns the share of each leaf in each matrix, float64 `[matrices]`, by the leaf's index.

    If a matrix consists of several leaves, they have equal shares.
    """
    leaves = tuple(weight.origin.leaves.values())
    axis = expert_axis(product, weight.operand)
    if axis is None or axis not in layout.axes.batch:
        return {leaf: np.full(layout.sizes[0], 1 / len(leaves)) for leaf in leaves}
    indices = _matrix_indices(layout, axis)
    shares = {leaf: np.zeros(layout.sizes[0]) for leaf in leaves}
    for piece in weight.origin.pieces:
        start = piece.at[axis]
        shares[piece.leaf] += (start <= indices) & (indices < start + piece.box[axis])
    return shares


def matrices_by_recipe(
    weight: WeightToQuantize, layout: MatrixLayout
) -> list[tuple[Recipe, np.ndarray]]:
    """Returns the recipes of a weight, each with the indices of its matrices.

    Every expert must have a recipe.
    """
    if weight.experts is None:
        return [(weight.recipe, np.arange(layout.sizes[0]))]
    indices = _matrix_indices(layout, weight.experts.axis)
    masks: dict[Recipe, np.ndarray] = {}
    for start, stop, recipe in weight.experts.parts:
        assert recipe is not None
        mask = (start <= indices) & (indices < stop)
        masks[recipe] = masks.get(recipe, np.zeros(indices.shape, bool)) | mask
    return [(recipe, np.flatnonzero(mask)) for recipe, mask in masks.items()]


def _matrix_indices(layout: MatrixLayout, axis: int) -> np.ndarray:
    """Returns the index of each matrix along a batch axis."""
    lengths = [layout.shape[a] for a in layout.axes.batch]
    return np.indices(lengths)[layout.axes.batch.index(axis)].reshape(-1)


def align_levels(parts: Sequence[Levels]) -> list[Levels]:
    """Returns levels that have the same fields, so that they can be joined.

    Missing zero points and minima become 0, and missing outliers NaN.
    """
    fills = {"zero_point": 0, "minimum": 0, "outlier": np.nan}

    def filled(levels: Levels, name: str) -> jax.Array | None:
        value = getattr(levels, name)
        is_needed = any(getattr(other, name) is not None for other in parts)
        return jnp.full_like(levels.step, fills[name]) if value is None and is_needed else value

    return [levels._replace(**{name: filled(levels, name) for name in fills}) for levels in parts]


def levels_for(levels: Any, recipe: Recipe) -> Levels:
    """Removes the fields of levels that a recipe does not have, which `align_levels` added."""
    offset = recipe.scaling.zero_point
    return Levels(
        step=levels.step,
        zero_point=levels.zero_point if offset == "integer" else None,
        minimum=levels.minimum if offset == "minimum" else None,
        outlier=levels.outlier if recipe.outliers is not None else None,
    )
