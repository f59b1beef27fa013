"""Search for the scales of a weight, with the errors weighted by the statistics of its input."""

import dataclasses

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.ptq._searching import Searching, SearchProblem
from jaxq.quantizers import Quantized, rescaled, snap
from jaxq.recipes import Recipe

__all__ = ["ScaleSearch"]


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

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError if the search cannot choose the scales of a recipe."""
        if recipe.scaling.second_level == "blocks":
            raise ValueError(
                f"{owner}: `recipe` must store the scale of each block by itself for a "
                f"ScaleSearch, got the scaling {type(recipe.scaling).__name__}. Use search=None."
            )

    def leaves(self, problem: SearchProblem, how: Searching) -> tuple[Quantized, ...]:
        """Returns the leaves with the best scales, and their old codes."""
        weight, levels, blocks, statistics = problem
        recipe, length, numbers = how.recipe, how.length, blocks.numbers
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
            if self.weighting == "hessian":
                weighted = by_hessian(error)
            else:
                weighted = statistics.square[..., None] * error
            return jax.ops.segment_sum(
                (error * weighted).reshape(-1), numbers.reshape(-1), problem.count
            )

        factors = jnp.array(self.factors, jnp.float32)
        best = factors[jnp.argmin(lax.map(loss, factors), axis=0)]
        return tuple(rescaled(q, own) for q, own in problem.by_leaf(best))
