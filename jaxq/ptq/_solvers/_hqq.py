"""HQQ, a search for the zero points of a weight that needs no calibration data."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer, number
from jaxq.ptq._solvers._search_interface import SearchOptions, SearchProblem
from jaxq.quantizers import Quantized, snap, with_minima
from jaxq.recipes import Recipe

__all__ = ["HQQ"]


class _State(NamedTuple):
    """The state of the iteration.

    Attributes:
      count: the number of iterations so far.
      zero: the zero point of each block.
      error: the smallest mean absolute error so far.
      improved: True if the last iteration reduced the error, or before the first one.
    """

    count: jax.Array
    zero: jax.Array
    error: jax.Array
    improved: jax.Array


@dataclasses.dataclass(frozen=True)
class HQQ:
    r"""Half-quadratic search for the zero point of each block, as the `search` of a solver.

    With the scale s and the codes `q = clip(round(w / s + z))`, the search minimizes
    `sum |w - s (q - z)|^p` over a real zero point z. Each iteration shrinks the errors e of the
    weight to `sign(e) max(|e| - |e|^(p - 1) / beta, 0)`, which model outliers, sets the zero point
    of a block to the mean of `q - (w - e) / s`, and multiplies beta by kappa. The search stops when
    the mean of `|e|` over the weight no longer falls. The minimum `-s z` is stored in the recipe's
    scale format; scales do not change. The search uses no calibration data.

    Attributes:
      norm: the exponent p, in (0, 1].
      beta: the initial value of beta, positive.
      kappa: the factor by which beta grows in each iteration, positive.
      iterations: the maximum number of iterations, positive.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> ptq.get_solver("hqq") == ptq.RTN(search=ptq.HQQ())
      True
      >>> recipe = jaxq.Recipe("uint4", jaxq.PerBlock(64), jaxq.recipes.ScaleAndMin(stored=True))

    References:
      Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        number("HQQ", "norm", self.norm, "a number in (0, 1]", lambda v: 0 < v <= 1, "Use 0.7.")
        remedy = "Omit it to use the default."
        for name, value in (("beta", self.beta), ("kappa", self.kappa)):
            number("HQQ", name, value, "a positive number", lambda v: v > 0, remedy)
        integer("HQQ", "iterations", self.iterations, remedy, least=1)

    def check(self, owner: str, recipe: Recipe) -> None:
        """Raises a ValueError unless a recipe stores a minimum for each block, and no outliers."""
        if recipe.scaling.zero_point != "minimum" or recipe.scaling.second_level is not None:
            raise ValueError(
                f"{owner}: with HQQ, `recipe` must store a minimum per block, got the scaling "
                f"{type(recipe.scaling).__name__}. Use jaxq.recipes.ScaleAndMin(stored=True)."
            )
        if recipe.outliers is not None:
            raise ValueError(
                f"{owner}: with HQQ, `recipe` must not store outliers, got {recipe.outliers}. Use "
                "outliers=None, or a ptq.ScaleSearch."
            )

    def leaves(self, problem: SearchProblem, options: SearchOptions) -> tuple[Quantized, ...]:
        """Returns the leaves with the best minima and with unchanged codes and scales."""
        weight, levels, indices = problem.weight, problem.levels, problem.blocks.indices
        assert levels.minimum is not None, "checked before"
        step = jnp.where(levels.step > 0, levels.step, np.float32(1))

        def block_mean(x: jax.Array) -> jax.Array:
            blocks = indices.reshape(-1)
            total = jax.ops.segment_sum(x.reshape(-1), blocks, problem.count)
            ones = jnp.ones(blocks.shape, jnp.float32)
            return total / jax.ops.segment_sum(ones, blocks, problem.count)

        def iterate(state: _State) -> _State:
            tried = levels._replace(step=step, minimum=-state.zero[indices] * step)
            q, values = snap(weight, tried, options.recipe)
            error = weight - values
            size = jnp.abs(error)
            beta = np.float32(self.beta) * np.float32(self.kappa) ** state.count.astype(jnp.float32)
            # |e|^(p - 1) is infinite at 0.
            bound = jnp.where(size > 0, size, 1) ** np.float32(self.norm - 1) / beta
            outlier = jnp.sign(error) * lax.max(size - bound, np.float32(0))
            zero = block_mean(q - (weight - outlier) / step)
            mean_error = jnp.mean(size)
            return _State(
                count=state.count + 1,
                zero=zero,
                error=lax.min(mean_error, state.error),
                improved=mean_error < state.error,
            )

        def is_unfinished(state: _State) -> jax.Array:
            return (state.count < self.iterations) & state.improved

        state = _State(
            count=jnp.int32(0),
            zero=block_mean(-levels.minimum / step),
            error=jnp.float32(np.inf),
            improved=jnp.bool_(True),
        )
        zero = lax.while_loop(is_unfinished, iterate, state).zero
        return tuple(
            with_minima(q, -leaf_zero * q.scales) for q, leaf_zero in problem.by_leaf(zero)
        )
