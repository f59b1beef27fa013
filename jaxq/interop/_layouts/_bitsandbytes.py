"""The layouts of bitsandbytes: 4-bit codebooks in blocks of the flattened weight, and LLM.int8().

References:
  bitsandbytes's `functional.QuantState` and `functional.int8_vectorwise_dequant`.
"""

import functools
import json
import math
from typing import Any, NamedTuple

import numpy as np

from jaxq.formats import CodebookFormat, get_format
from jaxq.interop._entries import Entry, checked_shape
from jaxq.interop._layouts._bits import unpack_bits
from jaxq.interop._layouts._weights import (
    Arrays,
    Source,
    StoredWeight,
    as_codes,
    build_quantized,
    fail,
    require_shape,
)
from jaxq.quantizers import Quantized
from jaxq.recipes import DoubleQuant, PerBlock, PerToken, Recipe, Symmetric

__all__ = ["bitsandbytes"]

_NAMES = {"nf4": "nf4", "fp4": "fp4_bnb"}
_MARK = ".quant_state.bitsandbytes__"


class _State(NamedTuple):
    """The description of a 4-bit weight.

    Attributes:
      shape: the shape of the weight.
      block: the number of elements that share a scale.
      nested: the number of scales that share a second scale; 0 without double quantization.
      offset: the mean of the scales, which is added to them.
    """

    shape: tuple[int, ...]
    block: int
    nested: int
    offset: float


def bitsandbytes(source: Source) -> dict[str, StoredWeight]:
    """Returns the weights of a checkpoint of bitsandbytes, by name.

    Raises:
      FileError: if tensors do not fit together, or have an unknown type.
    """
    result = {}
    for name, entry in source.entries.items():
        if _MARK in name:
            weight, kind = name.split(_MARK, 1)
            if kind not in _NAMES:
                fail(name, f"the type {kind!r:.20} is not supported; nf4 and fp4 are")
            result[weight] = _four_bits(source, weight, kind, entry)
    for module, scale in source.with_suffix(".SCB"):
        weight = source.require(f"{module}.weight")
        require_shape(weight, weight.shape, "int8")
        if len(weight.shape) != 2:
            fail(weight.name, f"it must be a matrix, got shape {list(weight.shape)}")
        require_shape(scale, weight.shape[:1], "float32", "float16", "bfloat16")
        form = source.entries.get(f"{module}.weight_format")
        parts = {"weight": weight, "scale": scale}
        if form is not None:
            if source.read_small(form).reshape(-1)[:1].tolist() != [0]:
                fail(form.name, "only the row layout (0) is supported")
            parts["form"] = form
        recipe = Recipe("int8", PerToken(), Symmetric(rule="half"))
        build = functools.partial(_build_int8, recipe=recipe)
        result[weight.name] = StoredWeight("bitsandbytes", weight.shape, recipe, parts, build)
    return result


def _build_int8(arrays: Arrays, *, recipe: Recipe) -> Quantized:
    scale = arrays["scale"].astype(np.float32) / np.float32(127)
    return build_quantized(recipe, as_codes(arrays["weight"]), scale)


def _four_bits(source: Source, name: str, kind: str, entry: Entry) -> StoredWeight:
    state = _state(source, entry)
    size = math.prod(state.shape)
    weight, absmax = source.require(name), source.require(f"{name}.absmax")
    table = source.require(f"{name}.quant_map")
    blocks = -(-size // state.block)
    if math.prod(weight.shape) != -(-size // 2):
        fail(name, f"it has {math.prod(weight.shape)} bytes for a weight of {list(state.shape)}")
    require_shape(weight, weight.shape, "uint8")
    require_shape(absmax, (blocks,), "uint8" if state.nested else "float32")
    require_shape(table, (16,), "float32")
    parts = {"weight": weight, "absmax": absmax, "table": table, "state": entry}
    scaling: Any = Symmetric()
    if state.nested:
        second = source.require(f"{name}.nested_absmax")
        levels = source.require(f"{name}.nested_quant_map")
        require_shape(second, (-(-blocks // state.nested),), "float32")
        require_shape(levels, (256,), "float32")
        parts |= {"second": second, "levels": levels}
        scaling = DoubleQuant(_codebook(source, levels, "dynamic8"), block=state.nested)
    element = _codebook(source, table, _NAMES[kind])
    if not state.shape or state.shape[-1] % state.block:
        build = functools.partial(_floats, state=state)
        note = f"its blocks of {state.block} do not divide rows of {state.shape[-1:]}"
        return StoredWeight("bitsandbytes", state.shape, None, parts, build, note)
    recipe = Recipe(element, PerBlock(state.block), scaling)
    build = functools.partial(_build, state=state, recipe=recipe)
    return StoredWeight("bitsandbytes", state.shape, recipe, parts, build)


def _codebook(source: Source, entry: Entry, standard: str) -> CodebookFormat:
    """Returns the format of a table of levels, which is `standard` if that has the same levels."""
    levels = tuple(float(v) for v in source.read_small(entry))
    fmt = get_format(standard)
    assert isinstance(fmt, CodebookFormat)
    if levels == fmt.levels:
        return fmt
    try:
        return CodebookFormat("bitsandbytes", levels)
    except ValueError as error:
        fail(entry.name, f"its levels are invalid: {error}")


def _state(source: Source, entry: Entry) -> _State:
    require_shape(entry, entry.shape, "uint8")
    try:
        state = json.loads(source.read_small(entry).tobytes())
        shape, block = checked_shape(state["shape"]), state["blocksize"]
        nested = state.get("nested_blocksize", 0)
        offset = float(state.get("nested_offset", 0.0))
        valid = all(type(n) is int for n in (block, nested)) and block > 0 and nested >= 0
        if not valid or math.prod(shape) >= 2**62 or not math.isfinite(offset):
            raise ValueError(f"blocks of {block!r:.20} and {nested!r:.20}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(entry.name, f"its description is damaged ({error})")
    return _State(shape, block, nested, offset)


def _codes(arrays: Arrays, state: _State) -> np.ndarray:
    data = arrays["weight"].reshape(-1)
    swapped = data >> np.uint8(4) | data << np.uint8(4)  # The high half of a byte comes first.
    return unpack_bits(swapped, 4, math.prod(state.shape)).reshape(state.shape)


def _build(arrays: Arrays, *, state: _State, recipe: Recipe) -> Quantized:
    second = ()
    if state.nested:
        second = (arrays["second"], np.float32(state.offset))
    return build_quantized(recipe, _codes(arrays, state), arrays["absmax"], second=second)


def _floats(arrays: Arrays, *, state: _State) -> np.ndarray:
    scale = arrays["absmax"]
    if state.nested:
        second = np.repeat(arrays["second"], state.nested)[: scale.size]
        scale = arrays["levels"][scale] * second + np.float32(state.offset)
    values = arrays["table"][_codes(arrays, state).reshape(-1)]
    return (values * np.repeat(scale, state.block)[: values.size]).reshape(state.shape)
