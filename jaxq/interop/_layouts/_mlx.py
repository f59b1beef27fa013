"""The layouts of MLX: codes in uint32 words, with scales and biases per group.

References:
  MLX's `quantize` and mlx-lm's `config.json`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.interop._entries import FileError
from jaxq.interop._layouts._bits import as_bytes, unpack_bits
from jaxq.interop._layouts._weights import (
    SCALE_FORMATS,
    Arrays,
    Source,
    StoredWeight,
    build_quantized,
    fail,
    minimum_recipe,
    require_shape,
)
from jaxq.quantizers import Quantized
from jaxq.recipes import PerBlock, Recipe, Symmetric, get_recipe

__all__ = ["mlx"]

_BITS = (2, 3, 4, 5, 6, 8)
_FLOATS = {
    "mxfp4": get_recipe("mxfp4"),
    "mxfp8": get_recipe("mxfp8_e4m3"),
    "nvfp4": Recipe("float4_e2m1fn", PerBlock(16), Symmetric(scale_format="float8_e4m3fn")),
}


def mlx(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of MLX, by name.

    Raises:
      FileError: if the checkpoint has an unknown mode, or tensors that do not fit together.
    """
    result = {}
    for module, _ in source.with_suffix(".scales"):
        words = source.entries.get(f"{module}.weight")
        if words is None or words.numpy_dtype != "uint32" or len(words.shape) < 2:
            continue
        module_config = source.config.get(module, source.config)
        if not isinstance(module_config, Mapping):
            fail(words.name, "its configuration must be a table")
        result[f"{module}.weight"] = _module(source._replace(config=module_config), module)
    return result


def _module(source: Source, module: str) -> StoredWeight:
    words, scales = source.entries[f"{module}.weight"], source.entries[f"{module}.scales"]
    mode = source.config.get("mode", "affine")
    parts = {"words": words, "scales": scales}
    *leading, count = words.shape
    if isinstance(mode, str) and mode in _FLOATS:
        recipe = _FLOATS[mode]
        bits, size = recipe.element.bits, _group(recipe)
        shape = (*leading, count * 32 // bits)
        if shape[-1] % size:
            fail(words.name, f"groups of {size} do not divide rows of {shape[-1]}")
        require_shape(scales, (*leading, shape[-1] // size), "uint8")
        build = functools.partial(_build, bits=bits, recipe=recipe)
        return StoredWeight("mlx", shape, recipe, parts, build)
    if mode != "affine":
        raise FileError(f"the MLX mode {mode!r:.40} is not supported; affine and mxfp4 are.")
    bits, size = source.number("bits"), source.number("group_size")
    if bits not in _BITS or size < 1 or count * 32 % bits or count * 32 // bits % size:
        fail(words.name, f"{bits} bits in groups of {size} do not fit rows of {count} words")
    shape = (*leading, count * 32 // bits)
    biases = source.require(f"{module}.biases")
    require_shape(scales, (*leading, shape[-1] // size), *SCALE_FORMATS)
    require_shape(biases, scales.shape, str(scales.numpy_dtype))
    parts["biases"] = biases
    if scales.numpy_dtype == "float32":
        build = functools.partial(_floats, bits=bits)
        return StoredWeight("mlx", shape, None, parts, build, "its scales and biases are float32")
    recipe = minimum_recipe(bits, shape, size, str(scales.numpy_dtype))
    build = functools.partial(_build, bits=bits, recipe=recipe)
    return StoredWeight("mlx", shape, recipe, parts, build)


def _group(recipe: Recipe) -> int:
    granularity: Any = recipe.granularity
    return granularity.sizes[0]


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    return unpack_bits(as_bytes(words), bits, words.shape[-1] * 32 // bits)


def _build(arrays: Arrays, *, bits: int, recipe: Recipe) -> Quantized:
    codes = _codes(arrays["words"], bits)
    return build_quantized(recipe, codes, arrays["scales"], zero_point=arrays.get("biases"))


def _floats(arrays: Arrays, *, bits: int) -> np.ndarray:
    codes, scales = _codes(arrays["words"], bits), arrays["scales"]
    blocks = codes.reshape(*scales.shape, codes.shape[-1] // scales.shape[-1]).astype(np.float32)
    return (blocks * scales[..., None] + arrays["biases"][..., None]).reshape(codes.shape)
