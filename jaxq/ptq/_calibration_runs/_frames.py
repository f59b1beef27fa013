"""Programs inside loops, with the values that do not depend on the data.

The operations between a leaf and the product that multiplies it only move elements. They are run on
the leaf's values and levels to obtain the weight of the product.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxq._jax import compat
from jaxq.models import CONVERSIONS, ProductInputs, StoredView, run_program
from jaxq.ptq._calibration_runs._inlining import FlatProgram, arguments_of
from jaxq.ptq._calibration_runs._leaves import LeafKey, Leaves
from jaxq.quantizers import Quantized

__all__ = ["Frame", "Outer"]


class Outer(NamedTuple):
    """A value of a surrounding frame, or a row of it.

    Attributes:
      frame: the surrounding frame.
      variable: the variable in that frame.
      row: the index of the row, or None for all of the value.
    """

    frame: "Frame"
    variable: Any
    row: int | None = None


@dataclasses.dataclass(eq=False)
class Frame:
    """A program at one iteration of the loops around it.

    Attributes:
      flat: the program.
      sources: the leaf, or the value of a surrounding frame, of each argument that does not depend
        on data.
      depth: the number of scans around it.
      leaves: the leaves of the model.
      iterations: the indices of the iterations of those scans around it that run one iteration at a
        time.
    """

    flat: FlatProgram
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
        fixed = {*self.sources, *body.constvars}
        for eqn in body.eqns:
            if all(compat.is_literal(v) or v in fixed for v in eqn.invars):
                fixed.update(eqn.outvars)
        return fixed

    def is_fixed(self, i: int) -> bool:
        """Returns whether equation i does not depend on data."""
        outvars = self.flat.body.eqns[i].outvars
        return bool(outvars) and all(v in self.fixed for v in outvars)

    def fixed_before(self, equations: list[int]) -> list[int]:
        """Returns the data-independent equations that some equations depend on."""
        result: set[int] = set()
        pending = [v for i in equations for v in self.flat.body.eqns[i].invars]
        while pending:
            variable = pending.pop()
            if compat.is_literal(variable) or variable not in self.fixed:
                continue
            i = self.makers.get(variable)
            if i is not None and i not in result and i not in equations:
                result.add(i)
                pending += self.flat.body.eqns[i].invars
        return sorted(result)

    def live(self, start: int) -> list[Any]:
        """Returns the data-dependent variables that results and equations from `start` on read."""
        body = self.flat.body
        read = [v for eqn in body.eqns[start:] for v in eqn.invars] + list(body.outvars)
        computed = {v for eqn in body.eqns[start:] for v in eqn.outvars}
        return [
            v
            for v in dict.fromkeys(v for v in read if not compat.is_literal(v))
            if v not in self.fixed and v not in computed
        ]

    def child(
        self, i: int, program_index: int, flat: FlatProgram, iteration: int | None
    ) -> "Frame":
        """Returns the frame of a program within an equation.

        Args:
          i: the equation.
          program_index: the index of the program in the equation.
          flat: the program.
          iteration: the iteration of a scan, or None for the weights that all iterations share.
        """
        eqn = self.flat.body.eqns[i]
        sources: dict[Any, LeafKey | Outer] = {}
        for inner, outer, row in arguments_of(eqn, flat.body, program_index, iteration):
            if compat.is_literal(outer) or outer not in self.fixed:
                continue
            source = self.sources.get(outer)
            if isinstance(source, LeafKey) and row is None:
                sources[inner] = source
            elif isinstance(source, LeafKey) and self._is_stack(outer, source):
                assert row is not None
                sources[inner] = LeafKey(source.leaf, (*source.slice_index, row))
            else:
                sources[inner] = Outer(self, outer, row)
        depth = self.depth + (eqn.primitive.name == "scan")
        return Frame(flat, sources, depth, self.leaves, self.iterations)

    def _is_stack(self, variable: Any, key: LeafKey) -> bool:
        """Returns whether a leaf has leading axes and is only read by one scan over them."""
        storage = self.leaves.storage(key)
        return self._uses(variable) == 1 and storage is not None and storage.leading > 0

    def _uses(self, variable: Any) -> int:
        """Returns how many equations and results read a variable."""
        body = self.flat.body
        read = [v for eqn in body.eqns for v in eqn.invars] + list(body.outvars)
        return sum(v is variable for v in read)

    def value(self, variable: Any) -> Any:
        """Returns a value that does not depend on data: an array, or a view of stored weights."""
        if compat.is_literal(variable):
            return variable.val
        body, source = self.flat.body, self.sources.get(variable)
        if isinstance(source, LeafKey):
            return self.leaves.value(source)
        if source is not None:
            return _row(source.frame.value(source.variable), source.row)
        if variable in body.constvars:
            return body.consts[list(body.constvars).index(variable)]
        maker = self.makers[variable]
        equations = [*self.fixed_before([maker]), maker]
        read = self.arguments(equations)
        products = 1 + max(max(self.flat.numbers(i), default=-1) for i in equations)
        part = self.flat.part(equations, read, [variable], [None] * products)
        return run_program(part, ProductInputs.empty(), [self.value(v) for v in read])[0][0]

    def arguments(self, equations: list[int]) -> list[Any]:
        """Returns the variables that equations read but do not compute, except constants."""
        eqns = [self.flat.body.eqns[i] for i in equations]
        known = {v for eqn in eqns for v in eqn.outvars} | {*self.flat.body.constvars}
        read = (v for eqn in eqns for v in eqn.invars if not compat.is_literal(v))
        return list(dict.fromkeys(v for v in read if v not in known))

    def leaves_of(self, variable: Any) -> tuple[LeafKey, ...]:
        """Returns the stored leaves from which a value is computed."""
        keys = self._all_leaves_of(variable)
        return tuple(dict.fromkeys(k for k in keys if self.leaves.storage(k) is not None))

    def _all_leaves_of(self, variable: Any) -> Iterator[LeafKey]:
        """Yields the leaves from which a value is computed, possibly several times."""
        source = None if compat.is_literal(variable) else self.sources.get(variable)
        if isinstance(source, LeafKey):
            yield source
        elif source is not None:
            yield from source.frame._all_leaves_of(source.variable)
        elif not compat.is_literal(variable) and variable in self.makers:
            for v in self.flat.body.eqns[self.makers[variable]].invars:
                yield from self._all_leaves_of(v)

    def move(self, variable: Any, arrays: Mapping[LeafKey, jax.Array]) -> jax.Array | None:
        """Applies the operations between leaves and a variable to arrays of the leaves' shapes.

        Conversions of the dtype are omitted.

        Args:
          variable: the variable.
          arrays: an array for each leaf.

        Returns:
          An array of the variable's shape; None if the variable does not depend on these leaves.
        """
        if compat.is_literal(variable):
            return None
        source = self.sources.get(variable)
        if isinstance(source, LeafKey):
            return arrays.get(source)
        if source is not None:
            x = source.frame.move(source.variable, arrays)
            return x if x is None or source.row is None else x[source.row]
        if variable not in self.makers:
            return None
        eqn = self.flat.body.eqns[self.makers[variable]]
        operands = [self.move(v, arrays) for v in eqn.invars]
        if all(x is None for x in operands):
            return None
        if eqn.primitive.name in CONVERSIONS:
            return operands[0]
        values = [
            self.value(v) if x is None else x for v, x in zip(eqn.invars, operands, strict=True)
        ]
        return compat.bind(eqn, values)[eqn.outvars.index(variable)]


def _row(x: Any, row: int | None) -> Any:
    """Returns a row of an array or of stored weights; all of it if `row` is None."""
    if row is None:
        return x
    if not isinstance(x, StoredView):
        return x[row]
    if isinstance(x.data, Quantized) and x.data.ndim > len(x.data.block):
        return jax.tree.map(lambda array: array[row], x)
    return StoredView(x.array[row], x.dtype)
