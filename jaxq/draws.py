"""Random bits and keys as `jax.random` gives them, to the bit, in a form that XLA on CPU likes.

`jax.random` draws by Threefry, whose 20 rounds JAX writes as a loop on CPU: a dozen kernels, and
arrays of the result's size between them. Written out they are a few operations on each element,
which join the pass that uses them, and compile in an eighth of the time. Keys of other generators
go to `jax.random` itself.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["bits", "fold_in", "split"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`jax.random.bits` for unsigned integers of at most 32 bits."""
    if not _written_out(key) or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, dtype)
    return _bits(jax.random.key_data(key), shape).astype(dtype)


def split(key: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """`jax.random.split`, its keys one by one."""
    if not _written_out(key):
        return tuple(jax.random.split(key, count))
    return tuple(_wrapped(data, key) for data in _split(jax.random.key_data(key), count))


def fold_in(key: jax.Array, number: Any) -> jax.Array:
    """`jax.random.fold_in`."""
    if not _written_out(key):
        return jax.random.fold_in(key, number)
    number = lax.convert_element_type(number, jnp.uint32)
    return _wrapped(_fold_in(jax.random.key_data(key), number), key)


def _written_out(key: jax.Array) -> bool:
    """Whether a key is Threefry's, counted as JAX does unless it is told otherwise."""
    return jax.config.jax_threefry_partitionable and jax.random.key_impl(key) == "threefry2x32"


def _wrapped(data: jax.Array, like: jax.Array) -> jax.Array:
    """A key in the form of another: typed, or its bare numbers."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


@functools.partial(jax.jit, static_argnums=1)
def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        place = place + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    first, second = _threefry(key, place)
    return first ^ second


@functools.partial(jax.jit, static_argnums=1)
def _split(key: jax.Array, count: int) -> list[jax.Array]:
    pairs = _pairs(key, lax.iota(jnp.uint32, count))
    return [lax.index_in_dim(pairs, i, keepdims=False) for i in range(count)]


@jax.jit
def _fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    return _pairs(key, number)


def _pairs(key: jax.Array, number: jax.Array) -> jax.Array:
    """The numbers of keys, computed once: XLA on CPU would do it anew in each pass that draws."""
    return lax.optimization_barrier(jnp.stack(_threefry(key, number), axis=-1))


def _threefry(key: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cipher Threefry-2x32 of 20 rounds, for the counters `(0, low)`.

    References:
      Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    first, second = (lax.index_in_dim(key, i, keepdims=False) for i in range(2))
    third = first ^ second ^ np.uint32(0x1BD11BDA)
    keys = [lax.broadcast(k, low.shape) for k in (first, second, third)]
    high, low = keys[0], low + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            high = high + low
            left = lax.shift_left(low, lax.full_like(low, rotation))
            right = lax.shift_right_logical(low, lax.full_like(low, 32 - rotation))
            low = high ^ (left | right)
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high, low
