"""Packing of codes into bytes."""

import functools
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.shapes import is_symbolic
from jaxq._jax.barriers import barrier_on_cpu

__all__ = ["pack", "unpack"]


def _groups(bits: int) -> tuple[int, int]:
    """Returns the smallest numbers (codes, bytes) such that the codes fill the bytes exactly."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def pack(codes: jax.typing.ArrayLike, bits: int) -> jax.Array:
    """Packs codes densely into bytes along the last axis, low bits first.

    The codes form one bit string, which starts with the lowest bit of the first code; byte i holds
    bits 8 i to 8 i + 7, lowest bit first. Two 4-bit codes thus share a byte with the first one in
    the low nibble, as in int4 of ml_dtypes, GGUF and most storage formats.

    Args:
      codes: unsigned integers below 2^bits, of shape `[..., n]`. Higher bits are dropped.
      bits: the width of a code, 1 to 16.

    Returns:
      A uint8 array of shape `[..., ceil(n bits / 8)]`. The unused high bits of the last byte are
      zero.

    Raises:
      TypeError: if the codes are not unsigned integers.
      ValueError: if `bits` is out of range or the codes have no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> pack(jnp.uint8([0x1, 0x2, 0x3]), bits=4).tolist()
      [33, 3]
    """
    codes = jnp.asarray(codes)
    _check_packing("pack", codes, bits)
    return _packed(codes, bits)


@functools.partial(jax.jit, static_argnames="bits")
def _packed(codes: jax.Array, bits: int) -> jax.Array:
    *leading, n = codes.shape
    per_group, group_bytes = _groups(bits)
    groups = -(-n // per_group)
    padding = [(0, 0, 0)] * len(leading) + [(0, groups * per_group - n, 0)]
    mask = 2 ** min(bits, 8 * codes.dtype.itemsize) - 1
    masked = jnp.bitwise_and(codes, codes.dtype.type(mask))
    wide = lax.pad(masked.astype(jnp.uint32), np.uint32(0), padding)
    # Codes are first combined into words of up to 32 bits. XLA on CPU (JAX 0.10 and 0.12)
    # vectorizes these sums and computes each code once; without them it computes a code again for
    # each byte that contains a part of it, which takes up to 16 times as long.
    per_word = max(
        count for count in range(1, per_group + 1) if per_group % count == 0 and count * bits <= 32
    )
    parts = wide.reshape(*leading, groups, per_group // per_word, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    shifts = shifts.reshape((1,) * (len(leading) + 1) + (-1,))
    words = {  # By the position of the first bit in the group.
        i * per_word * bits: jnp.sum(parts[..., i, :] << shifts, axis=-1, dtype=jnp.uint32)
        for i in range(per_group // per_word)
    }
    rows = []
    for start in range(0, 8 * group_bytes, 8):
        value = jnp.zeros((*leading, groups), jnp.uint32)
        for first, word in words.items():
            if first - 8 < start < first + per_word * bits:
                left, right = (np.uint32(max(k, 0)) for k in (first - start, start - first))
                value |= word << left >> right
        rows.append((value & np.uint32(255)).astype(jnp.uint8))
    packed = jnp.stack(rows, axis=-1).reshape(*leading, groups * group_bytes)
    return packed[..., : -(-n * bits // 8)]


def unpack(packed: jax.typing.ArrayLike, bits: int, n: int) -> jax.Array:
    """Unpacks the codes that `pack` packed into bytes.

    Args:
      packed: a uint8 array of shape `[..., ceil(n bits / 8)]`.
      bits: the width of a code, 1 to 16.
      n: the number of codes along the last axis.

    Returns:
      Codes of shape `[..., n]`, uint8 for at most 8 bits, else uint16.

    Raises:
      TypeError: if `packed` is not uint8.
      ValueError: if `bits` is out of range, or the last axis has another length.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(jnp.uint8([33, 3]), bits=4, n=3).tolist()
      [1, 2, 3]
    """
    packed = jnp.asarray(packed)
    _check_packing("unpack", packed, bits)
    size = packed.shape[-1]
    if packed.dtype != jnp.uint8:
        raise TypeError(
            f"unpack: `packed` must be uint8, got {packed.dtype}. Pass the result of "
            "jaxq.numerics.pack."
        )
    if size != -(-n * bits // 8):
        raise ValueError(
            f"unpack: the last axis of `packed` must have {-(-n * bits // 8)} bytes for {n} codes "
            f"of {bits} bits, got {size}."
        )
    return _unpacked(packed, bits, n)


@functools.partial(jax.jit, static_argnames=("bits", "n"))
def _unpacked(packed: jax.Array, bits: int, n: int) -> jax.Array:
    *leading, size = packed.shape
    per_group, group_bytes = _groups(bits)
    if bits == 8:
        return packed
    # XLA on CPU (JAX 0.12) would unpack several times as slowly while it cuts the bytes out of an
    # array in a loop.
    packed = barrier_on_cpu(packed)
    if group_bytes == 1:
        width = 1 if is_symbolic(size) else math.gcd(size, 4)  # Bytes per word.
        words = packed
        if width > 1:
            words = packed.reshape(*leading, size // width, width)
            words = lax.bitcast_convert_type(words, f"uint{8 * width}")
        codes = _shifted(words.astype(jnp.uint32), 8 * width // bits, bits)
        return codes.astype(jnp.uint8).reshape(*leading, size * per_group)[..., :n]
    groups = -(-n // per_group)
    padding = [(0, 0, 0)] * len(leading) + [(0, groups * group_bytes - size, 0)]
    wide = lax.pad(packed, np.uint8(0), padding).astype(jnp.uint32)
    # Bytes are first combined into words that hold several codes. XLA on CPU vectorizes this, but
    # not a separate expression for each code, which takes two to five times as long.
    per_word = _codes_per_word(bits)
    firsts = np.arange(0, per_group, per_word) * bits  # The position of each word's first bit.
    places = 8 * (np.arange(group_bytes) - firsts[:, None] // 8)
    weights = np.where((places >= 0) & (places < 32), 2.0 ** (places % 32), 0).astype(np.uint32)
    ones = (1,) * (len(leading) + 1)
    wide = wide.reshape(*leading, groups, 1, group_bytes) * weights.reshape(*ones, *weights.shape)
    words = jnp.sum(wide, axis=-1, dtype=jnp.uint32)
    words = words >> (firsts % 8).astype(np.uint32).reshape(*ones, -1)
    codes = _shifted(words, per_word, bits).astype(jnp.uint8 if bits <= 8 else jnp.uint16)
    return codes.reshape(*leading, groups * per_group)[..., :n]


def _shifted(words: jax.Array, count: int, bits: int) -> jax.Array:
    """Returns the codes in each word along a new last axis, given how many there are: 2^k."""
    shape = (*words.shape, count)
    words = jnp.broadcast_to(words[..., None], shape)
    # The multiple of the count changes nothing, but XLA on CPU would otherwise move the distances
    # out of a loop, and not vectorize the code that reads them (JAX 0.10 and 0.12).
    places = lax.broadcasted_iota(jnp.uint32, shape, words.ndim - 1) + words * np.uint32(count)
    distances = (places & np.uint32(count - 1)) * np.uint32(bits)
    return words >> distances & np.uint32(2**bits - 1)


def _codes_per_word(bits: int) -> int:
    """Returns the number of codes of which four bytes hold all bits, wherever the codes start."""
    per_group, _ = _groups(bits)
    return max(
        count
        for count in range(1, per_group + 1)
        if per_group % count == 0
        and all(i * bits % 8 + count * bits <= 32 for i in range(0, per_group, count))
    )


def _check_packing(name: str, array: jax.Array, bits: int) -> None:
    if not jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        raise TypeError(
            f"{name}: codes must be unsigned integers, got {array.dtype}. Convert them first, e.g. "
            "codes.astype(jnp.uint8)."
        )
    if not 1 <= bits <= 16:
        raise ValueError(f"{name}: `bits` must be 1 to 16, got {bits}. Use the format's `bits`.")
    if array.ndim == 0:
        raise ValueError(
            f"{name}: the array must have an axis to pack along, got a scalar. Reshape it to (1,)."
        )
