"""GPTQ for one weight with a given Hessian (`gptq`)."""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from jaxq.ptq._solvers._catalog import GPTQ, Problem, Solver, check_recipe
from jaxq.ptq._solvers._hessian_checks import check_solved, checked_weight
from jaxq.ptq._statistics import Statistics, empty_statistics
from jaxq.quantizers import Quantized, grid_values_of, levels, quantize, with_levels
from jaxq.recipes import Recipe, get_recipe

__all__ = ["gptq"]


def gptq(
    weight: jax.typing.ArrayLike,
    hessian: jax.typing.ArrayLike,
    recipe: str | Recipe,
    *,
    axis: int = 0,
    damping: float = 0.01,
    order: str | None = "static",
) -> Quantized:
    """Quantizes a weight by GPTQ with the Hessian of its input.

    The codes make the output error `tr(E^T H E)` small, where E is the error of the weight.

    Args:
      weight: a float16, bfloat16 or float32 array of at least two axes.
      hessian: the sum of `x x^T` over the tokens, `[inputs, inputs]`, up to a positive factor.
      recipe: as in `jaxq.quantize`; its granularity is relative to `axis`.
      axis: the axis of `weight` that products contract: 0 for a kernel `[inputs, outputs]`, 1 or -1
        for a weight `[outputs, inputs]`.
      damping: as in `GPTQ`.
      order: as in `GPTQ`.

    Returns:
      A `jaxq.Quantized` with the scales of `jaxq.quantize(weight, recipe, axis=axis)`. Inputs that
      are zero for all tokens are rounded to nearest. If the Hessian cannot be factorized (it is
      zero or indefinite, or contains a NaN), the codes are those of rounding to nearest under
      `jit`; without `jit`, an error is raised.

    Raises:
      ValueError: if the recipe is stochastic, shapes do not fit, or the Hessian cannot be
        factorized.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> weight = jnp.array([[0.4, 1.0], [0.4, -0.3]])
      >>> together = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # Both inputs are always equal.
      >>> recipe = jaxq.Recipe("int2")
      >>> jaxq.quantize(weight, recipe).dequantize().tolist()
      [[0.0, 1.0], [0.0, 0.0]]
      >>> ptq.gptq(weight, together, recipe).dequantize().tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
      Transformers" (2023).
    """
    weight, gram, axis = checked_weight("gptq", weight, hessian, axis)
    statistics = dataclasses.replace(empty_statistics((), weight.shape[axis], False), hessian=gram)
    record = get_recipe(recipe)
    check_recipe("gptq", record)
    result, is_solved = _solve(weight, statistics, record, GPTQ(damping, order), axis)
    check_solved("gptq", gram, is_solved)
    return result


@functools.partial(jax.jit, static_argnames=("recipe", "solver", "axis"))
def _solve(
    weight: jax.Array, statistics: Statistics, recipe: Recipe, solver: Solver, axis: int
) -> tuple[Quantized, jax.Array]:
    """Returns the quantized weight, and False if it was rounded to nearest instead."""
    start = quantize(weight, recipe, axis=axis)
    shape = jnp.moveaxis(weight, axis, 0).shape

    def matrix(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.astype(jnp.float32), axis, 0).reshape(shape[0], -1)

    problem = Problem(
        weight=matrix(weight),
        levels=jax.tree.map(matrix, levels(start)),
        nearest=matrix(grid_values_of(start)),
        statistics=statistics,
    )
    solution = solver.solve(problem, recipe)
    grid_values = jnp.moveaxis(solution.grid_values.reshape(shape), 0, axis)
    return with_levels(start, grid_values), solution.solved
