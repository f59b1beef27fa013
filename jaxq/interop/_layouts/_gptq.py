"""The layouts of GPTQ and AWQ: unsigned integers with zero points, in int32 words.

References:
  AutoGPTQ's and GPTQModel's `QuantLinear.pack`; AutoAWQ's `WQLinear_GEMM`.
"""

import functools

import numpy as np

from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts._bits import as_bytes, unpack_bits
from jaxq.interop._layouts._weights import (
    SCALE_FORMATS,
    Arrays,
    Source,
    StoredWeight,
    affine_recipe,
    build_quantized,
    fail,
    group_length,
    require_shape,
)
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe

__all__ = ["awq", "gptq"]

_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # The nibble of each of eight outputs.


def gptq(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of AutoGPTQ or GPTQModel, by name.

    Raises:
      FileError: if the checkpoint has an unknown format, or tensors that do not fit together.
    """
    version = source.config.get("checkpoint_format") or source.config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise FileError(f"the GPTQ format {version!r:.40} is not supported; gptq and gptq_v2 are.")
    increment = 1 if version == "gptq" else 0  # Version 1 stores zero points minus 1.
    result = {}
    for module, words in source.with_suffix(".qweight"):
        scales, zeros = (source.require(f"{module}.{part}") for part in ("scales", "qzeros"))
        order = source.entries.get(f"{module}.g_idx")
        result[f"{module}.weight"] = _module(source, words, scales, zeros, order, increment)
    return result


def _module(
    source: Source, words: Entry, scales: Entry, zeros: Entry, order: Entry | None, increment: int
) -> StoredWeight:
    if len(words.shape) != 2 or len(scales.shape) != 2 or len(zeros.shape) != 2:
        fail(words.name, "it, its scales and its zero points must be matrices")
    count, outputs = scales.shape
    if not count or not outputs:
        fail(scales.name, f"it has the shape {list(scales.shape)}")
    bits = zeros.shape[1] * 32 // outputs
    if bits not in _BITS or outputs * bits % 32 or words.shape[0] * 32 % bits:
        fail(words.name, f"its shapes mean {bits} bits per code; 2, 3, 4 and 8 are supported")
    inputs = words.shape[0] * 32 // bits
    require_shape(words, (inputs * bits // 32, outputs), "int32", "uint32")
    require_shape(zeros, (count, outputs * bits // 32), "int32", "uint32")
    require_shape(scales, (count, outputs), *SCALE_FORMATS)
    configured = source.config.get("bits", bits)
    if configured != bits and not source.config.get("dynamic"):
        fail(words.name, f"it has {bits} bits, but the configuration says {configured!r:.20}")
    shape, scale = (outputs, inputs), str(scales.numpy_dtype)
    parts = {"words": words, "scales": scales, "zeros": zeros}
    note = "the last of its groups is shorter" if _is_uneven(source, inputs, count) else ""
    if order is not None:
        require_shape(order, (inputs,), "int32", "int64")
        parts["order"] = order
        if not note and source.config.get("desc_act", True):
            if not _in_order(source.raw(order), inputs // count):
                note = "g_idx gives its columns to groups in activation order"
    elif note:
        source.require(f"{words.name.removesuffix('.qweight')}.g_idx")
    build = functools.partial(_build, bits=bits, increment=increment)
    if note:
        return StoredWeight("gptq", shape, None, parts, functools.partial(build, recipe=None), note)
    recipe = affine_recipe(bits, shape, group_length(words, inputs, count), scale)
    return StoredWeight("gptq", shape, recipe, parts, functools.partial(build, recipe=recipe))


def _is_uneven(source: Source, inputs: int, count: int) -> bool:
    """Returns whether the groups of a row differ in length."""
    size = source.config.get("group_size")
    if type(size) is int and size > 0 and -(-inputs // size) == count:
        return count > 1 and inputs % size != 0
    return inputs % count != 0


def _in_order(index: np.ndarray, group: int) -> bool:
    return bool((index == np.arange(index.size) // group).all())


def _build(
    arrays: Arrays, *, bits: int, increment: int, recipe: Recipe | None
) -> Quantized | np.ndarray:
    words, scales, zeros = (arrays[name] for name in ("words", "scales", "zeros"))
    count, outputs = scales.shape
    inputs = words.shape[0] * 32 // bits
    codes = unpack_bits(as_bytes(words.T), bits, inputs)
    zero = unpack_bits(as_bytes(zeros), bits, outputs).T
    zero = (zero + np.uint8(increment)) & np.uint8(2**bits - 1)
    index = arrays.get("order")
    if recipe is None:
        assert index is not None
        if index.min() < 0 or index.max() >= count:
            raise FileError(
                f"g_idx must hold group numbers 0 to {count - 1}, got {index.min()} to "
                f"{index.max()}. Download the file again."
            )
        distance = codes.astype(np.float32) - zero[:, index].astype(np.float32)
        return distance * scales.T.astype(np.float32)[:, index]
    if index is not None and not _in_order(index, inputs // count):
        raise FileError(
            "g_idx must be in order, as the configuration says desc_act = false, got another "
            "order. Correct desc_act in the configuration."
        )
    return build_quantized(recipe, codes, scales.T, zero_point=zero)


def awq(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of AutoAWQ in the version "gemm", by name.

    Raises:
      FileError: if the checkpoint has another version, or tensors that do not fit together.
    """
    version = source.config.get("version") or source.config.get("checkpoint_format") or "gemm"
    if str(version).lower() != "gemm":
        raise FileError(f"the AWQ version {version!r:.40} is not supported; gemm is.")
    bits = source.config.get("bits", source.config.get("w_bit", 4))
    if bits != 4:
        raise FileError(f"AWQ with {bits!r:.20} bits is not supported; 4 bits are.")
    result = {}
    for module, words in source.with_suffix(".qweight"):
        scales, zeros = (source.require(f"{module}.{part}") for part in ("scales", "qzeros"))
        if len(words.shape) != 2 or len(scales.shape) != 2:
            fail(words.name, "it and its scales must be matrices")
        inputs, outputs, count = words.shape[0], 8 * words.shape[1], scales.shape[0]
        require_shape(words, words.shape, "int32", "uint32")
        require_shape(zeros, (count, words.shape[1]), "int32", "uint32")
        require_shape(scales, (count, outputs), *SCALE_FORMATS)
        shape = (outputs, inputs)
        recipe = affine_recipe(
            4, shape, group_length(words, inputs, count), str(scales.numpy_dtype)
        )
        parts = {"words": words, "scales": scales, "zeros": zeros}
        build = functools.partial(_build_awq, recipe=recipe)
        result[f"{module}.weight"] = StoredWeight("awq", shape, recipe, parts, build)
    return result


def _build_awq(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    codes, zeros = (_awq_codes(arrays[name]) for name in ("words", "zeros"))
    return build_quantized(recipe, codes.T, arrays["scales"].T, zero_point=zeros.T)


def _awq_codes(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_bits(as_bytes(words), 4, 8 * words.shape[1])
    return nibbles.reshape(*words.shape, 8)[..., _AWQ_ORDER].reshape(len(words), 8 * words.shape[1])
