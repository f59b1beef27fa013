"""Quantization to Q4_0, Q4_1, Q5_0 and Q5_1, as ggml does it.

Each function takes blocks with an importance and returns the fields of the type's layout. Without
an importance, `of_recipe` takes the scales of the recipes with the names of these types.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.blocks import FloatBlocks, QuantizedBlocks
from jaxq._ggml.weighted import with_minimum, without_minimum
from jaxq._jax.arithmetic import materialize, reciprocal, rounded
from jaxq.interop.gguf._blocks import as_bytes, split_bits
from jaxq.interop.gguf._layouts import Fields
from jaxq.quantizers import simulate
from jaxq.recipes import get_recipe

__all__ = ["SMALL", "of_recipe"]


def _q4_0(blocks: FloatBlocks) -> Fields:
    result = without_minimum(blocks, 8)
    return {"d": result.d, "q": as_bytes(result.codes + 8)}


def _q5_0(blocks: FloatBlocks) -> Fields:
    result = without_minimum(blocks, 16)
    return {"d": result.d, **split_bits(result.codes + 16)}


def _q4_1(blocks: FloatBlocks) -> Fields:
    result = with_minimum(blocks, 15)
    return {"d": result.d, "m": _minima(result), "q": as_bytes(result.codes)}


def _q5_1(blocks: FloatBlocks) -> Fields:
    result = with_minimum(blocks, 31)
    return {"d": result.d, "m": _minima(result), **split_bits(result.codes)}


def _minima(result: QuantizedBlocks) -> jax.Array:
    assert result.m is not None
    return -result.m  # The layout adds them.


def of_recipe(x: jax.Array, name: str) -> Fields:
    """Returns the fields of Q4_0, Q4_1, Q5_0 or Q5_1 without an importance matrix.

    XLA on CPU compiles `jaxq.quantize` and `pack` to a program that takes twice as long.

    Args:
      x: rows of blocks, float32 `[rows, elements]`.
      name: the name of the type, and of the recipe that gives its scales.
    """
    scales, limit = simulate(x, get_recipe(name)).scales, {"4": 15, "5": 31}[name[1]]
    divisor, blocks = scales.divisor.reshape(-1), x.reshape(-1, 32)
    inverse = reciprocal(jnp.where(divisor == 0, np.float32(1), divisor))
    inverse = materialize(jnp.where(divisor == 0, np.float32(0), inverse))
    fields, half = {"d": scales.step.reshape(-1)}, np.float32(limit / 2 + 1)
    if scales.origin is not None:
        assert scales.minimum is not None
        fields["m"], half = scales.minimum.reshape(-1), np.float32(0.5)
        blocks = blocks - scales.origin.reshape(-1, 1)
    numbers = blocks * inverse[:, None]
    q = jnp.clip((rounded(numbers) + half).astype(jnp.int32), 0, limit).astype(jnp.uint8)
    if limit == 15:
        return {**fields, "q": q}
    return {**fields, "q": q & np.uint8(15), "high": q >> np.uint8(4)}


SMALL: dict[str, Callable[[FloatBlocks], Fields]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
}
