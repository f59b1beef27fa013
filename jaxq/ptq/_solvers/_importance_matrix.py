"""GGUF's searches for scales, weighted by the importance of the inputs on calibration data."""

import dataclasses
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.cutting import axis_of_blocks
from jaxq._jax.arithmetic import divide
from jaxq.ptq._solvers._search_interface import SearchOptions, SearchProblem
from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import Recipe, title_of

__all__ = ["ImportanceMatrix"]


@dataclasses.dataclass(frozen=True)
class ImportanceMatrix:
    """The search of a GGUF recipe, weighted by an importance matrix, as the `search` of a solver.

    Recipes with `jaxq.recipes.SuperBlocks`, such as `"q4_k"`, search for the scales and minima of
    their blocks. This record repeats that search with the mean square of each input as the weight
    of its errors, as llama-quantize does with an importance matrix (imatrix). `RTN` then gives the
    bytes of `jaxq.interop.gguf.quantize(weight, type, importance=mean_squares)`, up to the codes of
    blocks with scale 0. If all inputs are 0, all are equally important.

    Example:
      >>> from jaxq import ptq
      >>> model = lambda params, x: x @ params["kernel"]
      >>> solver = ptq.RTN(search=ptq.ImportanceMatrix())
      >>> quantize = ptq.quantize_weights(model, "q4_k", solver=solver)
    """

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError unless a recipe always searches for its scales."""
        scaling = recipe.scaling
        if not scaling.searches_elements or not scaling.takes_importance(recipe.element):
            raise ValueError(
                f"{owner}: with ImportanceMatrix, `recipe` must have the scaling SuperBlocks and "
                f"a search, such as 'q4_k', got {title_of(recipe)}. Use ptq.ScaleSearch('square')."
            )

    def leaves(self, problem: SearchProblem, options: SearchOptions) -> tuple[Quantized, ...]:
        """Returns the leaves with new scales and minima, and with unchanged codes."""
        leaves, block_of = problem.blocks
        block = leaves[0].cut.block
        length = block[axis_of_blocks(block)]
        if options.length != length:
            raise ValueError(
                f"ImportanceMatrix: blocks of {length} consecutive inputs are needed, got blocks "
                f"of {options.length}. Exclude convolutions by a rule, or use search=None."
            )
        shape, size = problem.weight.shape, problem.count * length
        inputs = lax.broadcasted_iota(jnp.int32, shape, 1)
        indices = block_of * np.int32(length) + inputs % np.int32(length)
        importance = jnp.broadcast_to(_mean_squares(problem.statistics)[..., None], shape)

        def by_block(x: jax.Array) -> jax.Array:
            """Returns `[blocks, elements]` for all leaves; 0 for elements of other products."""
            flat = jnp.zeros(size, x.dtype).at[indices.reshape(-1)].set(x.reshape(-1))
            return flat.reshape(problem.count, length)

        arrays = [by_block(a) for a in (problem.weight, importance, jnp.ones(shape, bool))]
        results, start = [], 0
        for q in leaves:
            end = start + math.prod(q.cut.counts)
            x, weights, is_present = (_as_leaf(a[start:end], q) for a in arrays)
            results.append(_rescaled(q, quantize(x, q.recipe, importance=weights), is_present))
            start = end
        return tuple(results)


def _mean_squares(statistics: Statistics) -> jax.Array:
    """Returns the mean squares of the inputs, `[matrices, inputs]`; 1 if all of them are 0."""
    tokens = jnp.maximum(statistics.tokens, 1).astype(jnp.float32)
    square = divide(statistics.square, tokens[..., None])
    return jnp.where((square > 0).any(axis=-1, keepdims=True), square, np.float32(1))


def _as_leaf(x: jax.Array, q: Quantized) -> jax.Array:
    """Returns numbers `[blocks, elements]` in the shape of a leaf."""
    x = x.reshape(*q.cut.counts, x.shape[1])
    return jnp.moveaxis(x, -1, axis_of_blocks(q.cut.block) + 1).reshape(q.shape)


def _rescaled(q: Quantized, other: Quantized, is_present: jax.Array) -> Quantized:
    """Returns a leaf with the scales of another where its elements belong to the product.

    Args:
      q: the leaf.
      other: the leaf with other scales.
      is_present: True for the elements that belong to the product, in the shape of the leaf.
    """
    axis = axis_of_blocks(q.cut.block)
    size = q.cut.block[axis] * q.recipe.scaling.blocks_per_run
    runs = q.shape[axis] // size
    is_present = lax.slice_in_dim(is_present, 0, is_present.shape[axis], size, axis)

    def select(new: jax.Array | None, old: jax.Array) -> jax.Array:
        # A super-block has one or several numbers in each array, one after the other.
        assert new is not None
        return jnp.where(jnp.repeat(is_present, old.shape[axis] // runs, axis), new, old)

    return dataclasses.replace(
        q,
        scale=select(other.scale, q.scale),
        second=tuple(map(select, other.second, q.second)),
        zero_point=None if q.zero_point is None else select(other.zero_point, q.zero_point),
    )
