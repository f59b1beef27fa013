"""Solution of a product that also changes its leaves: their scales, or their outliers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.ptq._collectors import Layout
from jaxq.ptq._gptq_matrix import Settings
from jaxq.ptq._leaf_states import LeafKey, Leaves, WeightView, trace_weight
from jaxq.ptq._matrix_solving import SolvedMatrices, parts_of, solve_stack
from jaxq.ptq._owq import keep_inputs
from jaxq.ptq._program_parts import Place
from jaxq.ptq._search import Blocks, Search, SearchOptions, run_length, searched
from jaxq.ptq._solvers import OWQ, RTN, Problem, Solver
from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Quantized, block_numbers, numbers_of
from jaxq.recipes import Recipe

__all__ = ["Changed", "Stack", "with_kept_inputs", "with_searched_scales"]


class Stack(NamedTuple):
    """The weight of a product as a stack of matrices.

    Attributes:
      place: the product.
      view: the weight as a view of leaves.
      layout: its form as matrices.
      recipes: its recipes, each with the indices of its matrices.
      shares: the share of each matrix that is of a leaf, `[matrices]`, by the leaf's index.
      statistics: the statistics of its input, with a leading axis `[matrices]`.
    """

    place: Place
    view: WeightView
    layout: Layout
    recipes: Sequence[tuple[Recipe, np.ndarray]]
    shares: Mapping[int, np.ndarray]
    statistics: Statistics

    @property
    def problem(self) -> Problem:
        """The problem that a solver gets."""
        view, matrices = self.view, self.layout.matrices
        return Problem(
            weight=matrices(view.x),
            levels=jax.tree.map(matrices, view.levels),
            nearest=matrices(view.nearest),
            statistics=self.statistics,
        )

    def retraced(self) -> "Stack":
        """Returns the stack after a change of its leaves."""
        view = trace_weight(self.place.frame, self.place.variable)
        assert isinstance(view, WeightView), "it was followed before"
        return self._replace(view=view)


class Changed(NamedTuple):
    """The solution of a weight whose leaves may have changed.

    Attributes:
      view: the weight, with the leaves that were chosen.
      answer: the solution; its `before` is the loss of the nearest levels of the original leaves.
      note: the reason why original leaves were kept, or "".
    """

    view: WeightView
    answer: SolvedMatrices
    note: str


def with_searched_scales(stack: Stack, leaves: Leaves, solver: Solver, search: Search) -> Changed:
    """Solves a product after a search for its scales, which is separate for each recipe.

    The leaves of a recipe keep their scales if the searched ones have more loss.
    """
    keys, problem = stack.view.keys, stack.problem
    starts = {key: leaves.work(key).start for key in keys}
    # The inputs of a convolution are ordered differently from its blocks.
    is_product = stack.place.product.operation != "conv_general_dilated"
    inputs = stack.layout.sizes[1]
    for recipe, places, part in parts_of(problem, stack.recipes):
        own = [key for key in keys if stack.shares[key.leaf][places].any()]
        numbers = _numbers(stack, starts, own)
        numbers = numbers[places] if len(stack.recipes) > 1 else numbers
        blocks = Blocks(tuple(starts[key] for key in own), numbers)
        length = run_length(recipe, inputs) if is_product else inputs
        options = SearchOptions(search, recipe, length)
        found = searched(part.weight, part.levels, blocks, part.statistics, options)
        for key, q in zip(own, found, strict=True):
            leaves.rescale(key, q)
    before = solve_stack(problem, stack.recipes, RTN()).before
    new = stack.retraced()
    answer = solve_stack(new.problem, stack.recipes, solver)
    worse = [
        places
        for _, places in stack.recipes
        if not bool(jnp.sum(answer.after[places]) <= jnp.sum(before[places]))
    ]
    if not worse:
        return Changed(new.view, answer._replace(before=before), "")
    for key in keys:
        if any(stack.shares[key.leaf][places].any() for places in worse):
            leaves.rescale(key, starts[key])
    new = stack.retraced()
    answer = solve_stack(new.problem, stack.recipes, solver)._replace(before=before)
    of = f"{len(worse)} of {len(stack.recipes)} recipes: " if len(stack.recipes) > 1 else ""
    return Changed(new.view, answer, f"{of}the searched scales have more loss")


def _numbers(
    stack: Stack, starts: Mapping[LeafKey, Quantized], own: Sequence[LeafKey]
) -> jax.Array:
    """Returns the number of the block of each element, counted across some leaves."""
    count, numbers = 0, []
    for key, q in starts.items():
        is_own = key in own
        numbers.append(block_numbers(q) + count if is_own else jnp.zeros(q.shape, jnp.int32))
        count += math.prod(q.cut.counts) if is_own else 0
    return stack.layout.matrices(stack.view.move(*numbers))


def with_kept_inputs(stack: Stack, leaves: Leaves, solver: OWQ) -> Changed:
    """Solves a product, and keeps its most expensive inputs as outliers of its leaf."""
    view, problem, axes = stack.view, stack.problem, stack.layout.axes
    key, *others = view.keys
    start, hessian = leaves.work(key).start, problem.statistics.hessian
    assert hessian is not None, "all products to solve have one"
    is_leaf = (
        isinstance(stack.place.frame.sources.get(stack.place.variable), LeafKey) and not others
    )
    is_matrix = len(axes.contract) == 1 and not axes.batch and start.ndim == len(start.block)
    found = None
    if is_leaf and is_matrix:
        settings = Settings(solver.damping, solver.order)
        found = keep_inputs(start, view.x, hessian[0], axes.contract[0], settings)
    if found is None:
        answer = solve_stack(problem, stack.recipes, solver)
        return Changed(view, answer, "no inputs are kept as outliers")
    q, solved = found
    before = solve_stack(problem, stack.recipes, RTN()).before
    leaves.rescale(key, q)
    new = stack.retraced()
    chosen = new.problem._replace(nearest=stack.layout.matrices(numbers_of(q)))
    answer = solve_stack(chosen, stack.recipes, RTN())
    if bool(solved) and bool(jnp.sum(answer.after) <= jnp.sum(before)):
        damping = jnp.full_like(before, solver.damping)
        return Changed(new.view, answer._replace(before=before, damping=damping), "")
    leaves.rescale(key, start)
    answer = solve_stack(problem, stack.recipes, solver)
    return Changed(view, answer, "kept inputs have more loss")
