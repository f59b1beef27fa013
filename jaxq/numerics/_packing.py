"""Packing of codes into bytes."""

import functools
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import array, integer
from jaxq._base.bits import where
from jaxq._base.shapes import is_symbolic
from jaxq._jax.barriers import barrier_on_cpu, computed_once
from jaxq._jax.opaque import opaque
from jaxq.numerics._codecs import unsigned

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
    codes = unsigned("pack", "codes", codes)
    bits = _check_packing("pack", "codes", codes, bits)
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
    remedy = "Pass the result of jaxq.numerics.pack."
    packed = array("unpack", "packed", packed, "uint8", remedy)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"unpack: `packed` must be uint8, got {packed.dtype}. {remedy}")
    bits = _check_packing("unpack", "packed", packed, bits)
    if not jax.export.is_symbolic_dim(n):
        n = integer("unpack", "n", n, "Pass the number of codes along the last axis.", least=0)
    size = packed.shape[-1]
    if size != -(-n * bits // 8):
        raise ValueError(
            f"unpack: the last axis of `packed` must have {-(-n * bits // 8)} bytes for {n} codes "
            f"of {bits} bits, got {size}. Pass the number and the width of the packed codes."
        )
    return _unpacked(packed, bits, n)


@functools.partial(jax.jit, static_argnames=("bits", "n"))
def _unpacked(packed: jax.Array, bits: int, n: int) -> jax.Array:
    return opaque(functools.partial(_unpacked_codes, bits, n), packed)


def _unpacked_codes(bits: int, n: int, packed: jax.Array) -> jax.Array:
    *leading, size = packed.shape
    if bits == 8:
        return packed
    if bits == 16:
        return lax.bitcast_convert_type(packed.reshape(*leading, n, 2), jnp.uint16)
    if 8 % bits == 0:
        # XLA on CPU (JAX 0.12) would unpack several times as slowly while it cuts the bytes out of
        # an array in a loop.
        words = barrier_on_cpu(packed)
        width = 1 if is_symbolic(size) else math.gcd(size, 4)  # Bytes per word.
        if width > 1:
            words = words.reshape(*leading, size // width, width)
            words = lax.bitcast_convert_type(words, f"uint{8 * width}")
        codes = _codes([words.astype(jnp.uint32)], 8 * width // bits, bits)
    else:  # Eight codes fill whole bytes. Each word has all bits of some of them.
        groups = -(-n // 8)
        padding = [(0, 0, 0)] * len(leading) + [(0, groups * bits - size, 0)]
        rows = lax.pad(computed_once(packed), np.uint8(0), padding)
        rows = rows.reshape(*leading, groups, bits)
        per_word = _codes_per_word(bits)
        firsts = range(0, 8 * bits, per_word * bits)
        words = [_word(rows, first, per_word * bits) for first in firsts]
        codes = _codes(words, per_word, bits)
    codes = codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16)
    return codes.reshape(*leading, math.prod(codes.shape[len(leading) :]))[..., :n]


def _codes_per_word(bits: int) -> int:
    """Returns the number of codes of which four bytes hold all bits, a divisor of 8."""
    return max(
        count
        for count in (1, 2, 4, 8)
        if all(first % 8 + count * bits <= 32 for first in range(0, 8 * bits, count * bits))
    )


def _word(rows: jax.Array, first: int, length: int) -> jax.Array:
    """Returns `length` bits of each row of bytes, from bit `first` on, with other bits above."""
    start, stop = first // 8, -(-(first + length) // 8)
    parts = (
        rows[..., i].astype(jnp.uint32) << np.uint32(8 * (i - start)) for i in range(start, stop)
    )
    return functools.reduce(lax.bitwise_or, parts) >> np.uint32(first % 8)


def _codes(words: list[jax.Array], per_word: int, bits: int) -> jax.Array:
    """Returns the codes in a group of words along a new last axis.

    Args:
      words: the words of all groups: the first ones, the second ones and so on.
      per_word: the number of codes in a word, a power of two.
      bits: the width of a code. The first code has the lowest bits.
    """
    count = len(words) * per_word
    shape = (*words[0].shape, count)
    word, *others = (jnp.broadcast_to(w[..., None], shape) for w in words)
    # Adding multiples of the count changes nothing, but without them XLA on CPU would move the
    # distances out of a loop, and not vectorize the code that reads them (JAX 0.10 and 0.12).
    index = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) + word * np.uint32(count)
    index = index & np.uint32(count - 1)
    for i, other in enumerate(others, 1):
        word = where(index >= np.uint32(i * per_word), other, word)
    distances = (index & np.uint32(per_word - 1)) * np.uint32(bits)
    return word >> distances & np.uint32(2**bits - 1)


def _check_packing(name: str, argument: str, codes: jax.Array, bits: int) -> int:
    """Returns the number of bits; raises an error if it is out of range or there is no axis."""
    bits = integer(name, "bits", bits, "Use the format's `bits`.", least=1, most=16)
    if codes.ndim == 0:
        raise ValueError(
            f"{name}: `{argument}` must have an axis to pack along, got a scalar. Reshape it to "
            "(1,)."
        )
    return bits
