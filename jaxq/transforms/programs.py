"""What is run: a program with what its products get, and the states that they see.

States of calibration go by the products' names. A product in a scan over layers has one for each of
them, along leading axes, one for every scan between the program and the product.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq import calibration
from jaxq.draws import fold_in
from jaxq.histories import History
from jaxq.meshes import varying
from jaxq.transforms import compat
from jaxq.transforms.assigning import Assigned
from jaxq.transforms.reading import Node

__all__ = ["Extra", "Program", "States", "merged", "of_all", "program", "unseen"]

States = dict[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr, which of its equations are products to quantize, and which contain some."""

    jaxpr: Any
    products: tuple[tuple[int, Assigned], ...]
    inner: tuple[tuple[int, tuple["Program", ...]], ...]

    def all(self) -> Iterator[Assigned]:
        """All products, in the order in which they run."""
        for _, assigned in self.products:
            yield assigned
        for _, programs in self.inner:
            for inside in programs:
                yield from inside.all()

    @property
    def draws(self) -> bool:
        """Whether any product needs a key."""
        return any(assigned.draws for assigned in self.all())


class Extra(NamedTuple):
    """What products need beside their operands.

    Attributes:
      key: for random numbers, or None.
      scales: from calibration, by the products' names.
      histories: of delayed scaling, likewise.
      places: by the axes of the `shard_map`s around, where on them the device is.
    """

    key: jax.Array | None
    scales: Mapping[str, tuple[calibration.Calibrated | None, ...]]
    histories: Mapping[str, tuple[History | None, ...]]
    places: Mapping[str, jax.Array]

    def folded(self, number: Any) -> jax.Array:
        """The keys for products or turns of a loop."""
        assert self.key is not None, "checked before anything runs"
        return fold_in(self.key, number)

    def apart(self, eqn: Any) -> tuple[str, ...]:
        """The axes of devices that draw their own numbers for a product: they multiply other ones.

        Where a `shard_map` does not check what differs, all its devices do.
        """
        differing = compat.varying_of(eqn)
        return tuple(
            axis
            for axis, place in sorted(self.places.items())
            if axis in differing or axis not in varying(place)
        )

    def everywhere(self, states: Any) -> Any:
        """States as ones that may differ on all devices, whatever they were made of."""
        axes = frozenset().union(*map(varying, self.places.values()))

        def moved(x: jax.Array) -> jax.Array:
            return lax.pcast(x, tuple(axes - varying(x)), to="varying")

        return jax.tree.map(moved, states)

    def within(self, programs: Sequence[Program]) -> "Extra":
        """What the products of some programs need."""
        names = {a.name for inside in programs for a in inside.all()}
        scales = {name: value for name, value in self.scales.items() if name in names}
        histories = {name: value for name, value in self.histories.items() if name in names}
        return self._replace(scales=scales, histories=histories)


def program(node: Node, chosen: Sequence[Assigned | None]) -> Program:
    """The program of a node by what its products were assigned."""
    products = [(i, chosen[product.number]) for i, product in node.products.items()]
    inner = [(i, tuple(program(n, chosen) for n in nodes)) for i, nodes in node.inner.items()]
    return Program(
        node.jaxpr,
        tuple((i, assigned) for i, assigned in products if assigned is not None),
        tuple((i, programs) for i, programs in inner if any(any(p.all()) for p in programs)),
    )


def merged(program: Program, depth: int, earlier: States, later: States) -> States:
    """States that a program at a depth of scans has seen, with those that it sees later."""
    products = {a.name: a for a in program.all()}

    def of_operand(known: Any, stacks: int, *states: Any) -> Any:
        if known is None:
            return None
        merge = functools.partial(calibration.merge, recipe=known[1])
        for _ in range(stacks):
            merge = jax.vmap(merge)
        return merge(*states)

    result = {}
    for name, states in later.items():
        calibrated, stacks = products[name].calibrated, len(_stacks(products[name], depth))
        operands = zip(calibrated, earlier[name], states, strict=True)
        result[name] = tuple(of_operand(known, stacks, a, b) for known, a, b in operands)
    return result


def of_all(program: Program, depth: int, states: States) -> States:
    """States of all turns of a loop, or of all devices, along a leading axis, as one."""
    if not states:
        return states
    first, rest = (jax.tree.map(lambda x, at=at: x[at], states) for at in (0, slice(1, None)))
    return lax.scan(lambda a, b: (merged(program, depth, a, b), None), first, rest)[0]


def _stacks(assigned: Assigned, depth: int) -> list[int]:
    """The lengths of the scans inside a program at a depth that have a state for every turn."""
    return [assigned.loops[turn] for turn in sorted(assigned.stacked) if turn >= depth]


def unseen(programs: Sequence[Program], extra: Extra, depth: int) -> States:
    """States that have seen nothing, for the products of some programs at a depth of scans."""

    def of_operand(known: Any, stacks: list[int]) -> Any:
        if known is None:
            return None
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*stacks, *x.shape)), calibration.init(*known)
        )

    states = {
        a.name: tuple(of_operand(known, _stacks(a, depth)) for known in a.calibrated)
        for inside in programs
        for a in inside.all()
        if a.recipe is not None and any(a.calibrated)
    }
    return extra.everywhere(states)
