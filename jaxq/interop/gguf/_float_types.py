"""Blocks of 4-bit floats, MXFP4 and NVFP4: their fields, and tensors of their recipes as bytes."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.blocks import FloatBlocks, join_sub_blocks, sub_blocks
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.interop.gguf._blocks import as_bytes
from jaxq.interop.gguf._layouts import LAYOUTS, Fields
from jaxq.numerics import encode
from jaxq.numerics import pack as pack_bits
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe

__all__ = ["FLOAT_TYPES", "pack_floats", "unpack_floats"]

_MINUS_ZERO = np.uint8(8)


def _fields(name: str, blocks: FloatBlocks) -> Fields:
    """Returns the fields of MXFP4 or NVFP4, as ggml quantizes them."""
    rule = SUPER_BLOCK_RULES[f"{name}_ggml"]
    result = rule.search(FloatBlocks(sub_blocks(blocks.x, rule.size)))
    scales = encode(result.d, rule.scale_format).T
    return {"scales": scales, "q": as_bytes(join_sub_blocks(result.codes.T).T)}


FLOAT_TYPES: dict[str, Callable[[FloatBlocks], Fields]] = {
    name: functools.partial(_fields, name) for name in ("mxfp4", "nvfp4")
}


def pack_floats(q: Quantized, name: str) -> jax.Array:
    """Returns the bytes of a quantized tensor whose blocks lie along the last axis."""
    layout = LAYOUTS[name]
    scales = q.scale.reshape(-1, layout.parts["scales"].size)
    data = layout.write({"scales": scales, "q": q.unpack().reshape(-1, layout.block)})
    return data.reshape(*q.shape[:-1], q.shape[-1] // layout.block * layout.size)


def unpack_floats(
    data: jax.Array, name: str, recipe: Recipe, dtype: jax.typing.DTypeLike
) -> Quantized:
    """Returns the quantized tensor that the bytes of whole blocks represent."""
    layout = LAYOUTS[name]
    *leading, count = (*data.shape[:-1], data.shape[-1] // layout.size)
    fields, length = layout.read(data.reshape(-1, layout.size)), count * layout.block
    codes, scales = fields["q"], fields["scales"]
    codes = jnp.where(codes == _MINUS_ZERO, np.uint8(0), codes)
    if name == "nvfp4":  # ggml ignores a scale's sign, and reads NaN as 0.
        scales = scales & np.uint8(127)
        scales = jnp.where(scales == 127, np.uint8(0), scales)
    part = layout.block // layout.parts["scales"].size
    return Quantized(
        codes=pack_bits(codes.reshape(*leading, length), recipe.element.bits),
        scale=scales.reshape(*leading, length // part),
        second=(),
        zero_point=None,
        outliers=(),
        recipe=recipe,
        dtype=jnp.dtype(dtype),
        block=(*(1,) * len(leading), part if length else 1),
        length=length,
    )
