"""The layouts of compressed-tensors, which vLLM and llm-compressor use.

References:
  The compressed-tensors package, version 0.20: `compressors` and `quantization`.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts._bits import as_bytes, unpack_bits
from jaxq.interop._layouts._floats import build_plain, fp8_format, nibbles
from jaxq.interop._layouts._weights import (
    SCALE_FORMATS,
    Arrays,
    Source,
    StoredWeight,
    affine_recipe,
    as_codes,
    build_quantized,
    fail,
    group_count,
    group_length,
    recipe_from_scales,
    require_shape,
    symmetric_recipe,
)
from jaxq.quantizers import Quantized
from jaxq.recipes import PerBlock, Recipe, Symmetric, get_recipe

__all__ = ["FORMATS", "compressed_tensors"]

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)


def compressed_tensors(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of compressed-tensors, by name.

    Raises:
      FileError: if the checkpoint has an unknown format, or tensors that do not fit together.
    """
    schemes = list(_groups(source.config))
    formats = [source.config.get("format"), *(scheme.get("format") for scheme in schemes)]
    for name in formats:
        if name is not None and name not in FORMATS:
            raise FileError(
                f"the compressed-tensors format {name!r:.40} is not supported; "
                f"{', '.join(FORMATS[:-2])} are."
            )
    sparsity = source.config.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise FileError(f"the sparse format {sparsity['format']!r:.40} is not supported.")
    args = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), Mapping)]
    widths = sorted({a.get("num_bits") for a in args if type(a.get("num_bits")) is int})
    result: dict[str, StoredWeight] = {}
    for module, packed in source.with_suffix(".weight_packed"):
        name = f"{module}.weight"
        scale = source.require(f"{name}_scale")
        if f"{name}_shape" in source.entries:
            result[name] = _integers(source, name, packed, scale, widths)
        else:
            result[name] = _four_bits(source, name, packed, scale)
    blocks = [a.get("block_structure") for a in args if a.get("block_structure")]
    for name, scale in source.with_suffix("_scale"):
        weight = source.entries.get(name)
        if name.endswith("weight") and weight is not None:
            result[name] = _plain(source, weight, scale, blocks)
    return result


def _groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = config.get("config_groups", {})
    if not isinstance(groups, Mapping):
        raise FileError(
            f"its config_groups must be a table, got {groups!r:.40}. Correct config.json."
        )
    for scheme in groups.values():
        if isinstance(scheme, Mapping):  # A list names the modules of a preset.
            yield scheme


def _integers(
    source: Source, name: str, packed: Entry, scale: Entry, widths: list[int]
) -> StoredWeight:
    shape_entry = source.require(f"{name}_shape")
    require_shape(shape_entry, (len(packed.shape),), "int64", "int32")
    shape = tuple(int(n) for n in source.read_small(shape_entry))
    if len(shape) < 2 or shape[:-1] != packed.shape[:-1] or not 0 < shape[-1] < 2**31:
        fail(packed.name, f"its shape {list(packed.shape)} does not fit a weight of {list(shape)}")
    require_shape(packed, packed.shape, "int32", "uint32")
    bits, dense = _width(packed, shape[-1], widths)
    count = scale.shape[-1] if scale.shape else 0
    require_shape(scale, (*shape[:-1], count), *SCALE_FORMATS)
    group, dtype = group_length(packed, shape[-1], count), str(scale.numpy_dtype)
    parts = {"packed": packed, "scale": scale, "shape": shape_entry}
    zero = source.entries.get(f"{name}_zero_point")
    if zero is not None:
        if len(shape) != 2:
            fail(zero.name, "zero points of stacked weights are not supported")
        words = -(-shape[0] * bits // 32) if dense else -(-shape[0] // (32 // bits))
        require_shape(zero, (words, count), "int32", "uint32")
        parts["zero"] = zero
    order = source.entries.get(f"{name}_g_idx")
    build = functools.partial(_build_integers, shape=shape, bits=bits, dense=dense)
    if order is not None:
        require_shape(order, shape[-1:], "int32", "int64")
        if not (source.raw(order) == np.arange(shape[-1]) // group).all():
            parts["order"] = order
            note = "g_idx gives its columns to groups in activation order"
            return StoredWeight("compressed-tensors", shape, None, parts, build, note)
        parts["order"] = order
    build_recipe = symmetric_recipe if zero is None else affine_recipe
    recipe = build_recipe(bits, shape, group, dtype)
    build = functools.partial(build, recipe=recipe)
    return StoredWeight("compressed-tensors", shape, recipe, parts, build)


def _width(packed: Entry, length: int, widths: list[int]) -> tuple[int, bool]:
    """Returns the number of bits of a code, and False if words have unused bits."""
    words = packed.shape[-1]
    fits = [(bits, True) for bits in widths if 1 <= bits <= 8 and words == -(-length * bits // 32)]
    # Files from before 2026 have 32 // bits global_scale codes in a word.
    padded = [
        (bits, False)
        for bits in widths
        if bits in (3, 5, 6, 7) and words == -(-length // (32 // bits))
    ]
    candidates = fits or padded
    if len(candidates) != 1:
        fail(
            packed.name,
            f"{words} words for {length} elements fit {len(candidates)} of the widths of the "
            f"configuration, {widths}",
        )
    return candidates[0]


def _codes(words: np.ndarray, length: int, bits: int, dense: bool) -> np.ndarray:
    """Returns the codes in words along the last axis, as offsets from the lowest code."""
    if dense or 32 % bits == 0:
        return unpack_bits(as_bytes(words), bits, length)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = as_codes(words)[..., None] >> shifts & np.uint32(2**bits - 1)
    codes = codes.reshape(*words.shape[:-1], codes.shape[-2] * codes.shape[-1])
    return codes[..., :length].astype(np.uint8)


def _build_integers(
    arrays: Arrays, *, shape: tuple[int, ...], bits: int, dense: bool, recipe: Recipe | None = None
) -> Quantized | np.ndarray:
    codes, scale = _codes(arrays["packed"], shape[-1], bits, dense), arrays["scale"]
    zero = arrays.get("zero")
    if zero is not None:
        zero = _codes(zero.T, shape[0], bits, dense).T
    if recipe is not None:
        if zero is None:
            codes = codes ^ np.uint8(1 << (bits - 1))
        return build_quantized(recipe, codes, scale, zero_point=zero)
    index, count = arrays["order"], scale.shape[-1]
    if index.min() < 0 or index.max() >= count:
        raise FileError(
            f"g_idx must hold group numbers 0 to {count - 1}, got {index.min()} to {index.max()}. "
            "Download the file again."
        )
    middle = np.float32(1 << (bits - 1))
    offset = middle if zero is None else zero[:, index].astype(np.float32)
    return (codes.astype(np.float32) - offset) * scale.astype(np.float32)[..., index]


def _four_bits(source: Source, name: str, packed: Entry, scale: Entry) -> StoredWeight:
    shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
    require_shape(packed, packed.shape, "uint8")
    if len(shape) < 2:
        fail(name, f"it must have at least two axes, got {len(shape)}")
    parts = {"weight": packed, "scale": scale}
    global_scale = source.entries.get(f"{name}_global_scale")
    if global_scale is None:
        recipe = get_recipe("mxfp4")
        require_shape(scale, (*shape[:-1], group_count(packed, shape[-1], 32)), "uint8")
        build = functools.partial(_build_mxfp4, recipe=recipe)
        return StoredWeight("compressed-tensors", shape, recipe, parts, build)
    require_shape(scale, (*shape[:-1], group_count(packed, shape[-1], 16)), "float8_e4m3fn")
    if math.prod(global_scale.shape) != 1 or global_scale.numpy_dtype != "float32":
        fail(global_scale.name, "it must be one float32 number")
    factor = np.float32(source.read_small(global_scale).reshape(()))
    if not 2.0**-100 < factor < 2.0**100:
        fail(global_scale.name, f"it must be a positive normal number, got {factor}")
    parts["global"] = global_scale
    # The format divides by the global scale, and the recipe multiplies by its inverse. They agree
    # on all scales if they do on the significands of float8_e4m3fn.
    inverse, digits = np.float32(1) / factor, np.arange(8, 16, dtype=np.float32)
    equal = bool((digits / factor == digits * inverse).all())
    recipe = Recipe("float4_e2m1fn", PerBlock(16), Symmetric())
    recipe = get_recipe("nvfp4") if equal else recipe
    build = functools.partial(_build_nvfp4, recipe=recipe, factor=factor)
    return StoredWeight("compressed-tensors", shape, recipe, parts, build)


def _build_mxfp4(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    return build_quantized(recipe, nibbles(arrays["weight"]), arrays["scale"])


def _build_nvfp4(arrays: Arrays, *, recipe: Recipe, factor: np.float32) -> Quantized:
    codes, scale = nibbles(arrays["weight"]), arrays["scale"]
    if recipe.scaling.second_level is not None:
        return build_quantized(recipe, codes, scale, second=(np.float32(1) / factor,))
    return build_quantized(recipe, codes, scale.astype(np.float32) / factor)


def _plain(source: Source, weight: Entry, scale: Entry, blocks: list[Any]) -> StoredWeight:
    parts = {"weight": weight, "scale": scale}
    zero = source.entries.get(f"{weight.name}_zero_point")
    if zero is not None:
        fail(zero.name, "zero points of unpacked codes are not supported")
    if scale.numpy_dtype == "uint8":
        recipe, shape = get_recipe("mxfp8_e4m3"), weight.shape
        if len(shape) < 2:
            fail(weight.name, f"it must have at least two axes, got {len(shape)}")
        require_shape(weight, shape, "float8_e4m3fn")
        require_shape(scale, (*shape[:-1], group_count(weight, shape[-1], 32)), "uint8")
    else:
        fmt = "int8" if weight.numpy_dtype == "int8" else fp8_format(weight)
        recipe = recipe_from_scales(weight, scale, fmt, _tile(weight, scale, blocks))
    build = functools.partial(build_plain, recipe=recipe)
    return StoredWeight("compressed-tensors", weight.shape, recipe, parts, build)


def _tile(weight: Entry, scale: Entry, blocks: list[Any]) -> tuple[int, int] | None:
    """Returns the tile of the configuration that explains the shape of the scales."""
    if len(weight.shape) < 2 or scale.shape[-1:] == (1,) == scale.shape[-2:-1]:
        return None  # One scale for all elements, or too few axes.
    for block in blocks:
        is_tile = isinstance(block, list) and len(block) == 2
        if is_tile and all(type(n) is int and n > 0 for n in block):
            counts = tuple(-(-n // b) for n, b in zip(weight.shape[-2:], block, strict=True))
            if counts == scale.shape[-2:]:
                return block[0], block[1]
    return None
