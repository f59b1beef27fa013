"""The solution of a model's products one by one, and the rows of the report."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import LOOK_UP, Product, QuantizedWeight, weight_of
from jaxq.products import Axes
from jaxq.ptq._calibration_calls import Model
from jaxq.ptq._collectors import Layout
from jaxq.ptq._experts import by_leaf, by_recipe
from jaxq.ptq._journal import Entry, Journal
from jaxq.ptq._leaf_states import LeafKey, Leaves, WeightView, trace_weight
from jaxq.ptq._matrix_solving import SolvedMatrices, solve_stack
from jaxq.ptq._program_parts import Place
from jaxq.ptq._reports import Report, SolvedProduct
from jaxq.ptq._solvers import OWQ, Solver, check_search, needs_drift, search_of
from jaxq.ptq._statistics import Statistics
from jaxq.ptq._weight_solving import Stack, with_kept_inputs, with_searched_scales

__all__ = ["Outcome", "SolverRun"]


class Outcome(NamedTuple):
    """The losses of one solved product, summed over all tokens and matrices.

    Attributes:
      leaves: the share of the loss and the number of tokens of each leaf of its weight, by the
        leaf's index.
      nearest: the loss of the nearest levels.
      loss: the loss of the chosen levels.
      power: the power of the outputs.
    """

    leaves: Mapping[int, "Share"]
    nearest: float
    loss: float
    power: float

    def relative(self, loss: float) -> float:
        """Returns a loss relative to the power of the outputs."""
        return loss / self.power if self.power else 0.0


class Share(NamedTuple):
    """The part of a product's loss that is due to one leaf, and the number of the leaf's tokens."""

    loss: float
    tokens: int


class _Earlier(NamedTuple):
    """A weight that an earlier product multiplied, with the statistics of its input."""

    x: jax.Array
    axes: Axes
    statistics: Statistics
    outcome: Outcome


class SolverRun:
    """The state of one call of a solving function: the leaves and the rows of the report.

    Args:
      owner: the name of the calling function, for errors.
      model: the model.
      solver: the solver.
      progress: the user's function, or None.

    Attributes:
      planned: the plan of the model.
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
        planned, found = model.planned, model.targets
        self.planned, self.found, self.solver = planned, found, solver
        self.leaves = Leaves(planned)
        self.outcomes: list[Outcome] = []
        self.journal: Journal | None = None
        self._owner, self._progress = owner, progress
        self._rows: list[SolvedProduct] = []
        self._seen: set[int] = set()
        self._earlier: dict[tuple[LeafKey, ...], list[_Earlier]] = {}
        self._solves: collections.Counter[LeafKey] = collections.Counter()
        self._expected: collections.Counter[int] = collections.Counter()
        for n in found.matrices:
            product = planned.products[n]
            weight = self._weight(product)
            for recipe in filter(None, weight.recipes):
                check_search(f"{owner}: {product.where}", recipe, solver)
            if _unsolvable(weight, found.matrices[n].axes):
                continue
            iterations = math.prod(product.loops[depth] for depth in product.stacked)
            if n not in planned.stored.reasons:
                self._expected.update(dict.fromkeys(self._leaves(n), iterations))

    def _weight(self, product: Product) -> Any:
        assigned = self.planned.chosen[product.number]
        assert assigned is not None
        weight = weight_of(product, assigned)
        assert weight is not None, "the rules quantize it"
        return weight

    def _leaves(self, number: int) -> list[int]:
        return list(self._weight(self.planned.products[number]).origin.leaves.values())

    def pack_rest(self) -> None:
        """Packs the leaves that no product solves."""
        for leaf in self.planned.stored.leaves:
            if leaf not in self._expected:
                self.leaves.pack(LeafKey(leaf))

    def solve(self, place: Place, observed: Callable[[], Statistics]) -> None:
        """Solves one product, in one iteration of the scans around it.

        Args:
          place: the product and the iteration.
          observed: a function that returns the statistics of its input.
        """
        product = place.product
        self._seen.add(product.number)
        if self.journal is not None and self._restored(place, self.journal):
            return
        statistics = observed()
        if not bool(jnp.all(jnp.isfinite(statistics.amax))):
            raise ValueError(
                f"{self._owner}: inputs must be finite, but {product.where} has a NaN or an "
                "infinity in its input. Look for it in the batches, or mask the padding."
            )
        reason = self.planned.stored.reasons.get(product.number)
        if reason is not None:
            view: WeightView | str = f"not stored: {reason}"
        elif why := _unsolvable(self._weight(product), self.found.matrices[product.number].axes):
            view = why
        else:
            view = trace_weight(place.frame, place.variable)
        if isinstance(view, str):
            self._add(self._unsolved(place, statistics, view))
            return
        self._solve(place, view.keys, view, statistics)

    def _restored(self, place: Place, journal: Journal) -> bool:
        """Restores a product from the journal; returns whether the journal contains it."""
        entry = journal.read(len(self._rows))
        if entry is None:
            return False
        keys = place.frame.leaves_of(place.variable)
        self._solves.update(keys)
        for key, q in zip(keys, entry.packed, strict=True):
            self.leaves.restore(key, q)
        self._add(entry.row)
        return True

    def _solve(
        self, place: Place, keys: tuple[LeafKey, ...], view: WeightView, statistics: Statistics
    ) -> None:
        product = place.product
        matrix, weight = self.found.matrices[product.number], self._weight(product)
        earlier = self._earlier.get(keys, [])
        for previous in earlier:
            if previous.axes == matrix.axes and bool(jnp.array_equal(previous.x, view.x)):
                statistics = statistics.merge(previous.statistics)
                # The loss below includes that of the previous product.
                self.outcomes.remove(previous.outcome)
                earlier = [other for other in earlier if other is not previous]
        layout = Layout(matrix.axes, view.x.shape)
        parts = by_leaf(product, weight, layout)
        stack = Stack(
            place=place,
            view=view,
            layout=layout,
            recipes=by_recipe(weight, layout),
            shares=parts,
            statistics=layout.stacked(statistics),
        )
        search = search_of(self.solver)
        if isinstance(self.solver, OWQ):
            view, answer, note = with_kept_inputs(stack, self.leaves, self.solver)
        elif search is not None:
            view, answer, note = with_searched_scales(stack, self.leaves, self.solver, search)
        else:
            answer, note = solve_stack(stack.problem, stack.recipes, self.solver), ""
        numbers = layout.weight(answer.numbers)
        self._solves.update(keys)
        for key, value in view.back(numbers, view.numbers).items():
            self.leaves.put(key, value, self._is_last(key))
        lost, tokens = np.asarray(answer.after), np.asarray(statistics.tokens).reshape(-1)
        shares = {
            leaf: Share(float(np.sum(part * lost)), int(np.sum(tokens[part > 0])))
            for leaf, part in parts.items()
        }
        sums = (float(jnp.sum(x)) for x in (answer.before, answer.after, answer.power))
        outcome = Outcome(shares, *sums)
        self.outcomes.append(outcome)
        self._earlier.pop(keys, None)
        if not all(map(self._is_last, keys)):
            current = _Earlier(view.x, matrix.axes, statistics, outcome)
            self._earlier[keys] = [*earlier, current]
        row = self._row(place, statistics, answer, outcome, note)
        # A weight of several products needs the statistics of all of them, so it is solved again.
        if self.journal is not None and all(map(self._is_only, keys)):
            packed = [self.leaves.packed(key) for key in keys]
            self.journal.write(len(self._rows), Entry(row, packed))
        self._add(row)

    def _is_last(self, key: LeafKey) -> bool:
        """Returns whether no other product or iteration solves a leaf or row."""
        return self._solves[key] * self._count(key) >= self._expected[key.leaf]

    def _is_only(self, key: LeafKey) -> bool:
        """Returns whether one product solves a leaf or row."""
        return self._count(key) >= self._expected[key.leaf]

    def _count(self, key: LeafKey) -> int:
        """Returns the number of rows of the key's leaf."""
        return math.prod(self.planned.traced.arrays[key.leaf].shape[: len(key.rows)])

    def _row(
        self,
        place: Place,
        statistics: Statistics,
        answer: "SolvedMatrices",
        outcome: Outcome,
        note: str,
    ) -> SolvedProduct:
        tokens = np.asarray(statistics.tokens).reshape(-1)
        solved, worse = np.asarray(answer.solved), np.asarray(answer.worse)
        notes = [note] if note else []
        if needs_drift(self.solver) and statistics.drift is None:
            notes.append("solved without input drift, which is unknown here")
        of = "" if len(tokens) == 1 else f" of {len(tokens)} matrices"
        for mask, text in (
            (tokens == 0, "saw no token"),
            (~solved & (tokens > 0), "the Hessian cannot be factorized"),
            (worse, "the nearest levels have less loss"),
        ):
            if mask.any():
                notes.append(f"{mask.sum()}{of}: {text}" if of else text)
        damping = np.asarray(answer.damping)
        return self._base(
            place,
            statistics,
            damping=float(damping.max()),
            rtn=outcome.relative(outcome.nearest),
            loss=outcome.relative(outcome.loss),
            power=outcome.power / max(int(tokens.sum()), 1),
            fallback="; ".join(notes),
        )

    def _base(self, place: Place, statistics: Statistics, **fields: Any) -> SolvedProduct:
        iterations = "".join(
            f"[{iteration}]" for iteration in (*place.frame.iterations, *place.iterations)
        )
        return SolvedProduct(
            product=place.product.name + iterations,
            recipe=_formats(self._weight(place.product)),
            tokens=int(jnp.min(statistics.tokens)),
            inputs=statistics.inputs,
            **fields,
        )

    def _unsolved(self, place: Place, statistics: Statistics, reason: str) -> SolvedProduct:
        return self._base(place, statistics, fallback=reason)

    def _add(self, row: SolvedProduct) -> None:
        self._rows.append(row)
        if self._progress is not None:
            self._progress(row)

    def report(self) -> Report:
        """Returns the report; products that were not solved come last."""
        rows = list(self._rows)
        reasons = {
            n: "its input does not depend on data"
            for n in self.found.matrices
            if n not in self._seen
        }
        solved = {leaf for n in self._seen for leaf in self._leaves(n)}
        for number, reason in sorted({**self.found.reasons, **reasons}.items()):
            product = self.planned.products[number]
            weight = self._weight(product)
            if product.operation == LOOK_UP and solved >= set(self._leaves(number)):
                continue
            rows.append(SolvedProduct(product.name, _formats(weight), fallback=reason))
        return Report(tuple(rows))

    def result(self) -> Any:
        """Returns the parameters with the solved leaves packed."""
        found = self.leaves.results()
        tree, places = self.planned.traced.parameters
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(places, leaves, strict=True)
        leaves = [found.get(place, leaf) if place is not None else leaf for place, leaf in pairs]
        result = jax.tree.unflatten(structure, leaves)
        return result[0] if isinstance(result, list) else result


def _unsolvable(weight: QuantizedWeight, axes: Axes) -> str:
    """Returns the reason why a weight of leaves with different recipes is not solved, or ""."""
    if weight.experts is None:
        return ""
    if None in weight.recipes:
        return "a part of its weight stays float"
    return "" if weight.experts.axis in axes.batch else "its outputs have different recipes"


def _formats(weight: QuantizedWeight) -> str:
    """Returns the name of a weight's element format; the formats of experts are joined by "|"."""
    names = ("float" if recipe is None else recipe.element.name for recipe in weight.recipes)
    return "|".join(dict.fromkeys(names))
