"""Compiled parts of a program, and the records that describe a run on all batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq.models import Assigned, Product, ProductInputs, Program, as_array, run_program
from jaxq.ptq._calibration_runs._frames import Frame
from jaxq.ptq._calibration_runs._signatures import signature, without_names
from jaxq.ptq._statistics import Collector, Statistics

__all__ = [
    "BatchRun",
    "CompiledPart",
    "Environment",
    "Occurrence",
    "PartCache",
    "Section",
    "Solve",
    "measure_drift",
    "merge_all",
]

Environment = dict[Any, Any]  # The values of the variables of a program.


class Occurrence(NamedTuple):
    """A product in one iteration of the loops around it.

    Attributes:
      product: the product.
      frame: the program that contains it.
      variable: the operand that is its weight.
      iterations: the indices of the iterations of scans over layers around it, except those in
        `frame.iterations`.
    """

    product: Product
    frame: Frame
    variable: Any
    iterations: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the product, with the layer in brackets if it is in a scan."""
        layers = (*self.frame.iterations, *self.iterations)
        return self.product.name + "".join(f"[{i}]" for i in layers)

    def check_finite(self, owner: str, statistics: Statistics) -> None:
        """Raises a ValueError unless the input of the product and the sums over it are finite."""
        if not _all_finite(statistics.amax):
            raise ValueError(
                f"{owner}: inputs must be finite, but {self.product.where} has a NaN or an "
                "infinity in its input. Look for it in the batches, or mask the padding."
            )
        # Squares are read only with the Hessian, whose diagonal they are.
        if not _all_finite(dataclasses.replace(statistics, square=statistics.amax)):
            raise ValueError(
                f"{owner}: sums over inputs must fit into float32, but those of "
                f"{self.product.where} overflow: its largest input is "
                f"{float(jnp.max(statistics.amax)):.3g}. Look for it in the batches, mask the "
                "padding, or scale the inputs down."
            )

    def check_weight(self, owner: str, weight: jax.Array) -> None:
        """Raises a ValueError unless the weight of the product is finite."""
        if not _all_finite(weight):
            raise ValueError(
                f"{owner}: weights must be finite, but that of {self.product.where} has a NaN or "
                "an infinity. Look for it in `params`, or exclude the weight with a rule whose "
                "recipe is None."
            )


def _all_finite(arrays: Any) -> bool:
    """Returns whether all floating arrays of a pytree are finite."""
    floats = [x for x in jax.tree.leaves(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in floats)


# Solves a product, given a function that returns the statistics of its input.
Solve = Callable[[Occurrence, Callable[[], Statistics]], None]


class BatchRun(NamedTuple):
    """A run of a program on all batches, with the original or with the packed weights.

    Attributes:
      frame: the program with its weights.
      envs: the values of the variables, one dict per batch.
    """

    frame: Frame
    envs: list[Environment]


class Section(NamedTuple):
    """Some equations of a program, to run as one part.

    Attributes:
      equations: the indices of the equations, in order.
      fixed: the variables that they read and that do not depend on data.
      data: the other variables that they read.
      outvars: the variables to return.
      observed: the numbers of the products whose inputs are observed.
    """

    equations: Sequence[int]
    fixed: Sequence[Any]
    data: Sequence[Any]
    outvars: Sequence[Any]
    observed: frozenset[int]


class CompiledPart(NamedTuple):
    """A compiled part of a program.

    Attributes:
      call: a jitted function of the fixed values, the other values and the mask, which returns the
        values of the outvars and the statistics of the observed inputs.
      names: the names of the observed products.
    """

    call: Callable[..., Any]
    names: tuple[str, ...]


class PartCache:
    """The compiled parts of a model, of which equal ones share one compiled function."""

    def __init__(self) -> None:
        self._parts: dict[Any, CompiledPart] = {}
        self._functions: dict[Any, Callable[..., Any]] = {}

    def get(
        self, frame: Frame, section: Section, chosen: Callable[[], Sequence[Assigned | None]]
    ) -> CompiledPart:
        """Returns the compiled part for some equations of a frame.

        Args:
          frame: the frame.
          section: the equations.
          chosen: a function that returns the assignments of all products, by number.
        """
        position = id(frame.flat), tuple(section.equations), section.observed
        if position not in self._parts:
            invars = [*section.fixed, *section.data]
            part = frame.flat.part(section.equations, invars, section.outvars, chosen())
            names = tuple(a.name for a in part.all() if any(a.observers))
            part = without_names(part, {a.name: str(k) for k, a in enumerate(part.all())})
            key = signature(part), frame.depth, len(section.fixed), bool(section.observed)
            if key not in self._functions:
                self._functions[key] = _compile(part, frame.depth)
            self._parts[position] = CompiledPart(self._functions[key], names)
        return self._parts[position]


def _compile(part: Program, depth: int) -> Callable[..., Any]:
    """Returns a jitted function that runs a part of a program below a number of scans."""
    names = [a.name for a in part.all() if any(a.observers)]

    @jax.jit
    def call(fixed: list[Any], data: list[Any], mask: jax.Array | None) -> Any:
        extra = ProductInputs.empty(mask)
        results, states = run_program(part, extra, [*fixed, *data], depth, observing=bool(names))
        return list(map(as_array, results)), [states[name][0] for name in names]

    return call


@functools.partial(jax.jit, donate_argnums=0)
def merge_all(total: list[Statistics], other: list[Statistics]) -> list[Statistics]:
    """Merges the statistics of several inputs with those of another batch."""
    # Lists rather than dicts by name, so that equal products share one compiled program.
    return [first.merge(second) for first, second in zip(total, other, strict=True)]


@functools.partial(jax.jit, static_argnames="collector")
def measure_drift(
    x: jax.Array, reference: jax.Array, mask: jax.Array | None, collector: Collector
) -> jax.Array:
    """Returns the drift of one batch; see `Collector.drift`."""
    return collector.drift(x, reference, mask)
