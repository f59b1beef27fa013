"""Searches that choose the scales of a weight before a solver chooses its codes."""

import functools
from typing import NamedTuple, Protocol

import jax

from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Levels, Quantized
from jaxq.recipes import PerBlock, Recipe

__all__ = ["Blocks", "Search", "SearchProblem", "Searching", "run_length", "searched"]


class Blocks(NamedTuple):
    """The blocks of the leaves that make up a weight.

    Attributes:
      leaves: the quantized leaves.
      numbers: for each element of the weight as matrices, the number of its block, counted through
        the leaves; int32 `[matrices, inputs, outputs]`.
    """

    leaves: tuple[Quantized, ...]
    numbers: jax.Array


class SearchProblem(NamedTuple):
    """A weight whose scales are searched.

    Attributes:
      weight: the weight as matrices, float32 `[matrices, inputs, outputs]`.
      levels: the levels of its elements.
      blocks: its blocks.
      statistics: the statistics of its input, with a leading axis `[matrices]`.
    """

    weight: jax.Array
    levels: Levels
    blocks: Blocks
    statistics: Statistics

    @property
    def count(self) -> int:
        """The number of blocks."""
        return sum(q.scale.size for q in self.blocks.leaves)

    def by_leaf(self, x: jax.Array) -> list[tuple[Quantized, jax.Array]]:
        """Returns each leaf with its part of values of all blocks, in the shape of its scales."""
        found, start = [], 0
        for q in self.blocks.leaves:
            found.append((q, x[start : start + q.scale.size].reshape(q.scale.shape)))
            start += q.scale.size
        return found


def run_length(recipe: Recipe, inputs: int) -> int:
    """Returns the number of neighboring inputs that a block of a matrix product's weight covers."""
    granularity = recipe.granularity
    if not isinstance(granularity, PerBlock):
        return inputs
    assert isinstance(granularity.sizes, tuple)
    assert isinstance(granularity.axes, tuple)
    pairs = zip(granularity.sizes, granularity.axes, strict=True)
    length = next((size for size, axis in pairs if axis % 2), 1)
    return inputs if inputs % length else length


class Search(Protocol):
    """A frozen record that chooses the scales of a weight before a solver chooses its codes."""

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError if the search cannot serve a recipe."""
        ...

    def leaves(
        self,
        problem: SearchProblem,
        how: "Searching",
    ) -> tuple[Quantized, ...]:
        """Returns the leaves of a weight with other scales, and their old codes; traced."""
        ...


class Searching(NamedTuple):
    """The static inputs of a search.

    Attributes:
      search: the search.
      recipe: the recipe.
      length: the number of neighboring inputs that a block covers at most, which divides their
        number; only the Hessian of such runs is read.
    """

    search: Search
    recipe: Recipe
    length: int


@functools.partial(jax.jit, static_argnames="how")
def searched(
    weight: jax.Array, levels: Levels, blocks: Blocks, statistics: Statistics, how: Searching
) -> tuple[Quantized, ...]:
    """Returns the leaves of a weight with the scales of a search, and their old codes.

    Args:
      weight: the weight as matrices, float32 `[matrices, inputs, outputs]`.
      levels: the levels of its elements.
      blocks: its blocks.
      statistics: the statistics of its input, with a leading axis `[matrices]`.
      how: the search.
    """
    return how.search.leaves(SearchProblem(weight, levels, blocks, statistics), how)
