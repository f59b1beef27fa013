"""GPTQ on one matrix: pure array algorithms, without recipes of models.

A weight is a matrix `[inputs, outputs]`, and the Hessian `H = sum x x^T` is `[inputs, inputs]`. The
error of a layer's output over the calibration data is `tr(E^T H E)`, with E the weight's error.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import where
from jaxq.quantizers import Levels, snap
from jaxq.recipes import Recipe

__all__ = ["Solution", "output_error", "solve"]

_BLOCK = 128  # The number of inputs that are rounded between two large products.
_RAISES = 6  # The damping is raised this many times by this factor if H has no Cholesky factor.
_FACTOR = 10.0


class Solution(NamedTuple):
    """The answer of a solver for one matrix.

    Attributes:
      numbers: the chosen grid values minus the zero points, `[inputs, outputs]`.
      damping: the damping used, relative to the mean of the Hessian's diagonal; NaN if none was.
      solved: False if the problem has no solution, and the nearest levels must be used.
    """

    numbers: jax.Array
    damping: jax.Array
    solved: jax.Array


def output_error(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns `tr(E^T H E)`, the squared error of a product's outputs over all tokens."""
    product = jnp.matmul(hessian, error, precision=lax.Precision.HIGHEST)
    return jnp.sum(error * product)


def solve(
    weight: jax.Array,
    levels: Levels,
    hessian: jax.Array,
    recipe: Recipe,
    damping: float,
    order: str | None,
) -> Solution:
    """Rounds the inputs of a matrix one by one, each correcting the errors of those before it.

    With the damped Hessian `H = V V^T`, V upper triangular, the error is
    `sum_i |V_ii e_i + sum_{j<i} V_ji e_j|^2`. Input i is therefore rounded at
    `w_i - sum_{j<i} e_j V_ji / V_ii`. This equals GPTQ's update by the Cholesky factor of the
    inverse of H, without an inverse. Blocks of inputs take the corrections of all blocks before
    them by one product.

    Args:
      weight: the float32 weight, `[inputs, outputs]`.
      levels: the levels of its elements.
      hessian: the float32 Hessian.
      recipe: the recipe, whose element format and rounding are used.
      damping: the least damping, relative to the mean of H's diagonal.
      order: `"static"` rounds the inputs with the largest diagonal entries of H first; None rounds
        them as they stand.
    """
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    has_data = (mean > 0) & jnp.all(jnp.isfinite(hessian))
    unit = where(has_data, mean, np.float32(1))
    scaled = jnp.where(has_data, hessian / unit, jnp.eye(len(hessian), dtype=jnp.float32))
    # An input that was always 0 has no part in the error, and is rounded by itself.
    dead = jnp.diagonal(scaled) <= 0
    scaled = scaled + jnp.diag(dead.astype(jnp.float32))
    rows = jnp.arange(len(hessian))
    if order == "static":
        rows = jnp.argsort(-jnp.diagonal(scaled), stable=True)
    ordered = scaled[rows][:, rows]
    factor, damping_used = _factor(ordered, damping)
    found = jnp.all(jnp.isfinite(factor))
    factor = jnp.where(found, factor, jnp.eye(len(hessian), dtype=jnp.float32))
    own = jax.tree.map(lambda x: x[rows], levels)
    numbers = _rounded(weight[rows], own, factor / jnp.diagonal(factor)[None], recipe)
    back = jnp.argsort(rows)
    return Solution(numbers[back], damping_used, has_data & found)


def _factor(hessian: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Returns the upper triangular V with `V V^T = H + damping I`, and the damping used."""
    identity = jnp.eye(len(hessian), dtype=jnp.float32)

    def factor(damping: jax.Array) -> jax.Array:
        # The Cholesky factor of the matrix with its rows and columns reversed.
        lower = lax.linalg.cholesky((hessian + damping * identity)[::-1, ::-1])
        return lower[::-1, ::-1]

    def failed(state: tuple) -> jax.Array:
        count, _, result = state
        return ~jnp.all(jnp.isfinite(result)) & (count < _RAISES)

    def again(state: tuple) -> tuple:
        count, damping, _ = state
        damping = lax.max(damping, np.float32(1e-3)) * np.float32(_FACTOR)
        return count + 1, damping, factor(damping)

    first = jnp.float32(damping)
    _, used, result = lax.while_loop(failed, again, (jnp.int32(0), first, factor(first)))
    return result, used


def _rounded(weight: jax.Array, levels: Levels, upper: jax.Array, recipe: Recipe) -> jax.Array:
    """Returns the numbers of a matrix whose inputs are in the order of rounding.

    Args:
      weight: the weight, `[inputs, outputs]`.
      levels: the levels of its elements.
      upper: V with each column divided by its diagonal entry.
      recipe: the recipe.
    """
    n, m = weight.shape
    size = min(_BLOCK, n)
    count = -(-n // size)
    more = count * size - n

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, more), (0, 0)]).reshape(count, size, m)

    columns = jnp.pad(upper, [(0, more), (0, more)])

    def block(errors: jax.Array, own: tuple) -> tuple[jax.Array, jax.Array]:
        number, weight, levels = own
        start = number * size
        mine = lax.dynamic_slice(columns, (0, start), (count * size, size))
        # The errors of the blocks that are still to come are 0.
        target = weight - jnp.matmul(mine.T, errors, precision=lax.Precision.HIGHEST)
        within = lax.dynamic_slice(mine, (start, 0), (size, size)).T
        step = functools.partial(_step, _Block(within, target, weight, levels), recipe)
        error, numbers = lax.fori_loop(0, size, step, (jnp.zeros_like(weight),) * 2)
        return lax.dynamic_update_slice(errors, error, (start, 0)), numbers

    xs = jnp.arange(count), cut(weight), jax.tree.map(cut, levels)
    _, numbers = lax.scan(block, jnp.zeros((count * size, m), jnp.float32), xs)
    return numbers.reshape(count * size, m)[:n]


class _Block(NamedTuple):
    """A block of inputs.

    Attributes:
      within: for each input, the share of the error of each input that it corrects.
      target: the weight, corrected by the errors of the blocks before.
      weight: the weight.
      levels: the levels of its elements.
    """

    within: jax.Array
    target: jax.Array
    weight: jax.Array
    levels: Levels


def _step(
    block: _Block, recipe: Recipe, i: jax.Array, state: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Rounds input i of a block, corrected by the errors of the inputs before it."""
    errors, numbers = state
    # The errors of the inputs still to come are 0.
    moved = block.target[i] - jnp.sum(block.within[i][:, None] * errors, axis=0)
    number, value = snap(moved, jax.tree.map(lambda x: x[i], block.levels), recipe)
    return errors.at[i].set(value - block.weight[i]), numbers.at[i].set(number)
