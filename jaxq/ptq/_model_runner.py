"""Solution of a model's weights in the order of its program.

The program is run in parts, on all batches. A part ends before a product with a new input. The
statistics of this input are merged over the batches, the weights of all products that read it are
solved, and the next part runs with the packed weights. A scan over layers runs one iteration at a
time, with one compiled program per part for all iterations; equal parts of unrolled layers also
share one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models import Assigned, Node, Planned, Product, unpacked
from jaxq.ptq._flat_programs import Flat, anonymous, arguments_of, flatten, signature
from jaxq.ptq._leaf_states import Frame, LeafKey, Leaves, Outer
from jaxq.ptq._observe import Targets
from jaxq.ptq._program_parts import (
    BatchRun,
    Environment,
    Part,
    Place,
    Solve,
    compiled,
    drift,
    merged,
)
from jaxq.ptq._statistics import Statistics

__all__ = ["Stages"]


@dataclasses.dataclass(eq=False)
class Stages:
    """A run of a planned model on all batches, in which products are solved as they are reached.

    Attributes:
      planned: the model.
      targets: the products to solve.
      chosen: the assignments of all products, without the recipes of the weights to solve.
      leaves: the leaves, float or packed.
      solve: the function that solves one product, given a function that returns its statistics.
      masks: the mask of each batch, or None.
    """

    planned: Planned
    targets: Targets
    chosen: Sequence[Assigned | None]
    leaves: Leaves
    solve: Solve
    masks: Sequence[jax.Array | None]
    _flats: dict[int, tuple[Node, Flat]] = dataclasses.field(default_factory=dict)
    _parts: dict[Any, Part] = dataclasses.field(default_factory=dict)

    def root(self, leaves: Leaves | None = None) -> Frame:
        """Returns the frame of the whole program, without its results, which are not needed.

        Args:
          leaves: the leaves of the frame; None (the default) means the leaves to solve.
        """
        flat = self._flat(self.planned.node)
        flat = dataclasses.replace(flat, body=flat.body._replace(outvars=[]))
        pairs = zip(flat.body.invars, self.planned.traced.origins, strict=True)
        sources = {v: LeafKey(i) for i, (v, o) in enumerate(pairs) if o is not None}
        return Frame(flat, sources, 0, leaves or self.leaves)

    def observed(self, frame: Frame, envs: list[Environment]) -> dict[str, Statistics]:
        """Returns the statistics of all distinct inputs, from one run of the float model."""
        data = [i for i in range(len(frame.flat.body.eqns)) if not frame.is_fixed(i)]
        return self._run(frame, data, self._wanted(frame.flat, data), envs, [])

    def solve_together(self, frame: Frame, states: Mapping[str, Statistics]) -> None:
        """Solves all products from the statistics of `observed`."""
        for i in range(len(frame.flat.body.eqns)):
            for number in sorted(frame.flat.numbers(i) & set(self.targets.matrices)):
                self._solve(frame, i, number, lambda: states)

    def solve_in_order(self, runs: Sequence[BatchRun]) -> list[list[list[Any]]]:
        """Solves products in the order of the program.

        Args:
          runs: the run to solve, optionally followed by a run with float weights, from which the
            drift of inputs is measured.

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
            new = self._wanted(flat, [i]) - done
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
                members = {n for n in self.targets.matrices if self.targets.first[n] in observed}
                for k in range(i, len(body.eqns)):
                    for number in sorted(flat.numbers(k) & members):
                        self._solve(frame, k, number, states)
                done |= members
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
        states = self._run(frame, [], observed, envs, self._live(frame, i), i)
        for other in others:
            states = self._with_drift(runs[0], other, i, states)
        return states

    def _with_drift(
        self, run: BatchRun, other: BatchRun, i: int, states: dict[str, Statistics]
    ) -> dict[str, Statistics]:
        """Returns statistics with the drift of the input of equation i, if that is a product."""
        product = run.frame.flat.products.get(i)
        if product is None or product.name not in states:
            return states
        matrix = self.targets.matrices[product.number]
        variable = run.frame.flat.body.eqns[i].invars[int(matrix.swapped)]
        if matrix.collector.grouped or variable in run.frame.fixed:
            return states
        total = None
        for own, reference, mask in zip(run.envs, other.envs, self.masks, strict=True):
            part = drift(own[variable], reference[variable], mask, matrix.collector.shared())
            total = part if total is None else total + part
        found = dataclasses.replace(states[product.name], drift=total)
        return {**states, product.name: found}

    def _value(self, frame: Frame, env: Environment, variable: Any) -> Any:
        """Returns the value of a variable for one batch as an array."""
        if not compat.is_literal(variable) and variable in env:
            return env[variable]
        return unpacked(frame.value(variable))

    def _wanted(self, flat: Flat, equations: Sequence[int]) -> set[int]:
        return {n for i in equations for n in flat.numbers(i)} & set(self.targets.matrices)

    def _flat(self, node: Node) -> Flat:
        if id(node) not in self._flats:
            self._flats[id(node)] = node, flatten(node, self.targets.matrices)
        return self._flats[id(node)][1]

    def _advance(self, run: BatchRun, pending: list[int], to: int) -> None:
        """Runs equations and keeps the values that are read from equation `to` on."""
        self._run(run.frame, pending, set(), run.envs, self._live(run.frame, to))

    def _live(self, frame: Frame, start: int) -> list[Any]:
        """Returns the data-dependent variables read by equations from `start` on or by results."""
        body = frame.flat.body
        read = [v for eqn in body.eqns[start:] for v in eqn.invars] + list(body.outvars)
        made = {v for eqn in body.eqns[start:] for v in eqn.outvars}
        return [
            v
            for v in dict.fromkeys(v for v in read if not compat.is_literal(v))
            if v not in frame.fixed and v not in made
        ]

    def _run(
        self,
        frame: Frame,
        equations: Sequence[int],
        observed: set[int],
        envs: list[Environment],
        live: list[Any],
        extra: int | None = None,
    ) -> dict[str, Statistics]:
        """Runs equations on all batches, and updates the environments to hold the live values.

        Args:
          frame: the program.
          equations: the equations, in order.
          observed: the numbers of products whose inputs are observed.
          envs: the values of each batch.
          live: the variables to keep.
          extra: one more equation, which is only observed, or None.

        Returns:
          The statistics of the observed products, by name, added over all batches.
        """
        own = [*equations, *([] if extra is None else [extra])]
        made = {v for i in equations for v in frame.flat.body.eqns[i].outvars}
        outvars = [v for v in live if v in made]
        total: list[Statistics] = []
        names: tuple[str, ...] = ()
        if outvars or observed:
            everything = sorted([*frame.fixed_before(own), *own])
            read = frame.arguments(everything)
            fixed = [v for v in read if v in frame.fixed]
            data = [v for v in read if v not in frame.fixed]
            part = self._part(frame, everything, (fixed, data, outvars), observed)
            names, values = part.names, [frame.value(v) for v in fixed]
            for env, mask in zip(envs, self.masks, strict=True):
                results, seen = part.call(values, [env[v] for v in data], mask)
                total = merged(total, seen) if total else seen
                env.update(zip(outvars, results, strict=True))
        for env in envs:
            for variable in [v for v in env if v not in live]:
                del env[variable]
        return dict(zip(names, total, strict=True))

    def _part(
        self,
        frame: Frame,
        equations: list[int],
        variables: tuple[list[Any], list[Any], list[Any]],
        observed: set[int],
    ) -> Part:
        """Compiles some equations, or returns them from the cache."""
        quick = id(frame.flat), tuple(equations), frozenset(observed)
        if quick in self._parts:
            return self._parts[quick]
        fixed, data, outvars = variables
        chosen = [
            self.targets.observing(self._assigned(n), n) if n in observed else self.chosen[n]
            for n in range(len(self.chosen))
        ]
        named = frame.flat.part(equations, [*fixed, *data], outvars, chosen)
        seen = tuple(a.name for a in named.all() if any(a.calibrated))
        part = anonymous(named, {a.name: str(k) for k, a in enumerate(named.all())})
        key = signature(part), frame.depth, len(fixed), tuple(observed and [0])
        if key not in self._parts:
            self._parts[key] = Part(compiled(part, frame.depth), ())
        self._parts[quick] = Part(self._parts[key].call, seen)
        return self._parts[quick]

    def _assigned(self, number: int) -> Assigned:
        assigned = self.chosen[number]
        assert assigned is not None, "a product to solve has an assignment"
        return assigned

    def _iterates_over_weights(self, frame: Frame, i: int) -> bool:
        """Returns whether an equation is a scan in which each iteration has its own weights."""
        eqn, products = frame.flat.body.eqns[i], self.planned.products
        numbers = self._wanted(frame.flat, [i])
        return eqn.primitive.name == "scan" and all(
            frame.depth in products[n].stacked for n in numbers
        )

    def _iterate(self, runs: Sequence[BatchRun], i: int) -> None:
        """Runs a scan iteration by iteration."""
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
            carried = [[result[:count] for result in own] for own in results]
            for row, own in zip(rows, results, strict=True):
                for values, result in zip(row, own, strict=True):
                    values[iteration] = result[count:]
        for (frame, envs), carries, row in zip(runs, carried, rows, strict=True):
            live = set(self._live(frame, i + 1))
            for env, carry, own in zip(envs, carries, row, strict=True):
                stacked = [jnp.stack(values) for values in zip(*own, strict=True)]
                pairs = zip(eqn.outvars, [*carry, *stacked], strict=True)
                env.update((v, x) for v, x in pairs if v in live)
                for variable in [v for v in env if v not in live]:
                    del env[variable]

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
        own = []
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
            own.append({v: x for v, x in pairs if v not in inside.sources})
        return BatchRun(inside, own)

    def _child(self, frame: Frame, i: int, which: int, iteration: int | None) -> Frame:
        """Returns the frame of a program within an equation.

        Args:
          frame: the program around it.
          i: the equation.
          which: the index of the program in the equation.
          iteration: the iteration of a scan, or None for the weights that all iterations share.
        """
        eqn, flat = frame.flat.body.eqns[i], self._flat(frame.flat.inner[i][which])
        sources: dict[Any, LeafKey | Outer] = {}
        for inner, outer, row in arguments_of(eqn, flat.body, which, iteration):
            if compat.is_literal(outer) or outer not in frame.fixed:
                continue
            source = frame.sources.get(outer)
            if isinstance(source, LeafKey) and row is None:
                sources[inner] = source
            elif isinstance(source, LeafKey) and self._is_stack(frame, outer, source):
                assert row is not None
                sources[inner] = LeafKey(source.leaf, (*source.rows, row))
            else:
                sources[inner] = Outer(frame, outer, row)
        depth = frame.depth + (eqn.primitive.name == "scan")
        return Frame(flat, sources, depth, frame.leaves, frame.iterations)

    def _is_stack(self, frame: Frame, variable: Any, key: LeafKey) -> bool:
        """Returns whether a leaf is only scanned over by one scan and has stored leading axes."""
        storage = frame.leaves.storage(key)
        return frame.uses(variable) == 1 and storage is not None and storage.leading > 0

    def _solve(
        self, frame: Frame, i: int, number: int, states: Callable[[], Mapping[str, Statistics]]
    ) -> None:
        """Solves one product in equation i, for every iteration of the scans in the equation."""
        product = self.planned.products[number]
        name = self.planned.products[self.targets.first[number]].name

        def seen(iterations: tuple[int, ...]) -> Statistics:
            return jax.tree.map(lambda x: x[iterations] if iterations else x, states()[name])

        for place in self._places(frame, i, product, ()):
            self.solve(place, functools.partial(seen, place.iterations))

    def _places(
        self, frame: Frame, i: int, product: Product, iterations: tuple[int, ...]
    ) -> Iterator[Place]:
        """Yields the places of a product in an equation."""
        eqn, flat = frame.flat.body.eqns[i], frame.flat
        if i in flat.products:
            operand = 0 if self.targets.matrices[product.number].swapped else 1
            yield Place(product, frame, eqn.invars[operand], iterations)
            return
        for which, node in enumerate(flat.inner[i]):
            inside = self._flat(node)
            for k in range(len(inside.body.eqns)):
                if product.number not in inside.numbers(k):
                    continue
                if eqn.primitive.name == "scan" and frame.depth in product.stacked:
                    for iteration in range(eqn.params["length"]):
                        child = self._child(frame, i, which, iteration)
                        yield from self._places(child, k, product, (*iterations, iteration))
                else:
                    child = self._child(frame, i, which, None)
                    yield from self._places(child, k, product, iterations)
