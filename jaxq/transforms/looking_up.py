"""Look-ups in a quantized table: only the rows that are read, where they are fewer than it has.

Where each row has scales of its own it becomes the same numbers by itself as within the table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxq.blocks import PerBlock
from jaxq.dot_recipes import is_stochastic
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer

__all__ = ["look_up"]


def look_up(
    eqn: Any,
    gather: Callable[[jax.Array], jax.Array],
    table: jax.Array,
    quantizer: Quantizer,
    key: jax.Array | None,
) -> jax.Array:
    """What a look-up reads from a quantized table.

    Args:
      eqn: its equation, a `lax.gather`.
      gather: that as a function of the table.
      table: the table.
      quantizer: its quantizer, on its own axes.
      key: a key, if the quantizer draws.
    """
    rows = _of_rows(eqn.params, table.shape, quantizer)
    if rows is None or eqn.outvars[0].aval.size >= table.size:
        return gather(fake_quant(table, quantizer, key=key))
    return fake_quant(gather(table), rows)


def _of_rows(params: Any, shape: tuple[int, ...], quantizer: Quantizer) -> Quantizer | None:
    """A table's quantizer on the axes of what is read; None where that is not the same."""
    whole = quantizer.second_level is not None or quantizer.outliers is not None
    fill = params["fill_value"]  # None is a NaN too.
    if whole or is_stochastic(quantizer) or not (fill is None or np.isnan(fill)):
        return None
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    left = [axis for axis in range(len(shape)) if axis not in gone]
    block = quantizer.cut(shape).block
    cuts = {*gone, *(axis for axis in left if sizes[axis] != shape[axis])}
    if any(block[axis] != 1 for axis in cuts) or not left:
        return None
    lengths = tuple(block[axis] for axis in left)
    return dataclasses.replace(
        quantizer, granularity=PerBlock(lengths, numbers.offset_dims, pad=True)
    )
