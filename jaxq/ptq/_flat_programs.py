"""Programs in which the `jit` and `checkpoint` calls around the products to solve are inlined.

Sequential solving runs a model in parts that begin and end at products, also inside such calls.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxq._jax import compat
from jaxq.models import Assigned, Node, Product, Program, program

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
        return program(Node(body, products, inner), chosen, stored=True)


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
    counter = itertools.count()
    constvars: list[Any] = []
    consts: list[Any] = []
    eqns: list[Any] = []
    products: dict[int, Product] = {}
    inner: dict[int, tuple[Node, ...]] = {}

    def new(variable: Any) -> compat.Variable:
        return compat.Variable(variable.aval, next(counter))

    def add(node: Node, operands: Sequence[Any]) -> list[Any]:
        body = compat.body(node.jaxpr)
        known = dict(zip(body.invars, operands, strict=True))

        def value(variable: Any) -> Any:
            return variable if compat.is_literal(variable) else known[variable]

        for variable, const in zip(body.constvars, body.consts, strict=True):
            known[variable] = new(variable)
            constvars.append(known[variable])
            consts.append(const)
        for i, eqn in enumerate(body.eqns):
            nodes, name = node.inner.get(i, ()), eqn.primitive.name
            invars = list(map(value, eqn.invars))
            if nodes and name in compat.AROUND and name != "shard_map":
                if nodes[0].returns_weights or _numbers(nodes[0]) & set(wanted):
                    known.update(zip(eqn.outvars, add(nodes[0], invars), strict=True))
                    continue
            results = [new(variable) for variable in eqn.outvars]
            known.update(zip(eqn.outvars, results, strict=True))
            if i in node.products:
                products[len(eqns)] = node.products[i]
            if nodes:
                inner[len(eqns)] = nodes
            eqns.append(compat.rewired(eqn, invars, results))
        return list(map(value, body.outvars))

    invars = [new(variable) for variable in compat.body(node.jaxpr).invars]
    outvars = add(node, invars)
    body = compat.Body(None, consts, constvars, invars, outvars, eqns)
    return FlatProgram(body, products, inner)


def arguments_of(
    eqn: Any, body: compat.Body, which: int, iteration: int | None
) -> Iterator[tuple[Any, Any, int | None]]:
    """Yields the arguments of a program within an equation, each with the operand it receives.

    Arguments that change between the iterations of a loop are omitted, except the rows of a scan.

    Args:
      eqn: the equation.
      body: the program.
      which: the index of the program in the equation.
      iteration: the iteration of a scan whose rows are yielded, or None for no rows.

    Yields:
      The variable in the program, the operand, and the row of the operand, or None for all of it.
    """
    name, operands = eqn.primitive.name, list(eqn.invars)
    carried = rows = range(0)
    if name == "scan":
        const_count, carry_count = compat.loop_counts(eqn)
        carried = range(const_count, const_count + carry_count)
        rows = range(const_count + carry_count, len(operands))
    elif name == "while":
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts = (operands[:conds], operands[conds : conds + bodies])[which]
        carried = range(len(consts), len(consts) + len(operands) - conds - bodies)
        operands = [*consts, *operands[conds + bodies :]]
    elif name == "cond":
        operands = operands[1:]
    elif name == "shard_map":
        return
    for k, (inner, outer) in enumerate(zip(body.invars, operands, strict=True)):
        changes = k in carried and (
            (name == "while" and which == 0) or body.outvars[k - carried[0]] is not inner
        )
        if k in rows and iteration is not None:
            yield inner, outer, iteration
        elif k not in rows and not changes:
            yield inner, outer, None
