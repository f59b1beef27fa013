"""Programs with the assignments of their products, and the calibration states of these products.

Calibration states are keyed by the products' names. A product in a scan over layers has one state
per layer, with one leading axis for every scan between the program and the product.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq._jax.draws import fold_in
from jaxq._jax.meshes import varying
from jaxq.models._assigning import Assigned, Observer
from jaxq.models._reading import Node
from jaxq.models._rules import LoRA, Switch
from jaxq.products import History, Row
from jaxq.quantizers import calibration

__all__ = [
    "ProductInputs",
    "ProductState",
    "Program",
    "States",
    "build_program",
    "empty_states",
    "merge_iterations",
    "merge_states",
]

States = dict[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with its products to quantize and its inner programs, both by equation."""

    jaxpr: Any
    products: tuple[tuple[int, Assigned], ...]
    inner: tuple[tuple[int, tuple["Program", ...]], ...]

    def all(self) -> Iterator[Assigned]:
        """Yields all products in the order in which they run."""
        for _, assigned in self.products:
            yield assigned
        for _, programs in self.inner:
            for inside in programs:
                yield from inside.all()

    @property
    def draws(self) -> bool:
        """True if any product needs a key."""
        return any(assigned.draws_random_bits for assigned in self.all())


class ProductState(NamedTuple):
    """The arrays of one product other than its operands, in a layout for loops and devices.

    Attributes:
      lhs: the history of the first operand, or None.
      rhs: the history of the second operand, or None.
      cotangent: the history of the cotangent, or None.
      row: the row for statistics, or None.
      switch: the flag that turns the recipe on, or None if it is always on.
      adapter: the low-rank adapter of the weight, or None.
    """

    lhs: History | None = None
    rhs: History | None = None
    cotangent: History | None = None
    row: Row | None = None
    switch: Switch | None = None
    adapter: LoRA | None = None

    @property
    def histories(self) -> tuple[History | None, ...]:
        """The histories of delayed scaling."""
        return self[:3]

    def copies_for_loop(self, count: int) -> "ProductState":
        """Copies the state for `count` products; the cotangents merge those of the copies."""
        copies: Any = (None if each is None else each.copies_for_loop(count) for each in self)
        return ProductState(*copies)


class ProductInputs(NamedTuple):
    """The inputs of products besides their operands.

    Attributes:
      key: the key for random numbers, or None.
      scales: the scales from calibration, by the products' names.
      product_states: histories, rows for statistics, switches and adapters, by the products'
        names.
      device_indices: the device's index along each axis of the surrounding `shard_map`s.
      mask: the mask of the tokens that observers count, or None.
      vectors: the factors of inputs by `Assigned.factor_name`, and zeros whose gradients are the
        scores of products by their names; or None.
    """

    key: jax.Array | None
    scales: Mapping[str, tuple[calibration.Calibrated | None, ...]]
    product_states: Mapping[str, ProductState]
    device_indices: Mapping[str, jax.Array]
    mask: jax.Array | None = None
    vectors: Mapping[str, jax.Array] | None = None

    @classmethod
    def empty(cls, mask: jax.Array | None = None) -> "ProductInputs":
        """Returns no inputs except the mask."""
        return cls(key=None, scales={}, product_states={}, device_indices={}, mask=mask)

    def without_training_records(self) -> "ProductInputs":
        """Returns the inputs without histories and rows, where no backward pass would fill them."""
        product_states = {
            name: ProductState(switch=state.switch, adapter=state.adapter)
            for name, state in self.product_states.items()
            if state.switch is not None or state.adapter is not None
        }
        return self._replace(product_states=product_states)

    def folded_key(self, index: Any) -> jax.Array:
        """Returns the random key derived for the number of a product or of a loop iteration."""
        assert self.key is not None, "checked before anything runs"
        return fold_in(self.key, index)

    def differing_axes(self, eqn: Any) -> tuple[str, ...]:
        """Returns the mesh axes along which devices draw different numbers for a product.

        These are the axes along which operands vary, or all axes if a `shard_map` does not track
        varying axes.
        """
        differing = compat.varying_of(eqn)
        return tuple(
            axis
            for axis, index in sorted(self.device_indices.items())
            if axis in differing or axis not in varying(index)
        )

    def as_device_varying(self, states: Any) -> Any:
        """Marks calibration states as device-varying inside `shard_map`."""
        axes = frozenset().union(*map(varying, self.device_indices.values()))

        def as_varying(x: jax.Array) -> jax.Array:
            return lax.pcast(x, tuple(axes - varying(x)), to="varying")

        return jax.tree.map(as_varying, states)

    def within(self, programs: Sequence[Program]) -> "ProductInputs":
        """Returns the inputs restricted to the products of some programs."""
        products = [a for inside in programs for a in inside.all()]
        names, vectors = {a.name for a in products}, self.vectors
        if vectors is not None:
            used = {name for a in products for name in a.vectors}
            vectors = {name: value for name, value in vectors.items() if name in used}
        scales = {name: value for name, value in self.scales.items() if name in names}
        product_states = {
            name: value for name, value in self.product_states.items() if name in names
        }
        return self._replace(scales=scales, product_states=product_states, vectors=vectors)


def build_program(
    node: Node,
    chosen: Sequence[Assigned | None],
    stored: bool = False,
    marked: Mapping[str, Assigned] = MappingProxyType({}),
) -> Program:
    """Returns the program of a node with the assignments of its products.

    Args:
      node: the node.
      chosen: the assignment of each product, or None.
      stored: True if weights are stored, so that programs that return them are also run equation
        by equation.
      marked: the assignments of the marked arrays to monitor, by their names.
    """
    products = [(i, chosen[product.number]) for i, product in node.products.items()]
    products += [(i, marked.get(mark.name)) for i, mark in node.marks.items()]
    inner = []
    for i, nodes in {**node.inner, **(node.marked if marked else {})}.items():
        programs = tuple(build_program(n, chosen, stored, marked) for n in nodes)
        if any(any(p.all()) for p in programs) or (stored and nodes[0].returns_weights):
            inner.append((i, programs))
    return Program(
        node.jaxpr,
        tuple((i, assigned) for i, assigned in products if assigned is not None),
        tuple(inner),
    )


def merge_states(program: Program, depth: int, earlier: States, later: States) -> States:
    """Merges earlier and later calibration states of a program at a depth of scans."""
    products = {a.name: a for a in program.all()}

    def of_operand(observer: Observer | None, stacks: int, *states: Any) -> Any:
        if observer is None:
            return None
        merge: Any = observer.merge
        for _ in range(stacks):
            merge = jax.vmap(merge)
        return merge(*states)

    result = {}
    for name, states in later.items():
        observers, stacks = products[name].observers, len(_stacks(products[name], depth))
        operands = zip(observers, earlier[name], states, strict=True)
        result[name] = tuple(of_operand(observer, stacks, a, b) for observer, a, b in operands)
    return result


def merge_iterations(program: Program, depth: int, states: States) -> States:
    """Merges the states of all loop iterations or devices, which lie along a leading axis."""
    if not states:
        return states
    first, rest = (jax.tree.map(lambda x, at=at: x[at], states) for at in (0, slice(1, None)))
    return lax.scan(lambda a, b: (merge_states(program, depth, a, b), None), first, rest)[0]


def _stacks(assigned: Assigned, depth: int) -> list[int]:
    """Returns the lengths of the scans from a depth on that have one state per iteration."""
    return [
        assigned.loops[scan_depth] for scan_depth in sorted(assigned.stacked) if scan_depth >= depth
    ]


def empty_states(programs: Sequence[Program], inputs: ProductInputs, depth: int) -> States:
    """Returns the calibration states of the products in some programs, before any data."""

    def of_operand(observer: Observer | None, stacks: list[int]) -> Any:
        if observer is None:
            return None
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*stacks, *x.shape)), observer.empty())

    states = {
        a.name: tuple(of_operand(observer, _stacks(a, depth)) for observer in a.observers)
        for inside in programs
        for a in inside.all()
        if any(a.observers)
    }
    return inputs.as_device_varying(states)
