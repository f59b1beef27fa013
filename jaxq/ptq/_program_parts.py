"""Compiled parts of a program, and records that describe a run on all batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxq.models import Extra, Product, Program, run, unpacked
from jaxq.ptq._collectors import Collector
from jaxq.ptq._leaf_states import Frame
from jaxq.ptq._statistics import Statistics

__all__ = ["BatchRun", "Environment", "Part", "Place", "Solve", "compiled", "drift", "merged"]

Environment = dict[Any, Any]


class Place(NamedTuple):
    """A product at one iteration of the loops around it.

    Attributes:
      product: the product.
      frame: the program in which it is.
      variable: the operand that is its weight.
      iterations: the iterations of the scans around it in which every iteration has its own weight.
    """

    product: Product
    frame: Frame
    variable: Any
    iterations: tuple[int, ...]


# Solves a product, given a function that returns the statistics of its input.
Solve = Callable[[Place, Callable[[], Statistics]], None]


class BatchRun(NamedTuple):
    """A run of a program on all batches, with the original or with the packed weights.

    Attributes:
      frame: the program with its weights.
      envs: the values of the variables, one dict per batch.
    """

    frame: Frame
    envs: list[Environment]


class Part(NamedTuple):
    """A compiled part of a program, and the names of its observed products."""

    call: Callable[..., Any]
    names: tuple[str, ...]


def compiled(part: Program, depth: int) -> Callable[..., Any]:
    """Returns a jitted function that runs a part of a program."""
    names = [a.name for a in part.all() if any(a.calibrated)]

    @jax.jit
    def call(fixed: list[Any], data: list[Any], mask: jax.Array | None) -> Any:
        extra = Extra.empty(mask)
        results, states = run(part, extra, [*fixed, *data], depth, observing=bool(names))
        return list(map(unpacked, results)), [states[name][0] for name in names]

    return call


@functools.partial(jax.jit, donate_argnums=0)
def merged(total: list[Statistics], seen: list[Statistics]) -> list[Statistics]:
    # Lists rather than dicts by name, so that equal products share one compiled program.
    return [own.merge(other) for own, other in zip(total, seen, strict=True)]


@functools.partial(jax.jit, static_argnames="collector")
def drift(
    x: jax.Array, reference: jax.Array, mask: jax.Array | None, collector: Collector
) -> jax.Array:
    return collector.drift(x, reference, mask)
