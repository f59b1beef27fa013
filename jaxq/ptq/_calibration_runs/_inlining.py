"""Programs in which the `jit` and `checkpoint` calls around the products to solve are inlined.

Sequential solving runs a model in parts that begin and end at products, also inside such calls.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxq._jax import compat
from jaxq.models import Assigned, Node, Product, Program, build_program

__all__ = ["FlatProgram", "arguments_of", "flatten"]


@dataclasses.dataclass(eq=False)
class FlatProgram:
    """A program as one list of equations.

    Attributes:
      body: the program.
      products: the products among the equations, by the index of the equation.
      inner: the nodes of the programs within an equation that contain products, by its index.
    """

    body: compat.Body
    products: Mapping[int, Product]
    inner: Mapping[int, tuple[Node, ...]]

    def numbers(self, i: int) -> set[int]:
        """Returns the numbers of the products in equation i."""
        if i in self.products:
            return {self.products[i].number}
        return {n for node in self.inner.get(i, ()) for n in _numbers(node)}

    def part(
        self,
        equations: Sequence[int],
        invars: Sequence[Any],
        outvars: Sequence[Any],
        chosen: Sequence[Assigned | None],
    ) -> Program:
        """Returns a program that consists of some of the equations.

        Args:
          equations: the indices of the equations, in order.
          invars: the variables that they read, except for constants.
          outvars: the variables to return.
          chosen: the assignments of all products, by number.
        """
        body = self.body._replace(
            invars=invars, outvars=outvars, eqns=[self.body.eqns[i] for i in equations]
        )
        products = {k: self.products[i] for k, i in enumerate(equations) if i in self.products}
        inner = {k: self.inner[i] for k, i in enumerate(equations) if i in self.inner}
        return build_program(Node(body, products, inner), chosen, stored=True)


def _numbers(node: Node) -> set[int]:
    """Returns the numbers of the products in a node."""
    inner = (n for nodes in node.inner.values() for child in nodes for n in _numbers(child))
    return {product.number for product in node.products.values()}.union(inner)


def flatten(node: Node, wanted: Collection[int]) -> FlatProgram:
    """Inlines the `jit` and `checkpoint` calls of a node that contain certain products.

    Args:
      node: the node.
      wanted: the numbers of the products.
    """
    flattener = _Flattener(frozenset(wanted))
    invars = [flattener.new_variable(variable) for variable in compat.body(node.jaxpr).invars]
    outvars = flattener.add(node, invars)
    body = compat.Body(None, flattener.consts, flattener.constvars, invars, outvars, flattener.eqns)
    return FlatProgram(body, flattener.products, flattener.inner)


class _Flattener:
    """The equations of a program and of the calls that are inlined in it.

    Args:
      wanted: the numbers of the products whose calls are inlined.

    Attributes:
      constvars: the variables of the constants.
      consts: the constants.
      eqns: the equations.
      products: as in `FlatProgram`.
      inner: as in `FlatProgram`.
    """

    def __init__(self, wanted: frozenset[int]) -> None:
        self._wanted = wanted
        self._counter = itertools.count()
        self.constvars: list[Any] = []
        self.consts: list[Any] = []
        self.eqns: list[Any] = []
        self.products: dict[int, Product] = {}
        self.inner: dict[int, tuple[Node, ...]] = {}

    def new_variable(self, variable: Any) -> compat.Variable:
        """Returns a new variable with the shape and dtype of another one.

        Each call of a program needs its own variables, because two calls may share one jaxpr.
        """
        return compat.Variable(variable.aval, next(self._counter))

    def add(self, node: Node, operands: Sequence[Any]) -> list[Any]:
        """Adds the equations of a node; returns the variables of its results.

        Args:
          node: the node.
          operands: the variables and literals that its arguments receive.
        """
        body = compat.body(node.jaxpr)
        renamed = dict(zip(body.invars, operands, strict=True))

        def value(variable: Any) -> Any:
            return variable if compat.is_literal(variable) else renamed[variable]

        for variable, const in zip(body.constvars, body.consts, strict=True):
            renamed[variable] = self.new_variable(variable)
            self.constvars.append(renamed[variable])
            self.consts.append(const)
        for i, eqn in enumerate(body.eqns):
            nodes, invars = node.inner.get(i, ()), list(map(value, eqn.invars))
            if self._is_inlined(eqn, nodes):
                results = self.add(nodes[0], invars)
            else:
                results = [self.new_variable(variable) for variable in eqn.outvars]
                if i in node.products:
                    self.products[len(self.eqns)] = node.products[i]
                if nodes:
                    self.inner[len(self.eqns)] = nodes
                self.eqns.append(compat.rewired(eqn, invars, results))
            renamed.update(zip(eqn.outvars, results, strict=True))
        return list(map(value, body.outvars))

    def _is_inlined(self, eqn: Any, nodes: tuple[Node, ...]) -> bool:
        """Returns whether an equation is a call that returns weights or has a wanted product."""
        name = eqn.primitive.name
        if not nodes or name not in compat.WRAPPED_CALLS or name == "shard_map":
            return False
        return nodes[0].returns_weights or not self._wanted.isdisjoint(_numbers(nodes[0]))


def arguments_of(
    eqn: Any, body: compat.Body, program_index: int, iteration: int | None
) -> Iterator[tuple[Any, Any, int | None]]:
    """Yields the arguments of a program within an equation, each with the operand it receives.

    Arguments that change between the iterations of a loop are omitted, except the rows of a scan.

    Args:
      eqn: the equation.
      body: the program.
      program_index: the index of the program in the equation.
      iteration: the iteration of a scan whose rows are yielded, or None for no rows.

    Yields:
      The variable in the program, the operand, and the row of the operand, or None for all of it.
    """
    name, operands = eqn.primitive.name, list(eqn.invars)
    carried = rows = range(0)
    if name == "scan":  # The operands are constants, carried values, and arrays of rows.
        const_count, carry_count = compat.loop_counts(eqn)
        carried = range(const_count, const_count + carry_count)
        rows = range(const_count + carry_count, len(operands))
    elif name == "while":
        # The operands are the constants of the condition (program 0), those of the body
        # (program 1), and the carried values, which both programs receive.
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts = (operands[:conds], operands[conds : conds + bodies])[program_index]
        carried = range(len(consts), len(consts) + len(operands) - conds - bodies)
        operands = [*consts, *operands[conds + bodies :]]
    elif name == "cond":  # The first operand is the index of the branch.
        operands = operands[1:]
    elif name == "shard_map":
        return
    for k, (inner, outer) in enumerate(zip(body.invars, operands, strict=True)):
        # The condition of a `while` returns no carried values, so they count as changed.
        changes = k in carried and (
            (name == "while" and program_index == 0) or body.outvars[k - carried[0]] is not inner
        )
        if k in rows and iteration is not None:
            yield inner, outer, iteration
        elif k not in rows and not changes:
            yield inner, outer, None
