"""Conversion of a `jaxq.Quantized` to and from the bytes of the block type that names its recipe.

The block types of the same names define the bytes (see `_layouts.py`). Signed codes of fewer than 8
bits are stored as offsets from the lowest code.
"""

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.interop.gguf._bits import bytes_of, halves_of
from jaxq.interop.gguf._layouts import LAYOUTS
from jaxq.interop.gguf._super_blocks import pack_super_blocks, unpack_super_blocks
from jaxq.numerics import pack as pack_bits
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe, get_recipe

__all__ = ["PACKED_RECIPES", "pack", "unpack"]

PACKED_RECIPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")

_TYPES = {get_recipe(name): name for name in (*PACKED_RECIPES, *SUPER_BLOCK_RULES)}


def pack(q: Quantized) -> jax.Array:
    """Packs a quantized tensor into the bytes of a GGUF file.

    Args:
      q: a tensor `[..., n]` quantized by `jaxq.quantize` with a recipe that has the name of a block
        type: `q8_0`, `q4_0`, `q4_1`, `q5_0`, `q5_1`, `q2_k` to `q6_k`, `iq4_nl` or `iq4_xs`.

    Returns:
      uint8 `[..., n / block · bytes per block]`.

    Raises:
      ValueError: the recipe is not supported, or its block does not divide the last axis.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> pack(jaxq.quantize(jnp.arange(-16.0, 16.0), "q4_0")).shape
      (18,)

    References:
      The `gguf` package's quants module and ggml's quants.c.
    """
    recipe, name = _checked("pack", q.recipe)
    layout = LAYOUTS[name]
    if not q.shape or q.shape[-1] % layout.block:
        raise ValueError(
            f"gguf.pack: {layout.block} must divide the last axis, got shape {q.shape}. Pad that "
            "axis before quantization."
        )
    if name in SUPER_BLOCK_RULES:
        return pack_super_blocks(q, name)
    codes = (q.unpack() ^ np.uint8(_bias(recipe))).reshape(-1, layout.block)
    columns = {"d": bytes_of(q.scale.reshape(-1))}
    if q.zero_point is not None:
        columns["m"] = bytes_of(q.zero_point.reshape(-1))
    if "high" in layout.parts:
        columns["high"] = layout.parts["high"].write(codes >> np.uint8(4))
    if recipe.element.bits < 8:
        codes = layout.parts["q"].write(codes & np.uint8(15))
    data = layout.join({**columns, "q": codes})
    return data.reshape(*q.shape[:-1], q.shape[-1] // layout.block * layout.size)


def unpack(
    data: jax.typing.ArrayLike, recipe: str | Recipe, dtype: jax.typing.DTypeLike = jnp.float32
) -> Quantized:
    """Unpacks the bytes of a GGUF file into a quantized tensor.

    Args:
      data: uint8 `[..., blocks · bytes per block]`.
      recipe: the recipe of the data, one of those that `pack` supports.
      dtype: the dtype of the dequantized tensor; float32 by default.

    Returns:
      A `Quantized` `[..., blocks · elements per block]`, whose values are those of
      `jaxq.interop.gguf.dequantize`.

    Raises:
      TypeError: the data are not uint8.
      ValueError: the recipe is not supported, or the last axis does not hold whole blocks.

    Example:
      >>> import numpy as np
      >>> from jaxq.interop import gguf
      >>> block = np.array([0x00, 0x38, *range(32)], np.uint8)  # The float16 scale 0.5, 32 codes.
      >>> q = gguf.unpack(block, "q8_0")
      >>> q.recipe.scale_format.name, hex(q.scale[0]), q.codes.tolist()[:4]
      ('float16', '0x3800', [0, 1, 2, 3])
    """
    recipe, name = _checked("unpack", get_recipe(recipe))
    layout = LAYOUTS[name]
    data, bits = jnp.asarray(data), recipe.element.bits
    if data.dtype != jnp.uint8:
        raise TypeError(
            f"gguf.unpack: `data` must be uint8, got {data.dtype}. Pass the raw bytes, for "
            "example TensorFile.raw(entry)."
        )
    if not data.ndim or data.shape[-1] % layout.size:
        raise ValueError(
            f"gguf.unpack: a block of {name!r} has {layout.size} bytes, which must divide the last "
            f"axis, got shape {data.shape}. Pass the bytes of whole rows."
        )
    if name in SUPER_BLOCK_RULES:
        return unpack_super_blocks(data, name, recipe, dtype)
    counts = (*data.shape[:-1], data.shape[-1] // layout.size)
    shape = (*counts[:-1], layout.block * counts[-1])
    columns = layout.split(data.reshape(-1, layout.size))
    codes = columns["q"] if bits == 8 else layout.parts["q"].read(columns["q"])
    if "high" in columns:
        codes = codes | layout.parts["high"].read(columns["high"]) << np.uint8(4)
    codes = (codes ^ np.uint8(_bias(recipe))).reshape(shape)
    if bits < 8:
        codes = pack_bits(codes, bits)
    scale = halves_of(columns["d"]).reshape(counts)
    zero_point = halves_of(columns["m"]).reshape(counts) if "m" in columns else None
    block = (1,) * (len(shape) - 1) + (min(layout.block, max(shape[-1], 1)),)
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


def _checked(name: str, recipe: Recipe) -> tuple[Recipe, str]:
    """Returns the recipe and the name of its block type, or raises an error if it has none."""
    if recipe not in _TYPES:
        raise ValueError(
            f"gguf.{name}: `recipe` must be one of {', '.join(_TYPES.values())}, got "
            f"{recipe.element.name} with {recipe.granularity}. Blocks must lie along the last "
            "axis; transpose kernels [inputs, outputs]."
        )
    return recipe, _TYPES[recipe]


def _bias(recipe: Recipe) -> int:
    """Returns the sign bit, whose flip makes signed codes offsets from the lowest value, or 0."""
    bits = recipe.element.bits
    return 1 << (bits - 1) if recipe.element.min < 0 and bits < 8 else 0
