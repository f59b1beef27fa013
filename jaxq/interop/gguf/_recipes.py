"""Conversion of a `jaxq.Quantized` to and from the bytes of the block types that hold its recipe.

`_layouts.py` defines the bytes. Signed codes of fewer than 8 bits are stored as offsets from the
lowest value.
"""

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import array as as_array
from jaxq._base.registry import Registry
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.interop.gguf._bits import bytes_of, uint16_of
from jaxq.interop.gguf._float_types import FLOAT_TYPES, pack_floats, unpack_floats
from jaxq.interop.gguf._layouts import LAYOUTS, BlockType
from jaxq.interop.gguf._super_blocks import pack_super_blocks, unpack_super_blocks
from jaxq.numerics import pack as pack_bits
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe, get_recipe, title_of

__all__ = ["TYPES", "checked_bytes", "pack", "recipe_of", "unpack"]

TYPES: Registry[BlockType] = Registry(
    "GGUF type",
    LAYOUTS,
    {"q2_k_s": "q2_k", "q3_k_m": "q3_k", "q4_k_m": "q4_k", "q4_k_s": "q4_k", "q5_k_m": "q5_k"},
)

# The recipes of the types whose name is not that of their recipe.
_RECIPE_NAMES = {"tq1_0": "tq2_0", "mxfp4": "mxfp4_ggml", "nvfp4": "nvfp4_ggml"}
_RECIPES = {name: get_recipe(_RECIPE_NAMES.get(name, name)) for name in LAYOUTS}

# The types that hold the codes and scales of a recipe, the default one first.
_TYPES_BY_RECIPE: dict[Recipe, list[str]] = {}
for _name in sorted(LAYOUTS, key=lambda name: name in _RECIPE_NAMES):
    _TYPES_BY_RECIPE.setdefault(_RECIPES[_name], []).append(_name)
_TYPES_BY_RECIPE[get_recipe("mxfp4")] = ["mxfp4"]  # OCP's rule for the same scales.


def recipe_of(type: str) -> Recipe:
    """Returns the recipe by which ggml quantizes to a block type.

    The recipe has the name of the type, with three exceptions: `tq1_0` has the recipe `tq2_0`,
    because both types hold the same numbers; and `mxfp4` and `nvfp4` have the recipes `mxfp4_ggml`
    and `nvfp4_ggml`, because the recipes `mxfp4` and `nvfp4` are those of OCP and NVIDIA.

    Args:
      type: a name in `jaxq.interop.gguf.TYPES`.

    Returns:
      The recipe, whose blocks lie along the last axis.

    Raises:
      ValueError: if the type is unknown.

    Example:
      >>> from jaxq.recipes import RECIPES
      >>> [RECIPES.name_of(recipe_of(name)) for name in ("q4_k", "mxfp4", "nvfp4", "tq1_0")]
      ['q4_k', 'mxfp4_ggml', 'nvfp4_ggml', 'tq2_0']
    """
    TYPES.find(type)
    return _RECIPES[type]


def pack(q: Quantized, type: str | None = None) -> jax.Array:
    """Packs a quantized tensor into the bytes of a GGUF file.

    Args:
      q: a tensor `[..., n]` quantized by `jaxq.quantize` with the recipe of a block type (see
        `recipe_of`), or with `mxfp4`.
      type: the block type. Default: None, the type of the recipe; needed only for `tq1_0`.

    Returns:
      uint8 `[..., n / block · bytes per block]`.

    Raises:
      ValueError: if the type cannot hold the recipe, or its block does not divide the last axis.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> pack(jaxq.quantize(jnp.arange(-16.0, 16.0), "q4_0")).shape
      (18,)

    References:
      The `gguf` package's quants module and ggml's quants.c.
    """
    if q.recipe not in _TYPES_BY_RECIPE:
        raise ValueError(
            "gguf.pack: `q` must have the recipe of a block type, such as 'q4_k', got "
            f"{title_of(q.recipe):.60} with {q.recipe.granularity}. Quantize with "
            "gguf.recipe_of(type), for example 'nvfp4_ggml' for NVFP4, along the last axis; "
            "transpose kernels [inputs, outputs]."
        )
    names = _TYPES_BY_RECIPE[q.recipe]
    name = names[0] if type is None else type
    if name not in names:
        raise ValueError(
            f"gguf.pack: `type` must be one that holds {title_of(q.recipe)}: {', '.join(names)}, "
            f"got {type!r}. Omit it, or quantize with gguf.recipe_of(type)."
        )
    layout = LAYOUTS[name]
    if not q.shape or q.shape[-1] % layout.block:
        raise ValueError(
            f"gguf.pack: {layout.block} must divide the last axis, got shape {q.shape}. Pad that "
            "axis before quantization."
        )
    if name in FLOAT_TYPES:
        return pack_floats(q, name)
    if name in SUPER_BLOCK_RULES:
        return pack_super_blocks(q, name)
    codes = (q.unpack() + np.uint8(_offset(q.recipe))) & _mask(q.recipe)
    codes = codes.reshape(-1, layout.block)
    # The names of fields are those of ggml or start with them: d is the scale, m the minimum.
    columns = {"d": bytes_of(q.scale.reshape(-1))}
    if q.zero_point is not None:
        columns["m"] = bytes_of(q.zero_point.reshape(-1))
    if "high" in layout.parts:
        columns["high"] = layout.parts["high"].write(codes >> np.uint8(4))
        codes = codes & np.uint8(15)
    if q.recipe.element.bits == 8:
        columns["q"] = codes
    elif name == "tq1_0":
        ends = {"q": codes[:, :160], "q16": codes[:, 160:240], "q4": codes[:, 240:]}
        columns |= {field: layout.parts[field].write(part) for field, part in ends.items()}
    else:
        columns["q"] = layout.parts["q"].write(codes)
    data = layout.join(columns)
    return data.reshape(*q.shape[:-1], q.shape[-1] // layout.block * layout.size)


def unpack(
    data: jax.typing.ArrayLike, type: str, dtype: jax.typing.DTypeLike = jnp.float32
) -> Quantized:
    """Unpacks the bytes of a GGUF file into a quantized tensor.

    Args:
      data: uint8 `[..., blocks · bytes per block]`.
      type: the block type of the data, a name in `jaxq.interop.gguf.TYPES`.
      dtype: the dtype of the dequantized tensor; float32 by default.

    Returns:
      A tensor with the recipe `recipe_of(type)`, whose values are those of
      `jaxq.interop.gguf.dequantize`, and which `pack` packs to the same bytes. In MXFP4 and NVFP4,
      minus zero becomes zero, as in ggml. MXFP4 values beyond float32 become its largest number,
      and scales of NaN give NaN; in NVFP4 they give 0. Codes beyond 2 of `tq2_0`, which no
      quantizer writes, are not supported.

    Raises:
      ValueError: if the type is unknown, or the last axis does not hold whole blocks.
      TypeError: if the data are not uint8.

    Example:
      >>> import numpy as np
      >>> from jaxq.interop import gguf
      >>> block = np.array([0x00, 0x38, *range(32)], np.uint8)  # The float16 scale 0.5, 32 codes.
      >>> q = gguf.unpack(block, "q8_0")
      >>> q.dequantize().tolist()[:4]
      [0.0, 0.5, 1.0, 1.5]
    """
    layout, recipe = TYPES.find(type), recipe_of(type)
    data = checked_bytes("unpack", data, type)
    if type in FLOAT_TYPES:
        return unpack_floats(data, type, recipe, dtype)
    if type in SUPER_BLOCK_RULES:
        return unpack_super_blocks(data, type, recipe, dtype)
    bits = recipe.element.bits
    counts = (*data.shape[:-1], data.shape[-1] // layout.size)
    shape = (*counts[:-1], layout.block * counts[-1])
    columns = layout.split(data.reshape(-1, layout.size))
    names = [name for name in ("q", "q16", "q4") if name in columns]
    codes = [columns[n] if bits == 8 else layout.parts[n].read(columns[n]) for n in names]
    codes = jnp.concatenate(codes, axis=-1)
    if "high" in columns:
        codes = codes | (layout.parts["high"].read(columns["high"]) << np.uint8(4))
    codes = ((codes - np.uint8(_offset(recipe))) & _mask(recipe)).reshape(shape)
    if bits < 8:
        codes = pack_bits(codes, bits)
    scale = uint16_of(columns["d"]).reshape(counts)
    zero_point = uint16_of(columns["m"]).reshape(counts) if "m" in columns else None
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


def checked_bytes(name: str, data: jax.typing.ArrayLike, type: str) -> jax.Array:
    """Returns the bytes of whole blocks, or raises an error."""
    layout, remedy = TYPES.find(type), "Pass the raw bytes, for example TensorFile.raw(entry)."
    array = as_array(f"gguf.{name}", "data", data, "uint8", remedy)
    if array.dtype != jnp.uint8:
        raise TypeError(f"gguf.{name}: `data` must be uint8, got {array.dtype}. {remedy}")
    if not array.ndim or array.shape[-1] % layout.size:
        raise ValueError(
            f"gguf.{name}: a block of {type!r} has {layout.size} bytes, which must divide the last "
            f"axis, got shape {array.shape}. Pass the bytes of whole rows."
        )
    return array


def _offset(recipe: Recipe) -> int:
    """Returns the number that is added to signed codes of less than 8 bits, else 0."""
    return int(-recipe.element.min) if recipe.element.bits < 8 else 0


def _mask(recipe: Recipe) -> np.uint8:
    """Returns a mask of the width of a code."""
    return np.uint8(2**recipe.element.bits - 1)
