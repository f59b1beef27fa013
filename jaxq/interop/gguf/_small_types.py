"""Quantization to the types with one scale per block or per 16 elements, as ggml does it.

Each function takes blocks and returns the fields of the type's layout. Q4_0 to Q5_1 without an
importance matrix take the scales of the recipes with their names, and Q8_0 is that recipe (see
`_recipes.py`).
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._ggml.blocks import (
    IMPORTANCE_STEPS,
    FloatBlocks,
    divide_or_zero,
    divided,
    error_weights,
    join_sub_blocks,
    sub_blocks,
)
from jaxq._ggml.searches import fit_affine, fit_symmetric, largest
from jaxq._jax.arithmetic import materialize, reciprocal, rounded
from jaxq.interop.gguf._blocks import as_bytes, split_bits
from jaxq.interop.gguf._layouts import E2M1, Fields, e8m0_half, ue4m3_half
from jaxq.quantizers import simulate
from jaxq.recipes import get_recipe

__all__ = ["SMALL", "of_recipe"]


# Types with one scale.


def _simple_symmetric(blocks: FloatBlocks, limit: int) -> tuple[jax.Array, jax.Array]:
    """Returns the scales and codes of Q4_0 and Q5_0 with an importance matrix."""
    scale, q = fit_symmetric(
        blocks.x, limit, error_weights(blocks.weights, blocks.x, blocks.row_square)
    )
    return scale, q + limit


def _simple_affine(blocks: FloatBlocks, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scales, minima and codes of Q4_1 and Q5_1 with an importance matrix."""
    w = error_weights(blocks.weights, blocks.x, blocks.row_square)
    d, minimum, q = fit_affine(blocks.x, limit, w, IMPORTANCE_STEPS)
    return d, -minimum, q


def _q4_0(blocks: FloatBlocks) -> Fields:
    d, q = _simple_symmetric(blocks, 8)
    return {"d": d, "q": as_bytes(q.T)}


def _q5_0(blocks: FloatBlocks) -> Fields:
    d, q = _simple_symmetric(blocks, 16)
    return {"d": d, **split_bits(q.T)}


def _q4_1(blocks: FloatBlocks) -> Fields:
    d, m, q = _simple_affine(blocks, 15)
    return {"d": d, "m": m, "q": as_bytes(q.T)}


def _q5_1(blocks: FloatBlocks) -> Fields:
    d, m, q = _simple_affine(blocks, 31)
    return {"d": d, "m": m, **split_bits(q.T)}


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


def _round_half_away(x: jax.Array) -> jax.Array:
    """Returns the nearest integers, ties away from zero, as C's roundf."""
    whole = jnp.trunc(x)
    return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), np.float32(0))


def _ternary(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    d = largest(x)[0]
    return d, as_bytes(
        (_round_half_away(rounded(x * divide_or_zero(1, d)[None])) + np.float32(1)).T
    )


def _tq1_0(blocks: FloatBlocks) -> Fields:
    d, q = _ternary(blocks.x)
    return {"q": q[:, :160], "q16": q[:, 160:240], "q4": q[:, 240:], "d": d}


def _tq2_0(blocks: FloatBlocks) -> Fields:
    d, q = _ternary(blocks.x)
    return {"q": q, "d": d}


# Types of 4-bit floats.


def _floored_log2(x: jax.Array) -> jax.Array:
    """Returns floor(log2(x)) of positive normal numbers as C computes it in float32.

    The logarithm of a number just below 2^k rounds to k if the gap between float32 numbers there is
    wide enough.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - np.int32(127)
    above = np.arange(-126, 130)  # k, the logarithm of the next power of two.
    with np.errstate(all="ignore"):
        # Half the gap below k, in steps of the numbers below 2^k: one step is 2^-24 / ln 2.
        gap = above.astype(np.float64) - np.nextafter(above.astype(np.float32), np.float32(-1e9))
    steps = np.where(above == 0, 0.0, np.abs(gap) / 2 * np.log(2) * 2.0**24)
    most = jnp.asarray(np.floor(steps).astype(np.int32))
    missing = np.int32(1 << 23) - (bits & np.int32((1 << 23) - 1))
    return exponent + (missing <= most[exponent + 126]).astype(jnp.int32)


def _nearest_e2m1(x: jax.Array, half: jax.Array) -> jax.Array:
    """Returns the codes of the nearest E2M1 numbers, the first of equally near ones."""
    half = half[None]
    best = jnp.abs(half * np.float32(E2M1[0]) - x)
    code = jnp.zeros(x.shape, jnp.int32)
    for i, value in enumerate(E2M1[1:].tolist(), 1):
        error = jnp.abs(rounded(half * np.float32(value)) - x)
        code = jnp.where(error < best, i, code)
        best = jnp.minimum(error, best)
    return code


def _mxfp4(blocks: FloatBlocks) -> Fields:
    amax = largest(blocks.x)[0]
    e = _floored_log2(jnp.maximum(amax, np.float32(2**-126))) + 125
    e = jnp.where(amax > 0, e, 0).astype(jnp.uint8)
    return {"e": e[:, None], "q": as_bytes(_nearest_e2m1(blocks.x, e8m0_half(e)).T)}


def _ue4m3(x: jax.Array) -> jax.Array:
    """Returns codes of unsigned E4M3, ties rounded away from zero.

    As in ggml, numbers from 248 on become 448.
    """
    x = jnp.clip(x, 0, np.float32(448))
    small = jnp.clip((rounded(x * np.float32(512)) + np.float32(0.5)).astype(jnp.int32), 0, 7)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    normal = ((bits - np.int32(120 << 23)) + np.int32(1 << 19)) >> 20
    code = jnp.where(bits >> 23 <= 120, small, jnp.where(normal >= 0x78, 0x7E, normal))
    return jnp.where(x > 0, code, 0).astype(jnp.uint8)


def _nvfp4(blocks: FloatBlocks) -> Fields:
    x = sub_blocks(blocks.x, 16)
    scales = _ue4m3(divided(largest(x)[0], 6))
    q = _nearest_e2m1(x, ue4m3_half(scales))
    count = blocks.x.shape[1]
    return {"scales": scales.reshape(-1, count).T, "q": as_bytes(join_sub_blocks(q, count).T)}


SMALL: dict[str, Callable[[FloatBlocks], Fields]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
}
