"""Slices of a stored tensor that are dequantized separately."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxq.formats import IntFormat
from jaxq.quantizers._quantized import WHOLE_BYTES, Quantized, dequantize
from jaxq.recipes import Symmetric

__all__ = ["Slices", "slices"]


class Slices(NamedTuple):
    """A stored tensor that can be dequantized slice by slice.

    Attributes:
      shape: the shape of the tensor.
      dtype: its dtype.
      units: for each axis, the number of which starts and lengths of slices must be multiples; the
        axis length if the axis cannot be cut.
      take: `(axis, start, size) -> array`, the dequantized elements from `start`, which may be
        traced, to `start + size` of an axis; bitwise those of the whole dequantized tensor.
    """

    shape: tuple[int, ...]
    dtype: Any
    units: tuple[int, ...]
    take: Callable[[int, Any, int], jax.Array]


def slices(q: Quantized) -> Slices | None:
    """Returns a stored tensor as slices; None for one with outliers, or of symbolic shape.

    With a second level of scales, the float32 values of all scales are computed first.
    """
    if q.recipe.outliers is not None or not q.ndim or not all(type(n) is int for n in q.shape):
        return None
    stacked = q.ndim - len(q.block)
    if q.recipe.scaling.second_level is not None:
        scales = Quantized.scales.fget
        assert scales is not None
        for _ in range(stacked):
            scales = jax.vmap(scales)
        # The rule "half" keeps the lowest code of integers, which `SuperBlocks` uses.
        lowest = q.recipe.scaling.blocks_per_run > 1 and isinstance(q.recipe.element, IntFormat)
        scaling = Symmetric(rule="half") if lowest else Symmetric()
        recipe = dataclasses.replace(q.recipe, scaling=scaling)
        fields = {"scale": scales(q), "zero_point": q.minima, "second": (), "recipe": recipe}
        q = dataclasses.replace(q, **fields)
    cut, bits = q.cut, q.recipe.element.bits
    # Codes on the last axis are cut between bytes.
    codes_of_whole_bytes = 8 // math.gcd(bits, 8)

    def unit(axis: int) -> int:
        block = cut.block[axis] if cut.counts[axis] > 1 else 1
        return math.lcm(block, codes_of_whole_bytes) if axis == q.ndim - 1 else block

    def take(axis: int, start: Any, size: int) -> jax.Array:
        def of(x: jax.Array, numerator: int = 1, denominator: int = 1) -> jax.Array:
            at, count = start * numerator // denominator, size * numerator // denominator
            return lax.dynamic_slice_in_dim(x, at, count, axis)

        def of_blocks(x: jax.Array) -> jax.Array:
            return of(x, 1, cut.block[axis]) if cut.counts[axis] > 1 else x

        is_last = axis == q.ndim - 1
        zero_point = None if q.zero_point is None else of_blocks(q.zero_point)
        block = tuple(min(b, size) if i == axis else b for i, b in enumerate(cut.block))
        part = dataclasses.replace(
            q,
            codes=of(q.codes, bits, 8) if is_last and bits not in WHOLE_BYTES else of(q.codes),
            scale=of_blocks(q.scale),
            zero_point=zero_point,
            block=block,
            length=size if is_last else q.length,
        )
        return dequantize(part)

    units = tuple(min(unit(axis), n) for axis, n in enumerate(q.shape))
    return Slices(q.shape, q.dtype, units, take)
