"""The algorithm of GPTQ for one matrix.

A weight is a matrix `[inputs, outputs]`, and the Hessian `H = sum x x^T` is `[inputs, inputs]`. The
squared output error over the calibration data is `tr(E^T H E)`, with the weight's error E.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import where
from jaxq.ptq._solvers._search_interface import inputs_per_block
from jaxq.quantizers import Levels, snap
from jaxq.recipes import Recipe

__all__ = ["Settings", "Solution", "damped_hessian", "output_error", "solve"]

_BLOCK = 128  # The number of inputs that are rounded between two large matrix products.
_LARGE = 512  # The number of rows of the Hessian that `output_error` multiplies at a time.
_MAX_RAISES = 6  # The number of times that the damping is raised if H has no Cholesky factor.
_RAISE_FACTOR = 10.0


class Solution(NamedTuple):
    """The solution of a solver for one matrix.

    Attributes:
      grid_values: the chosen grid values minus the zero points, `[inputs, outputs]`.
      damping: the damping, relative to the mean of the Hessian's diagonal; NaN if none was used.
      solved: False if the Hessian cannot be factorized, so that the nearest levels must be used.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> grid_values, damping = jnp.zeros((4, 2)), jnp.float32(0.01)
      >>> solution = ptq.Solution(grid_values, damping, solved=jnp.bool(True))
      >>> solution.grid_values.shape
      (4, 2)
    """

    grid_values: jax.Array
    damping: jax.Array
    solved: jax.Array


def output_error(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns `tr(E^T H E)`, the squared error of a product's outputs over all tokens."""
    # H is symmetric, so each block above the diagonal counts twice, and no block below is read.
    total, size = jnp.float32(0), _LARGE if len(hessian) >= 2 * _LARGE else len(hessian)
    for start in range(0, len(hessian), size):
        current, after = error[start : start + size], error[start + size :]
        rows = hessian[start : start + size, start:]
        product = _product(rows[:, : len(current)], current)
        if len(after):
            product = product + 2 * _product(rows[:, len(current) :], after)
        total = total + jnp.sum(current * product)
    return total


class Settings(NamedTuple):
    """The settings of GPTQ.

    Attributes:
      damping: the initial damping, relative to the mean of H's diagonal.
      order: `"static"` rounds the inputs with the largest diagonal entries of H first. `"group"`
        does so within each group of the recipe, and takes the groups by their largest entries. None
        rounds the inputs in the order of the weight.
      asymmetry: the factor of GPTAQ's correction.
      propagation: the factor of QEP's correction.
    """

    damping: float
    order: str | None
    asymmetry: float = 0.0
    propagation: float = 0.0


def solve(
    weight: jax.Array,
    levels: Levels,
    hessian: jax.Array,
    drift: jax.Array | None,
    recipe: Recipe,
    settings: Settings,
) -> Solution:
    """Rounds the inputs of a matrix one by one, so that each corrects the errors of earlier ones.

    With the damped Hessian `H = V V^T`, V upper triangular, the error is
    `sum_i |V_ii e_i + sum_{j<i} V_ji e_j|^2`. Input i is therefore rounded at
    `w_i - sum_{j<i} e_j V_ji / V_ii`. This equals GPTQ's update by the Cholesky factor of the
    inverse of H, but needs no inverse. The corrections of a block of inputs by all blocks before it
    are computed by one matrix product.

    The drift `D = sum (y - x) x^T` is used to correct the difference between the input x and the
    input y of the float model. QEP adds `c H^-1 D^T w` to w first, with c = `propagation`. GPTAQ
    replaces w_i by `w_i + sum_{j<i} v_j P_ji`, where v_j is the value of input j before rounding,
    and `P = a striu(D V^-T) V^-1`, with a = `asymmetry` and the strictly upper triangular part.

    Args:
      weight: the float32 weight, `[inputs, outputs]`.
      levels: the levels of its elements.
      hessian: the float32 Hessian, as `_statistics._statistics.hessian_of` computes it.
      drift: the float32 drift, or None.
      recipe: the recipe, whose element format and rounding are used.
      settings: the settings.
    """
    scaled, unit, has_data = _scaled(hessian)
    rows = _order(jnp.diagonal(scaled), settings.order, recipe)
    ordered = scaled[rows][:, rows]
    factor, damping_used = _factor(ordered, settings.damping)
    is_solved = jnp.all(jnp.isfinite(jnp.diagonal(factor)))
    factor = jnp.where(is_solved, factor, jnp.eye(len(hessian), dtype=jnp.float32))
    weight, shifts = weight[rows], None
    if drift is not None and (settings.propagation or settings.asymmetry):
        is_solved = is_solved & jnp.all(jnp.isfinite(drift))
        drift = jnp.where(is_solved, drift / unit, np.float32(0))[rows][:, rows]
        if settings.propagation:
            change = _drift_correction(factor, drift, weight)
            weight = weight + np.float32(settings.propagation) * change
        if settings.asymmetry:
            shifts = np.float32(settings.asymmetry) * _shifts(factor, drift)
    levels = jax.tree.map(lambda x: x[rows], levels)
    feedback = _Feedback(factor / jnp.diagonal(factor)[None], shifts)
    grid_values = _rounded(weight, levels, feedback, recipe)
    return Solution(
        grid_values=grid_values[jnp.argsort(rows)],
        damping=damping_used,
        solved=has_data & is_solved,
    )


def damped_hessian(hessian: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Returns a Hessian divided by the mean of its diagonal and damped, and the damping used."""
    scaled, _, has_data = _scaled(hessian)
    _, used = _factor(scaled, damping)
    damped = scaled + used * jnp.eye(len(scaled), dtype=jnp.float32)
    return jnp.where(has_data, damped, np.float32(np.nan)), used


def _scaled(hessian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a Hessian divided by the mean of its diagonal, that mean, and False if there is none.

    An input that is always 0 gets the diagonal entry 1. It does not affect the error, and is
    rounded to nearest. A Hessian that is 0 or not finite becomes the identity.
    """
    mean = jnp.mean(jnp.diagonal(hessian))
    has_data = (mean > 0) & jnp.all(jnp.isfinite(hessian))
    unit = where(has_data, mean, np.float32(1))
    scaled = jnp.where(has_data, hessian / unit, jnp.eye(len(hessian), dtype=jnp.float32))
    is_zero = jnp.diagonal(scaled) <= 0
    return scaled + jnp.diag(is_zero.astype(jnp.float32)), unit, has_data


def _order(diagonal: jax.Array, order: str | None, recipe: Recipe) -> jax.Array:
    """Returns the inputs in the order of rounding."""
    inputs = len(diagonal)
    if order is None:
        return jnp.arange(inputs)
    # Activation order is the group order of a single group.
    length = inputs_per_block(recipe, inputs) if order == "group" else inputs
    groups = diagonal.reshape(-1, length)
    within = jnp.argsort(-groups, axis=1, stable=True)
    within = within + length * jnp.arange(len(groups))[:, None]
    return within[jnp.argsort(-jnp.max(groups, axis=1), stable=True)].reshape(-1)


def _drift_correction(factor: jax.Array, drift: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `H^-1 D^T w`, the change of a weight that compensates for the drift; H = V V^T."""
    target = _product(drift.T, weight)
    half = lax.linalg.triangular_solve(factor, target, left_side=True)
    return lax.linalg.triangular_solve(factor, half, left_side=True, transpose_a=True)


def _shifts(factor: jax.Array, drift: jax.Array) -> jax.Array:
    """Returns `striu(D V^-T) V^-1`."""
    half = lax.linalg.triangular_solve(factor, drift, transpose_a=True)
    return lax.linalg.triangular_solve(factor, jnp.triu(half, 1))


class _Feedback(NamedTuple):
    """The effects of rounded inputs on later inputs, `[inputs, inputs]`.

    Attributes:
      errors: the factors of the errors: V with each column divided by its diagonal entry.
      shifts: the factors of the values before rounding: P, or None.
    """

    errors: jax.Array
    shifts: jax.Array | None


def _factor(hessian: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Returns the upper triangular V with `V V^T = H + damping I`, and the damping used."""
    identity = jnp.eye(len(hessian), dtype=jnp.float32)

    def factor(damping: jax.Array) -> jax.Array:
        # The Cholesky factor of the matrix with its rows and columns reversed.
        lower = lax.linalg.cholesky((hessian + damping * identity)[::-1, ::-1])
        return lower[::-1, ::-1]

    def failed(state: tuple) -> jax.Array:
        count, _, result = state
        # The result is NaN, also in its diagonal, if there is no Cholesky factor.
        return ~jnp.all(jnp.isfinite(jnp.diagonal(result))) & (count < _MAX_RAISES)

    def raise_damping(state: tuple) -> tuple:
        count, damping, _ = state
        damping = lax.max(damping, np.float32(1e-3)) * np.float32(_RAISE_FACTOR)
        return count + 1, damping, factor(damping)

    first = jnp.float32(damping)
    _, used, result = lax.while_loop(failed, raise_damping, (jnp.int32(0), first, factor(first)))
    return result, used


def _rounded(weight: jax.Array, levels: Levels, feedback: _Feedback, recipe: Recipe) -> jax.Array:
    """Returns the grid values of a matrix whose inputs are in the order of rounding.

    Args:
      weight: the weight, `[inputs, outputs]`.
      levels: the levels of its elements.
      feedback: the effects of rounded inputs on later inputs.
      recipe: the recipe.
    """
    n, m = weight.shape
    size = min(_BLOCK, n)
    count = -(-n // size)
    padding = count * size - n

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding), (0, 0)]).reshape(count, size, m)

    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, padding), (0, padding)]), feedback)

    def round_block(state: _Rounded, block: tuple) -> tuple[_Rounded, jax.Array]:
        number, weight, levels = block
        start = number * size
        columns = jax.tree.map(
            lambda x: lax.dynamic_slice(x, (0, start), (count * size, size)), padded
        )
        # The errors and values of later blocks are 0.
        if state.values is not None:
            weight = weight + _product(columns.shifts.T, state.values)
        target = weight - _product(columns.errors.T, state.errors)
        inner_feedback = jax.tree.map(
            lambda x: lax.dynamic_slice(x, (start, 0), (size, size)).T, columns
        )
        step = functools.partial(_step, _InputBlock(inner_feedback, target, weight, levels), recipe)
        zeros = jnp.zeros_like(weight)
        first = _Rounded(zeros, None if state.values is None else zeros)
        result, grid_values = lax.fori_loop(0, size, step, (first, zeros))
        state = jax.tree.map(
            lambda x, part: lax.dynamic_update_slice(x, part, (start, 0)), state, result
        )
        return state, grid_values

    xs = jnp.arange(count), split(weight), jax.tree.map(split, levels)
    zeros = jnp.zeros((count * size, m), jnp.float32)
    start = _Rounded(zeros, None if feedback.shifts is None else zeros)
    _, grid_values = lax.scan(round_block, start, xs)
    return grid_values.reshape(count * size, m)[:n]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns a matrix product with the highest precision."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


class _Rounded(NamedTuple):
    """The results for the inputs rounded so far; 0 for all later inputs.

    Attributes:
      errors: the chosen values minus the values of the weight.
      values: the corrected values before rounding; None if no shifts depend on them.
    """

    errors: jax.Array
    values: jax.Array | None


class _InputBlock(NamedTuple):
    """Inputs that are rounded one after another before later inputs are corrected.

    Attributes:
      inner_feedback: the effects of these inputs on each other, transposed.
      target: the weight, corrected by the errors of earlier blocks.
      weight: the weight.
      levels: the levels of its elements.
    """

    inner_feedback: _Feedback
    target: jax.Array
    weight: jax.Array
    levels: Levels


def _step(
    block: _InputBlock, recipe: Recipe, i: jax.Array, state: tuple[_Rounded, jax.Array]
) -> tuple[_Rounded, jax.Array]:
    """Rounds input i of a block after correcting it for the errors of the inputs before it."""
    (errors, values), grid_values = state
    weight, target = block.weight[i], block.target[i]
    # The errors and values of later inputs are 0.
    shifts = block.inner_feedback.shifts
    if values is not None and shifts is not None:
        shift = jnp.sum(shifts[i][:, None] * values, axis=0)
        weight, target = weight + shift, target + shift
    corrected = target - _product(block.inner_feedback.errors[i], errors)
    grid_value, value = snap(corrected, jax.tree.map(lambda x: x[i], block.levels), recipe)
    if values is not None:
        values = values.at[i].set(corrected)
    return _Rounded(errors.at[i].set(value - weight), values), grid_values.at[i].set(grid_value)
