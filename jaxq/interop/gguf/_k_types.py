"""The fields of K-quants, and the integers of the recipes with their names that they hold."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.interop.gguf._blocks import as_bytes, split_bits
from jaxq.interop.gguf._layouts import Fields, two_scales, two_scales_bytes
from jaxq.recipes import SUPER_BLOCK_RULES, Blocks, Found

__all__ = ["Integers", "fields_of", "integers_of", "searched"]

_FOUR = np.uint8(4)


class Integers(NamedTuple):
    """The integers of super-blocks.

    Attributes:
      scales: the scales of the parts, `[blocks, parts]`.
      codes: the grid values of the elements, `[blocks, 256]`.
      minima: the minima of the parts; None in types without them.
    """

    scales: jax.Array
    codes: jax.Array
    minima: jax.Array | None = None


def searched(name: str, blocks: Blocks) -> Fields:
    """Returns the fields of a type, with the scales that its rule finds."""
    found: Found = SUPER_BLOCK_RULES[name].search(blocks)
    factors = {"d": found.d} if found.m is None else {"d": found.d, "m": found.m}
    return {**factors, **fields_of(name, Integers(found.scales, found.codes, found.minima))}


def fields_of(name: str, integers: Integers) -> Mapping[str, jax.Array]:
    """Returns the fields that hold the integers of a type."""
    scales, codes, minima = integers
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
        case "q6_k":
            return {**split_bits(codes + 32), "scales": scales.astype(jnp.int8)}
    assert minima is not None
    q = {"q": as_bytes(codes)} if name == "q4_k" else split_bits(codes)
    return {"scales": two_scales_bytes(scales, minima), **q}


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
    q = q | fields["high"] << _FOUR if "high" in fields else q
    if name == "q6_k":
        return Integers(fields["scales"], q.astype(jnp.int32) - 32)
    scales, minima = two_scales(fields["scales"])
    return Integers(scales, q, minima)
