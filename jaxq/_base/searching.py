"""A binary search among few sorted numbers, without memory accesses.

XLA vectorizes its comparisons and selections, which look-ups in a table prevent on CPU.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import where

__all__ = ["number", "search", "selected"]


def search(x: jax.Array, limits: list) -> list[jax.Array]:
    """Returns the binary digits, from the highest, of the number of limits that x exceeds.

    Args:
      x: an array of numbers. A NaN exceeds no limit.
      limits: ascending NumPy scalars of the dtype of x.
    """
    most = np.inf if jnp.issubdtype(x.dtype, jnp.floating) else np.iinfo(x.dtype).max
    depth = max(1, len(limits).bit_length())
    limits = [*limits, *[x.dtype.type(most)] * (2**depth - 1 - len(limits))]
    digits: list[jax.Array] = []
    for _ in range(depth):
        half = 2 ** (depth - len(digits) - 1)
        limit = selected(digits, limits[half - 1 :: 2 * half])
        limit = limit if digits else lax.full(x.shape, limit)
        digits.append(lax.gt(x, limit))
    return digits


def number(digits: list[jax.Array]) -> jax.Array:
    """Returns the int32 numbers with these binary digits."""
    weighted = (where(digit, np.int32(1 << i), np.int32(0)) for i, digit in enumerate(digits[::-1]))
    return functools.reduce(lax.bitwise_or, weighted)


def selected(digits: list[jax.Array], items: list) -> Any:
    """Selects the items at the indices with these binary digits.

    Args:
      digits: the digits, from the highest; without digits the only item is returned.
      items: NumPy scalars or arrays of one dtype. Those missing at the end equal the last one.
    """
    items = [*items, *items[-1:] * (2 ** len(digits) - len(items))]
    for digit in digits:
        half = len(items) // 2
        items = [where(digit, items[half + i], items[i]) for i in range(half)]
    return items[0]
