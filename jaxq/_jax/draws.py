"""Random bits and keys identical to those of `jax.random`, in a form that is fast in XLA on CPU.

`jax.random` uses Threefry, whose 20 rounds JAX emits as a loop on CPU: a dozen kernels, with
intermediate arrays of the result's size. Unrolled, the rounds fuse into the pass that uses them: a
stochastic quantizer takes a fifth of the time, needs no memory for bits, and its bits compile in an
eighth of the time. Keys of other generators are passed to `jax.random` itself.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import described
from jaxq._base.shapes import holds
from jaxq._jax.opaque import opaque

__all__ = ["bits", "checked_key", "fold_in", "one_of", "split"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def checked_key(owner: str, key: Any) -> Any:
    """Returns the argument `key` of a function, after checking that it is None or one random key.

    Raises:
      TypeError: if it is something else, such as a seed.
      ValueError: if it is an array of keys.

    Example:
      >>> checked_key("fake_quant", 0)
      Traceback (most recent call last):
      ...
      TypeError: fake_quant: `key` must be a random key, got 0. Pass jax.random.key(seed).
    """
    dtype = getattr(key, "dtype", None)
    if key is None:
        return None
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and (dtype != np.uint32 or not np.ndim(key)):
        raise TypeError(
            f"{owner}: `key` must be a random key, got {described(key)}. Pass jax.random.key(seed)."
        )
    if np.ndim(key) != (0 if is_typed else 1):
        raise ValueError(
            f"{owner}: `key` must be one random key, got an array of shape {np.shape(key)}. Pass "
            "one of its keys, or map over them with jax.vmap."
        )
    return key


def bits(key: jax.typing.ArrayLike, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the result of `jax.random.bits`, for unsigned integers of at most 32 bits."""
    key = _typed(key)
    if key.ndim:
        raise ValueError(
            f"`key` must be one random key, got an array of shape {key.shape}. Pass one of its "
            "keys, or map over them with jax.vmap."
        )
    if not _written_out(key) or not holds(lambda: math.prod(shape) < 2**32):
        return jax.random.bits(key, shape, dtype)
    return opaque(functools.partial(_bits, shape), jax.random.key_data(key)).astype(dtype)


def split(keys: jax.Array, count: int) -> jax.Array:
    """Splits each key as `jax.random.split` does, along a new last axis."""
    keys = _typed(keys)
    if not _written_out(keys):
        return _each(lambda key: jax.random.split(key, count), keys)
    # JAX's `arange` would be a kernel of its own.
    numbers = jnp.asarray(np.arange(count, dtype=np.uint32))
    return _keys(jax.random.key_data(keys)[..., None, :], numbers)


def fold_in(keys: jax.Array, numbers: Any) -> jax.Array:
    """Folds each number into one key, or one number into each key, as `jax.random.fold_in` does."""
    keys, numbers = _typed(keys), jnp.asarray(numbers)
    if not _written_out(keys):
        return _each(lambda key: _each(lambda n: jax.random.fold_in(key, n), numbers), keys)
    return _keys(jax.random.key_data(keys), numbers)


def one_of(keys: jax.Array, i: int | jax.Array) -> Any:
    """Returns `keys[i]` for a position on the first axis, a number or a uint32 scalar."""
    if isinstance(i, int):
        return lax.index_in_dim(keys, i, keepdims=False)
    return lax.dynamic_index_in_dim(keys, i, keepdims=False)


def _typed(key: Any) -> jax.Array:
    """Converts a raw key to a typed key, and returns typed keys unchanged."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype != jnp.uint32 or not key.ndim:
        got = type(key).__name__ if dtype is None else f"{dtype} of shape {key.shape}"
        raise TypeError(f"`key` must be a random key, got {got}. Pass jax.random.key(seed).")
    return jax.random.wrap_key_data(key)


def _written_out(key: jax.Array) -> bool:
    """Returns whether this module computes the bits of a key.

    True for Threefry keys if JAX uses its default, partitionable counters.
    """
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
    # A sum combines the words in pairs, because XLA would compile the cipher twice for the two
    # operands of a concatenation, and again in each program part that reads a selection.
    shape = (*jnp.broadcast_shapes(data.shape[:-1], numbers.shape), 2, 2)
    words = [jnp.broadcast_to(data[..., i, None, None], shape) for i in range(2)]
    words = _cipher(words, jnp.broadcast_to(numbers[..., None, None], shape) + words[1])
    masks = (np.outer(row, row) * np.uint32(2**32 - 1) for row in np.eye(2, dtype=np.uint32))
    masked = (
        lax.bitwise_and(w, jnp.broadcast_to(m, shape)) for w, m in zip(words, masks, strict=True)
    )
    return jnp.sum(lax.bitwise_or(*masked), axis=-1, dtype=jnp.uint32)


def _bits(shape: tuple[int, ...], data: jax.Array) -> jax.Array:
    # XLA on CPU would compile a kernel for the positions in an array of several axes. On several
    # devices an axis may be sharded, so the array keeps its shape.
    used = (math.prod(shape),) if jax.device_count() == 1 else shape
    words = [jnp.broadcast_to(data[i], used) for i in range(2)]
    return lax.bitwise_xor(*_cipher(words, _places(used) + words[1])).reshape(shape)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Returns the positions of the elements in a flattened array."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        if n > 1:
            stride = np.uint32(math.prod(shape[axis + 1 :]))
            places = places + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return places


def _cipher(words: Sequence[jax.Array], second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the Threefry-2x32 cipher with 20 rounds for counters `(0, number)`.

    Args:
      words: the two words of the keys.
      second: the numbers plus the second words.

    References:
      Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
    """

    def spread(x: int) -> jax.Array:
        return jnp.broadcast_to(np.uint32(x), second.shape)

    keys = [*words, lax.bitwise_xor(lax.bitwise_xor(*words), spread(0x1BD11BDA))]
    # Each rotation distance is emitted once, since compile time grows with the size of the program.
    distances = {n: (spread(n), spread(32 - n)) for group in _ROTATIONS for n in group}
    first = keys[0]
    for i in range(5):
        for n in _ROTATIONS[i % 2]:
            left, right = distances[n]
            first = lax.add(first, second)
            parts = lax.shift_left(second, left), lax.shift_right_logical(second, right)
            second = lax.bitwise_xor(first, lax.bitwise_or(*parts))
        first = lax.add(first, keys[(i + 1) % 3])
        second = lax.add(lax.add(second, keys[(i + 2) % 3]), spread(i + 1))
    return first, second
