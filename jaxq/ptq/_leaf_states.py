"""The leaves of a model while they are solved, and their views as the weights of products.

The operations between a leaf and its product only move elements. They are run on the leaf's values
and levels to obtain the weight of the product, and their transpose moves the solution back.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models import CONVERSIONS, Extra, Planned, Storage, StoredView, run
from jaxq.ptq._experts import align_levels
from jaxq.ptq._flat_programs import Flat
from jaxq.quantizers import Levels, Quantized, levels, numbers_of, snap, with_levels

__all__ = ["Frame", "LeafKey", "Leaves", "Outer", "WeightView", "trace_weight"]


class LeafKey(NamedTuple):
    """A leaf of the parameters, or a row of it.

    Attributes:
      leaf: the index among the arrays of the arguments.
      rows: the indices of the row along the leading axes, which scans over layers iterate over.
    """

    leaf: int
    rows: tuple[int, ...] = ()


class LeafState(NamedTuple):
    """A leaf that is being solved; all arrays have its shape.

    Attributes:
      x: the float values that its products multiply, float32.
      levels: the levels of its elements.
      nearest: the nearest grid values.
      numbers: the chosen grid values.
      start: the leaf quantized to the nearest levels.
    """

    x: jax.Array
    levels: Levels
    nearest: jax.Array
    numbers: jax.Array
    start: Quantized


class Leaves:
    """The leaves of a planned model, floats until they are solved.

    Args:
      planned: the model, planned with float parameters.
    """

    def __init__(self, planned: Planned) -> None:
        self._arrays = planned.traced.arrays
        self._storage = planned.stored.leaves
        self._packed: dict[LeafKey, Quantized] = {}
        self._work: dict[LeafKey, LeafState] = {}

    def array(self, key: LeafKey) -> Any:
        """Returns the float array of a leaf."""
        return self._arrays[key.leaf][key.rows] if key.rows else self._arrays[key.leaf]

    def storage(self, key: LeafKey) -> Storage | None:
        """Returns the stored form of a leaf, or None if it stays an array."""
        storage = self._storage.get(key.leaf)
        return storage and storage._replace(leading=storage.leading - len(key.rows))

    def value(self, key: LeafKey) -> Any:
        """Returns the argument for a leaf: packed if it is solved at least partly, or an array."""
        q = self._packed.get(key)
        if q is None and any(k.leaf == key.leaf for k in self._packed):
            q = self._stacked(key, {k.rows: q for k, q in self._packed.items() if k[0] == key[0]})
        if q is None:
            return self.array(key)
        return StoredView(dataclasses.replace(q, dtype=self._storage[key.leaf].dtype), q.dtype)

    def nearest(self, key: LeafKey) -> Quantized:
        """Returns a leaf with the nearest levels."""
        storage = self.storage(key)
        assert storage is not None, "only stored leaves are solved"
        return storage.quantize(self.array(key))

    def work(self, key: LeafKey) -> LeafState:
        """Returns the state of a leaf that is being solved."""
        if key not in self._work:
            storage = self.storage(key)
            assert storage is not None, "only stored leaves are solved"
            q = self.nearest(key)
            x = storage.converted(self.array(key)).astype(jnp.float32)
            numbers = numbers_of(q)
            self._work[key] = LeafState(x, levels(q), numbers, numbers, q)
        return self._work[key]

    def put(self, key: LeafKey, numbers: jax.Array, is_last: bool) -> None:
        """Stores the chosen grid values of a leaf; frees its state if no others follow."""
        work = self.work(key)
        self._packed[key] = with_levels(work.start, numbers)
        self._work[key] = work._replace(numbers=numbers)
        if is_last:
            del self._work[key]

    def restore(self, key: LeafKey, q: Quantized) -> None:
        """Stores a leaf that an earlier run solved."""
        self._packed[key] = q
        self.forget(key)

    def packed(self, key: LeafKey) -> Quantized:
        """Returns a solved leaf."""
        return self._packed[key]

    def rescale(self, key: LeafKey, start: Quantized) -> None:
        """Replaces the scales of a leaf that is being solved by those of `start`."""
        work = self.work(key)
        own = levels(start)
        nearest = snap(work.x, own, start.recipe)[0]
        self._work[key] = work._replace(levels=own, nearest=nearest, start=start)

    def forget(self, key: LeafKey) -> None:
        """Frees the state of a leaf."""
        self._work.pop(key, None)

    def pack(self, key: LeafKey) -> None:
        """Packs a leaf with the nearest levels."""
        self._packed[key] = self.nearest(key)

    def results(self) -> dict[int, Quantized]:
        """Returns the packed leaves by index; rows that were not solved have the nearest levels."""
        found: dict[int, Quantized] = {}
        for leaf in self._storage:
            rows = {key.rows: q for key, q in self._packed.items() if key.leaf == leaf}
            found[leaf] = self._stacked(LeafKey(leaf), rows)
        return found

    def _stacked(self, key: LeafKey, rows: Mapping[tuple[int, ...], Quantized]) -> Quantized:
        if key.rows in rows:
            return rows[key.rows]
        if not any(own[: len(key.rows)] == key.rows for own in rows):
            return self.nearest(key)
        count = len(self.array(key))
        parts = [self._stacked(LeafKey(key.leaf, (*key.rows, i)), rows) for i in range(count)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


class Outer(NamedTuple):
    """A value of a surrounding frame, or a row of it if `row` is not None."""

    frame: "Frame"
    variable: Any
    row: int | None = None


@dataclasses.dataclass(eq=False)
class Frame:
    """A program at one iteration of the loops around it.

    Attributes:
      flat: the program.
      sources: the leaf or outer value of each argument that does not depend on data.
      depth: the number of scans around it.
      leaves: the leaves of the model.
      iterations: the iterations of the scans around it that run one at a time.
    """

    flat: Flat
    sources: Mapping[Any, LeafKey | Outer]
    depth: int
    leaves: Leaves
    iterations: tuple[int, ...] = ()

    @functools.cached_property
    def makers(self) -> dict[Any, int]:
        """The index of the equation that computes each variable."""
        return {v: i for i, eqn in enumerate(self.flat.body.eqns) for v in eqn.outvars}

    @functools.cached_property
    def fixed(self) -> set[Any]:
        """The variables that do not depend on data."""
        body = self.flat.body
        found = {*self.sources, *body.constvars}
        for eqn in body.eqns:
            if all(compat.is_literal(v) or v in found for v in eqn.invars):
                found.update(eqn.outvars)
        return found

    def uses(self, variable: Any) -> int:
        """Returns how many equations and results read a variable."""
        body = self.flat.body
        read = [v for eqn in body.eqns for v in eqn.invars] + list(body.outvars)
        return sum(v is variable for v in read)

    def is_fixed(self, i: int) -> bool:
        """Returns whether equation i does not depend on data."""
        outvars = self.flat.body.eqns[i].outvars
        return bool(outvars) and all(v in self.fixed for v in outvars)

    def fixed_before(self, equations: list[int]) -> list[int]:
        """Returns the data-independent equations that some equations depend on."""
        found: set[int] = set()
        left = [v for i in equations for v in self.flat.body.eqns[i].invars]
        while left:
            variable = left.pop()
            if compat.is_literal(variable) or variable not in self.fixed:
                continue
            i = self.makers.get(variable)
            if i is not None and i not in found and i not in equations:
                found.add(i)
                left += self.flat.body.eqns[i].invars
        return sorted(found)

    def value(self, variable: Any) -> Any:
        """Returns a value that does not depend on data, an array or a view of stored weights."""
        if compat.is_literal(variable):
            return variable.val
        body, source = self.flat.body, self.sources.get(variable)
        if isinstance(source, LeafKey):
            return self.leaves.value(source)
        if source is not None:
            return _row(source.frame.value(source.variable), source.row)
        if variable in body.constvars:
            return body.consts[list(body.constvars).index(variable)]
        made = self.makers[variable]
        equations = [*self.fixed_before([made]), made]
        read = self.arguments(equations)
        nothing = [None] * (1 + max(max(self.flat.numbers(i), default=-1) for i in equations))
        part = self.flat.part(equations, read, [variable], nothing)
        return run(part, Extra.empty(), [self.value(v) for v in read])[0][0]

    def arguments(self, equations: list[int]) -> list[Any]:
        """Returns the variables that equations read but do not compute, except constants."""
        eqns = [self.flat.body.eqns[i] for i in equations]
        made = {v for eqn in eqns for v in eqn.outvars} | {*self.flat.body.constvars}
        read = (v for eqn in eqns for v in eqn.invars if not compat.is_literal(v))
        return list(dict.fromkeys(v for v in read if v not in made))

    def leaves_of(self, variable: Any) -> tuple[LeafKey, ...]:
        """Returns the leaves that a value is a view of."""
        found: dict[LeafKey, None] = {}

        def note(key: LeafKey) -> None:
            if self.leaves.storage(key) is not None:
                found[key] = None

        self._trace(variable, note)
        return tuple(found)

    def _trace(self, variable: Any, leaf: Callable[[LeafKey], Any]) -> None:
        source = None if compat.is_literal(variable) else self.sources.get(variable)
        if isinstance(source, LeafKey):
            leaf(source)
        elif source is not None:
            source.frame._trace(source.variable, leaf)
        elif not compat.is_literal(variable) and variable in self.makers:
            for v in self.flat.body.eqns[self.makers[variable]].invars:
                self._trace(v, leaf)

    def moved(self, variable: Any, arrays: Mapping[LeafKey, jax.Array]) -> jax.Array | None:
        """Applies the operations between leaves and a variable to arrays of the leaves' shapes.

        Returns None if the variable does not depend on these leaves.
        """
        if compat.is_literal(variable):
            return None
        source = self.sources.get(variable)
        if isinstance(source, LeafKey):
            return arrays.get(source)
        if source is not None:
            x = source.frame.moved(source.variable, arrays)
            return x if x is None or source.row is None else x[source.row]
        if variable not in self.makers:
            return None
        eqn = self.flat.body.eqns[self.makers[variable]]
        operands = [self.moved(v, arrays) for v in eqn.invars]
        if all(x is None for x in operands):
            return None
        if eqn.primitive.name in CONVERSIONS:
            return operands[0]
        values = [
            self.value(v) if x is None else x for v, x in zip(eqn.invars, operands, strict=True)
        ]
        return compat.bind(eqn, values)[eqn.outvars.index(variable)]


def _row(x: Any, row: int | None) -> Any:
    """Returns a row of an array or of stored weights."""
    if row is None:
        return x
    if not isinstance(x, StoredView):
        return x[row]
    if isinstance(x.data, Quantized) and x.data.ndim > len(x.data.block):
        return jax.tree.map(lambda array: array[row], x)
    return StoredView(x.array[row], x.dtype)


class WeightView(NamedTuple):
    """The weight of a product as a view of leaves, with functions to move arrays between them.

    Attributes:
      keys: the leaves.
      x: the values of the weight, float32.
      levels: the levels of its elements.
      nearest: the nearest grid values.
      pull: a function that moves an array of the weight's shape to arrays of the leaves' shapes.
      counts: the number of times that each element of the leaves occurs in the weight.
      numbers: the chosen grid values of the leaves.
      move: a function that moves arrays of the leaves' shapes to an array of the weight's shape.
    """

    keys: tuple[LeafKey, ...]
    x: jax.Array
    levels: Levels
    nearest: jax.Array
    pull: Callable[[jax.Array], Sequence[jax.Array]]
    counts: Sequence[jax.Array]
    numbers: Sequence[jax.Array]
    move: Callable[..., jax.Array]

    def back(
        self, x: jax.Array, others: Sequence[jax.typing.ArrayLike]
    ) -> dict[LeafKey, jax.Array]:
        """Moves an array of the weight's shape to arrays of the leaves' shapes.

        Args:
          x: the array.
          others: the values of elements that do not occur in the weight, one array per leaf.
        """
        parts = zip(self.keys, self.counts, self.pull(x), others, strict=True)
        return {key: jnp.where(count > 0, pulled, other) for key, count, pulled, other in parts}


def trace_weight(frame: Frame, variable: Any) -> WeightView | str:
    """Returns the weight held by a variable of a frame, or the reason why it is not solved."""
    if variable not in frame.fixed:
        return "its weight changes in a loop"
    keys = frame.leaves_of(variable)
    if not keys:
        return "its weight is not a view of a leaf"
    seen = _weight_view(frame, variable, keys)
    if any(bool(jnp.max(count) > 1) for count in seen.counts):
        return "an element occurs several times in its weight"
    return seen


def _weight_view(frame: Frame, variable: Any, keys: tuple[LeafKey, ...]) -> WeightView:
    works = {key: frame.leaves.work(key) for key in keys}

    def move(*arrays: jax.Array) -> jax.Array:
        found = frame.moved(variable, dict(zip(keys, arrays, strict=True)))
        assert found is not None, "the operand is a view of these leaves"
        return found

    def of(part: Callable[[LeafState], Any]) -> Any:
        parts = [part(works[key]) for key in keys]
        return jax.tree.map(lambda *arrays: move(*arrays), *parts)

    x = of(lambda work: work.x)
    nearest = of(lambda work: work.nearest)
    own = jax.tree.map(
        lambda *arrays: move(*arrays), *align_levels([work.levels for work in works.values()])
    )
    numbers = [work.numbers for work in works.values()]
    if isinstance(frame.sources.get(variable), LeafKey):
        return WeightView(keys, x, own, nearest, lambda x: [x], [jnp.ones(())], numbers, move)
    _, pull = jax.vjp(move, *(works[key].x for key in keys))
    return WeightView(keys, x, own, nearest, pull, pull(jnp.ones_like(x)), numbers, move)
