"""The largest or the least number of every block, at the speed of memory.

XLA on CPU makes vectors of a reduction that takes at most 32 numbers lying apart to one, side by
side with their neighbours. Any other goes number by number, four times as long, or copies the
tensor first. So blocks are reduced by such steps, one axis after the other.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.blocks import Cut

__all__ = ["reduced", "summed"]

_APART = 32
_NEIGHBOURS = 8
_WHOLE = {lax.max: jnp.max, lax.min: jnp.min}


def reduced(combine: Callable, x: jax.Array, cut: Cut, none: np.int32) -> jax.Array:
    """The least or largest in each block.

    Args:
      combine: `lax.max` or `lax.min`.
      x: an int32 array, split as `cut.split` does it.
      cut: the blocks.
      none: what an empty block has, and a bound for all others: those below (above, for `lax.min`)
        count as it. Not the last one of int32: XLA would see that it bounds nothing.

    Returns:
      An int32 array, the blocks' axes kept at 1.
    """
    reduce = functools.partial(_WHOLE[combine], initial=none)
    shape = tuple(1 if axis in cut.axes else n for axis, n in enumerate(x.shape))
    x, parts, axes = _in_parts(x, cut)
    begun = False
    for axis in reversed(axes):
        if x.shape[axis] == 1:
            continue
        if begun:
            x = _halves(combine, x, axis)
        along = _along_last if axis == x.ndim - 1 else _along
        x = along(combine, reduce, x, axis)
        begun = True
    if parts:
        # The bound between them keeps XLA from making one reduction of all.
        x = reduce(combine(x, none), axis=parts).reshape(shape)
    return combine(x, none)


def summed(x: jax.Array) -> jax.Array:
    """The sums of integers that are not negative along the last axis, which goes."""
    n = x.shape[-1]
    if n == 0 or n % _NEIGHBOURS:
        return jnp.sum(x, axis=-1)
    step = _step(n // _NEIGHBOURS)
    x = x.reshape(*x.shape[:-1], n // step // _NEIGHBOURS, step, _NEIGHBOURS)
    for axis in (-2, -1, -1):  # The bound between them keeps XLA from making one sum of three.
        x = lax.max(jnp.sum(x, axis=axis), np.int32(0))
    return x


def _in_parts(x: jax.Array, cut: Cut) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """An array in which an axis that is one block, and may lie on several devices, is two axes.

    Which devices it lies on is not known while it is traced, except that their number divides both
    the axis and the number of all devices. The steps over the second axis then stay on a device,
    and what they leave of all devices is reduced at once. On a single device nothing changes.

    Returns:
      The array, the new first axes, and all axes that lie within a block and a part.
    """
    shape: list[int] = []
    parts, axes = [], []
    for axis, n in enumerate(x.shape):
        if axis in cut.axes:
            count = math.gcd(n, jax.device_count()) if x.shape[axis - 1] == 1 else 1
            if count > 1:
                parts.append(len(shape))
                shape.append(count)
                n //= count
            axes.append(len(shape))
        shape.append(n)
    return x.reshape(shape), tuple(parts), tuple(axes)


def _along_last(combine: Callable, reduce: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Reduces the last axis, in one loop over x."""
    n = x.shape[axis]
    rest = n % _NEIGHBOURS
    if 0 < rest < n:
        parts = (lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, n - rest), (n - rest, n)))
        return combine(*(_along_last(combine, reduce, part, axis) for part in parts))
    if n and not rest:
        step = _step(n // _NEIGHBOURS)
        x = x.reshape(*x.shape[:-1], n // step // _NEIGHBOURS, step, _NEIGHBOURS)
        # The bound between them keeps XLA from making one reduction of two.
        x = reduce(reduce(x, axis=-2), axis=-1)
    return reduce(x, axis=axis, keepdims=True)


def _along(combine: Callable, reduce: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Reduces an axis with others behind it, by a loop over what each step leaves."""
    n = x.shape[axis]
    step = _step(n)
    if step in (1, n):
        return reduce(x, axis=axis, keepdims=True)
    x = x.reshape(*x.shape[:axis], n // step, step, *x.shape[axis + 1 :])
    return _along(combine, reduce, _halves(combine, reduce(x, axis=axis + 1), axis), axis)


def _halves(combine: Callable, x: jax.Array, axis: int) -> jax.Array:
    """One half of an axis combined with the other; a middle that both have counts once.

    XLA would put the loop that made x into the next one, where it is no vector. It does not where
    that one reads x in two ways.
    """
    n = x.shape[axis]
    half = -(-n // 2)
    low = lax.slice_in_dim(x, 0, half, axis=axis)
    return combine(low, lax.slice_in_dim(x, n - half, n, axis=axis))


def _step(n: int) -> int:
    """How many numbers become one."""
    return next((d for d in range(min(n, _APART), 1, -1) if n % d == 0), 1)
