"""Sums of many numbers in one pass, over a whole tensor or over each of its blocks.

XLA on CPU makes one loop of a reduction with several operands, and one for each of several
reductions (or of one of a single operand, behind a copy of the tensor). Such a loop adds up in
order, so it is kept short; its results are then added as a tree.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, where
from jaxq.blocks import Cut, Granularity

__all__ = ["blocks_of", "largest_magnitude", "over_blocks", "power_of_two"]

_IN_ORDER = 256  # How many numbers are added one after the other.


def blocks_of(shape: tuple[int, ...], per: Granularity | None) -> Cut:
    """How a tensor is cut into the parts that get a number each; None: one whole."""
    return (
        Cut((math.prod(shape),), (math.prod(shape),))
        if per is None
        else Cut(shape, per.block(shape))
    )


def over_blocks(
    arrays: Sequence[jax.Array],
    cut: Cut,
    per: Granularity | None,
    combine: Sequence[Callable[[jax.Array, jax.Array], jax.Array]],
) -> list[jax.Array]:
    """Sums or maxima of several arrays of one shape, in one pass over them.

    Args:
      arrays: of the tensor's shape; 0 must add nothing, as blocks are filled up with it.
      cut: what `blocks_of` gave.
      per: what it was given.
      combine: `lax.add` or `lax.max` for each.

    Returns:
      For each an array of shape `cut.counts`, or a scalar for a whole tensor.
    """
    zeros = [np.zeros((), a.dtype) for a in arrays]
    split = [cut.split(a.reshape(cut.shape)) for a in arrays]
    if split[0].size == 0:
        shape = () if per is None else cut.counts
        return [jnp.zeros(shape, a.dtype) for a in arrays]
    first, later, shape, padding, room = [], [], [], [], _IN_ORDER
    for axis, length in reversed(list(enumerate(split[0].shape))):
        padding.insert(0, (0, 0, 0))
        if axis not in cut.axes:
            shape.insert(0, length)
            continue
        step = min(length, max(room, 1))
        room //= step
        padding[0] = (0, -length % step, 0)
        shape[:0] = [-(-length // step), step]
    place = 0
    for axis in range(len(split[0].shape)):
        if axis in cut.axes:
            later.append(place - len(first))
            first.append(place + 1)
        place += 1 + (axis in cut.axes)
    folded = [
        lax.pad(a, zero, padding).reshape(shape) for a, zero in zip(split, zeros, strict=True)
    ]
    rows = lax.reduce(
        tuple(folded),
        tuple(zeros),
        lambda a, b: tuple(f(p, q) for f, p, q in zip(combine, a, b, strict=True)),
        tuple(first),
    )
    result = []
    for row, f in zip(rows, combine, strict=True):
        total = (jnp.max if f is lax.max else _sum)(row, axis=tuple(later))
        result.append(total.reshape(() if per is None else cut.counts))
    return result


def _sum(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axis, dtype=x.dtype)


def largest_magnitude(x: jax.Array, layout: Layout) -> jax.Array:
    """Bits of the magnitudes of finite numbers, 0 for others: integers in their order."""
    magnitude = layout.bits(x) & layout.magnitude_mask
    return where(magnitude < layout.inf, magnitude, layout.int_type(0))


def power_of_two(x: jax.Array, exponent: jax.Array, layout: Layout) -> jax.Array:
    """Numbers times 2^exponent, in two steps, as the power alone may be no normal number."""
    half = exponent >> layout.int_type(1)
    return x * layout.floats(layout.field(half)) * layout.floats(layout.field(exponent - half))
