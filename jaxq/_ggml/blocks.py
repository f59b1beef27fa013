"""Blocks before and after quantization, and arithmetic that several of ggml's searches share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.shapes import is_symbolic
from jaxq._ggml.searches import Steps, product, quotient, sums
from jaxq._jax.arithmetic import square_root
from jaxq._jax.barriers import barrier
from jaxq.formats import get_format
from jaxq.numerics import cast

__all__ = [
    "IMPORTANCE_STEPS",
    "FloatBlocks",
    "QuantizedBlocks",
    "divide_or_zero",
    "divided",
    "error_weights",
    "in_chunks",
    "join_sub_blocks",
    "mean_square",
    "sub_blocks",
    "to_float16",
]

# The scales that ggml tries with an importance matrix.
IMPORTANCE_STEPS = Steps(-0.9, 0.05, 36)

_CHUNK = 2**15  # The number of elements quantized at a time, which fit into the cache.

# Rows of blocks have an odd multiple of this many numbers, a line of the cache. Rows at distances
# of 4096 bytes would displace each other from the first-level cache.
_LINE = 16

# XLA on CPU (JAX 0.10) divides the rows of blocks between threads, and does not vectorize a single
# row. Super-blocks have a row for each of their parts; other blocks are put into this many rows.
_ROWS = 8

_SUPER_BLOCK = 256  # The number of elements in a super-block.

_FLOAT16 = get_format("float16")


class FloatBlocks(NamedTuple):
    """Blocks of floats to quantize.

    Attributes:
      x: the elements, float32 `[elements, blocks]`.
      weights: the importance of each element, `[elements, blocks]`; None without an importance
        matrix.
      row_square: the mean square of the row of the tensor that contains the block, `[blocks]`; None
        without an importance matrix.
    """

    x: jax.Array
    weights: jax.Array | None = None
    row_square: jax.Array | None = None


class QuantizedBlocks(NamedTuple):
    """Quantized super-blocks, one per row.

    Attributes:
      d: the factor of the scales, `[blocks]`, float32 before it is rounded to float16; or the scale
        of a block that is not divided, before it is rounded to the rule's `scale_format`.
      scales: the quantized scales of the sub-blocks, int32 `[blocks, parts]`; None if the block is
        not divided, so that its scale is d.
      codes: int32 `[blocks, elements]`: the grid values of integer formats, else the codes.
      m: the factor of the minima, `[blocks]`; None if the rule has no minima.
      minima: the quantized minima of the sub-blocks, int32 `[blocks, parts]`, which are subtracted;
        None if the rule has no minima.
    """

    d: jax.Array
    scales: jax.Array | None
    codes: jax.Array
    m: jax.Array | None = None
    minima: jax.Array | None = None


def in_chunks(function: Callable[[FloatBlocks], Any], blocks: FloatBlocks, length: int) -> Any:
    """Applies a function to chunks of blocks that fit into the cache, and joins the results.

    Args:
      function: a function from blocks to arrays `[blocks, ...]`.
      blocks: all blocks.
      length: the number of elements in a block.
    """
    count, rows = blocks.x.shape[1], _ROWS if length < _SUPER_BLOCK else 1
    most = _odd_lines(_CHUNK // (length * rows))
    if is_symbolic(count) or 0 < count <= most:
        return function(blocks)
    # An empty tensor has one chunk of padding, because the searches need a block.
    chunks = max(1, -(-count // (rows * most)))
    lanes = min(most, _odd_lines(-(-count // (chunks * rows)) + 2 * _LINE - 1))

    def cut(x: jax.Array) -> jax.Array:
        """Returns `[chunks, blocks, ...]`."""
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, chunks * rows * lanes - count)])
        return jnp.moveaxis(padded, -1, 0).reshape(chunks, rows * lanes, *x.shape[:-1])

    def on_chunk(chunk: FloatBlocks) -> Any:
        # Transposed here and not in `cut`, because a chunk is in the cache.
        chunk = jax.tree.map(lambda x: barrier(jnp.moveaxis(x, 0, -1)), chunk)
        if rows == 1:
            return function(chunk)
        chunk = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], rows, lanes), chunk)
        return jax.vmap(function, in_axes=-2)(chunk)

    def join(x: jax.Array) -> jax.Array:
        x = x if rows == 1 else x.reshape(chunks, rows * lanes, *x.shape[3:])
        return x.reshape(chunks * rows * lanes, *x.shape[2:])[:count]

    return jax.tree.map(join, lax.map(on_chunk, jax.tree.map(cut, blocks)))


def _odd_lines(count: int) -> int:
    """Returns the largest odd multiple of `_LINE` up to a number, at least `_LINE` itself."""
    return max((count // _LINE - 1) // 2 * 2 + 1, 1) * _LINE


def to_float16(x: jax.Array) -> jax.Array:
    """Returns numbers rounded to float16."""
    return cast(x, _FLOAT16)


def divide_or_zero(numerator: float, x: jax.Array) -> jax.Array:
    """Returns numerator / x, or 0 where x is 0."""
    nonzero = x != 0
    safe = jnp.where(nonzero, x, np.float32(1))
    result = quotient(jnp.full(x.shape, numerator, jnp.float32), safe)
    return jnp.where(nonzero, result, np.float32(0))


def divided(x: jax.Array, divisor: float) -> jax.Array:
    """Returns x / divisor, correctly rounded."""
    return quotient(x, jnp.full(x.shape, divisor, jnp.float32))


def sub_blocks(x: jax.Array, length: int) -> jax.Array:
    """Divides blocks `[elements, blocks]` into sub-blocks `[length, parts, blocks]`."""
    return x.reshape(-1, length, x.shape[1]).swapaxes(0, 1)


def join_sub_blocks(x: jax.Array) -> jax.Array:
    """Joins sub-blocks `[length, parts, blocks]` to blocks `[elements, blocks]`."""
    return x.swapaxes(0, 1).reshape(-1, x.shape[2])


def mean_square(x: jax.Array, factor: float) -> jax.Array:
    """Returns the mean square of each block times a factor."""
    return sums(lambda v: (product(v, v),), x)[0] * np.float32(factor / x.shape[0])


def error_weights(weights: jax.Array | None, x: jax.Array, square: jax.Array | None) -> jax.Array:
    """Returns `weights * sqrt(square + x^2)`, by which ggml multiplies squared errors.

    Args:
      weights: the importance of each element.
      x: the elements.
      square: the mean square of each block, or of its row.
    """
    assert weights is not None
    assert square is not None
    return product(weights, square_root(square[None] + product(x, x)))
