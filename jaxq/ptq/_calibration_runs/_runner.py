"""Runs of a model on the calibration batches, in which the weights of products are solved.

In sequential solving, the program is run in parts, on all batches. A part ends before a product
with a new input. The statistics of this input are merged over the batches, the weights of all
products that read it are solved, and the next part runs with the packed weights. A scan over layers
runs one iteration at a time, with one compiled program per part for all iterations. Equal parts of
unrolled layers also share one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models import Assigned, ModelPlan, Node, Product, as_array
from jaxq.ptq._calibration_runs._calibration_calls import Calls, Model, without_weight
from jaxq.ptq._calibration_runs._frames import Frame
from jaxq.ptq._calibration_runs._inlining import FlatProgram, flatten
from jaxq.ptq._calibration_runs._leaves import LeafKey, Leaves
from jaxq.ptq._calibration_runs._parts import (
    BatchRun,
    Environment,
    Occurrence,
    PartCache,
    Section,
    Solve,
    measure_drift,
    merge_all,
)
from jaxq.ptq._statistics import Statistics, Targets

__all__ = ["ModelRunner", "model_runner"]


@dataclasses.dataclass(eq=False)
class ModelRunner:
    """Runs a planned model on all batches, and solves its products.

    Attributes:
      planned: the model.
      targets: the products to solve.
      chosen: the assignments of all products, without the recipes of the weights to solve.
      leaves: the leaves, float or packed.
      solve: the function that solves one product, given a function that returns the statistics of
        its input.
      masks: the mask of each batch, or None.
    """

    planned: ModelPlan
    targets: Targets
    chosen: Sequence[Assigned | None]
    leaves: Leaves
    solve: Solve
    masks: Sequence[jax.Array | None]
    _flat_programs: dict[int, tuple[Node, FlatProgram]] = dataclasses.field(default_factory=dict)
    _parts: PartCache = dataclasses.field(default_factory=PartCache)

    def root(self, leaves: Leaves | None = None) -> Frame:
        """Returns the frame of the program, without the results, which are not needed.

        Args:
          leaves: the leaves that the frame reads; None (the default) means the leaves to solve.
        """
        flat = self._flat(self.planned.node)
        flat = dataclasses.replace(flat, body=flat.body._replace(outvars=[]))
        pairs = zip(flat.body.invars, self.planned.traced.origins, strict=True)
        sources = {v: LeafKey(i) for i, (v, o) in enumerate(pairs) if o is not None}
        return Frame(flat, sources, 0, leaves or self.leaves)

    def observe_all(self, frame: Frame, envs: list[Environment]) -> dict[str, Statistics]:
        """Returns the statistics of all distinct inputs, from one run of the float model."""
        equations = [i for i in range(len(frame.flat.body.eqns)) if not frame.is_fixed(i)]
        return self._run(frame, equations, self._targets_in(frame.flat, equations), envs, [])

    def solve_together(self, frame: Frame, states: Mapping[str, Statistics]) -> None:
        """Solves all products from the statistics that `observed` returned."""
        for i in range(len(frame.flat.body.eqns)):
            for number in sorted(frame.flat.numbers(i) & set(self.targets.matrices)):
                self._solve(frame, i, number, lambda: states)

    def solve_in_order(self, runs: Sequence[BatchRun]) -> list[list[list[Any]]]:
        """Solves products in the order of the program.

        Args:
          runs: the run with the leaves to solve, and optionally a second run with float weights,
            from which the drift of inputs is measured.

        Returns:
          The results of the program for each run and batch.
        """
        frame = runs[0].frame
        flat, body = frame.flat, frame.flat.body
        pending: list[int] = []
        done: set[int] = set()
        for i in range(len(body.eqns)):
            if frame.is_fixed(i):
                continue
            new = self._targets_in(flat, [i]) - done
            if new and self._iterates_over_weights(frame, i):
                for run in runs:
                    self._advance(run, pending, i)
                pending = []
                self._iterate(runs, i)
                continue
            if new:
                observed = {n for n in new if self.targets.first[n] == n}
                for run in runs:
                    self._advance(run, pending, i)
                # Observed in a separate program, so that a resumed run has bitwise equal values.
                states = functools.cache(functools.partial(self._observe, runs, i, observed))
                pending = []
                readers = {n for n in self.targets.matrices if self.targets.first[n] in observed}
                for k in range(i, len(body.eqns)):
                    for number in sorted(flat.numbers(k) & readers):
                        self._solve(frame, k, number, states)
                done |= readers
            pending.append(i)
        for run in runs:
            self._advance(run, pending, len(body.eqns))
        return [
            [[self._value(frame, env, v) for v in body.outvars] for env in envs]
            for frame, envs in runs
        ]

    def _observe(
        self, runs: Sequence[BatchRun], i: int, observed: set[int]
    ) -> dict[str, Statistics]:
        """Returns the statistics of the inputs of the products in equation i."""
        (frame, envs), *others = runs
        states = self._run(frame, [], observed, envs, frame.live(i), i)
        for float_run in others:
            states = self._with_drift(runs[0], float_run, i, states)
        return states

    def _with_drift(
        self, run: BatchRun, float_run: BatchRun, i: int, states: dict[str, Statistics]
    ) -> dict[str, Statistics]:
        """Adds the drift of the input of equation i to its statistics, if it is a product."""
        product = run.frame.flat.products.get(i)
        if product is None or product.name not in states:
            return states
        matrix = self.targets.matrices[product.number]
        variable = run.frame.flat.body.eqns[i].invars[int(matrix.swapped)]
        if matrix.collector.grouped or variable in run.frame.fixed:
            return states
        total = None
        for env, float_env, mask in zip(run.envs, float_run.envs, self.masks, strict=True):
            x, reference = env[variable], float_env[variable]
            drift = measure_drift(x, reference, mask, matrix.collector.shared())
            total = drift if total is None else total + drift
        return {**states, product.name: dataclasses.replace(states[product.name], drift=total)}

    def _value(self, frame: Frame, env: Environment, variable: Any) -> Any:
        """Returns the value of a variable for one batch as an array."""
        if not compat.is_literal(variable) and variable in env:
            return env[variable]
        return as_array(frame.value(variable))

    def _targets_in(self, flat: FlatProgram, equations: Sequence[int]) -> set[int]:
        """Returns the numbers of the products to solve in some equations."""
        return {n for i in equations for n in flat.numbers(i)} & set(self.targets.matrices)

    def _flat(self, node: Node) -> FlatProgram:
        """Returns the flat program of a node, computed once."""
        if id(node) not in self._flat_programs:
            # The node is stored too, so that no other node gets the same id.
            self._flat_programs[id(node)] = node, flatten(node, self.targets.matrices)
        return self._flat_programs[id(node)][1]

    def _advance(self, run: BatchRun, pending: list[int], to: int) -> None:
        """Runs equations and stores the values that equation `to` and later ones read."""
        self._run(run.frame, pending, set(), run.envs, run.frame.live(to))

    def _run(
        self,
        frame: Frame,
        equations: Sequence[int],
        observed: set[int],
        envs: list[Environment],
        live: list[Any],
        observed_equation: int | None = None,
    ) -> dict[str, Statistics]:
        """Runs equations on all batches, and updates the environments to hold the live values.

        Args:
          frame: the program.
          equations: the equations, in order.
          observed: the numbers of products whose inputs are observed.
          envs: the values of each batch.
          live: the variables whose values are stored.
          observed_equation: one more equation, whose inputs are observed but whose results are not
            stored; None (the default) for no such equation.

        Returns:
          The statistics of the observed products, by name, added over all batches.
        """
        computed = {v for i in equations for v in frame.flat.body.eqns[i].outvars}
        outvars = [v for v in live if v in computed]
        total: list[Statistics] = []
        names: tuple[str, ...] = ()
        if outvars or observed:
            needed = [*equations, *([] if observed_equation is None else [observed_equation])]
            needed = sorted([*frame.fixed_before(needed), *needed])
            read = frame.arguments(needed)
            fixed = [v for v in read if v in frame.fixed]
            data = [v for v in read if v not in frame.fixed]
            section = Section(needed, fixed, data, outvars, frozenset(observed))
            part = self._parts.get(frame, section, lambda: self._with_observers(observed))
            names, values = part.names, [frame.value(v) for v in fixed]
            for env, mask in zip(envs, self.masks, strict=True):
                results, states = part.call(values, [env[v] for v in data], mask)
                total = merge_all(total, states) if total else states
                env.update(zip(outvars, results, strict=True))
        for env in envs:
            _delete_all_but(env, live)
        return dict(zip(names, total, strict=True))

    def _with_observers(self, observed: set[int]) -> list[Assigned | None]:
        """Returns the assignments of all products, where some products observe their inputs."""
        return [
            self.targets.observing(assigned, n)
            if n in observed and assigned is not None
            else assigned
            for n, assigned in enumerate(self.chosen)
        ]

    def _iterates_over_weights(self, frame: Frame, i: int) -> bool:
        """Returns whether an equation is a scan in which each iteration has its own weights."""
        eqn, products = frame.flat.body.eqns[i], self.planned.products
        numbers = self._targets_in(frame.flat, [i])
        return eqn.primitive.name == "scan" and all(
            frame.depth in products[n].stacked for n in numbers
        )

    def _iterate(self, runs: Sequence[BatchRun], i: int) -> None:
        """Runs the scan in equation i one iteration at a time, and solves its products."""
        eqn = runs[0].frame.flat.body.eqns[i]
        consts, count = compat.loop_counts(eqn)
        first, length = consts + count, eqn.params["length"]
        carried = [
            [[self._value(frame, env, v) for v in eqn.invars[consts:first]] for env in envs]
            for frame, envs in runs
        ]
        rows: list[list[list[Any]]] = [[[None] * length for _ in run.envs] for run in runs]
        iterations = range(length)
        for iteration in reversed(iterations) if eqn.params["reverse"] else iterations:
            inside = [
                self._start_iteration(run, i, iteration, carry)
                for run, carry in zip(runs, carried, strict=True)
            ]
            results = self.solve_in_order(inside)
            carried = [[result[:count] for result in run_results] for run_results in results]
            for run_rows, run_results in zip(rows, results, strict=True):
                for batch_rows, result in zip(run_rows, run_results, strict=True):
                    batch_rows[iteration] = result[count:]
        for (frame, envs), carries, run_rows in zip(runs, carried, rows, strict=True):
            live = frame.live(i + 1)
            for env, carry, batch_rows in zip(envs, carries, run_rows, strict=True):
                stacked = [jnp.stack(values) for values in zip(*batch_rows, strict=True)]
                pairs = zip(eqn.outvars, [*carry, *stacked], strict=True)
                env.update((v, x) for v, x in pairs if v in live)
                _delete_all_but(env, live)

    def _start_iteration(
        self, run: BatchRun, i: int, iteration: int, carried: list[list[Any]]
    ) -> BatchRun:
        """Returns the run of one iteration of a scan, with its initial values."""
        frame, eqn = run.frame, run.frame.flat.body.eqns[i]
        consts, count = compat.loop_counts(eqn)
        first = consts + count
        inside = self._child(frame, i, 0, iteration)
        inside.iterations = (*frame.iterations, iteration)
        invars = inside.flat.body.invars
        inside_envs = []
        for env, carry in zip(run.envs, carried, strict=True):
            values = [
                *(
                    None if v in inside.sources else self._value(frame, env, o)
                    for v, o in zip(invars[:consts], eqn.invars[:consts], strict=True)
                ),
                *carry,
                *(
                    None if v in inside.sources else self._value(frame, env, o)[iteration]
                    for v, o in zip(invars[first:], eqn.invars[first:], strict=True)
                ),
            ]
            pairs = zip(invars, values, strict=True)
            inside_envs.append({v: x for v, x in pairs if v not in inside.sources})
        return BatchRun(inside, inside_envs)

    def _child(self, frame: Frame, i: int, program_index: int, iteration: int | None) -> Frame:
        """Returns the frame of a program within equation i; see `Frame.child`."""
        return frame.child(
            i, program_index, self._flat(frame.flat.inner[i][program_index]), iteration
        )

    def _solve(
        self, frame: Frame, i: int, number: int, states: Callable[[], Mapping[str, Statistics]]
    ) -> None:
        """Solves one product in equation i, for every iteration of the scans in the equation."""
        product = self.planned.products[number]
        name = self.planned.products[self.targets.first[number]].name

        def observe(iterations: tuple[int, ...]) -> Statistics:
            return jax.tree.map(lambda x: x[iterations] if iterations else x, states()[name])

        for occurrence in self._occurrences(frame, i, product, ()):
            self.solve(occurrence, functools.partial(observe, occurrence.iterations))

    def _occurrences(
        self, frame: Frame, i: int, product: Product, iterations: tuple[int, ...]
    ) -> Iterator[Occurrence]:
        """Yields the occurrences of a product in equation i.

        Args:
          frame: the program.
          i: the equation.
          product: the product.
          iterations: the iterations of the scans around the frame in which it has its own weight.
        """
        eqn, flat = frame.flat.body.eqns[i], frame.flat
        if i in flat.products:
            operand = 0 if self.targets.matrices[product.number].swapped else 1
            yield Occurrence(product, frame, eqn.invars[operand], iterations)
            return
        for program_index, node in enumerate(flat.inner[i]):
            inside = self._flat(node)
            for k in range(len(inside.body.eqns)):
                if product.number not in inside.numbers(k):
                    continue
                if eqn.primitive.name == "scan" and frame.depth in product.stacked:
                    for iteration in range(eqn.params["length"]):
                        child = self._child(frame, i, program_index, iteration)
                        yield from self._occurrences(child, k, product, (*iterations, iteration))
                else:
                    child = self._child(frame, i, program_index, None)
                    yield from self._occurrences(child, k, product, iterations)


def model_runner(calls: Calls, model: Model, leaves: Leaves, solve: Solve) -> ModelRunner:
    """Returns the runner of a model.

    Args:
      calls: the calls of the model on the batches.
      model: the planned model.
      leaves: the leaves to solve.
      solve: the function that is called for each product.
    """
    planned = model.planned
    chosen = [without_weight(p, a) for p, a in zip(planned.products, planned.chosen, strict=True)]
    return ModelRunner(
        planned=planned,
        targets=model.targets,
        chosen=chosen,
        leaves=leaves,
        solve=solve,
        masks=calls.masks,
    )


def _delete_all_but(env: Environment, live: Collection[Any]) -> None:
    """Deletes the values of all variables that are not live."""
    live = set(live)
    for variable in [v for v in env if v not in live]:
        del env[variable]
