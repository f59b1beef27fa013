"""Solutions of the matrices of a product, with their losses."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.ptq._experts import own_levels
from jaxq.ptq._matrices import output_error
from jaxq.ptq._solvers import Problem, Solver
from jaxq.quantizers import values_of
from jaxq.recipes import Recipe

__all__ = ["Answer", "answer_of", "answers"]


class Answer(NamedTuple):
    """The solutions of matrices, with their losses.

    Attributes:
      numbers: the grid values, `[matrices, inputs, outputs]`.
      before: the loss of the nearest levels, `[matrices]`.
      after: the loss of the solution, `[matrices]`.
      power: the power of the outputs, `[matrices]`.
      damping: the damping, `[matrices]`.
      solved: False where the solver gave up, `[matrices]`.
      worse: True where the nearest levels have less loss and were taken, `[matrices]`.
    """

    numbers: jax.Array
    before: jax.Array
    after: jax.Array
    power: jax.Array
    damping: jax.Array
    solved: jax.Array
    worse: jax.Array


def answers(
    problem: Problem, recipes: Sequence[tuple[Recipe, np.ndarray]], solver: Solver
) -> Answer:
    """Solves a stack of matrices that may have different recipes."""
    if len(recipes) == 1:
        recipe, _ = recipes[0]
        return answer_of(
            problem._replace(levels=own_levels(problem.levels, recipe)), recipe, solver
        )
    found = []
    for recipe, places in recipes:
        part: Problem = jax.tree.map(lambda x, at=places: x[at], problem)
        part = part._replace(levels=own_levels(part.levels, recipe))
        found.append(answer_of(part, recipe, solver))
    back = np.argsort(np.concatenate([places for _, places in recipes]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[back], *found)


@functools.partial(jax.jit, static_argnames=("recipe", "solver"))
def answer_of(problem: Problem, recipe: Recipe, solver: Solver) -> Answer:
    """Solves a stack of matrices."""

    def one(problem: Problem) -> Answer:
        weight, levels, nearest, statistics = problem
        hessian = statistics.hessian
        assert hessian is not None

        def loss(numbers: jax.Array) -> jax.Array:
            return output_error(values_of(numbers, levels, recipe) - weight, hessian)

        def aim(numbers: jax.Array) -> jax.Array:
            """Returns the loss, up to a constant that depends on the drift."""
            if statistics.drift is None:
                return loss(numbers)
            error = values_of(numbers, levels, recipe) - weight
            pulled = jnp.matmul(statistics.drift.T, weight, precision=lax.Precision.HIGHEST)
            return output_error(error, hessian) - 2 * jnp.sum(error * pulled)

        found = solver.solve(problem, recipe)
        before, after = loss(nearest), loss(found.numbers)
        worse = aim(found.numbers) > aim(nearest)
        numbers = jnp.where(worse, nearest, found.numbers)
        return Answer(
            numbers=numbers,
            before=before,
            after=jnp.where(worse, before, after),
            power=output_error(weight, hessian),
            damping=found.damping,
            solved=found.solved,
            worse=worse,
        )

    return jax.vmap(one)(problem)
