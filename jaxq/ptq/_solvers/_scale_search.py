"""Search for the scales of a weight with the smallest output error on calibration data."""

import dataclasses

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import choice, numbers_of
from jaxq.ptq._solvers._search_interface import SearchOptions, SearchProblem
from jaxq.quantizers import Quantized, rescaled, snap
from jaxq.recipes import Recipe

__all__ = ["ScaleSearch"]


@dataclasses.dataclass(frozen=True)
class ScaleSearch:
    r"""A grid search for the scale of each block, as the `search` of a solver.

    For each block, the recipe's scale is multiplied by every factor and rounded to the recipe's
    scale format. The block keeps the first of these scales for which rounding its elements to
    nearest gives the smallest output error. With the block's error e and the submatrix h of the
    Hessian for its inputs, the output error is `e^T h e`, or `sum h_ii e_i^2` if only the diagonal
    is used. The blocks, the scale format, zero points and tensor scales do not change.

    Attributes:
      weighting: `"hessian"` (the default) uses the submatrix of the Hessian for the block's inputs;
        `"square"` uses only its diagonal, the sum of x^2, known as the importance matrix (imatrix).
      factors: the factors to try. The first of equally good factors is chosen, so put 1 first.

    Raises:
      ValueError: if `weighting` is unknown, or `factors` are not positive.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> solver = ptq.GPTQ(search=ptq.ScaleSearch("square"))
      >>> solver.search.factors[:3]
      (1.0, 0.975, 0.95)
    """

    weighting: str = "hessian"
    factors: tuple[float, ...] = tuple(1 - i / 40 for i in range(21))

    def __post_init__(self) -> None:
        names = ("hessian", "square")
        choice("ScaleSearch", "weighting", self.weighting, names, "Use 'hessian'.")
        requirement, remedy = "a tuple of positive numbers", "Omit it for 21 factors from 1 to 0.5."
        factors = numbers_of(
            "ScaleSearch", "factors", self.factors, requirement, lambda f: f > 0, remedy
        )
        object.__setattr__(self, "factors", factors)
        if not factors:
            raise ValueError(f"ScaleSearch: `factors` must not be empty, got (). {remedy}")

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError if the search cannot choose the scales of a recipe."""
        if recipe.scaling.second_level == "blocks":
            other = "ptq.ImportanceMatrix()" if recipe.scaling.searches_elements else "None"
            raise ValueError(
                f"{owner}: with ScaleSearch, `recipe` must store block scales without block-wise "
                f"second-level scales, got {type(recipe.scaling).__name__}. Use search={other}."
            )

    def leaves(self, problem: SearchProblem, options: SearchOptions) -> tuple[Quantized, ...]:
        """Returns the leaves with the best scales and with unchanged codes."""
        weight, levels, blocks, statistics = problem
        recipe, length, indices = options.recipe, options.length, blocks.indices
        matrices, inputs, outputs = weight.shape
        hessian = statistics.hessian
        assert hessian is not None, "all callers pass one"
        runs = inputs // length
        diagonal = hessian.reshape(matrices, runs, length, runs, length)
        diagonal = jnp.einsum("mrirj->mrij", diagonal)
        # A block covers the same inputs for every output, so the first output is enough.
        block = indices[:, :, 0].reshape(matrices, runs, length)
        diagonal = jnp.where(block[..., :, None] == block[..., None, :], diagonal, np.float32(0))

        def times_hessian(error: jax.Array) -> jax.Array:
            error = error.reshape(matrices, runs, length, outputs)
            product = jnp.matmul(diagonal, error, precision=lax.Precision.HIGHEST)
            return product.reshape(weight.shape)

        def loss(factor: jax.Array) -> jax.Array:
            steps = [rescaled(q, factor).scales.reshape(-1) for q in blocks.leaves]
            tried = levels._replace(step=jnp.concatenate(steps)[indices])
            error = snap(weight, tried, recipe)[1] - weight
            if self.weighting == "hessian":
                weighted = times_hessian(error)
            else:
                weighted = statistics.square[..., None] * error
            return jax.ops.segment_sum(
                (error * weighted).reshape(-1), indices.reshape(-1), problem.count
            )

        factors = jnp.array(self.factors, jnp.float32)
        best = factors[jnp.argmin(lax.map(loss, factors), axis=0)]
        return tuple(rescaled(q, leaf_factors) for q, leaf_factors in problem.by_leaf(best))
