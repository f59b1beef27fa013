"""OWQ: the most sensitive inputs of a weight stay floats, and GPTQ quantizes the others."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq.numerics import encode
from jaxq.products import is_stochastic
from jaxq.ptq._gptq_matrix import Settings, Solution, solve
from jaxq.quantizers import (
    Levels,
    Quantized,
    dequantize,
    levels,
    numbers_of,
    quantize,
    values_of,
    with_levels,
)
from jaxq.recipes import Recipe, get_recipe

__all__ = ["check_owq_order", "keep_inputs", "owq"]


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
      damping: the number added to the diagonal of H, relative to the diagonal's mean.
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
    weight, gram, record = (
        jnp.asarray(weight),
        jnp.asarray(hessian, jnp.float32),
        get_recipe(recipe),
    )
    check_owq_order("owq", order)
    inputs = weight.shape[axis] if -weight.ndim <= axis < weight.ndim else None
    if weight.ndim < 2 or inputs is None or gram.shape != (inputs, inputs):
        raise ValueError(
            "owq: `hessian` must have the shape (n, n), where n is the length of `axis` of "
            f"`weight`, which needs two axes or more, got {gram.shape} and {weight.shape} with "
            f"axis={axis}. Pass the axis of the inputs as `axis`."
        )
    if record.outliers is None or record.outliers.sigma is not None or is_stochastic(record):
        raise ValueError(
            "owq: `recipe` must have outliers without `sigma` and round deterministically, got "
            f"{record.outliers} and rounding={record.rounding!r}. Use, for example, "
            "outliers=jaxq.recipes.Outliers(0.01)."
        )
    kept = record.outliers.count(weight.size) // (weight.size // inputs)
    if not 0 < kept < inputs:
        raise ValueError(
            f"owq: `recipe` must have outliers for at least one of the {inputs} inputs, got the "
            f"fraction {record.outliers.fraction}. Use at least {1 / inputs:.3g}."
        )
    result, solved = _owq(weight, gram, _Options(record, axis, Settings(damping, order), kept))
    is_known_to_fail = False
    with contextlib.suppress(jax.errors.ConcretizationTypeError):  # Under `jit`.
        is_known_to_fail = not bool(solved)
    if is_known_to_fail:
        raise ValueError(
            "owq: `hessian` must be positive semidefinite, finite and not zero, got one with the "
            f"mean diagonal {float(jnp.mean(jnp.diagonal(gram))):.3g}, which cannot be factorized. "
            "Check the activations for NaN, or increase `damping`."
        )
    return result


def check_owq_order(owner: str, order: str | None) -> None:
    """Raises a ValueError unless OWQ supports an order."""
    if order not in ("static", None):
        raise ValueError(f"{owner}: `order` must be 'static' or None, got {order!r}. Use 'static'.")


def keep_inputs(
    start: Quantized, weight: jax.Array, hessian: jax.Array, axis: int, settings: Settings
) -> tuple[Quantized, jax.Array] | None:
    """Returns a stored weight with the most expensive inputs as its outliers, as `owq` does.

    Args:
      start: the weight quantized to the nearest levels, whose recipe has its granularity on the
        weight's own axes.
      weight: the float32 weight that products see.
      hessian: the sum of `x x^T`.
      axis: the axis of inputs.
      settings: the settings of GPTQ.

    Returns:
      The weight, and False if the Hessian cannot be solved; None if the recipe has no room for the
      outliers of one input, or as many as the data wants.
    """
    outliers, inputs = start.recipe.outliers, weight.shape[axis]
    if outliers is None or outliers.sigma is not None:
        return None
    kept = outliers.count(weight.size) // (weight.size // inputs)
    if not 0 < kept < inputs:
        return None
    options = _Options(start.recipe, axis, settings, kept, is_placed=True)
    q, solved = _owq(weight, hessian, options)
    return dataclasses.replace(q, dtype=start.dtype), solved


class _Options(NamedTuple):
    """The static arguments.

    Attributes:
      recipe: the recipe.
      axis: the axis of inputs.
      settings: the settings of GPTQ.
      kept: the number of inputs that stay floats.
      is_placed: True if the recipe's granularity is on the weight's own axes.
    """

    recipe: Recipe
    axis: int
    settings: Settings
    kept: int
    is_placed: bool = False


@functools.partial(jax.jit, static_argnames="options")
def _owq(weight: jax.Array, hessian: jax.Array, options: _Options) -> tuple[Quantized, jax.Array]:
    """Returns the quantized weight, and False if the Hessian cannot be factorized."""
    recipe, axis, kept = options.recipe, options.axis, options.kept
    plain = dataclasses.replace(recipe, outliers=None)
    moved = jnp.moveaxis(weight, axis, 0).shape

    def matrix(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, axis, 0).reshape(moved[0], -1)

    def back(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(moved), 0, axis)

    w = matrix(weight.astype(jnp.float32))
    place = None if options.is_placed else axis
    nearest = matrix(dequantize(quantize(weight, plain, axis=place)).astype(jnp.float32))
    cost = jnp.diagonal(hessian) * jnp.sum(jnp.square(nearest - w), axis=1)
    most = jnp.sort(lax.top_k(cost, kept)[1])
    is_kept = jnp.zeros(len(w), bool).at[most].set(True)
    rest = jnp.argsort(is_kept, stable=True)[: len(w) - kept]
    left = back(jnp.where(is_kept[:, None], 0, w)).astype(weight.dtype)
    start = quantize(left, plain, axis=place)
    own = jax.tree.map(lambda x: matrix(x)[rest], levels(start))
    numbers = matrix(numbers_of(start))
    found, share = _solved(w[rest], own, hessian, options._replace(recipe=plain), (rest, most))
    chosen = jnp.where(found.solved, found.numbers, numbers[rest])
    error = values_of(chosen, own, plain) - w[rest]
    change = jnp.matmul(share, error, precision=lax.Precision.HIGHEST)
    values = w[most] - jnp.where(found.solved, change, 0)
    q = with_levels(start, back(numbers.at[rest].set(chosen)))
    assert recipe.outliers is not None
    empty = recipe.outliers.count(weight.size) - values.size
    places = matrix(jnp.arange(weight.size, dtype=jnp.int32).reshape(weight.shape))[most]
    order = jnp.argsort(places.reshape(-1))
    places = jnp.pad(places.reshape(-1)[order], (0, empty), constant_values=weight.size)
    values = jnp.pad(values.reshape(-1)[order], (0, empty))
    codes = encode(values, recipe.outliers.element, overflow="propagate")
    own_recipe = dataclasses.replace(q.recipe, outliers=recipe.outliers)
    return dataclasses.replace(q, recipe=own_recipe, outliers=(codes, places)), found.solved


def _solved(
    weight: jax.Array,
    own: Levels,
    hessian: jax.Array,
    options: _Options,
    rows: tuple[jax.Array, jax.Array],
) -> tuple[Solution, jax.Array]:
    """Solves the inputs r that are rounded, given the inputs k that stay floats.

    For an error E of the rounded inputs, the output error is smallest if the float inputs change by
    `-A E`, with `A = H_kk^-1 H_kr`. It is then `tr(E^T S E)`, with the Schur complement
    `S = H_rr - H_rk A`.

    Returns:
      The solution, and A.
    """
    rest, most = rows
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + options.settings.damping * mean * jnp.eye(len(hessian), dtype=jnp.float32)
    between = damped[most][:, rest]
    factor = jax.scipy.linalg.cho_factor(damped[most][:, most])
    share = jax.scipy.linalg.cho_solve(factor, between)
    schur = damped[rest][:, rest] - jnp.matmul(between.T, share, precision=lax.Precision.HIGHEST)
    return solve(
        weight, own, schur, None, options.recipe, options.settings._replace(damping=0.0)
    ), share
