"""Random bits and keys identical to those of `jax.random`, in a form that is fast in XLA on CPU.

`jax.random` uses Threefry, whose 20 rounds JAX emits as a loop on CPU: a dozen kernels, with
intermediate arrays of the result's size. Unrolled, the rounds fuse into the pass that uses them: a
stochastic quantizer takes a fifth of the time, needs no memory for bits, and its bits compile in an
eighth of the time. Keys of other generators are passed to `jax.random` itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.shapes import holds
from jaxq._jax.opaque import opaque

__all__ = ["bits", "fold_in", "one_of", "split"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the result of `jax.random.bits`, for unsigned integers of at most 32 bits."""
    key = _typed(key)
    if not _written_out(key) or not holds(lambda: math.prod(shape) < 2**32):
        return jax.random.bits(key, shape, dtype)
    return opaque(functools.partial(_bits, shape), jax.random.key_data(key)).astype(dtype)


def split(keys: jax.Array, count: int) -> jax.Array:
    """Splits each key as `jax.random.split` does, along a new last axis."""
    keys = _typed(keys)
    if not _written_out(keys):
        return _each(lambda key: jax.random.split(key, count), keys)
    return _keys(jax.random.key_data(keys)[..., None, :], jnp.arange(count))


def fold_in(keys: jax.Array, numbers: Any) -> jax.Array:
    """Folds each number into one key, or one number into each key, as `jax.random.fold_in` does."""
    keys, numbers = _typed(keys), jnp.asarray(numbers)
    if not _written_out(keys):
        return _each(lambda key: _each(lambda n: jax.random.fold_in(key, n), numbers), keys)
    return _keys(jax.random.key_data(keys), numbers)


def one_of(keys: jax.Array, i: int) -> Any:
    """Returns `keys[i]`."""
    return lax.index_in_dim(keys, i, keepdims=False)


def _typed(key: jax.Array) -> jax.Array:
    """Converts a raw key to a typed key, and returns typed keys unchanged."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _written_out(key: jax.Array) -> bool:
    """Returns whether a key is a Threefry key and JAX uses its default, partitionable counters."""
    config: Any = jax.config
    return config.jax_threefry_partitionable and jax.random.key_impl(key) == "threefry2x32"


def _each(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Maps a function over elements one by one: some generators differ under `jax.vmap`."""
    if not x.ndim:
        return function(x)
    return jnp.stack([_each(function, one_of(x, i)) for i in range(len(x))])


def _keys(data: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns the keys derived from numbers and from keys, given as data with one more axis."""
    return jax.random.wrap_key_data(
        opaque(_pairs, data, numbers.astype(jnp.uint32)), impl="threefry2x32"
    )


def _pairs(data: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns the data of the keys that `_keys` returns."""
    return jnp.stack(_threefry(data, numbers), axis=-1)


def _bits(shape: tuple[int, ...], data: jax.Array) -> jax.Array:
    places = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        if n > 1:
            stride = np.uint32(math.prod(shape[axis + 1 :]))
            places = places + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    first, second = _threefry(data, places)
    return first ^ second


def _threefry(key: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the Threefry-2x32 cipher with 20 rounds for the counters `(0, number)`.

    References:
      Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    shape = jnp.broadcast_shapes(key.shape[:-1], numbers.shape)

    def spread(x: jax.Array | np.uint32) -> jax.Array:
        return jnp.broadcast_to(x, shape)

    keys = [spread(key[..., 0]), spread(key[..., 1])]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
    # Each rotation distance is emitted once, since compile time grows with the size of the program.
    distances = {
        n: (spread(np.uint32(n)), spread(np.uint32(32 - n))) for group in _ROTATIONS for n in group
    }
    first, second = keys[0], spread(numbers) + keys[1]
    for i in range(5):
        for n in _ROTATIONS[i % 2]:
            left, right = distances[n]
            first = lax.add(first, second)
            parts = lax.shift_left(second, left), lax.shift_right_logical(second, right)
            second = lax.bitwise_xor(first, lax.bitwise_or(*parts))
        first = first + keys[(i + 1) % 3]
        second = second + keys[(i + 2) % 3] + np.uint32(i + 1)
    return first, second
