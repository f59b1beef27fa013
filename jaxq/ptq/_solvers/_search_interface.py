"""The interface of searches, which choose the scales of a weight before its codes are chosen."""

import functools
import math
from typing import NamedTuple, Protocol

import jax

from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Levels, Quantized
from jaxq.recipes import PerBlock, Recipe

__all__ = ["Blocks", "Search", "SearchOptions", "SearchProblem", "inputs_per_block", "run_search"]


class Blocks(NamedTuple):
    """The blocks of the leaves that make up a weight.

    Attributes:
      leaves: the quantized leaves.
      indices: the index of the block of each element, counted across all leaves, int32
        `[matrices, inputs, outputs]`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> q = jaxq.quantize(jnp.array([[0.4, 1.0], [0.4, -0.3]]), jaxq.Recipe("int2"))
      >>> ptq.Blocks((q,), indices=jnp.zeros((1, 2, 2), jnp.int32)).indices.shape
      (1, 2, 2)
    """

    leaves: tuple[Quantized, ...]
    indices: jax.Array


class SearchProblem(NamedTuple):
    """A weight whose scales are searched.

    Attributes:
      weight: the weight as matrices, float32 `[matrices, inputs, outputs]`.
      levels: the levels of its elements.
      blocks: its blocks.
      statistics: the statistics of its input, with a leading axis `[matrices]`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> from jaxq.quantizers import Levels
      >>> w, steps = jnp.array([[0.4, 1.0], [0.4, -0.3]]), jnp.ones((1, 2, 2))
      >>> q, indices = jaxq.quantize(w, jaxq.Recipe("int2")), jnp.zeros((1, 2, 2), jnp.int32)
      >>> levels, blocks = Levels(steps, None, None), ptq.Blocks((q,), indices)
      >>> tokens = ptq.collect(jnp.ones((1, 4, 2)))
      >>> problem = ptq.SearchProblem(w[None], levels, blocks, tokens)
      >>> problem.count, [scale.shape for _, scale in problem.by_leaf(jnp.array([2.0]))]
      (1, [(1, 1)])
    """

    weight: jax.Array
    levels: Levels
    blocks: Blocks
    statistics: Statistics

    @property
    def count(self) -> int:
        """The number of blocks."""
        return sum(math.prod(q.cut.counts) for q in self.blocks.leaves)

    def by_leaf(self, x: jax.Array) -> list[tuple[Quantized, jax.Array]]:
        """Returns each leaf with its part of x, one value per block, in the shape of its scales."""
        parts, start = [], 0
        for q in self.blocks.leaves:
            counts = q.cut.counts
            parts.append((q, x[start : start + math.prod(counts)].reshape(counts)))
            start += math.prod(counts)
        return parts


def inputs_per_block(recipe: Recipe, inputs: int) -> int:
    """Returns the number of consecutive inputs that a block of a weight covers."""
    granularity = recipe.granularity
    if not isinstance(granularity, PerBlock):
        return inputs
    assert isinstance(granularity.sizes, tuple)
    assert isinstance(granularity.axes, tuple)
    pairs = zip(granularity.sizes, granularity.axes, strict=True)
    # A recipe describes a weight as `[outputs, inputs]`, so the axis of the inputs is -1 or 1.
    length = next((size for size, axis in pairs if axis % 2), 1)
    return inputs if inputs % length else length


class Search(Protocol):
    """A frozen, hashable dataclass that chooses the scales of a weight before its codes are chosen.

    Pass an instance as the `search` of a solver. It is a static argument of jitted functions.

    Example:
      A search that multiplies each scale by a factor. With the codes that are nearest on the
      recipe's scale, this factor has the least squared error of the weight.

      >>> import dataclasses, jax, jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> from jaxq.quantizers import rescaled, snap
      >>> @dataclasses.dataclass(frozen=True)
      ... class LeastSquares:
      ...     def check(self, owner, recipe):
      ...         if recipe.scaling.zero_point is not None:
      ...             raise ValueError(f"{owner}: use LeastSquares with Symmetric scaling.")
      ...
      ...     def leaves(self, problem, options):
      ...         def block_sums(x):
      ...             blocks = problem.blocks.indices.reshape(-1)
      ...             return jax.ops.segment_sum(x.reshape(-1), blocks, problem.count)
      ...
      ...         _, values = snap(problem.weight, problem.levels, options.recipe)
      ...         power = block_sums(values * values)
      ...         factors = block_sums(problem.weight * values) / jnp.where(power > 0, power, 1)
      ...         return tuple(rescaled(q, factor) for q, factor in problem.by_leaf(factors))
      >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
      >>> def error(solver):
      ...     solve = ptq.quantize_weights(lambda w, x: x @ w, "int4_channel", solver=solver)
      ...     packed, _ = solve(w, [x])
      ...     return jnp.sum((packed.dequantize() - w) ** 2)
      >>> bool(error(ptq.RTN(search=LeastSquares())) < error(ptq.RTN()))
      True
    """

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError if the search does not support a recipe."""
        ...

    def leaves(self, problem: SearchProblem, options: "SearchOptions") -> tuple[Quantized, ...]:
        """Returns the leaves with new scales and unchanged codes. Traced under `jax.jit`."""
        ...


class SearchOptions(NamedTuple):
    """The arguments of a search that are static under `jax.jit`.

    Attributes:
      search: the record that chooses scales, such as `HQQ()`.
      recipe: the recipe of the weight.
      length: the largest number of consecutive inputs in a block, a divisor of the number of
        inputs. Only diagonal blocks of the Hessian of this size are read.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> ptq.SearchOptions(ptq.HQQ(), jaxq.get_recipe("int4_g32"), length=32).length
      32
    """

    search: Search
    recipe: Recipe
    length: int


@functools.partial(jax.jit, static_argnames="options")
def run_search(problem: SearchProblem, options: SearchOptions) -> tuple[Quantized, ...]:
    """Returns the leaves of a weight with searched scales and unchanged codes."""
    return options.search.leaves(problem, options)
