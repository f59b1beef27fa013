"""Layouts of narrow floats: block FP8 of DeepSeek, MXFP4 of gpt-oss, and those of ModelOpt.

References:
  DeepSeek-V3's `weight_dequant`; gpt-oss's `Checkpoint._get_mxfp4_tensor`; TensorRT Model
  Optimizer's unified Hugging Face checkpoints.
"""

import functools
import math

import numpy as np

from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts._bits import as_bytes, unpack_bits
from jaxq.interop._layouts._weights import (
    Arrays,
    Source,
    StoredWeight,
    as_codes,
    build_quantized,
    fail,
    recipe_from_scales,
    require_shape,
)
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe, get_recipe

__all__ = ["build_plain", "fp8", "fp8_format", "gpt_oss", "modelopt", "nibbles"]

_FP8 = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}
_TILE = 128


def fp8_format(entry: Entry) -> str:
    """Returns the name of the format of an FP8 tensor."""
    if entry.numpy_dtype not in _FP8:
        fail(entry.name, f"it must be float8, got {entry.dtype}")
    return _FP8[entry.numpy_dtype]


def build_plain(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    """Returns the `Quantized` of a tensor of plain codes with scales."""
    return build_quantized(recipe, as_codes(arrays["weight"]), arrays["scale"])


def nibbles(data: np.ndarray) -> np.ndarray:
    """Returns 4-bit codes `[..., 2 n]` from bytes `[..., n]`, the low half of a byte first."""
    return unpack_bits(as_bytes(data), 4, 2 * data.shape[-1])


def fp8(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint with the method "fp8", by name.

    The scales of `M.weight` are `M.weight_scale_inv`, which multiplies the weight in spite of its
    name, or `M.weight_scale`.

    Raises:
      FileError: if tensors do not fit together.
    """
    size = source.config.get("weight_block_size", [_TILE, _TILE])
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise FileError(
            f"weight_block_size must be a list of two integers, got {size!r:.40}. Correct "
            "config.json."
        )
    result = {}
    for suffix, tile in (("_scale_inv", size), ("_scale", None)):
        for name, scale in source.with_suffix(suffix):
            weight = source.entries.get(name)
            if weight is None or weight.numpy_dtype not in _FP8:
                continue
            block = None if tile is None else (tile[0], tile[1])
            result[name] = _plain("fp8", weight, scale, block)
    return result


def _plain(method: str, weight: Entry, scale: Entry, block: tuple[int, int] | None) -> StoredWeight:
    recipe = recipe_from_scales(weight, scale, fp8_format(weight), block)
    build = functools.partial(build_plain, recipe=recipe)
    return StoredWeight(method, weight.shape, recipe, {"weight": weight, "scale": scale}, build)


def gpt_oss(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of gpt-oss in MXFP4, `[experts, rows, inputs]`, by name.

    Raises:
      FileError: if tensors do not fit together.
    """
    recipe, result = get_recipe("mxfp4"), {}
    for name, blocks in source.with_suffix("_blocks"):
        scales = source.entries.get(f"{name}_scales")
        if scales is None or blocks.numpy_dtype != "uint8" or len(blocks.shape) < 3:
            continue
        *leading, count, size = blocks.shape
        if size != 16:
            fail(blocks.name, f"its last axis must have 16 bytes, got {size}")
        require_shape(scales, (*leading, count), "uint8")
        shape = (*leading, 32 * count)
        parts = {"blocks": blocks, "scales": scales}
        build = functools.partial(_build_mxfp4, recipe=recipe)
        result[name] = StoredWeight("mxfp4", shape, recipe, parts, build)
    return result


def _build_mxfp4(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    blocks, scales = arrays["blocks"], arrays["scales"]
    codes = nibbles(blocks.reshape(*blocks.shape[:-2], 16 * blocks.shape[-2]))
    return build_quantized(recipe, codes, scales)


def modelopt(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of ModelOpt in NVFP4 or FP8, by name.

    Raises:
      FileError: if the checkpoint has another algorithm, or tensors that do not fit together.
    """
    config = source.config
    algorithm = config.get("quant_algo") or "NVFP4"
    if algorithm not in ("NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION"):
        raise FileError(
            f"the ModelOpt algorithm {algorithm!r:.40} is not supported; NVFP4 and FP8 are."
        )
    result = {}
    for name, scale in source.with_suffix("_scale"):
        weight = source.entries.get(name)
        if weight is None or not name.endswith("weight"):
            continue
        if weight.numpy_dtype != "uint8":
            if weight.numpy_dtype in _FP8:
                result[name] = _plain("modelopt", weight, scale, None)
            continue
        second = source.require(f"{name}_scale_2")
        recipe, shape = get_recipe("nvfp4"), (*weight.shape[:-1], 2 * weight.shape[-1])
        if len(shape) < 2 or shape[-1] % 16 or math.prod(second.shape) != 1:
            fail(name, f"a weight of shape {list(shape)} does not fit NVFP4 with one tensor scale")
        require_shape(scale, (*shape[:-1], shape[-1] // 16), "float8_e4m3fn")
        require_shape(second, second.shape, "float32")
        parts = {"weight": weight, "scale": scale, "second": second}
        build = functools.partial(_build_nvfp4, recipe=recipe)
        result[name] = StoredWeight("modelopt", shape, recipe, parts, build)
    return result


def _build_nvfp4(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    second = np.float32(arrays["second"].reshape(()))
    return build_quantized(recipe, nibbles(arrays["weight"]), arrays["scale"], second=(second,))
