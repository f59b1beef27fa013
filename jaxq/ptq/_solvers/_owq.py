"""OWQ, which stores the most sensitive inputs of a weight as floats and solves the others."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import choice, number
from jaxq.numerics import encode
from jaxq.products import is_stochastic
from jaxq.ptq._solvers._gptq_algorithm import Settings, Solution, damped_hessian, solve
from jaxq.ptq._solvers._hessian_checks import check_solved, checked_weight
from jaxq.quantizers import (
    Levels,
    Quantized,
    grid_values_of,
    levels,
    quantize,
    values_of,
    with_levels,
)
from jaxq.recipes import Outliers, Recipe, get_recipe

__all__ = ["check_owq_order", "owq", "owq_leaf"]


def owq(
    weight: jax.typing.ArrayLike,
    hessian: jax.typing.ArrayLike,
    recipe: str | Recipe,
    *,
    axis: int = 0,
    damping: float = 0.01,
    order: str | None = "static",
) -> Quantized:
    """Quantizes a weight by GPTQ, except for the most sensitive inputs, which stay floats.

    With the Hessian `H = sum x x^T` and the error E of rounding to nearest, the sensitivity of
    input j is `H_jj |E_j|^2`. The weights of the most sensitive inputs are stored as the recipe's
    outliers, and the scales are computed without them. Their values are adjusted to the chosen
    codes of the other inputs such that the output error is smallest.

    Args:
      weight: a float16, bfloat16 or float32 array of at least two axes.
      hessian: the sum of `x x^T` over the tokens, `[inputs, inputs]`, up to a positive factor.
      recipe: a recipe with `outliers` and without their `sigma`. As many inputs stay floats as fit
        into the number of outliers. The granularity is relative to `axis`.
      axis: the axis of `weight` that products contract: 0 for a kernel `[inputs, outputs]`, 1 or -1
        for a weight `[outputs, inputs]`.
      damping: as in `GPTQ`.
      order: `"static"` or None, as in `GPTQ`.

    Returns:
      A `jaxq.Quantized`. If the Hessian cannot be factorized, the codes are those of rounding to
      nearest under `jit`; without `jit`, an error is raised.

    Raises:
      ValueError: if the recipe is stochastic or has too few outliers for one input, shapes do not
        fit, `order` is unknown, or the Hessian cannot be factorized.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> weight = jnp.array([[0.4, 1.0], [0.4, -0.3]])
      >>> second = jnp.diag(jnp.array([1.0, 100.0]))  # The second input is the larger one.
      >>> recipe = jaxq.Recipe("int2", outliers=jaxq.recipes.Outliers(0.5))
      >>> q = ptq.owq(weight, second, recipe)
      >>> [[round(float(value), 2) for value in row] for row in q.dequantize()]
      [[0.0, 1.0], [0.4, -0.3]]

    References:
      Lee et al., "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of
      Large Language Models" (2024).
    """
    weight, gram, axis = checked_weight("owq", weight, hessian, axis)
    requirement = "a number of at least 0"
    number("owq", "damping", damping, requirement, lambda d: d >= 0, "Use 0.01.")
    record = get_recipe(recipe)
    check_owq_order("owq", order)
    if record.outliers is None or record.outliers.sigma is not None or is_stochastic(record):
        raise ValueError(
            "owq: `recipe` must have outliers without `sigma` and round deterministically, got "
            f"{record.outliers} and rounding={record.rounding!r}. Use, for example, "
            "outliers=jaxq.recipes.Outliers(0.01)."
        )
    inputs = weight.shape[axis]
    count = _float_input_count(record.outliers, weight, inputs)
    if not 0 < count < inputs:
        raise ValueError(
            f"owq: `recipe` must have outliers for at least one of the {inputs} inputs, got the "
            f"fraction {record.outliers.fraction}. Use at least {1 / inputs:.3g}."
        )
    options = _Options(record, axis, Settings(damping, order), count)
    result, solution = _owq(weight, gram, options)
    check_solved("owq", gram, solution.solved)
    return result


def check_owq_order(owner: str, order: str | None) -> None:
    """Raises a ValueError unless OWQ supports an order."""
    choice(owner, "order", order, ("static", None), "Use 'static'.")


def _float_input_count(outliers: Outliers, weight: jax.Array, inputs: int) -> int:
    """Returns the number of inputs whose weights fit into the number of outliers."""
    return outliers.count(weight.size) // (weight.size // inputs)


def owq_leaf(
    start: Quantized, weight: jax.Array, hessian: jax.Array, axis: int, settings: Settings
) -> tuple[Quantized, Solution] | None:
    """Quantizes a leaf by OWQ, in the form in which it is stored.

    Args:
      start: the leaf quantized to the nearest levels. The granularity of its recipe is given by the
        axes of the leaf.
      weight: the float32 values that the product multiplies.
      hessian: the sum of `x x^T`.
      axis: the axis of inputs.
      settings: the settings of GPTQ.

    Returns:
      The quantized leaf, and the solution for the inputs that are rounded. None if the recipe has
      no outliers, a number of outliers that depends on the data, or too few for one input.
    """
    outliers, inputs = start.recipe.outliers, weight.shape[axis]
    if outliers is None or outliers.sigma is not None:
        return None
    count = _float_input_count(outliers, weight, inputs)
    if not 0 < count < inputs:
        return None
    options = _Options(start.recipe, axis, settings, count, is_placed=True)
    q, solution = _owq(weight, hessian, options)
    return dataclasses.replace(q, dtype=start.dtype), solution


class _Options(NamedTuple):
    """The static arguments of OWQ.

    Attributes:
      recipe: the recipe.
      axis: the axis of inputs.
      settings: the settings of GPTQ.
      float_inputs: the number of inputs that are stored as floats.
      is_placed: True if the recipe's granularity is given by the axes of the weight, False (the
        default) if it is relative to `axis`.
    """

    recipe: Recipe
    axis: int
    settings: Settings
    float_inputs: int
    is_placed: bool = False


@functools.partial(jax.jit, static_argnames="options")
def _owq(weight: jax.Array, hessian: jax.Array, options: _Options) -> tuple[Quantized, Solution]:
    """Returns the quantized weight, and the solution for the inputs that are rounded."""
    recipe, axis = options.recipe, options.axis
    plain = dataclasses.replace(recipe, outliers=None)
    shape = jnp.moveaxis(weight, axis, 0).shape

    def matrix(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, axis, 0).reshape(shape[0], -1)

    def from_matrix(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(shape), 0, axis)

    w = matrix(weight.astype(jnp.float32))
    place = None if options.is_placed else axis
    nearest = quantize(weight, plain, axis=place)
    error = matrix(values_of(grid_values_of(nearest), levels(nearest), plain)) - w
    cost = jnp.diagonal(hessian) * jnp.sum(jnp.square(error), axis=1)
    floats = jnp.sort(lax.top_k(cost, options.float_inputs)[1])
    is_float = jnp.zeros(len(w), bool).at[floats].set(True)
    rounded = jnp.argsort(is_float, stable=True)[: len(w) - options.float_inputs]
    without_floats = from_matrix(jnp.where(is_float[:, None], 0, w)).astype(weight.dtype)
    start = quantize(without_floats, plain, axis=place)
    rounded_levels = jax.tree.map(lambda x: matrix(x)[rounded], levels(start))
    grid_values = matrix(grid_values_of(start))
    split = _InputSplit(rounded, floats)
    solution, feedback = _solve_rounded(
        w[rounded], rounded_levels, hessian, options._replace(recipe=plain), split
    )
    chosen = jnp.where(solution.solved, solution.grid_values, grid_values[rounded])
    error = values_of(chosen, rounded_levels, plain) - w[rounded]
    change = jnp.matmul(feedback, error, precision=lax.Precision.HIGHEST)
    values = w[floats] - jnp.where(solution.solved, change, 0)
    q = with_levels(start, from_matrix(grid_values.at[rounded].set(chosen)))
    assert recipe.outliers is not None
    # Outliers are stored in the order of their indices, followed by unused entries.
    unused = recipe.outliers.count(weight.size) - values.size
    indices = matrix(jnp.arange(weight.size, dtype=jnp.int32).reshape(weight.shape))[floats]
    order = jnp.argsort(indices.reshape(-1))
    indices = jnp.pad(indices.reshape(-1)[order], (0, unused), constant_values=weight.size)
    values = jnp.pad(values.reshape(-1)[order], (0, unused))
    codes = encode(values, recipe.outliers.element, overflow="propagate")
    with_outliers = dataclasses.replace(q.recipe, outliers=recipe.outliers)
    return dataclasses.replace(q, recipe=with_outliers, outliers=(codes, indices)), solution


class _InputSplit(NamedTuple):
    """The indices of the inputs that are rounded, and of those that are stored as floats."""

    rounded: jax.Array
    floats: jax.Array


def _solve_rounded(
    weight: jax.Array,
    levels: Levels,
    hessian: jax.Array,
    options: _Options,
    split: _InputSplit,
) -> tuple[Solution, jax.Array]:
    """Solves the inputs r that are rounded, given the inputs f that are stored as floats.

    For an error E of the rounded inputs, the output error is smallest if the float inputs change by
    `-A E`, with `A = H_ff^-1 H_fr`. It is then `tr(E^T S E)`, with the Schur complement
    `S = H_rr - H_rf A`.

    Args:
      weight: the rounded inputs of the weight, `[inputs, outputs]`.
      levels: the levels of their elements.
      hessian: the Hessian of all inputs.
      options: the static arguments.
      split: the indices of both kinds of inputs.

    Returns:
      The solution, and A.
    """
    rounded, floats = split
    damped, damping = damped_hessian(hessian, options.settings.damping)
    between = damped[floats][:, rounded]
    factor = jax.scipy.linalg.cho_factor(damped[floats][:, floats])
    feedback = jax.scipy.linalg.cho_solve(factor, between)
    product = jnp.matmul(between.T, feedback, precision=lax.Precision.HIGHEST)
    schur = damped[rounded][:, rounded] - product
    settings = options.settings._replace(damping=0.0)
    solution = solve(weight, levels, schur, None, options.recipe, settings)
    return solution._replace(damping=damping), feedback
