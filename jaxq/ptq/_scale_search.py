"""Search for the scales of a weight, with the errors weighted by the statistics of its input."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Levels, Quantized, rescaled, snap
from jaxq.recipes import PerBlock, Recipe

__all__ = ["Blocks", "ScaleSearch", "Searching", "run_length", "searched"]


@dataclasses.dataclass(frozen=True)
class ScaleSearch:
    r"""A search for the scale of each block of a weight, as an option of a solver.

    Each block tries its own scale times some factors, rounded to the recipe's scale format, and
    takes the first one with the smallest error of the outputs when its elements are rounded to the
    nearest levels. With e the error of the block and h the part of the Hessian that belongs to its
    inputs, the error is `e^T h e`, or `sum h_ii e_i^2` if only the diagonal counts. The result has
    the recipe's own scale format and blocks; zero points and tensor scales stay as they are.

    Attributes:
      weighting: `"hessian"` uses the part of the Hessian that belongs to the block's inputs;
        `"square"` only its diagonal, the sum of x^2, which others call importance matrix (imatrix).
      factors: the tried factors of the scale. The first one wins among equals, so put 1 first.

    Raises:
      ValueError: if `weighting` is unknown, or `factors` are not positive.

    Example:
      >>> from jaxq import ptq
      >>> solver = ptq.GPTQ(search=ptq.ScaleSearch("square"))
      >>> solver.search.factors[:3]
      (1.0, 0.975, 0.95)
    """

    weighting: str = "hessian"
    factors: tuple[float, ...] = tuple(1 - i / 40 for i in range(21))

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        if self.weighting not in ("hessian", "square"):
            raise ValueError(
                f"ScaleSearch: `weighting` must be 'hessian' or 'square', got {self.weighting!r}."
            )
        if not self.factors or not all(0 < factor < np.inf for factor in self.factors):
            raise ValueError(
                f"ScaleSearch: `factors` must be positive numbers, got {self.factors[:4]}. Leave "
                "them out for 21 factors from 1 down to 0.5."
            )


class Blocks(NamedTuple):
    """The blocks of the leaves that make up a weight.

    Attributes:
      leaves: the quantized leaves.
      numbers: for each element of the weight as matrices, the number of its block, counted through
        the leaves; int32 `[matrices, inputs, outputs]`.
    """

    leaves: tuple[Quantized, ...]
    numbers: jax.Array


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


class Searching(NamedTuple):
    """The static inputs of a search.

    Attributes:
      search: the search.
      recipe: the recipe.
      length: the number of neighboring inputs that a block covers at most, which divides their
        number; only the Hessian of such runs is read.
    """

    search: ScaleSearch
    recipe: Recipe
    length: int


@functools.partial(jax.jit, static_argnames="how")
def searched(
    weight: jax.Array, levels: Levels, blocks: Blocks, statistics: Statistics, how: Searching
) -> tuple[Quantized, ...]:
    """Returns the leaves with the best scales, and their old codes.

    Args:
      weight: the weight as matrices, float32 `[matrices, inputs, outputs]`.
      levels: the levels of its elements.
      blocks: its blocks.
      statistics: the statistics of its input, with a leading axis `[matrices]`.
      how: the search.
    """
    (search, recipe, length), numbers = how, blocks.numbers
    count = sum(q.scale.size for q in blocks.leaves)
    matrices, inputs, outputs = weight.shape
    hessian = statistics.hessian
    assert hessian is not None, "all callers pass one"
    runs = inputs // length
    diagonal = hessian.reshape(matrices, runs, length, runs, length)
    diagonal = jnp.einsum("mrirj->mrij", diagonal)
    # Blocks cover the same inputs in every output.
    own = numbers[:, :, 0].reshape(matrices, runs, length)
    diagonal = jnp.where(own[..., :, None] == own[..., None, :], diagonal, np.float32(0))

    def by_hessian(error: jax.Array) -> jax.Array:
        error = error.reshape(matrices, runs, length, outputs)
        product = jnp.matmul(diagonal, error, precision=lax.Precision.HIGHEST)
        return product.reshape(weight.shape)

    def loss(factor: jax.Array) -> jax.Array:
        steps = [rescaled(q, factor).scales.reshape(-1) for q in blocks.leaves]
        tried = levels._replace(step=jnp.concatenate(steps)[numbers])
        error = snap(weight, tried, recipe)[1] - weight
        if search.weighting == "hessian":
            weighted = by_hessian(error)
        else:
            weighted = statistics.square[..., None] * error
        return jax.ops.segment_sum((error * weighted).reshape(-1), numbers.reshape(-1), count)

    factors = jnp.array(search.factors, jnp.float32)
    best = factors[jnp.argmin(lax.map(loss, factors), axis=0)]
    found, start = [], 0
    for q in blocks.leaves:
        own = best[start : start + q.scale.size].reshape(q.scale.shape)
        found.append(rescaled(q, own))
        start += q.scale.size
    return tuple(found)
