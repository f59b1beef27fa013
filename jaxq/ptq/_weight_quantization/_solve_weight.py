"""Solution of the weight of one product, by a solver that may also change scales or outliers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.ptq._calibration_runs import LeafKey, Leaves, Occurrence, WeightView, trace_weight
from jaxq.ptq._solvers import (
    OWQ,
    RTN,
    Blocks,
    Problem,
    Search,
    SearchOptions,
    SearchProblem,
    Settings,
    Solver,
    inputs_per_block,
    owq_leaf,
    run_search,
    search_of,
)
from jaxq.ptq._statistics import MatrixLayout, Statistics
from jaxq.ptq._weight_quantization._solve_matrices import (
    SolvedMatrices,
    solve_matrices,
    split_by_recipe,
)
from jaxq.quantizers import Quantized, block_indices, grid_values_of
from jaxq.recipes import Recipe

__all__ = ["SolvedWeight", "WeightStack", "solve_weight"]


class WeightStack(NamedTuple):
    """The weight of a product as a stack of matrices.

    Attributes:
      occurrence: the product.
      view: the weight as a view of leaves.
      layout: the conversion between the weight and matrices.
      recipes: the recipes of the weight, each with the indices of its matrices.
      shares: the share of each leaf in each matrix, `[matrices]`, by the leaf's index.
      statistics: the statistics of the input, with a leading axis `[matrices]`.
    """

    occurrence: Occurrence
    view: WeightView
    layout: MatrixLayout
    recipes: Sequence[tuple[Recipe, np.ndarray]]
    shares: Mapping[int, np.ndarray]
    statistics: Statistics

    @property
    def problem(self) -> Problem:
        """The problem for a solver, with a leading axis `[matrices]`."""
        view, matrices = self.view, self.layout.matrices
        return Problem(
            weight=matrices(view.x),
            levels=jax.tree.map(matrices, view.levels),
            nearest=matrices(view.nearest),
            statistics=self.statistics,
        )

    def retrace(self) -> "WeightStack":
        """Returns the stack after a change of its leaves."""
        view, _ = trace_weight(self.occurrence.frame, self.occurrence.variable)
        assert view is not None, "it was traced before"
        return self._replace(view=view)


class SolvedWeight(NamedTuple):
    """The solution of a weight whose leaves may have changed.

    Attributes:
      view: the weight after the change of its leaves.
      matrices: the solution. Its `nearest_loss` is that of the original leaves.
      note: the reason why the leaves were not changed as requested, or "".
    """

    view: WeightView
    matrices: SolvedMatrices
    note: str


def solve_weight(stack: WeightStack, leaves: Leaves, solver: Solver) -> SolvedWeight:
    """Solves the weight of a product.

    Args:
      stack: the weight.
      leaves: the leaves of the model. Their scales and outliers are changed as the solver requires.
      solver: the solver.
    """
    search = search_of(solver)
    if isinstance(solver, OWQ):
        return _solve_with_owq(stack, leaves, solver)
    if search is not None:
        return _solve_with_search(stack, leaves, solver, search)
    return SolvedWeight(stack.view, solve_matrices(stack.problem, stack.recipes, solver), "")


def _solve_with_search(
    stack: WeightStack, leaves: Leaves, solver: Solver, search: Search
) -> SolvedWeight:
    """Solves a weight after a search for its scales, which is separate for each recipe.

    If the searched scales of a recipe have a larger loss, its leaves get their original scales.
    """
    problem = stack.problem
    starts = {key: leaves.state(key).start for key in stack.view.keys}
    _search_scales(stack, starts, leaves, search)
    nearest = solve_matrices(problem, stack.recipes, RTN())
    new = stack.retrace()
    matrices = solve_matrices(new.problem, stack.recipes, solver)
    before, after = nearest.nearest_objective, matrices.solved_objective
    worse = [
        indices
        for _, indices in stack.recipes
        if not bool(jnp.sum(after[indices]) <= jnp.sum(before[indices]))
    ]
    if not worse:
        return SolvedWeight(new.view, matrices._replace(nearest_loss=nearest.nearest_loss), "")
    for key, start in starts.items():
        if any(stack.shares[key.leaf][indices].any() for indices in worse):
            leaves.rescale(key, start)
    new = stack.retrace()
    matrices = solve_matrices(new.problem, stack.recipes, solver)._replace(
        nearest_loss=nearest.nearest_loss
    )
    count = f"{len(worse)} of {len(stack.recipes)} recipes: " if len(stack.recipes) > 1 else ""
    return SolvedWeight(new.view, matrices, f"{count}the searched scales have a larger loss")


def _search_scales(
    stack: WeightStack, starts: Mapping[LeafKey, Quantized], leaves: Leaves, search: Search
) -> None:
    """Replaces the scales of leaves by searched ones."""
    # The inputs of a convolution are ordered differently from its blocks.
    is_product = stack.occurrence.product.operation != "conv_general_dilated"
    inputs = stack.layout.sizes[1]
    for recipe, indices, part in split_by_recipe(stack.problem, stack.recipes):
        keys = [key for key in starts if stack.shares[key.leaf][indices].any()]
        block_of = _block_indices(stack, starts, keys)
        block_of = block_of[indices] if len(stack.recipes) > 1 else block_of
        blocks = Blocks(tuple(starts[key] for key in keys), block_of)
        length = inputs_per_block(recipe, inputs) if is_product else inputs
        options = SearchOptions(search, recipe, length)
        search_problem = SearchProblem(part.weight, part.levels, blocks, part.statistics)
        results = run_search(search_problem, options)
        for key, q in zip(keys, results, strict=True):
            leaves.rescale(key, q)


def _block_indices(
    stack: WeightStack, starts: Mapping[LeafKey, Quantized], keys: Sequence[LeafKey]
) -> jax.Array:
    """Returns the index of the block of each element, counted across some leaves.

    Args:
      stack: the weight.
      starts: all leaves of the weight.
      keys: the leaves whose blocks are counted; the elements of all others have the index 0.
    """
    count, indices = 0, []
    for key, q in starts.items():
        if key in keys:
            indices.append(block_indices(q) + count)
            count += math.prod(q.cut.counts)
        else:
            indices.append(jnp.zeros(q.shape, jnp.int32))
    return stack.layout.matrices(stack.view.move(*indices))


def _solve_with_owq(stack: WeightStack, leaves: Leaves, solver: OWQ) -> SolvedWeight:
    """Solves a weight, and stores its most sensitive inputs as outliers of its leaf."""
    view, problem = stack.view, stack.problem
    key = view.keys[0]
    state, hessian = leaves.state(key), problem.statistics.hessian
    assert hessian is not None, "all products to solve have one"
    axis = _input_axis(stack, state.start)
    result = None
    if axis is not None:
        settings = Settings(solver.damping, solver.order)
        result = owq_leaf(state.start, state.x, hessian[0], axis, settings)
    if result is None:
        matrices = solve_matrices(problem, stack.recipes, solver)
        return SolvedWeight(view, matrices, "no inputs are stored as outliers")
    q, solution = result
    nearest_loss = solve_matrices(problem, stack.recipes, RTN()).nearest_loss
    leaves.rescale(key, q)
    new = stack.retrace()
    chosen = new.problem._replace(nearest=stack.layout.matrices(view.move(grid_values_of(q))))
    matrices = solve_matrices(chosen, stack.recipes, RTN())
    if bool(solution.solved) and bool(jnp.sum(matrices.solved_loss) <= jnp.sum(nearest_loss)):
        damping = jnp.full_like(nearest_loss, solution.damping)
        return SolvedWeight(
            new.view, matrices._replace(nearest_loss=nearest_loss, damping=damping), ""
        )
    leaves.rescale(key, state.start)
    matrices = solve_matrices(problem, stack.recipes, solver)
    return SolvedWeight(view, matrices, "inputs stored as outliers have a larger loss")


def _input_axis(stack: WeightStack, start: Quantized) -> int | None:
    """Returns the axis of a leaf along which the inputs of its product lie.

    None if the weight is not one matrix that consists of the whole leaf.

    Args:
      stack: the weight.
      start: its first leaf.
    """
    view, axes = stack.view, stack.layout.axes
    is_matrix = len(axes.contract) == 1 and not axes.batch and start.ndim == len(start.block)
    if len(view.keys) > 1 or not is_matrix or math.prod(start.shape) != view.x.size:
        return None
    index = lax.broadcasted_iota(jnp.int32, view.x.shape, axes.contract[0])
    for axis in range(start.ndim):
        own = lax.broadcasted_iota(jnp.int32, start.shape, axis)
        if bool(jnp.array_equal(view.move(own), index)):
            return axis
    return None
