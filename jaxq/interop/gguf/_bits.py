"""Fields of ggml's blocks: codes of 1, 2 or 4 bits that are interleaved within bytes."""

import functools
import operator

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["bytes_of", "float16_bytes", "float16_values", "gather", "spread", "uint16_of"]


def spread(data: jax.Array, width: int, bits: int) -> jax.Array:
    """Returns the codes that are interleaved in bytes.

    Each group of `width` bytes holds 8 / bits runs of `width` codes: the first run in the lowest
    bits of the bytes, the next one in the bits above.

    Args:
      data: uint8 `[blocks, bytes]`.
      width: the number of bytes in a group.
      bits: the width of a code.

    Returns:
      uint8 `[blocks, 8 / bits · bytes]`.
    """
    runs, mask = data.reshape(data.shape[0], data.shape[1] // width, width), np.uint8(2**bits - 1)
    if bits == 4:
        # XLA on CPU (JAX 0.12) does not vectorize shifts by an array in a loop, and a stack of more
        # parts is slower than they are: see `benchmarks/serving.py`.
        codes = jnp.stack([runs & mask, runs >> np.uint8(4)], 2)
    else:
        codes = (
            runs[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None] & mask
        )
    return codes.reshape(data.shape[0], data.shape[1] * 8 // bits)


def gather(codes: jax.Array, width: int, bits: int) -> jax.Array:
    """Returns the bytes that hold codes; the inverse of `spread`."""
    size = codes.shape[1] * bits // 8
    runs = codes.reshape(codes.shape[0], size // width, 8 // bits, width)
    # Slices, because XLA on CPU computes a reduction over a middle axis less than half as fast.
    parts = [runs[:, :, i] << np.uint8(bits * i) for i in range(8 // bits)]
    return functools.reduce(operator.or_, parts).reshape(codes.shape[0], size)


def float16_bytes(x: jax.Array) -> jax.Array:
    """Returns float32 `[blocks]` as the bytes of float16 numbers, `[blocks, 2]`."""
    return bytes_of(lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16))


def float16_values(data: jax.Array) -> jax.Array:
    """Returns the values of float16 numbers from their bytes; the inverse of `float16_bytes`."""
    return lax.bitcast_convert_type(uint16_of(data), jnp.float16).astype(jnp.float32)


def bytes_of(codes: jax.Array) -> jax.Array:
    """Returns uint16 `[blocks]` as two bytes each, `[blocks, 2]`, the low byte first."""
    return jnp.stack([codes, codes >> np.uint16(8)], axis=-1).astype(jnp.uint8)


def uint16_of(data: jax.Array) -> jax.Array:
    """Returns uint16 from pairs of bytes; the inverse of `bytes_of`."""
    low, high = (data[..., i].astype(jnp.uint16) for i in (0, 1))
    return low | high << np.uint16(8)
