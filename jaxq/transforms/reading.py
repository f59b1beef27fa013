"""A traced function read without running it: its products, and whose weights they multiply.

A `Node` is one program with what of it may be quantized: products, and equations with programs of
their own in which there are some. Nothing is decided here; `rules` does that.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp

from jaxq.contractions import Axes
from jaxq.transforms import compat
from jaxq.transforms.origins import Origin, slice_of, through

__all__ = ["LOOK_UP", "Node", "Product", "flops", "read", "table_axes"]

LOOK_UP = "gather"
_PRODUCTS = ("dot_general", "conv_general_dilated", LOOK_UP)


@dataclasses.dataclass(eq=False)
class Product:
    """A product of a program: a matrix product, a convolution, or a look-up in a table.

    Attributes:
      operation: `"dot_general"`, `"conv_general_dilated"` or `"gather"`.
      origins: of both operands; of a look-up, of the table alone.
      operands: their shapes and dtypes.
      out: shape and dtype of the result.
      params: the equation's parameters.
      scope: the named scopes that it stands in.
      source: the line of the user's code.
      times: how often one call runs it; None in a `while` loop.
      loops: the lengths of the scans around it, outermost first.
      barred: why it cannot be quantized, or "".
      reverse: whether reverse mode goes through it: not in a function with derivatives of its own,
        nor in a `while` loop.
      name: what reports and states call it; `read` makes them distinct.
      number: its place among all products.
    """

    operation: str
    origins: tuple[Origin | None, ...]
    operands: tuple[Any, ...]
    out: Any
    params: Any
    scope: str
    source: str
    times: int | None
    loops: tuple[int, ...]
    barred: str = ""
    reverse: bool = True
    name: str = ""
    number: int = -1

    @property
    def stacked(self) -> frozenset[int]:
        """The scans, by depth, every turn of which multiplies another weight."""
        return frozenset(turn for o in self.origins if o is not None for turn in o.turns)

    @property
    def where(self) -> str:
        """Name and source, as errors give them."""
        return f"{self.operation} {self.name!r} ({self.source})"


@dataclasses.dataclass(eq=False)
class Node:
    """A program, its products by equation, and by equation the nodes of the programs within."""

    jaxpr: Any
    products: dict[int, Product] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Node", ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What surrounds a program."""

    scope: str = ""
    source: str = ""
    times: int | None = 1
    loops: tuple[int, ...] = ()
    barred: str = ""
    reverse: bool = True


def read(jaxpr: Any, origins: Sequence[Origin | None]) -> tuple[Node, list[Product]]:
    """The products of a program.

    Args:
      jaxpr: what `jax.make_jaxpr` gave.
      origins: of its arguments.

    Returns:
      The program's node, and all products in the order in which they run.
    """
    products: list[Product] = []
    node, _ = _read(jaxpr, origins, _Frame(), products)
    seen: dict[str, int] = {}
    for number, product in enumerate(products):
        found = [o.path for o in reversed(product.origins) if o is not None]
        base = found[0] if found else "/".join(filter(None, (product.scope, product.operation)))
        seen[base] = seen.get(base, 0) + 1
        product.name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        product.number = number
    return node, products


def _read(
    jaxpr: Any, origins: Sequence[Origin | None], frame: _Frame, products: list[Product]
) -> tuple[Node, list[Origin | None]]:
    body, node = compat.body(jaxpr), Node(jaxpr)
    known: dict[Any, Origin | None] = dict(zip(body.invars, origins, strict=True))

    def origin(variable: Any) -> Origin | None:
        return None if compat.is_literal(variable) else known.get(variable)

    for i, eqn in enumerate(body.eqns):
        operands = [origin(variable) for variable in eqn.invars]
        results: list[Origin | None] | None = None
        if eqn.primitive.name in _PRODUCTS and _is_product(eqn, operands):
            node.products[i] = _product(eqn, operands, frame)
            products.append(node.products[i])
        elif compat.bodies(eqn):
            own = dataclasses.replace(
                frame,
                scope=_joined(frame.scope, compat.scope_of(eqn)),
                source=compat.source_of(eqn, frame.source),
            )
            nodes, results = _inside(eqn, operands, own, products)
            if any(inner.products or inner.inner for inner in nodes):
                node.inner[i] = nodes
        else:
            results = through(eqn, operands)
        if results is not None:
            known.update(zip(eqn.outvars, results, strict=True))
    return node, [origin(variable) for variable in body.outvars]


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _is_product(eqn: Any, origins: Sequence[Origin | None]) -> bool:
    operands = eqn.invars[:2]
    if eqn.primitive.name != LOOK_UP:
        return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in operands)
    numbers = eqn.params["dimension_numbers"]
    many = len(eqn.outvars[0].aval.shape) > len(numbers.offset_dims)
    floating = jnp.issubdtype(operands[0].aval.dtype, jnp.floating)
    return origins[0] is not None and many and floating and not numbers.operand_batching_dims


def _product(eqn: Any, origins: Sequence[Origin | None], frame: _Frame) -> Product:
    count = 1 if eqn.primitive.name == LOOK_UP else 2
    return Product(
        eqn.primitive.name,
        tuple(origins[:count]),
        tuple(_shape(v.aval) for v in eqn.invars[:count]),
        _shape(eqn.outvars[0].aval),
        eqn.params,
        _joined(frame.scope, compat.scope_of(eqn)),
        compat.source_of(eqn, frame.source),
        frame.times,
        frame.loops,
        frame.barred,
        frame.reverse,
    )


def _shape(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _inside(
    eqn: Any, origins: list[Origin | None], frame: _Frame, products: list[Product]
) -> tuple[tuple[Node, ...], list[Origin | None]]:
    """The nodes of the programs within an equation, and the origins of its results."""
    name, inner = eqn.primitive.name, compat.bodies(eqn)
    nothing: list[Origin | None] = [None] * len(eqn.outvars)

    def run(jaxpr: Any, origins: Sequence[Origin | None], **changes: Any) -> Any:
        return _read(jaxpr, origins, dataclasses.replace(frame, **changes), products)

    if name in compat.AROUND:
        if name == "shard_map":  # A shard is a part of its leaf.
            origins = [o and o.at(None) for o in origins]
        node, results = run(inner[0], origins)
        return (node,), nothing if name == "shard_map" else results
    if name in ("custom_jvp_call", "custom_vjp_call"):
        node, results = run(inner[0], origins, reverse=False)
        return (node,), results
    if name == "scan":
        consts, carry = compat.loop_counts(eqn)
        body, first, count = compat.body(inner[0]), consts + carry, eqn.params["length"]
        own = origins[:consts] + _kept(body, origins, consts, carry)
        times = None if frame.times is None else frame.times * count
        depth = len(frame.loops)
        slices = [slice_of(origin, depth) for origin in origins[first:]]
        node, results = run(inner[0], own + slices, times=times, loops=(*frame.loops, count))
        return (node,), own[consts:] + nothing[carry:]
    if name == "while":
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test, turn = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        of_test, of_turn = origins[:conds], origins[conds : conds + bodies]
        moved = origins[conds:]  # The body's constants, then what is carried.
        kept = _kept(compat.body(turn), moved, bodies, len(moved) - bodies)
        first, _ = run(test, of_test + kept, times=None, barred="the condition of a while loop")
        second, _ = run(turn, of_turn + kept, times=None, reverse=False)
        return (first, second), kept
    if name == "cond":
        found = [run(branch, origins[1:]) for branch in eqn.params["branches"]]
        return tuple(node for node, _ in found), nothing
    barred = frame.barred or f"inside {name}"
    nodes = []
    for jaxpr in inner:
        count = len(compat.body(jaxpr).invars)
        own = origins if count == len(origins) else [None] * count
        nodes.append(run(jaxpr, own, barred=barred)[0])
    return tuple(nodes), nothing


def _kept(
    body: Any, origins: Sequence[Origin | None], consts: int, carry: int
) -> list[Origin | None]:
    """The origins of what a loop carries: those of what it hands on as it is."""
    invars = body.invars[consts : consts + carry]
    return [
        origin if variable is out else None
        for variable, out, origin in zip(
            invars, body.outvars[:carry], origins[consts : consts + carry], strict=True
        )
    ]


def table_axes(product: Product) -> Axes:
    """The axes of the table that a look-up reads: a matrix `[index, element]`."""
    numbers, sizes = product.params["dimension_numbers"], product.params["slice_sizes"]
    shape = product.operands[0].shape
    looked_up = [i for i in numbers.start_index_map if sizes[i] != shape[i]]
    rest = tuple(i for i in range(len(shape)) if i not in looked_up)
    return Axes((), tuple(sorted(looked_up)), rest)


def flops(product: Product) -> int:
    """Multiplications and additions of one run; 0 for a look-up."""
    if product.operation == LOOK_UP:
        return 0
    out = math.prod(product.out.shape)
    lhs, rhs = product.operands
    if product.operation == "dot_general":
        (contract, _), _ = product.params["dimension_numbers"]
        return 2 * out * math.prod(lhs.shape[axis] for axis in contract)
    spec = product.params["dimension_numbers"].rhs_spec
    return 2 * out * math.prod(n for axis, n in enumerate(rhs.shape) if axis != spec[0])
