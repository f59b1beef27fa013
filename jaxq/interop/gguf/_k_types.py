"""The fields of types whose scales are searched, and the integers that they hold."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.blocks import FloatBlocks, QuantizedBlocks
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.interop.gguf._blocks import as_bytes, split_bits
from jaxq.interop.gguf._layouts import (
    LAYOUTS,
    Fields,
    join_scales_and_minima,
    split_scales_and_minima,
)

__all__ = ["SEARCHED", "Integers", "fields_of", "integers_of"]

_FOUR = np.uint8(4)


class Integers(NamedTuple):
    """The integers of super-blocks.

    Attributes:
      scales: the scales of the parts, `[blocks, parts]`; None if a block has a float16 scale only.
      codes: the grid values of the elements, `[blocks, elements]`, or indices of levels.
      minima: the minima of the parts; None in types without them.
    """

    scales: jax.Array | None
    codes: jax.Array
    minima: jax.Array | None = None


def _searched(name: str, blocks: FloatBlocks) -> Fields:
    """Returns the fields of a type, with the scales that its rule finds."""
    result: QuantizedBlocks = SUPER_BLOCK_RULES[name].search(blocks)
    factors = {"d": result.d} if result.m is None else {"d": result.d, "m": result.m}
    return {**factors, **fields_of(name, Integers(result.scales, result.codes, result.minima))}


def fields_of(name: str, integers: Integers) -> Mapping[str, jax.Array]:
    """Returns the fields that hold the integers of a type."""
    scales, codes, minima = integers
    if scales is None:
        return {"q": as_bytes(codes)}
    if minima is not None:
        scales, minima = scales.astype(jnp.uint8), minima.astype(jnp.uint8)
    match name:
        case "q2_k":
            assert minima is not None
            return {"scales": scales | minima << _FOUR, "q": as_bytes(codes)}
        case "q3_k":
            q, scales = as_bytes(codes + 4), (scales + 32).astype(jnp.uint8)
            high, low = q >> np.uint8(2), q & np.uint8(3)
            return {"high": high, "q": low, "low": scales & np.uint8(15), "top": scales >> _FOUR}
        case "iq4_xs":
            scales = (scales + 32).astype(jnp.uint8)
            low, top = scales & np.uint8(15), scales >> _FOUR
            return {"low": low, "top": top, "q": as_bytes(codes)}
        case "q6_k":
            return {**split_bits(codes + 32), "scales": scales.astype(jnp.int8)}
    assert minima is not None
    q = {"q": as_bytes(codes)} if name == "q4_k" else split_bits(codes)
    return {"scales": join_scales_and_minima(scales, minima), **q}


def integers_of(name: str, fields: Fields) -> Integers:
    """Returns the integers that the fields of a type hold; the inverse of `fields_of`."""
    q = fields["q"]
    match name:
        case "q2_k":
            scales = fields["scales"]
            return Integers(scales & np.uint8(15), q, scales >> _FOUR)
        case "q3_k":
            scales = (fields["low"] | fields["top"] << _FOUR).astype(jnp.int32) - 32
            return Integers(scales, (q | fields["high"] << np.uint8(2)).astype(jnp.int32) - 4)
        case "iq4_xs":
            return Integers((fields["low"] | fields["top"] << _FOUR).astype(jnp.int32) - 32, q)
        case "iq4_nl":
            return Integers(None, q)
    q = q | fields["high"] << _FOUR if "high" in fields else q
    if name == "q6_k":
        return Integers(fields["scales"], q.astype(jnp.int32) - 32)
    scales, minima = split_scales_and_minima(fields["scales"])
    return Integers(scales, q, minima)


SEARCHED: dict[str, Callable[[FloatBlocks], Fields]] = {
    name: functools.partial(_searched, name) for name in SUPER_BLOCK_RULES if name in LAYOUTS
}
