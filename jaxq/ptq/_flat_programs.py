"""Programs in which the `jit` and `checkpoint` calls around the products to solve are inlined.

Sequential solving runs a model in parts that begin and end at products, also inside such calls.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxq._jax import compat
from jaxq.models import Assigned, Node, Product, Program, program

__all__ = ["Flat", "anonymous", "arguments_of", "flatten", "signature"]

_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")  # A forward pass ignores their rules.


@dataclasses.dataclass(eq=False)
class Flat:
    """A program as one list of equations.

    Attributes:
      body: the program.
      products: the product of each equation that is one, by the equation's index.
      inner: the nodes of inner programs with products, by the equation's index.
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
    inner = (n for nodes in node.inner.values() for own in nodes for n in _numbers(own))
    return {product.number for product in node.products.values()}.union(inner)


def flatten(node: Node, wanted: Collection[int]) -> Flat:
    """Inlines the calls of a node that contain wanted products.

    Args:
      node: the node.
      wanted: the numbers of products; a `jit` or `checkpoint` call that contains one is inlined.
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
            own = list(map(value, eqn.invars))
            if nodes and name in compat.AROUND and name != "shard_map":
                if nodes[0].returns_weights or _numbers(nodes[0]) & set(wanted):
                    known.update(zip(eqn.outvars, add(nodes[0], own), strict=True))
                    continue
            results = [new(variable) for variable in eqn.outvars]
            known.update(zip(eqn.outvars, results, strict=True))
            if i in node.products:
                products[len(eqns)] = node.products[i]
            if nodes:
                inner[len(eqns)] = nodes
            eqns.append(compat.rewired(eqn, own, results))
        return list(map(value, body.outvars))

    invars = [new(variable) for variable in compat.body(node.jaxpr).invars]
    outvars = add(node, invars)
    body = compat.Body(None, consts, constvars, invars, outvars, eqns)
    return Flat(body, products, inner)


def arguments_of(
    eqn: Any, body: compat.Body, which: int, iteration: int | None
) -> Iterator[tuple[Any, Any, int | None]]:
    """Yields the arguments of a program within an equation, each with the operand passed to it.

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
        consts, count = compat.loop_counts(eqn)
        carried = range(consts, consts + count)
        rows = range(consts + count, len(operands))
    elif name == "while":
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        own = operands[:conds], operands[conds : conds + bodies]
        carried = range(len(own[which]), len(own[which]) + len(operands) - conds - bodies)
        operands = [*own[which], *operands[conds + bodies :]]
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


def anonymous(program: Program, names: Mapping[str, str]) -> Program:
    """Returns a program with renamed products, without their numbers and source lines."""

    def renamed(assigned: Assigned) -> Assigned:
        known: Any = assigned.calibrated  # Collectors, which have names.
        observers = tuple(collector and collector.shared() for collector in known)
        name = names[assigned.name]
        return dataclasses.replace(
            assigned, name=name, where=f"product {name}", number=0, calibrated=observers
        )

    return Program(
        program.jaxpr,
        tuple((i, renamed(assigned)) for i, assigned in program.products),
        tuple((i, tuple(anonymous(p, names) for p in inner)) for i, inner in program.inner),
    )


def signature(program: Program) -> tuple[Any, ...]:
    """Returns a key that is equal for programs with the same computation."""
    return _jaxpr_signature(program.jaxpr), _assignments(program)


def _assignments(program: Program) -> tuple[Any, ...]:
    return program.products, tuple(
        (i, tuple(map(_assignments, programs))) for i, programs in program.inner
    )


def _jaxpr_signature(jaxpr: Any) -> tuple[Any, ...]:
    body = compat.body(jaxpr)
    places: dict[Any, int] = {}

    def place(variable: Any) -> Any:
        if compat.is_literal(variable):
            return "literal", str(variable.aval), str(variable.val)
        return places.setdefault(variable, len(places))

    arguments = [(place(v), str(v.aval)) for v in (*body.constvars, *body.invars)]
    equations = [
        (
            eqn.primitive.name,
            _params_signature(eqn),
            *map(place, eqn.invars),
            *((place(v), str(v.aval)) for v in eqn.outvars),
        )
        for eqn in body.eqns
    ]
    consts = tuple(map(id, body.consts))
    return tuple(arguments), consts, tuple(equations), tuple(map(place, body.outvars))


def _params_signature(eqn: Any) -> tuple[Any, ...]:
    def hashable(value: Any) -> Any:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            return _jaxpr_signature(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(hashable, value))
        if callable(value) and eqn.primitive.name in _CUSTOM_CALLS:
            return "rule"
        try:
            hash(value)
        except TypeError:
            return id(value)
        return value

    return tuple((name, hashable(eqn.params[name])) for name in sorted(eqn.params))
