"""Leaves with different recipes that a product multiplies as one array, such as experts.

The leaves are concatenated along an axis that the product does not contract: experts along a batch
or free axis, or the outputs of several weights along a free axis.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq.models._reading import LOOK_UP, Piece, Product, contraction_of
from jaxq.models._rules import Rule
from jaxq.products import ProductRecipe, is_stochastic, placed
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe

__all__ = ["Experts", "expert_axis", "experts_of"]


class _Part(NamedTuple):
    """One leaf: its range along the axis, and its recipe or None."""

    start: int
    stop: int
    recipe: Recipe | None


class Experts(NamedTuple):
    """The recipes of the leaves of a stack, which a product multiplies as one array. Hashable.

    Attributes:
      operand: the index of the stack among the product's operands.
      axis: the axis along which the leaves lie.
      parts: the leaves in their order.
      shared: the product recipe and the output recipe, which all leaves share.
    """

    operand: int
    axis: int
    parts: tuple[_Part, ...]
    shared: tuple[ProductRecipe, Recipe | None]

    def recipe(self, piece: Piece) -> Recipe | None:
        """Returns the recipe of a leaf, given its piece of the stack."""
        return next(part.recipe for part in self.parts if part.start == piece.at[self.axis])

    def alone(self, piece: Piece, shape: tuple[int, ...]) -> tuple[Piece, tuple[int, ...]]:
        """Returns the piece of a leaf and the shape of a stack that consists of this leaf alone."""
        at = (*piece.at[: self.axis], 0, *piece.at[self.axis + 1 :])
        shape = (*shape[: self.axis], piece.box[self.axis], *shape[self.axis + 1 :])
        return dataclasses.replace(piece, at=at), shape

    def quantized(self, eqn: Any, stack: jax.Array) -> jax.Array:
        """Returns a stack with each leaf quantized by its recipe."""
        axes, arrays = contraction_of(eqn).axes[self.operand], []
        for start, stop, recipe in self.parts:
            x = lax.slice_in_dim(stack, start, stop, axis=self.axis)
            if recipe is not None:
                granularity = placed(recipe.granularity, x.shape, axes)
                x = fake_quant(x, dataclasses.replace(recipe, granularity=granularity))
            arrays.append(x)
        return jnp.concatenate(arrays, self.axis)


def experts_of(owner: str, product: Product, operand: int, rules: Sequence[Rule | None]) -> Experts:
    """Returns the recipes of leaves that a product multiplies as one array.

    Args:
      owner: the name of the calling function, for errors.
      product: the product.
      operand: the index of the stack among its operands.
      rules: the rule of each piece of the stack, or None.

    Raises:
      ValueError: if the leaves do not lie along an axis that is not contracted, if rules differ in
        more than the weight's recipe, or if a recipe draws random bits.
    """
    origin, axis = product.origins[operand], expert_axis(product, operand)
    assert origin is not None
    if axis is None:
        raise ValueError(
            f"{owner}: `rules` must give one recipe to the weights that {product.where} multiplies "
            "as one array, unless they lie along its experts or outputs. Write one rule that "
            "matches all of them."
        )
    parts, shared = [], set()
    for piece, rule in sorted(zip(origin.pieces, rules, strict=True), key=lambda p: p[0].at):
        recipe, output = (None, None) if rule is None else (rule.product, rule.output)
        weight = None if recipe is None else recipe.operands[1]
        if weight is not None and is_stochastic(weight):
            raise ValueError(
                f"{owner}: weights that are multiplied as one array with different recipes must be "
                f"rounded deterministically, got a random rounding for {piece.path!r}. Use "
                "rounding='nearest_even'."
            )
        start = piece.at[axis]
        parts.append(_Part(start, start + piece.box[axis], weight))
        recipe = dataclasses.replace(recipe or ProductRecipe(), rhs=None)
        shared.add((recipe, output if isinstance(output, Recipe) else None))
    if len(shared) > 1:
        raise ValueError(
            f"{owner}: the rules of the weights that {product.where} multiplies as one array must "
            "differ only in the recipe of the weight, got other recipes for other tensors. Use "
            "recipes of the weight only, such as 'int4_g32', or one rule."
        )
    recipe, _ = next(iter(shared))
    if recipe.hadamard or recipe.execution != "emulated" or recipe.residuals != "quantized":
        raise ValueError(
            f"{owner}: weights that {product.where} multiplies as one array with different recipes "
            "must have no Hadamard transform, execution='emulated' and residuals='quantized', got "
            "another product recipe. Give them one rule."
        )
    return Experts(operand, axis, tuple(parts), shared.pop())


def expert_axis(product: Product, operand: int) -> int | None:
    """Returns the axis along which a product's operand is a stack of leaves, or None.

    Batch axes come before free axes; leaves along a contracted axis are no stack.
    """
    origin, shape = product.origins[operand], product.operands[operand].shape
    if origin is None or origin.computed or len(origin.paths) == 1 or product.operation == LOOK_UP:
        return None
    batch, free, _ = contraction_of(product.eqn).axes[operand]
    return next((axis for axis in (*batch, *free) if _stacked(origin.pieces, axis, shape)), None)


def _stacked(pieces: Sequence[Piece], axis: int, shape: tuple[int, ...]) -> bool:
    """Returns whether a view is the concatenation of its pieces along an axis."""
    expected_start = 0
    if any(piece.axes is None for piece in pieces):
        return False
    for piece in sorted(pieces, key=lambda piece: piece.at[axis]):
        if piece.at[axis] != expected_start:
            return False
        expected_start += piece.box[axis]
        if piece.box[:axis] + piece.box[axis + 1 :] != shape[:axis] + shape[axis + 1 :]:
            return False
    return expected_start == shape[axis]
