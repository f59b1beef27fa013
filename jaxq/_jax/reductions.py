"""The maximum, the minimum or the sum of every block, computed at memory bandwidth.

XLA on CPU vectorizes a reduction of at most 32 strided elements to one, with adjacent elements as
the vector lanes. Any other reduction is scalar, which takes four times as long, or copies the
tensor first. Blocks are therefore reduced in such steps, one axis after the other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.cutting import Cut
from jaxq._base.shapes import is_symbolic

__all__ = ["largest", "reduced", "summed", "total"]

_STRIDED = 32
_ROWS = 16  # Rows that are a power of two apart displace each other from the cache.
_NEIGHBORS = 8
_REDUCE = {lax.max: lax.reduce_max, lax.min: lax.reduce_min}


def reduced(combine: Callable, x: jax.Array, cut: Cut, none: np.int32) -> jax.Array:
    """Returns the maximum or minimum of each block.

    Args:
      combine: `lax.max` or `lax.min`.
      x: an int32 array, split by `cut.split`.
      cut: the division into blocks.
      none: the result for an empty block. Elements below it (above it, for `lax.min`) are replaced
        by it. Must not be the int32 minimum or maximum, or XLA removes the clamp.

    Returns:
      An int32 array in which the axes within a block have length 1.
    """

    def reduce(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        # The clamp keeps XLA from merging the reduction with the next one.
        return combine(_REDUCE[combine](x, axes), none)

    shape = tuple(1 if axis in cut.axes else n for axis, n in enumerate(x.shape))
    x, parts, axes = _in_parts(x, cut)
    started = False
    for axis in reversed(axes):
        if x.shape[axis] == 1:
            continue
        if started and not is_symbolic(x.shape[axis]):
            x = _halves(combine, x, axis)
        along = _along_last if axis == x.ndim - 1 else _along
        x = along(combine, reduce, x, axis)
        started = True
    x = x if started else combine(x, none)
    return reduce(x, parts).reshape(shape) if parts else x


def largest(x: jax.Array) -> jax.Array:
    """Returns the maximum of all elements of a non-negative int32 array, 0 if there are none.

    XLA on CPU compiles a reduction along more than 32 elements to three loops: it fuses neither the
    computation of x nor the last step into the reduction. All axes are therefore divided.
    """
    if x.ndim == 1 and not is_symbolic(x.size) and jax.device_count() == 1:
        x = x.reshape(_lengths(x.size))
        x = lax.max(lax.reduce_max(x, range(1, x.ndim)), np.int32(0))
        return lax.max(lax.reduce_max(x, (0,)), np.int32(0))
    shape: list[Any] = []
    outer = []
    for n in x.shape:
        # As in `_in_parts`, the outer axis keeps the parts that may lie on different devices.
        step = 1 if is_symbolic(n) else _step(n // math.gcd(n, jax.device_count()))
        if step in (1, n):
            shape.append(n)
        else:
            outer.append(len(shape))
            shape += [n // step, step]
    inner = [axis for axis in range(len(shape)) if axis not in outer]
    x = lax.max(lax.reduce_max(x.reshape(shape), inner), np.int32(0))
    return lax.max(lax.reduce_max(x, range(x.ndim)), np.int32(0)) if outer else x


def summed(x: jax.Array) -> jax.Array:
    """Returns the sums of non-negative integers over the last axis, in their dtype."""
    n = x.shape[-1]
    if n == 0 or n % _NEIGHBORS:
        return jnp.sum(x, axis=-1, dtype=x.dtype)
    step = _step(n // _NEIGHBORS)
    x = x.reshape(*x.shape[:-1], n // step // _NEIGHBORS, step, _NEIGHBORS)
    for axis in (-2, -1, -1):  # The clamp in between keeps XLA from merging the three sums.
        x = lax.max(jnp.sum(x, axis=axis, dtype=x.dtype), np.int32(0))
    return x


def total(x: jax.Array, cut: Cut) -> jax.Array:
    """Returns the sum of each block, whose bits do not depend on the order of summation.

    The elements are rounded to multiples of 2^-24 and added as integers, which are divided into
    digits so that no sum overflows. (Sums are exact for 2^24 elements per block of any shape, and
    for 2^34 if the lengths are multiples of powers of two.)

    Args:
      x: float32 numbers in [0, 4), split by `cut.split`. The sum of other numbers is undefined.
      cut: the division into blocks.

    Returns:
      A float32 array in which the axes within a block have length 1.
    """
    if not cut.axes:
        return x
    shape = tuple(1 if axis in cut.axes else n for axis, n in enumerate(x.shape))
    x, parts, axes = _in_parts(x, cut)
    axis = max((a for a in axes if x.shape[a] != 1), default=axes[-1])
    n = x.shape[axis]
    if axis == x.ndim - 1 and not is_symbolic(n) and n % _NEIGHBORS == 0:
        x, axes = x.reshape(*x.shape[:-1], n // _NEIGHBORS, _NEIGHBORS), (*axes, x.ndim)
    whole = lax.round(x * np.float32(2.0**24), lax.RoundingMethod.TO_NEAREST_EVEN)
    sums = _near_sums(whole.astype(jnp.int32), axis)  # Below 2^31.
    if sums.shape[axis] == 1:  # Parts of the axis are short if there are many devices.
        axis = max((a for a in axes if not is_symbolic(sums.shape[a])), key=lambda a: sums.shape[a])
    sums = _near_sums(_digits(sums, 2, 16), axis + 1)  # Below 2^21.
    sums = jnp.sum(_digits(sums, 3, 7), axis=[a + 2 for a in (*parts, *axes)], dtype=jnp.int32)
    result = jnp.zeros(shape, jnp.float32)
    for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)):  # From the lowest digit.
        digit = sums[i, j].reshape(shape).astype(jnp.float32)
        result = result + digit * np.float32(2.0 ** (7 * i + 16 * j - 24))
    return result


def _digits(x: jax.Array, count: int, bits: int) -> jax.Array:
    """Returns the digits of non-negative integers along a new first axis, the lowest first."""
    shifts = (np.arange(count) * bits).astype(np.int32).reshape(-1, *(1,) * x.ndim)
    return x[None] >> shifts & np.int32(2**bits - 1)


def _near_sums(x: jax.Array, axis: int) -> jax.Array:
    """Returns the sums of a few non-negative integers each, which shortens an axis."""
    n = x.shape[axis]
    step = 1 if is_symbolic(n) else _step(n)
    x = x.reshape(*x.shape[:axis], n // step, step, *x.shape[axis + 1 :])
    # The clamp keeps XLA from merging the sum with the next one.
    return lax.max(jnp.sum(x, axis=axis + 1, dtype=x.dtype), np.int32(0))


def _in_parts(x: jax.Array, cut: Cut) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Splits each axis that is a single block, and may be sharded, into two axes.

    During tracing the sharding is unknown, except that the number of shards divides both the axis
    and the number of all devices. The steps over the second axis then stay on one device, and the
    partial results of all devices are reduced at once. On a single device nothing changes.

    Returns:
      The array, the new first axes, and all axes that lie within a block and a part.
    """
    shape: list[int] = []
    parts, axes = [], []
    for axis, n in enumerate(x.shape):
        if axis in cut.axes:
            whole = x.shape[axis - 1] == 1 and not is_symbolic(n)
            count = math.gcd(n, jax.device_count()) if whole else 1
            if count > 1:
                parts.append(len(shape))
                shape.append(count)
                n //= count
            axes.append(len(shape))
        shape.append(n)
    return x.reshape(shape), tuple(parts), tuple(axes)


def _along_last(combine: Callable, reduce: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Reduces the last axis in one loop over x."""
    n = x.shape[axis]
    if is_symbolic(n):
        return _keepdims(reduce, x, axis)
    rest = n % _NEIGHBORS
    if 0 < rest < n:
        parts = (lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, n - rest), (n - rest, n)))
        return combine(*(_along_last(combine, reduce, part, axis) for part in parts))
    if n and not rest:
        step = _step(n // _NEIGHBORS)
        x = x.reshape(*x.shape[:-1], n // step // _NEIGHBORS, step, _NEIGHBORS)
        x = reduce(reduce(x, (axis + 1,)), (axis + 1,))
        return x if x.shape[axis] == 1 else _keepdims(reduce, x, axis)
    return _keepdims(reduce, x, axis)


def _along(
    combine: Callable, reduce: Callable, x: jax.Array, axis: int, at_once: int = _STRIDED
) -> jax.Array:
    """Reduces an axis that is not the last in several steps, each a loop over the last result."""
    n = x.shape[axis]
    if is_symbolic(n) or n <= at_once:
        return _keepdims(reduce, x, axis)
    step = _step(n, _ROWS)
    if 2 * step < _ROWS:
        step = _step(n)
    if step in (1, n):
        return _keepdims(reduce, x, axis)
    x = x.reshape(*x.shape[:axis], n // step, step, *x.shape[axis + 1 :])
    x = _halves(combine, reduce(x, (axis + 1,)), axis)
    return _along(combine, reduce, x, axis, at_once=_ROWS)


def _keepdims(reduce: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Reduces an axis to length 1."""
    return lax.expand_dims(reduce(x, (axis,)), (axis,))


def _halves(combine: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Combines the two halves of an axis, which share the middle element if the length is odd.

    Otherwise XLA would fuse the loop that computes x into the next one, where it is not vectorized.
    It does not fuse a loop whose result is read in two ways.
    """
    n = x.shape[axis]
    half = -(-n // 2)
    low = lax.slice_in_dim(x, 0, half, axis=axis)
    return combine(low, lax.slice_in_dim(x, n - half, n, axis=axis))


def _lengths(n: int) -> list[int]:
    """Divides an axis into axes of at most `_STRIDED` elements, as far as the length permits."""
    lengths = []
    while n > _STRIDED and (step := _step(n)) > 1:
        lengths.append(step)
        n //= step
    return [n, *lengths]


def _step(n: int, most: int = _STRIDED) -> int:
    """Returns the number of elements to reduce to one: the largest divisor up to `most`."""
    return next((d for d in range(min(n, most), 1, -1) if n % d == 0), 1)
