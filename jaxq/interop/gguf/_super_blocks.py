"""Conversion between quantized tensors with the scaling `SuperBlocks` and the bytes of GGUF."""

import jax
from jax import numpy as jnp

from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.formats import CodebookFormat, Format
from jaxq.interop.gguf._bits import bytes_of, uint16_of
from jaxq.interop.gguf._k_types import Integers, fields_of, integers_of
from jaxq.interop.gguf._layouts import LAYOUTS
from jaxq.numerics import decode, encode
from jaxq.numerics import pack as pack_bits
from jaxq.numerics import unpack as unpack_bits
from jaxq.quantizers import WHOLE_BYTES, Quantized
from jaxq.recipes import Recipe

__all__ = ["pack_super_blocks", "unpack_super_blocks"]

_FACTORS = ("d", "m")


def pack_super_blocks(q: Quantized, name: str) -> jax.Array:
    """Returns the bytes of a quantized tensor whose blocks lie along the last axis."""
    layout, recipe = LAYOUTS[name], q.recipe

    def integers(codes: jax.Array) -> jax.Array:
        """Returns the integers for stored scales, one row per super-block."""
        fmt = recipe.scale_format
        if fmt.bits not in WHOLE_BYTES:
            codes = unpack_bits(codes, fmt.bits, codes.shape[-1] * 8 // fmt.bits)
        return decode(codes, fmt).astype(jnp.int32).reshape(-1, recipe.scaling.blocks_per_run)

    codes = q.unpack()
    if not isinstance(recipe.element, CodebookFormat):
        codes = decode(codes, recipe.element).astype(jnp.int32)
    scales = integers(q.scale) if q.second else None
    minima = None if q.zero_point is None else integers(q.zero_point)
    fields = fields_of(name, Integers(scales, codes.reshape(-1, layout.block), minima))
    columns = {field: layout.parts[field].write(x) for field, x in fields.items()}
    factors = [bytes_of(factor.reshape(-1)) for factor in q.second or (q.scale,)]
    data = layout.join({**columns, **dict(zip(_FACTORS, factors, strict=False))})
    return data.reshape(*q.shape[:-1], q.shape[-1] // layout.block * layout.size)


def unpack_super_blocks(
    data: jax.Array, name: str, recipe: Recipe, dtype: jax.typing.DTypeLike
) -> Quantized:
    """Returns the quantized tensor that the bytes of complete super-blocks represent."""
    layout = LAYOUTS[name]
    *leading, count = (*data.shape[:-1], data.shape[-1] // layout.size)
    columns = layout.split(data.reshape(-1, layout.size))
    factors = tuple(
        uint16_of(columns[f]).reshape(*leading, count) for f in _FACTORS if f in columns
    )
    fields = {n: layout.parts[n].read(x) for n, x in columns.items() if n not in _FACTORS}
    integers = integers_of(name, fields)

    def encoded(values: jax.Array, fmt: Format) -> jax.Array:
        """Returns integers of super-blocks as stored codes."""
        shape = (*leading, count * values.shape[1])
        codes = values
        if not isinstance(fmt, CodebookFormat):
            codes = encode(values.astype(jnp.float32), fmt)
        codes = codes.reshape(shape)
        return codes if fmt.bits in WHOLE_BYTES else pack_bits(codes, fmt.bits)

    length, fmt, minima = count * layout.block, recipe.scale_format, integers.minima
    last = SUPER_BLOCK_RULES[name].length if length else 1
    return Quantized(
        codes=encoded(integers.codes, recipe.element),
        scale=factors[0] if integers.scales is None else encoded(integers.scales, fmt),
        second=() if integers.scales is None else factors,
        zero_point=None if minima is None else encoded(minima, fmt),
        outliers=(),
        recipe=recipe,
        dtype=jnp.dtype(dtype),
        block=(*(1,) * len(leading), last),
        length=length,
    )
