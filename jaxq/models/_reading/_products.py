"""Analysis of a traced function without running it: its products and their weights.

A `Node` is one program with its products and the equations that contain programs with products.
Recipes are assigned in `_assigning`, not here.

A product's weight is an operand that is a view of parameters. If no operand is a view and the other
operand is data, an operand that is computed from parameters alone, such as a kernel under weight
normalization, is also a weight.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models._reading._marks import MARK, Mark
from jaxq.models._reading._operations import LEFT_ALONE, LOOK_UP, QUANTIZED, contraction_of
from jaxq.models._reading._origins import CONSTANT, Origin
from jaxq.models._reading._views import computed_origin, through
from jaxq.products import Axes

__all__ = ["Node", "Product", "Reading", "flops", "read", "table_axes"]


@dataclasses.dataclass(eq=False)
class Product:
    """A product of a program, a look-up in a table, or an operation that is not quantized.

    Attributes:
      eqn: the equation.
      origins: the origins of both operands, None for an operand that is not a weight; for a
        look-up, of the table alone; for an operation that is not quantized, of all operands.
      operands: the shapes and dtypes of these operands.
      out: the shape and dtype of the result.
      scope: the surrounding named scopes.
      source: the line of the user's code.
      times: the number of executions per call; None in a `while` loop.
      loops: the lengths of the surrounding scans, outermost first.
      barred_reason: the reason why the product cannot be quantized, or "".
      is_differentiated: True if reverse mode differentiates the product; False in a function with
        a custom derivative or in a `while` loop.
      name: the name in reports and states; `read` makes names distinct.
      number: the index among all products.
      within: the products whose computed weights depend on this product, as
        `x @ (w + a @ b)` does on `a @ b`.
      sources: the paths of the parameters from which an operand that is not a weight is computed.
    """

    eqn: Any
    origins: tuple[Origin | None, ...]
    operands: tuple[Any, ...]
    out: Any
    scope: str
    source: str
    times: int | None
    loops: tuple[int, ...]
    barred_reason: str = ""
    is_differentiated: bool = True
    name: str = ""
    number: int = -1
    within: tuple["Product", ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def operation(self) -> str:
        """The primitive's name, such as `"dot_general"`."""
        return self.eqn.primitive.name

    @property
    def params(self) -> Any:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def stacked(self) -> frozenset[int]:
        """The depths of the scans in which each iteration has its own weight."""
        return frozenset(depth for o in self.origins if o is not None for depth in o.scans)

    @property
    def stacks(self) -> tuple[int, ...]:
        """The lengths of the scans in `stacked`, outermost first."""
        return tuple(self.loops[depth] for depth in sorted(self.stacked))

    @property
    def where(self) -> str:
        """The name and source line, as errors show them."""
        return f"{self.operation} {self.name!r} ({self.source})"


@dataclasses.dataclass(eq=False)
class Node:
    """A program with its products, marks and the nodes of its inner programs, by equation.

    Attributes:
      jaxpr: the program.
      products: its products by equation.
      inner: the nodes, by equation, of inner programs that have products or return weights.
      returns_weights: True if a result is a view of parameters.
      marks: its marked arrays by equation.
      marked: the nodes, by equation, of inner programs that have marks but are not in `inner`.
    """

    jaxpr: Any
    products: dict[int, Product] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Node", ...]] = dataclasses.field(default_factory=dict)
    returns_weights: bool = False
    marks: dict[int, Mark] = dataclasses.field(default_factory=dict)
    marked: dict[int, tuple["Node", ...]] = dataclasses.field(default_factory=dict)


class Reading(NamedTuple):
    """The result of `read`.

    Attributes:
      node: the program's node.
      products: all products in the order in which they run.
      marks: all marked arrays in the order in which they are computed.
    """

    node: Node
    products: list[Product]
    marks: list[Mark]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The context of an inner program: its scope, source line and enclosing loops."""

    scope: str = ""
    source: str = ""
    times: int | None = 1
    loops: tuple[int, ...] = ()
    barred_reason: str = ""
    is_differentiated: bool = True
    stacked: frozenset[int] = frozenset()


def read(jaxpr: Any, origins: Sequence[Origin | None]) -> Reading:
    """Finds the products and the marked arrays of a program.

    Args:
      jaxpr: the result of `jax.make_jaxpr`.
      origins: the origins of its arguments.
    """
    products: list[Product] = []
    node, _ = _read(jaxpr, origins, _Frame(), products)
    counts: dict[str, int] = {}

    def distinct(name: str) -> str:
        """Returns a name, with a number if earlier products or marks have the same name."""
        counts[name] = counts.get(name, 0) + 1
        return name if counts[name] == 1 else f"{name}#{counts[name]}"

    for number, product in enumerate(products):
        weight_names = [o.name for o in reversed(product.origins) if o is not None]
        for part in {n for o in product.origins if o is not None for n in o.products}:
            products[part].within += (product,)
        path = "/".join(filter(None, (product.scope, product.operation)))
        product.name = distinct(weight_names[0] if weight_names else path)
        product.number = number
    marks = list(_marks(node))
    for mark in marks:
        mark.name = distinct(mark.name)
    return Reading(node, products, marks)


def _marks(node: Node) -> Iterator[Mark]:
    """Yields all marks of a node in the order in which they are computed."""
    for i in sorted({*node.marks, *node.inner, *node.marked}):
        if i in node.marks:
            yield node.marks[i]
        for inside in (*node.inner.get(i, ()), *node.marked.get(i, ())):
            yield from _marks(inside)


def _read(
    jaxpr: Any, origins: Sequence[Origin | None], frame: _Frame, products: list[Product]
) -> tuple[Node, list[Origin | None]]:
    body, node = compat.body(jaxpr), Node(jaxpr)
    origin_of: dict[Any, Origin | None] = dict(zip(body.invars, origins, strict=True))
    # Arrays that the function closes over may be data, so only scalars count as constants.
    origin_of |= {variable: CONSTANT for variable in body.constvars if not variable.aval.shape}

    def origin(variable: Any) -> Origin | None:
        return CONSTANT if compat.is_literal(variable) else origin_of.get(variable)

    for i, eqn in enumerate(body.eqns):
        operands = [origin(variable) for variable in eqn.invars]
        product = _read_product(eqn, operands, frame)
        if product is not None:
            value = computed_origin(eqn, operands)
            if value is not None:
                number = frozenset({len(products)})
                value = dataclasses.replace(value, products=value.products | number)
            results = [value] * len(eqn.outvars)
            node.products[i] = product
            products.append(product)
        elif compat.bodies(eqn):
            inner_frame = dataclasses.replace(
                frame,
                scope=_join_scopes(frame.scope, compat.scope_of(eqn)),
                source=compat.source_of(eqn, frame.source),
            )
            nodes, results = _read_inner(eqn, operands, inner_frame, products)
            returns = eqn.primitive.name in compat.WRAPPED_CALLS and nodes[0].returns_weights
            if returns or any(inner.products or inner.inner for inner in nodes):
                node.inner[i] = nodes
            elif any(inner.marks or inner.marked for inner in nodes):
                node.marked[i] = nodes
        else:
            results = through(eqn, operands)
            if eqn.primitive.name == MARK and not frame.barred_reason:
                node.marks[i] = _mark(eqn, frame)
        origin_of.update(zip(eqn.outvars, results, strict=True))
    results = [origin(variable) for variable in body.outvars]
    node.returns_weights = any(o is not None and not o.computed for o in results)
    return node, results


def _mark(eqn: Any, frame: _Frame) -> Mark:
    return Mark(
        _shape(eqn.outvars[0].aval),
        compat.source_of(eqn, frame.source),
        frame.loops,
        frame.stacked,
        frame.is_differentiated,
        eqn.params["name"],
    )


def _join_scopes(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _read_product(eqn: Any, origins: Sequence[Origin | None], frame: _Frame) -> Product | None:
    """Returns an equation as a product, or None if it multiplies no tensors."""
    name = eqn.primitive.name
    if name in QUANTIZED:
        first, second = (v.aval.dtype for v in eqn.invars[:2])
        floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (first, second))
        reason = (
            "" if floating else f"multiplies {first} by {second}, and only floats are quantized"
        )
        return _product(eqn, origins, frame, 2, reason)
    if name == LOOK_UP:
        return _product(eqn, origins, frame, 1) if _is_look_up(eqn, origins) else None
    if name in LEFT_ALONE:
        return _product(eqn, origins, frame, len(eqn.invars), LEFT_ALONE[name])
    return None


def _is_look_up(eqn: Any, origins: Sequence[Origin | None]) -> bool:
    """Returns whether a gather reads a parameter at many indices."""
    numbers = eqn.params["dimension_numbers"]
    is_many = len(eqn.outvars[0].aval.shape) > len(numbers.offset_dims)
    floating = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    is_view = origins[0] is not None and not origins[0].computed
    return is_view and is_many and floating and not numbers.operand_batching_dims


def _weights(origins: Sequence[Origin | None]) -> tuple[Origin | None, ...]:
    """Returns the origins of operands that are weights, None for the others."""
    views = tuple(None if o is None or o.computed else o for o in origins)
    if any(views) or sum(o is not None and bool(o.leaves) for o in origins) > 1:
        return views
    return tuple(o if o is not None and o.pieces else None for o in origins)


def _product(
    eqn: Any, origins: Sequence[Origin | None], frame: _Frame, count: int, barred_reason: str = ""
) -> Product:
    weights = _weights(origins[:count])
    pairs = zip(origins, weights, strict=False)
    others = [o for o, weight in pairs if o is not None and weight is None]
    return Product(
        eqn,
        weights,
        tuple(_shape(v.aval) for v in eqn.invars[:count]),
        _shape(eqn.outvars[0].aval) if eqn.outvars else jax.ShapeDtypeStruct((0,), jnp.float32),
        _join_scopes(frame.scope, compat.scope_of(eqn)),
        compat.source_of(eqn, frame.source),
        frame.times,
        frame.loops,
        frame.barred_reason or barred_reason,
        frame.is_differentiated,
        sources=tuple(path for origin in others for path in origin.leaves),
    )


def _shape(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(getattr(aval, "shape", ()), getattr(aval, "dtype", jnp.float32))


def _read_inner(
    eqn: Any, origins: list[Origin | None], frame: _Frame, products: list[Product]
) -> tuple[tuple[Node, ...], list[Origin | None]]:
    """Returns the nodes of the programs within an equation and the origins of its results."""
    name, inner = eqn.primitive.name, compat.bodies(eqn)
    nothing: list[Origin | None] = [None] * len(eqn.outvars)

    def run(jaxpr: Any, origins: Sequence[Origin | None], **changes: Any) -> Any:
        return _read(jaxpr, origins, dataclasses.replace(frame, **changes), products)

    if name in compat.WRAPPED_CALLS:
        if name == "shard_map":  # A shard is a part of its leaf.
            origins = [o and o.opaque for o in origins]
        node, results = run(inner[0], origins)
        return (node,), nothing if name == "shard_map" else results
    if name in ("custom_jvp_call", "custom_vjp_call"):
        node, results = run(inner[0], origins, is_differentiated=False)
        # Its results are arrays, so no stored weight passes through it.
        return (node,), [o and o.opaque for o in results]
    if name == "scan":
        consts, carry = compat.loop_counts(eqn)
        body, first, count = compat.body(inner[0]), consts + carry, eqn.params["length"]
        unchanged = origins[:consts] + _unchanged(body, origins, consts, carry)
        times = None if frame.times is None else frame.times * count
        depth = len(frame.loops)
        slices = [o and o.rows(depth) for o in origins[first:]]
        layers = {depth} if any(o is not None and o.leaves for o in origins[first:]) else set()
        node, results = run(
            inner[0],
            unchanged + slices,
            times=times,
            loops=(*frame.loops, count),
            stacked=frame.stacked | layers,
        )
        return (node,), unchanged[consts:] + nothing[carry:]
    if name == "while":
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test, step = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        of_test, of_step = origins[:conds], origins[conds : conds + bodies]
        of_loop = origins[conds:]  # The body's constants, then the carried values.
        same = _unchanged(compat.body(step), of_loop, bodies, len(of_loop) - bodies)
        first, _ = run(
            test, of_test + same, times=None, barred_reason="in the condition of a while loop"
        )
        second, _ = run(step, of_step + same, times=None, is_differentiated=False)
        return (first, second), same
    if name == "cond":
        branches = eqn.params["branches"]
        return tuple(run(branch, origins[1:])[0] for branch in branches), nothing
    barred_reason = frame.barred_reason or f"inside {name}"
    nodes = []
    for jaxpr in inner:
        count = len(compat.body(jaxpr).invars)
        inputs = origins if count == len(origins) else [None] * count
        nodes.append(run(jaxpr, inputs, barred_reason=barred_reason)[0])
    return tuple(nodes), [computed_origin(eqn, origins)] * len(eqn.outvars)


def _unchanged(
    body: Any, origins: Sequence[Origin | None], consts: int, carry: int
) -> list[Origin | None]:
    """Returns the origins of a loop's carried values, None for those that the loop changes."""
    invars = body.invars[consts : consts + carry]
    return [
        origin if variable is outvar else None
        for variable, outvar, origin in zip(
            invars, body.outvars[:carry], origins[consts : consts + carry], strict=True
        )
    ]


def table_axes(product: Product) -> Axes:
    """Returns the axes of a look-up's table as a matrix `[index, element]`."""
    numbers, sizes = product.params["dimension_numbers"], product.params["slice_sizes"]
    shape = product.operands[0].shape
    index_axes = [i for i in numbers.start_index_map if sizes[i] != shape[i]]
    element_axes = tuple(i for i in range(len(shape)) if i not in index_axes)
    return Axes((), tuple(sorted(index_axes)), element_axes)


def flops(product: Product) -> int:
    """Returns the multiplications and additions of one run; 0 for operations not in `QUANTIZED`."""
    if product.operation not in QUANTIZED:
        return 0
    rhs = product.operands[1]
    contraction = contraction_of(product.eqn)
    sizes = zip(contraction.out, product.out.shape, strict=True)
    # A row of a ragged product belongs to one group.
    out = math.prod(n for label, n in sizes if label != contraction.group)
    return 2 * out * math.prod(rhs.shape[axis] for axis in contraction.axes[1].contract)
