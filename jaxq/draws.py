"""Random bits and keys as `jax.random` gives them, to the bit, in a form that XLA on CPU likes.

`jax.random` draws by Threefry, whose 20 rounds JAX writes as a loop on CPU: a dozen kernels, and
arrays of the result's size between them. Written out they join the pass that uses them: a
stochastic quantizer takes a fifth of the time, needs no memory for bits, and its bits compile in an
eighth of the time. Keys of other generators go to `jax.random` itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.sealed import sealed

__all__ = ["bits", "fold_in", "one_of", "split"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`jax.random.bits` for unsigned integers of at most 32 bits."""
    key = _typed(key)
    if not _written_out(key) or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, dtype)
    return sealed(functools.partial(_bits, shape), jax.random.key_data(key)).astype(dtype)


def split(keys: jax.Array, count: int) -> jax.Array:
    """`jax.random.split` of each key, along a new last axis."""
    keys = _typed(keys)
    if not _written_out(keys):
        return _each(lambda key: jax.random.split(key, count), keys)
    return _keys(jax.random.key_data(keys)[..., None, :], jnp.arange(count))


def fold_in(keys: jax.Array, numbers: Any) -> jax.Array:
    """`jax.random.fold_in` of each number into one key, or of one number into each key."""
    keys, numbers = _typed(keys), jnp.asarray(numbers)
    if not _written_out(keys):
        return _each(lambda key: _each(lambda n: jax.random.fold_in(key, n), numbers), keys)
    return _keys(jax.random.key_data(keys), numbers)


def one_of(keys: jax.Array, i: int) -> Any:
    """What stands at a place of the first axis."""
    return lax.index_in_dim(keys, i, keepdims=False)


def _typed(key: jax.Array) -> jax.Array:
    """A key, or the bare numbers of one."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _written_out(key: jax.Array) -> bool:
    """Whether a key is Threefry's, counted as JAX does unless it is told otherwise."""
    config: Any = jax.config
    return config.jax_threefry_partitionable and jax.random.key_impl(key) == "threefry2x32"


def _each(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A function of one number after the other: under `jax.vmap` some generators give others."""
    if not x.ndim:
        return function(x)
    return jnp.stack([_each(function, one_of(x, i)) for i in range(len(x))])


def _keys(data: jax.Array, numbers: jax.Array) -> jax.Array:
    """The keys with these numbers below others, whose data has one more axis, the last."""
    return jax.random.wrap_key_data(
        sealed(_pairs, data, numbers.astype(jnp.uint32)), impl="threefry2x32"
    )


def _pairs(data: jax.Array, numbers: jax.Array) -> jax.Array:
    """The data of those keys."""
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
    """The cipher Threefry-2x32 of 20 rounds, for the counters `(0, number)`.

    References:
      Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    shape = jnp.broadcast_shapes(key.shape[:-1], numbers.shape)

    def spread(x: jax.Array | np.uint32) -> jax.Array:
        return jnp.broadcast_to(x, shape)

    keys = [spread(key[..., 0]), spread(key[..., 1])]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
    # Each number of places is written once, as XLA's time depends on how much there is to read.
    turns = {
        n: (spread(np.uint32(n)), spread(np.uint32(32 - n))) for group in _ROTATIONS for n in group
    }
    first, second = keys[0], spread(numbers) + keys[1]
    for i in range(5):
        for n in _ROTATIONS[i % 2]:
            left, right = turns[n]
            first = lax.add(first, second)
            parts = lax.shift_left(second, left), lax.shift_right_logical(second, right)
            second = lax.bitwise_xor(first, lax.bitwise_or(*parts))
        first = first + keys[(i + 1) % 3]
        second = second + keys[(i + 2) % 3] + np.uint32(i + 1)
    return first, second
