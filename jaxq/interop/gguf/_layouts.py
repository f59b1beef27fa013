"""The bytes of ggml's block types: their fields, and the values that they represent.

A layout cuts blocks of bytes into fields (`read`), joins fields to bytes (`write`), and computes
values from fields (`values`). All products of a scale and a code are float32 numbers, so values do
not depend on how a compiler fuses the arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax.arithmetic import materialize
from jaxq.formats import get_format
from jaxq.interop.gguf._bits import float16_bytes, float16_values, gather, spread

__all__ = [
    "LAYOUTS",
    "BlockType",
    "Fields",
    "join_scales_and_minima",
    "split_scales_and_minima",
]

Fields = Mapping[str, jax.Array]
Reader = Callable[[jax.Array], jax.Array]
Writer = Callable[[jax.Array], jax.Array]

_IQ4 = get_format("iq4").values  # Codes are in the order of their values.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # The values, doubled.


class Part(NamedTuple):
    """Consecutive bytes of a block: their number, and functions that read and write them."""

    size: int
    read: Reader
    write: Writer


class BlockType(NamedTuple):
    """A block type.

    Attributes:
      number: the number of the type in files, from the enumeration `ggml_type`.
      block: the number of elements in a block.
      parts: the fields of a block by name, in the order of their bytes.
      values: a function from the fields of blocks to their values, float32 `[blocks, block]`.
    """

    number: int
    block: int
    parts: Mapping[str, Part]
    values: Callable[[Fields], jax.Array]

    @property
    def size(self) -> int:
        """The number of bytes in a block."""
        return sum(part.size for part in self.parts.values())

    def split(self, data: jax.Array) -> Fields:
        """Returns the bytes of each field from blocks of bytes, uint8 `[blocks, size]`."""
        ends = np.cumsum([part.size for part in self.parts.values()]).tolist()
        return {
            name: data[:, end - part.size : end]
            for (name, part), end in zip(self.parts.items(), ends, strict=True)
        }

    def join(self, columns: Fields) -> jax.Array:
        """Returns blocks of bytes from the bytes of each field; the inverse of `split`."""
        return jnp.concatenate([columns[name] for name in self.parts], axis=-1)

    def read(self, data: jax.Array) -> Fields:
        """Returns the fields of blocks of bytes, uint8 `[blocks, size]`."""
        return {name: self.parts[name].read(part) for name, part in self.split(data).items()}

    def write(self, fields: Fields) -> jax.Array:
        """Returns the bytes of fields."""
        return self.join({name: part.write(fields[name]) for name, part in self.parts.items()})

    def values_of(self, fields: Fields) -> jax.Array:
        """Returns the values of the bytes of fields, whose factors become float16."""
        parts = {name: self.parts[name] for name in fields}
        return self.values(
            {
                n: part.read(part.write(fields[n])) if part is _FLOAT16 else fields[n]
                for n, part in parts.items()
            }
        )


def _bytes(size: int) -> Part:
    return Part(size, lambda data: data, lambda codes: codes)


def _signed(size: int) -> Part:
    def as_type(dtype: str) -> Reader:
        return lambda data: lax.bitcast_convert_type(data, jnp.dtype(dtype))

    return Part(size, as_type("int8"), as_type("uint8"))


def _codes(size: int, width: int, bits: int) -> Part:
    return Part(size, lambda d: spread(d, width, bits), lambda c: gather(c, width, bits))


_FLOAT16 = Part(2, float16_values, float16_bytes)


def _float(codes: jax.Array, offset: int = 0) -> jax.Array:
    """Returns codes as float32 numbers, less an offset."""
    return (codes.astype(jnp.int32) - np.int32(offset)).astype(jnp.float32)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Divides blocks `[blocks, elements]`, of which there may be none, into parts."""
    return x.reshape(x.shape[0], parts, x.shape[1] // parts)


def _scaled(scale: jax.Array, q: jax.Array) -> jax.Array:
    """Returns products of scales `[blocks, parts]` and numbers `[blocks, elements]`."""
    parts = _split(q, scale.shape[1])
    return (materialize(scale)[..., None] * parts).reshape(q.shape)


def _single_scale(offset: int, minimum: bool = False) -> Callable[[Fields], jax.Array]:
    """Returns the values of types with one scale (and one minimum) per block."""

    def values(f: Fields) -> jax.Array:
        q = f["q"] | f["high"] << np.uint8(4) if "high" in f else f["q"]
        y = f["d"][:, None] * _float(q, offset)
        return y + f["m"][:, None] if minimum else y

    return values


def split_scales_and_minima(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the 6-bit scales and minima of Q4_K and Q5_K from their 12 bytes."""
    low, middle, high = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    six, four, two = np.uint8(63), np.uint8(4), np.uint8(6)
    s = jnp.concatenate([low & six, high & np.uint8(15) | low >> two << four], axis=1)
    m = jnp.concatenate([middle & six, high >> four | middle >> two << four], axis=1)
    return s, m


def join_scales_and_minima(s: jax.Array, m: jax.Array) -> jax.Array:
    """Returns the 12 bytes of 6-bit scales and minima; the inverse of `split_scales_and_minima`."""
    four, two = np.uint8(4), np.uint8(6)
    low = s[:, :4] | s[:, 4:] >> four << two
    middle = m[:, :4] | m[:, 4:] >> four << two
    high = s[:, 4:] & np.uint8(15) | (m[:, 4:] & np.uint8(15)) << four
    return jnp.concatenate([low, middle, high], axis=1)


def _k_affine(f: Fields) -> jax.Array:
    s, m = split_scales_and_minima(f["scales"])
    q = f["q"] | f["high"] << np.uint8(4) if "high" in f else f["q"]
    low = materialize(f["m"][:, None] * _float(m))
    y = _scaled(f["d"][:, None] * _float(s), _float(q))
    return (_split(y, low.shape[1]) - low[..., None]).reshape(y.shape)


def _q2_k(f: Fields) -> jax.Array:
    s, m = f["scales"] & np.uint8(15), f["scales"] >> np.uint8(4)
    low = materialize(f["m"][:, None] * _float(m))
    y = _scaled(f["d"][:, None] * _float(s), _float(f["q"]))
    return (_split(y, low.shape[1]) - low[..., None]).reshape(y.shape)


def _q3_k(f: Fields) -> jax.Array:
    s = f["low"] | f["top"] << np.uint8(4)
    return _scaled(f["d"][:, None] * _float(s, 32), _float(f["q"] | f["high"] << np.uint8(2), 4))


def _q6_k(f: Fields) -> jax.Array:
    q = f["q"] | f["high"] << np.uint8(4)
    return _scaled(f["d"][:, None] * _float(f["scales"]), _float(q, 32))


def _table(levels: np.ndarray, codes: jax.Array) -> jax.Array:
    return jnp.asarray(levels.astype(np.float32))[codes]


def _iq4_nl(f: Fields) -> jax.Array:
    return f["d"][:, None] * _table(_IQ4, f["q"])


def _iq4_xs(f: Fields) -> jax.Array:
    s = f["low"] | f["top"] << np.uint8(4)
    return _scaled(f["d"][:, None] * _float(s, 32), _table(_IQ4, f["q"]))


def _ue4m3_half(code: jax.Array) -> jax.Array:
    """Returns half of an unsigned E4M3 number, the scale of the doubled elements of NVFP4."""
    e, m = code >> np.uint8(3) & np.uint8(15), code & np.uint8(7)
    small = _float(m) * np.float32(2**-10)
    bits = ((e.astype(jnp.int32) + np.int32(119)) << 23) | m.astype(jnp.int32) << 20
    value = jnp.where(e == 0, small, lax.bitcast_convert_type(bits, jnp.float32))
    return jnp.where(code == 0x7F, np.float32(0), value)


def _mxfp4(f: Fields) -> jax.Array:
    # The scale of the doubled elements is 2^(e - 128). XLA treats 2^-128 and 2^-127 as 0, so they
    # are applied as two factors. Only products below 2^-126 become 0.
    e = f["scales"].astype(jnp.int32)
    first, second = (
        lax.bitcast_convert_type(exponent << np.int32(23), jnp.float32)
        for exponent in (jnp.minimum(e, 2) + np.int32(125), jnp.maximum(e, 2) - np.int32(1))
    )
    return _scaled(second, _scaled(first, _table(_E2M1, f["q"])))


def _nvfp4(f: Fields) -> jax.Array:
    return _scaled(_ue4m3_half(f["scales"]), _table(_E2M1, f["q"]))


def _trits(size: int, width: int, count: int) -> Part:
    """Returns the reader and writer of a TQ1_0 field whose bytes hold `count` ternary digits."""
    powers = 3 ** np.arange(count, dtype=np.uint16).reshape(1, 1, -1, 1)

    def read(data: jax.Array) -> jax.Array:
        runs = _split(data, size // width)[:, :, None].astype(jnp.uint16)
        digits = (runs * powers & np.uint16(255)) * np.uint16(3) >> np.uint16(8)
        return digits.reshape(data.shape[0], size * count).astype(jnp.uint8)

    def write(codes: jax.Array) -> jax.Array:
        runs = codes.reshape(codes.shape[0], size // width, count, width).astype(jnp.uint32)
        weights = 3 ** (4 - np.arange(count, dtype=np.uint32)).reshape(1, 1, -1, 1)
        whole = (runs * weights).sum(axis=2, dtype=jnp.uint32)
        whole = (whole * np.uint32(256) + np.uint32(242)) // np.uint32(243)
        return whole.reshape(codes.shape[0], size).astype(jnp.uint8)

    return Part(size, read, write)


def _tq1_0(f: Fields) -> jax.Array:
    q = jnp.concatenate([f["q"], f["q16"], f["q4"]], axis=-1)
    return f["d"][:, None] * _float(q, 1)


LAYOUTS: dict[str, BlockType] = {
    "q4_0": BlockType(2, 32, {"d": _FLOAT16, "q": _codes(16, 16, 4)}, _single_scale(8)),
    "q4_1": BlockType(
        3, 32, {"d": _FLOAT16, "m": _FLOAT16, "q": _codes(16, 16, 4)}, _single_scale(0, True)
    ),
    "q5_0": BlockType(
        6, 32, {"d": _FLOAT16, "high": _codes(4, 1, 1), "q": _codes(16, 16, 4)}, _single_scale(16)
    ),
    "q5_1": BlockType(
        7,
        32,
        {"d": _FLOAT16, "m": _FLOAT16, "high": _codes(4, 1, 1), "q": _codes(16, 16, 4)},
        _single_scale(0, True),
    ),
    "q8_0": BlockType(8, 32, {"d": _FLOAT16, "q": _signed(32)}, _single_scale(0)),
    "q2_k": BlockType(
        10, 256, {"scales": _bytes(16), "q": _codes(64, 32, 2), "d": _FLOAT16, "m": _FLOAT16}, _q2_k
    ),
    "q3_k": BlockType(
        11,
        256,
        {
            "high": _codes(32, 32, 1),
            "q": _codes(64, 32, 2),
            "low": _codes(8, 8, 4),
            "top": _codes(4, 4, 2),
            "d": _FLOAT16,
        },
        _q3_k,
    ),
    "q4_k": BlockType(
        12,
        256,
        {"d": _FLOAT16, "m": _FLOAT16, "scales": _bytes(12), "q": _codes(128, 32, 4)},
        _k_affine,
    ),
    "q5_k": BlockType(
        13,
        256,
        {
            "d": _FLOAT16,
            "m": _FLOAT16,
            "scales": _bytes(12),
            "high": _codes(32, 32, 1),
            "q": _codes(128, 32, 4),
        },
        _k_affine,
    ),
    "q6_k": BlockType(
        14,
        256,
        {"q": _codes(128, 64, 4), "high": _codes(64, 32, 2), "scales": _signed(16), "d": _FLOAT16},
        _q6_k,
    ),
    "iq4_nl": BlockType(20, 32, {"d": _FLOAT16, "q": _codes(16, 16, 4)}, _iq4_nl),
    "iq4_xs": BlockType(
        23,
        256,
        {"d": _FLOAT16, "top": _codes(2, 1, 2), "low": _codes(4, 1, 4), "q": _codes(128, 16, 4)},
        _iq4_xs,
    ),
    "tq1_0": BlockType(
        34,
        256,
        {"q": _trits(32, 32, 5), "q16": _trits(16, 16, 5), "q4": _trits(4, 4, 4), "d": _FLOAT16},
        _tq1_0,
    ),
    "tq2_0": BlockType(35, 256, {"q": _codes(64, 32, 2), "d": _FLOAT16}, _single_scale(1)),
    "mxfp4": BlockType(39, 32, {"scales": _bytes(1), "q": _codes(16, 16, 4)}, _mxfp4),
    "nvfp4": BlockType(40, 64, {"scales": _bytes(4), "q": _codes(32, 8, 4)}, _nvfp4),
}
