"""Solution of a stack of matrices by a solver, with the losses before and after."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.ptq._calibration_runs import levels_for
from jaxq.ptq._solvers import Problem, Solver, output_error
from jaxq.quantizers import values_of
from jaxq.recipes import Recipe

__all__ = ["SolvedMatrices", "solve_matrices", "split_by_recipe"]


class SolvedMatrices(NamedTuple):
    """The solutions of a stack of matrices, with their losses.

    Attributes:
      grid_values: the chosen grid values minus the zero points, `[matrices, inputs, outputs]`.
      nearest_loss: the loss of the nearest levels, `[matrices]`.
      solved_loss: the loss of the chosen levels, `[matrices]`.
      nearest_objective: the loss of the nearest levels against the outputs of the float model, up
        to a constant, `[matrices]`. It differs from the loss only if the input has a known drift.
      solved_objective: the same of the chosen levels, `[matrices]`.
      power: the squared norm of the outputs, `tr(W^T H W)`, `[matrices]`.
      damping: the damping that the solver used, `[matrices]`.
      solved: False where the solver found no solution, `[matrices]`.
      worse: True where the solution had a larger loss than the nearest levels, which were used
        instead, `[matrices]`.
    """

    grid_values: jax.Array
    nearest_loss: jax.Array
    solved_loss: jax.Array
    nearest_objective: jax.Array
    solved_objective: jax.Array
    power: jax.Array
    damping: jax.Array
    solved: jax.Array
    worse: jax.Array


def split_by_recipe(
    problem: Problem, recipes: Sequence[tuple[Recipe, np.ndarray]]
) -> list[tuple[Recipe, np.ndarray, Problem]]:
    """Splits a problem by the recipes of its matrices.

    Args:
      problem: the problem, with a leading axis `[matrices]`.
      recipes: each recipe with the indices of its matrices.

    Returns:
      For each recipe: the recipe, the indices, and the problem of these matrices.
    """
    parts = []
    for recipe, indices in recipes:
        part: Problem = problem
        if len(recipes) > 1:
            part = jax.tree.map(lambda x, at=indices: x[at], problem)
        parts.append((recipe, indices, part._replace(levels=levels_for(part.levels, recipe))))
    return parts


def solve_matrices(
    problem: Problem, recipes: Sequence[tuple[Recipe, np.ndarray]], solver: Solver
) -> SolvedMatrices:
    """Solves a stack of matrices.

    Args:
      problem: the problem, with a leading axis `[matrices]`.
      recipes: each recipe with the indices of its matrices.
      solver: the solver.
    """
    solutions = [
        _solve_with_one_recipe(part, recipe, solver)
        for recipe, _, part in split_by_recipe(problem, recipes)
    ]
    if len(solutions) == 1:
        return solutions[0]
    order = np.argsort(np.concatenate([indices for _, indices in recipes]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *solutions)


@functools.partial(jax.jit, static_argnames=("recipe", "solver"))
def _solve_with_one_recipe(problem: Problem, recipe: Recipe, solver: Solver) -> SolvedMatrices:
    """Solves a stack of matrices that share one recipe."""

    def solve_matrix(problem: Problem) -> SolvedMatrices:
        weight, levels, nearest, statistics = problem
        hessian = statistics.hessian
        assert hessian is not None

        def loss(grid_values: jax.Array) -> jax.Array:
            return output_error(values_of(grid_values, levels, recipe) - weight, hessian)

        def objective(grid_values: jax.Array) -> jax.Array:
            """Returns the objective of grid values."""
            if statistics.drift is None:
                return loss(grid_values)
            error = values_of(grid_values, levels, recipe) - weight
            target = jnp.matmul(statistics.drift.T, weight, precision=lax.Precision.HIGHEST)
            return output_error(error, hessian) - 2 * jnp.sum(error * target)

        solution = solver.solve(problem, recipe)
        nearest_loss, solved_loss = loss(nearest), loss(solution.grid_values)
        nearest_objective, solved_objective = objective(nearest), objective(solution.grid_values)
        worse = solved_objective > nearest_objective
        grid_values = jnp.where(worse, nearest, solution.grid_values)
        return SolvedMatrices(
            grid_values=grid_values,
            nearest_loss=nearest_loss,
            solved_loss=jnp.where(worse, nearest_loss, solved_loss),
            nearest_objective=nearest_objective,
            solved_objective=jnp.where(worse, nearest_objective, solved_objective),
            power=output_error(weight, hessian),
            damping=solution.damping,
            solved=solution.solved,
            worse=worse,
        )

    return jax.vmap(solve_matrix)(problem)
