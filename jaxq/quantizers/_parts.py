"""Separation of a recipe with traced widths into arrays and a static record."""

import dataclasses
from typing import NamedTuple

import jax
from jax import numpy as jnp

from jaxq.numerics import BinaryGrid
from jaxq.recipes import Recipe

__all__ = ["Parts", "join_parts", "parts_of"]


class Parts(NamedTuple):
    """The traced and the static part of a recipe.

    Attributes:
      grid: the element format if it is a `BinaryGrid`, with arrays as numbers; else None.
      recipe: the recipe, hashable: a grid of zeros takes the place of `grid`.
    """

    grid: BinaryGrid | None
    recipe: Recipe


def parts_of(recipe: Recipe) -> Parts:
    """Splits a recipe into its parts; `join_parts` joins them again."""
    grid = recipe.format
    if not isinstance(grid, BinaryGrid):
        return Parts(None, recipe)
    integers, reals = ("mantissa_bits", "emin", "emax"), ("max", "lowest")
    numbers = {name: jnp.asarray(getattr(grid, name), jnp.int32) for name in integers}
    numbers |= {name: jnp.asarray(getattr(grid, name), jnp.float32) for name in reals}
    static = dataclasses.replace(recipe, format=jax.tree.map(lambda _: 0, grid))
    return Parts(dataclasses.replace(grid, **numbers), static)


def join_parts(grid: BinaryGrid | None, recipe: Recipe) -> Recipe:
    """Puts the traced grid back into the recipe."""
    return recipe if grid is None else dataclasses.replace(recipe, format=grid)
