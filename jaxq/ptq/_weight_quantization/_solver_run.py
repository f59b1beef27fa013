"""The solution of the products of a model one by one, with the rows of the report."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import LOOK_UP, Product, WeightToQuantize, weight_of
from jaxq.products import Axes
from jaxq.ptq._calibration_runs import (
    LeafKey,
    Leaves,
    Model,
    Occurrence,
    WeightView,
    leaf_shares,
    matrices_by_recipe,
    replace_parameters,
    trace_weight,
)
from jaxq.ptq._results import Entry, Journal, Report, SolvedProduct
from jaxq.ptq._solvers import Solver, check_search, needs_drift
from jaxq.ptq._statistics import MatrixLayout, Statistics
from jaxq.ptq._weight_quantization._solve_matrices import SolvedMatrices
from jaxq.ptq._weight_quantization._solve_weight import SolvedWeight, WeightStack, solve_weight

__all__ = ["Outcome", "SolverRun"]


class Outcome(NamedTuple):
    """The losses of one solved product, summed over all tokens and matrices.

    Attributes:
      leaf_losses: the part of the loss that is due to each leaf of its weight, by the leaf's index.
      nearest_loss: the loss of the nearest levels.
      solved_loss: the loss of the chosen levels.
      power: the power of the outputs.
    """

    leaf_losses: Mapping[int, "LeafLoss"]
    nearest_loss: float
    solved_loss: float
    power: float

    def relative(self, loss: float) -> float:
        """Returns a loss relative to the power of the outputs."""
        return loss / self.power if self.power else 0.0


class LeafLoss(NamedTuple):
    """The part of a product's loss that is due to one leaf.

    Attributes:
      loss: the loss.
      tokens: the number of tokens that the leaf multiplies.
    """

    loss: float
    tokens: int


class _SolvedUse(NamedTuple):
    """A solved product whose weight is also used by later products.

    Attributes:
      x: the values of the weight.
      axes: the axes of the weight.
      statistics: the statistics of the input.
      outcome: the losses.
    """

    x: jax.Array
    axes: Axes
    statistics: Statistics
    outcome: Outcome


class SolverRun:
    """The solved leaves and the rows of the report in one call of a solving function.

    Args:
      owner: the name of the calling function, for errors.
      model: the model.
      solver: the solver.
      progress: the user's function, or None.

    Attributes:
      planned: the plan of the model.
      targets: the products to solve.
      solver: the solver.
      leaves: the leaves.
      outcomes: the losses of the solved products.
      journal: the stored products of an interrupted run, or None.
    """

    def __init__(
        self,
        owner: str,
        model: Model,
        solver: Solver,
        progress: Callable[[SolvedProduct], None] | None = None,
    ) -> None:
        planned, targets = model.planned, model.targets
        self.planned, self.targets, self.solver = planned, targets, solver
        self.leaves = Leaves(planned)
        self.outcomes: list[Outcome] = []
        self.journal: Journal | None = None
        self._owner, self._progress = owner, progress
        self._report_rows: list[SolvedProduct] = []
        self._reached: set[int] = set()
        self._solved_uses: dict[tuple[LeafKey, ...], list[_SolvedUse]] = {}
        # How often each leaf or slice of it was solved, and how often each leaf will be solved.
        self._solve_counts: collections.Counter[LeafKey] = collections.Counter()
        self._expected_counts: collections.Counter[int] = collections.Counter()
        for n in targets.matrices:
            product = planned.products[n]
            weight = self._weight(product)
            for recipe in filter(None, weight.recipes):
                check_search(f"{owner}: {product.where}", recipe, solver)
            if _unsolvable_reason(weight, targets.matrices[n].axes):
                continue
            iterations = math.prod(product.loops[depth] for depth in product.stacked)
            if n not in planned.stored.reasons:
                self._expected_counts.update(dict.fromkeys(self._leaf_indices(n), iterations))

    def _weight(self, product: Product) -> WeightToQuantize:
        assigned = self.planned.chosen[product.number]
        assert assigned is not None
        weight = weight_of(product, assigned)
        assert weight is not None, "the rules quantize it"
        return weight

    def _leaf_indices(self, number: int) -> list[int]:
        return list(self._weight(self.planned.products[number]).origin.leaves.values())

    def pack_unsolved(self) -> None:
        """Packs the leaves that no product solves."""
        for leaf in self.planned.stored.leaves:
            if leaf not in self._expected_counts:
                self.leaves.pack(LeafKey(leaf))

    def solve(self, occurrence: Occurrence, observe: Callable[[], Statistics]) -> None:
        """Solves one product, in one iteration of the scans around it.

        Args:
          occurrence: the product and the iteration.
          observe: a function that returns the statistics of its input.
        """
        product = occurrence.product
        self._reached.add(product.number)
        if self.journal is not None and self._restore(occurrence, self.journal):
            return
        statistics = observe()
        occurrence.check_finite(self._owner, statistics)
        reason = self.planned.stored.reasons.get(product.number)
        if reason is not None:
            reason = f"not stored: {reason}"
        else:
            axes = self.targets.matrices[product.number].axes
            reason = _unsolvable_reason(self._weight(product), axes)
        view = None
        if not reason:
            view, reason = trace_weight(occurrence.frame, occurrence.variable)
        if view is None:
            self._add_report_row(self._report_row(occurrence, statistics, unsolved_reason=reason))
        else:
            self._solve(occurrence, view, statistics)

    def _restore(self, occurrence: Occurrence, journal: Journal) -> bool:
        """Restores a product from the journal; returns whether the journal contains it."""
        entry = journal.read(len(self._report_rows))
        if entry is None:
            return False
        keys = occurrence.frame.leaves_of(occurrence.variable)
        self._solve_counts.update(keys)
        for key, q in zip(keys, entry.packed, strict=True):
            self.leaves.restore(key, q)
        self._add_report_row(entry.row)
        return True

    def _solve(self, occurrence: Occurrence, view: WeightView, statistics: Statistics) -> None:
        product = occurrence.product
        occurrence.check_weight(self._owner, view.x)
        keys, axes = view.keys, self.targets.matrices[product.number].axes
        statistics, other_uses = self._merge_equal_uses(view, axes, statistics)
        layout, weight = MatrixLayout(axes, view.x.shape), self._weight(product)
        stack = WeightStack(
            occurrence=occurrence,
            view=view,
            layout=layout,
            recipes=matrices_by_recipe(weight, layout),
            shares=leaf_shares(product, weight, layout),
            statistics=layout.flatten_batches(statistics),
        )
        solved = solve_weight(stack, self.leaves, self.solver)
        view, grid_values = solved.view, layout.weight(solved.matrices.grid_values)
        self._solve_counts.update(keys)
        for key, value in view.move_back(grid_values, view.grid_values).items():
            self.leaves.put(key, value, self._is_last(key))
        outcome = _outcome(stack.shares, solved.matrices, statistics)
        if not math.isfinite(outcome.power + outcome.nearest_loss + outcome.solved_loss):
            raise ValueError(
                f"{self._owner}: squared outputs must fit into float32, but their sum overflows "
                f"for {product.where}. Look for large values in its weight and in the batches, or "
                "scale them down."
            )
        self.outcomes.append(outcome)
        self._solved_uses.pop(keys, None)
        if not all(map(self._is_last, keys)):
            use = _SolvedUse(view.x, axes, statistics, outcome)
            self._solved_uses[keys] = [*other_uses, use]
        row = self._solved_report_row(occurrence, statistics, solved, outcome)
        # A weight of several products needs the statistics of all of them, so it is solved again
        # and must not be journaled yet.
        if self.journal is not None and all(map(self._is_only, keys)):
            packed = [self.leaves.packed(key) for key in keys]
            self.journal.write(len(self._report_rows), Entry(row, packed))
        self._add_report_row(row)

    def _merge_equal_uses(
        self, view: WeightView, axes: Axes, statistics: Statistics
    ) -> tuple[Statistics, list[_SolvedUse]]:
        """Merges the statistics of earlier products that multiplied the same weight.

        Returns:
          The merged statistics, and the earlier products that used the leaves in another way.
        """
        others = []
        for use in self._solved_uses.get(view.keys, []):
            if use.axes == axes and bool(jnp.array_equal(use.x, view.x)):
                statistics = statistics.merge(use.statistics)
                # The new loss includes that of the earlier product.
                self.outcomes.remove(use.outcome)
            else:
                others.append(use)
        return statistics, others

    def _is_last(self, key: LeafKey) -> bool:
        """Returns whether no product or iteration solves a leaf or slice later."""
        return self._solve_counts[key] * self._slice_count(key) >= self._expected_counts[key.leaf]

    def _is_only(self, key: LeafKey) -> bool:
        """Returns whether only one product solves a leaf or slice."""
        return self._slice_count(key) >= self._expected_counts[key.leaf]

    def _slice_count(self, key: LeafKey) -> int:
        """Returns the number of slices into which the key divides its leaf."""
        return math.prod(self.planned.traced.arrays[key.leaf].shape[: len(key.slice_index)])

    def _solved_report_row(
        self,
        occurrence: Occurrence,
        statistics: Statistics,
        solved: SolvedWeight,
        outcome: Outcome,
    ) -> SolvedProduct:
        """Returns the row of the report for a solved product."""
        matrices = solved.matrices
        tokens = np.asarray(statistics.tokens).reshape(-1)
        is_solved, worse = np.asarray(matrices.solved), np.asarray(matrices.worse)
        notes = [solved.note] if solved.note else []
        if needs_drift(self.solver) and statistics.drift is None:
            notes.append("solved without input drift, which is unknown here")
        out_of = "" if len(tokens) == 1 else f" of {len(tokens)} matrices"
        for mask, text in (
            (tokens == 0, "received no tokens"),
            (~is_solved & (tokens > 0), "the Hessian cannot be factorized"),
            (worse, "the nearest levels have a smaller loss"),
        ):
            if mask.any():
                notes.append(f"{mask.sum()}{out_of}: {text}" if out_of else text)
        return self._report_row(
            occurrence,
            statistics,
            damping=float(np.asarray(matrices.damping).max()),
            rtn=outcome.relative(outcome.nearest_loss),
            loss=outcome.relative(outcome.solved_loss),
            power=outcome.power / max(int(tokens.sum()), 1),
            unsolved_reason="; ".join(notes),
        )

    def _report_row(
        self, occurrence: Occurrence, statistics: Statistics, **fields: Any
    ) -> SolvedProduct:
        """Returns a row of the report with given fields and those that do not need a solution."""
        return SolvedProduct(
            product=occurrence.name,
            format=_formats(self._weight(occurrence.product)),
            tokens=int(jnp.min(statistics.tokens)),
            inputs=statistics.inputs,
            **fields,
        )

    def _add_report_row(self, row: SolvedProduct) -> None:
        self._report_rows.append(row)
        if self._progress is not None:
            self._progress(row)

    def report(self) -> Report:
        """Returns the report; products that were not solved come last."""
        rows = list(self._report_rows)
        reasons = {
            n: "its input does not depend on data"
            for n in self.targets.matrices
            if n not in self._reached
        }
        solved = {leaf for n in self._reached for leaf in self._leaf_indices(n)}
        for number, reason in sorted({**self.targets.reasons, **reasons}.items()):
            product = self.planned.products[number]
            weight = self._weight(product)
            if product.operation == LOOK_UP and solved >= set(self._leaf_indices(number)):
                continue
            rows.append(SolvedProduct(product.name, _formats(weight), unsolved_reason=reason))
        return Report(tuple(rows))

    def result(self) -> Any:
        """Returns the parameters with the solved leaves packed."""
        return replace_parameters(self.planned, self.leaves.results())


def _outcome(
    shares: Mapping[int, np.ndarray], matrices: SolvedMatrices, statistics: Statistics
) -> Outcome:
    """Returns the losses of a solved product and the parts that are due to its leaves."""
    losses, tokens = np.asarray(matrices.solved_loss), np.asarray(statistics.tokens).reshape(-1)
    leaf_losses = {
        leaf: LeafLoss(float(np.sum(share * losses)), int(np.sum(tokens[share > 0])))
        for leaf, share in shares.items()
    }
    return Outcome(
        leaf_losses=leaf_losses,
        nearest_loss=float(jnp.sum(matrices.nearest_loss)),
        solved_loss=float(jnp.sum(matrices.solved_loss)),
        power=float(jnp.sum(matrices.power)),
    )


def _unsolvable_reason(weight: WeightToQuantize, axes: Axes) -> str:
    """Returns the reason why a weight cannot be solved, or ""."""
    if weight.experts is None:
        return ""
    if None in weight.recipes:
        return "a part of its weight stays float"
    return "" if weight.experts.axis in axes.batch else "its outputs have different recipes"


def _formats(weight: WeightToQuantize) -> str:
    """Returns the name of a weight's element format; the formats of experts are joined by "|"."""
    names = ("float" if recipe is None else recipe.element.name for recipe in weight.recipes)
    return "|".join(dict.fromkeys(names))
