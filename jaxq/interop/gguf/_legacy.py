"""The GGUF byte layout of the block formats `q8_0`, `q4_0`, `q4_1`, `q5_0` and `q5_1`.

A block of 32 elements is stored as its float16 scale, its float16 minimum (`_1` types only), the
fifth bits of 5-bit codes (four bytes, the first element in the lowest bit), and the low nibbles:
byte i holds those of elements i and i + 16. 8-bit codes are stored as plain bytes. Narrower signed
codes are stored as offsets from their lowest value.
"""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.numerics import pack as pack_bits
from jaxq.numerics import unpack as unpack_bits
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe, get_recipe

__all__ = ["pack", "unpack"]

RECIPES = tuple(get_recipe(name) for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"))

_BLOCK = 32


def pack(q: Quantized) -> jax.Array:
    """Packs a quantized tensor into the bytes of a GGUF file.

    Args:
      q: a tensor `[..., n]` quantized by `jaxq.quantize` with one of the recipes above.

    Returns:
      uint8 `[..., n / 32 · bytes per block]`.

    Raises:
      ValueError: the recipe is not supported, or 32 does not divide the last axis.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> pack(jaxq.quantize(jnp.arange(-16.0, 16.0), "q4_0")).shape
      (18,)

    References:
      The `gguf` package's quants module and ggml's quants.c.
    """
    recipe, bits = _checked("pack", q.recipe)
    if not q.shape or q.shape[-1] % _BLOCK:
        raise ValueError(f"gguf.pack: 32 must divide the last axis, got shape {q.shape}.")
    codes = q.unpack() ^ np.uint8(_bias(recipe))
    leading, blocks = q.shape[:-1], q.shape[-1] // _BLOCK
    codes = codes.reshape(*leading, blocks, _BLOCK)
    parts = [_halves(q.scale)]
    if q.zero_point is not None:
        parts.append(_halves(q.zero_point))
    if bits == 5:
        parts.append(pack_bits(codes >> np.uint8(4), 1))
    if bits < 8:
        low = codes & np.uint8(15)
        codes = low[..., : _BLOCK // 2] | low[..., _BLOCK // 2 :] << np.uint8(4)
    data = jnp.concatenate([*parts, codes], axis=-1)
    return data.reshape(*leading, blocks * data.shape[-1])


def unpack(
    data: jax.typing.ArrayLike, recipe: str | Recipe, dtype: jax.typing.DTypeLike = jnp.float32
) -> Quantized:
    """Unpacks the bytes of a GGUF file into a quantized tensor.

    Args:
      data: uint8 `[..., blocks · bytes per block]`.
      recipe: the recipe of the data, one of those above.
      dtype: the dtype of the dequantized tensor; float32 by default.

    Returns:
      A `Quantized` `[..., 32 · blocks]`.

    Raises:
      TypeError: the data are not uint8.
      ValueError: the recipe is not supported, or the last axis does not hold whole blocks.
    """
    recipe, bits = _checked("unpack", get_recipe(recipe))
    data = jnp.asarray(data)
    minimum = recipe.scaling.zero_point == "minimum"
    size = 2 + 2 * minimum + bits * _BLOCK // 8
    if data.dtype != jnp.uint8:
        raise TypeError(f"gguf.unpack: `data` must be uint8, got {data.dtype}.")
    if not data.ndim or data.shape[-1] % size:
        raise ValueError(
            f"gguf.unpack: a block of these has {size} bytes, which must divide the last axis, got "
            f"shape {data.shape}."
        )
    blocks = data.reshape(*data.shape[:-1], data.shape[-1] // size, size)
    scale, blocks = _whole(blocks[..., :2]), blocks[..., 2:]
    zero_point = None
    if minimum:
        zero_point, blocks = _whole(blocks[..., :2]), blocks[..., 2:]
    fifth = unpack_bits(blocks[..., :4], 1, _BLOCK) << np.uint8(4) if bits == 5 else np.uint8(0)
    codes = blocks[..., 4 * (bits == 5) :]
    if bits < 8:
        codes = jnp.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
    codes = (codes | fifth) ^ np.uint8(_bias(recipe))
    shape = (*data.shape[:-1], _BLOCK * blocks.shape[-2])
    codes = codes.reshape(shape)
    if bits < 8:
        codes = pack_bits(codes, bits)
    block = (1,) * (len(shape) - 1) + (min(_BLOCK, max(shape[-1], 1)),)
    return Quantized(
        codes=codes,
        scale=scale,
        second=(),
        zero_point=zero_point,
        outliers=(),
        recipe=recipe,
        dtype=jnp.dtype(dtype),
        block=block,
        length=shape[-1],
    )


def _checked(name: str, recipe: Recipe) -> tuple[Recipe, int]:
    if recipe not in RECIPES:
        raise ValueError(
            f"gguf.{name}: `recipe` must be one of q8_0, q4_0, q4_1, q5_0, q5_1, got "
            f"{recipe.element.name} with {recipe.granularity}. Blocks must lie along the last "
            "axis; transpose kernels [inputs, outputs]."
        )
    return recipe, recipe.element.bits


def _bias(recipe: Recipe) -> int:
    """Returns the sign bit, whose flip makes signed codes offsets from the lowest value, or 0."""
    bits = recipe.element.bits
    return 1 << (bits - 1) if recipe.element.min < 0 and bits < 8 else 0


def _halves(codes: jax.Array) -> jax.Array:
    """Splits 16-bit codes into two bytes each, the low byte first."""
    return jnp.stack([codes, codes >> np.uint16(8)], axis=-1).astype(jnp.uint8)


def _whole(data: jax.Array) -> jax.Array:
    """Joins pairs of bytes into 16-bit codes; the inverse of `_halves`."""
    low, high = (lax.index_in_dim(data, i, -1, keepdims=False).astype(jnp.uint16) for i in (0, 1))
    return low | high << np.uint16(8)
