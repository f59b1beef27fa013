"""Sums and maxima in one pass, over a whole tensor or over each of its blocks.

XLA on CPU compiles one reduction with several operands to a single loop, but several reductions to
one loop each (and a reduction of a single operand to a loop after a copy of the tensor). Such a
loop adds sequentially, so it is kept short; its results are then added as a tree.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import described
from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import divide
from jaxq.recipes import Granularity

__all__ = [
    "Combine",
    "blocks_of",
    "fold",
    "largest_magnitude",
    "over_blocks",
    "power_of_two",
    "share",
]

_IN_ORDER = 256  # The number of elements that are added sequentially.
_LONGEST = 1024  # The number of elements that `over_rows` adds sequentially.
PARTS = 512  # The length of the results of `over_rows`.

Combine = Callable[[jax.Array, jax.Array], jax.Array]


def blocks_of(shape: tuple[int, ...], per: Granularity | None) -> Cut:
    """Returns the blocks of a tensor that get one result each; one block if `per` is None."""
    if per is None:
        return Cut((math.prod(shape),), (math.prod(shape),))
    if not isinstance(per, Granularity):
        raise TypeError(
            f"`per` must be a granularity or None, got {described(per)}. Use, for example, "
            "jaxq.PerChannel(-1)."
        )
    return Cut(shape, per.block(shape))


def over_blocks(
    arrays: Sequence[jax.Array],
    cut: Cut,
    per: Granularity | None,
    combine: Sequence[Combine],
) -> list[jax.Array]:
    """Returns sums or maxima of several arrays of one shape, in one pass over them.

    Args:
      arrays: arrays of the tensor's shape; 0 must be neutral, because blocks are padded with it.
      cut: the result of `blocks_of`.
      per: the granularity that was passed to `blocks_of`.
      combine: `lax.add` or `lax.max` for each array.

    Returns:
      For each array, a result of shape `cut.counts`, or a scalar for a whole tensor.
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
        _together(combine),
        tuple(first),
    )
    result = []
    for row, f in zip(rows, combine, strict=True):
        total = (jnp.max if f is lax.max else _sum)(row, axis=tuple(later))
        result.append(total.reshape(() if per is None else cut.counts))
    return result


def fold(x: jax.Array) -> jax.Array:
    """Returns an array as `PARTS` rows, `[PARTS, ...]`, padded with zeros."""
    rest = max(-(-x.size // PARTS), 1)
    loops = -(-rest // _LONGEST)
    shape = (PARTS, rest) if loops == 1 else (PARTS, loops, -(-rest // loops))
    padding = math.prod(shape) - x.size
    x = x.reshape(-1)
    if padding:
        x = lax.pad(x, np.zeros((), x.dtype), [(0, padding, 0)])
    return x.reshape(shape)


def over_rows(arrays: Sequence[jax.Array], combine: Sequence[Combine]) -> list[jax.Array]:
    """Returns sums, or maxima of nonnegative numbers, over the rows of arrays, `[PARTS]`.

    The arrays share the loops. All results have length `PARTS`, whatever the size of the arrays, so
    XLA compiles the operations on them only once.

    Args:
      arrays: results of `fold` for arrays of one shape.
      combine: `lax.add` or `lax.max` for each array.
    """
    zeros = tuple(np.zeros((), a.dtype) for a in arrays)
    rows = tuple(arrays)
    for axis in reversed(range(1, arrays[0].ndim)):
        rows = lax.reduce(rows, zeros, _together(combine), (axis,))
    return list(rows)


def _together(combine: Sequence[Combine]) -> Callable[[tuple, tuple], tuple]:
    """Returns the function that combines several pairs of numbers at once."""
    return lambda a, b: tuple(f(p, q) for f, p, q in zip(combine, a, b, strict=True))


def _sum(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axis, dtype=x.dtype)


@jax.jit
def share(part: jax.Array, count: jax.Array) -> jax.Array:
    """Returns float32 quotients of counts, with the same bits on every backend.

    float64 quotients are those of XLA.
    """
    return divide(part, count) if part.dtype == jnp.float32 else part / count


def largest_magnitude(x: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns the bits of each number's magnitude, or 0 for NaN and infinity."""
    magnitude = layout.bits(x) & layout.magnitude_mask
    return where(magnitude < layout.inf, magnitude, layout.int_type(0))


def power_of_two(x: jax.Array, exponent: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns x * 2^exponent, rounded once.

    The result is computed on the bits, because XLA on CPU flushes subnormal operands and results of
    arithmetic to zero.
    """
    digits, m = layout.int_type((1 << layout.mantissa_bits) - 1), layout.mantissa_bits
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    normalized = extended_bits(magnitude, layout)
    place = (normalized >> m) + exponent  # The exponent field of the result.
    one = layout.int_type(1)
    shift = lax.clamp(layout.int_type(0), one - place, layout.int_type(m + 2))
    significand = normalized & digits | one << m
    # Round to nearest even: add half a unit in the last place, minus one if the last bit is 0.
    half = where(shift > 0, ((one << shift) >> one) - one + (significand >> shift & one), one - one)
    small = (significand + half) >> shift
    field = lax.clamp(one, place, layout.int_type(2 * layout.bias + 1))
    result = where(place < one, small, (field << m) | (normalized & digits))
    result = where(place > layout.int_type(2 * layout.bias), layout.inf, result)
    same = (magnitude == 0) | (magnitude >= layout.inf)
    return layout.floats(where(same, bits, result | (bits & layout.sign)))
