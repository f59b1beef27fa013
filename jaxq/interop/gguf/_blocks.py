"""The blocks that are quantized, and functions of them that the types share."""

from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._jax.arithmetic import barrier
from jaxq.interop.gguf._bits import halves, join_halves
from jaxq.interop.gguf._searches import Steps, product, quotient, sums

__all__ = [
    "IMPORTANT",
    "Blocks",
    "as_bytes",
    "as_half",
    "divided",
    "mean_square",
    "over",
    "split_bits",
    "sub_blocks",
    "weighted",
    "whole",
]


# The scales that ggml tries with an importance matrix.
IMPORTANT = Steps(-0.9, 0.05, 36)


class Blocks(NamedTuple):
    """Blocks to quantize.

    Attributes:
      x: the elements, float32 `[elements, blocks]`.
      weights: the importance of each element, of the same shape; None without a matrix.
      row: the mean square of the row of each block; None without a matrix.
    """

    x: jax.Array
    weights: jax.Array | None
    row: jax.Array | None


def as_half(x: jax.Array) -> jax.Array:
    """Returns numbers rounded to float16."""
    return join_halves(halves(x))


def as_bytes(q: jax.Array) -> jax.Array:
    """Returns codes `[elements, blocks]` as uint8 `[blocks, elements]`.

    XLA on CPU would compute them again for each field of a layout that they are split into.
    """
    return barrier(q.astype(jnp.uint8).T)


def split_bits(q: jax.Array) -> dict[str, jax.Array]:
    """Returns 5- or 6-bit codes as low nibbles and the bits above."""
    q = as_bytes(q)
    return {"q": q & np.uint8(15), "high": q >> np.uint8(4)}


def over(numerator: float, x: jax.Array) -> jax.Array:
    """Returns numerator / x, or 0 where x is 0."""
    ok = x != 0
    safe = jnp.where(ok, x, np.float32(1))
    return jnp.where(ok, quotient(jnp.full(x.shape, numerator, jnp.float32), safe), np.float32(0))


def divided(x: jax.Array, divisor: float) -> jax.Array:
    return quotient(x, jnp.full(x.shape, divisor, jnp.float32))


def sub_blocks(x: jax.Array, length: int) -> jax.Array:
    """Returns `[length, parts · blocks]` from `[elements, blocks]`."""
    parts = x.reshape(-1, length, x.shape[1])
    return parts.swapaxes(0, 1).reshape(length, -1)


def whole(x: jax.Array, blocks: int) -> jax.Array:
    """Returns `[elements, blocks]` from `sub_blocks`."""
    return x.reshape(x.shape[0], -1, blocks).swapaxes(0, 1).reshape(-1, blocks)


def mean_square(x: jax.Array, factor: float) -> jax.Array:
    return sums(lambda v: (product(v, v),), x)[0] * np.float32(factor / x.shape[0])


def weighted(weights: jax.Array | None, x: jax.Array, square: jax.Array | None) -> jax.Array:
    """Returns an importance times the root of the squares' sum, as ggml weights errors."""
    assert weights is not None
    assert square is not None
    return product(weights, jnp.sqrt(square[None] + product(x, x)))
