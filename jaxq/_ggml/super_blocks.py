"""Rules for the scales of super-blocks, and ggml's quantizers for K-quants.

A super-block is divided into sub-blocks, each with its own scale. The scales are quantized too, and
their factor is the scale of the second level. A sub-block is a block of a recipe's granularity; a
"block" of ggml, as in `FloatBlocks`, is a super-block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.blocks import (
    IMPORTANCE_STEPS,
    FloatBlocks,
    QuantizedBlocks,
    divide_or_zero,
    divided,
    error_weights,
    join_sub_blocks,
    mean_square,
    sub_blocks,
    to_float16,
)
from jaxq._ggml.floats import mxfp4, nvfp4
from jaxq._ggml.iq4 import iq4_nl, iq4_xs
from jaxq._ggml.searches import (
    EPS,
    Steps,
    first,
    fit_affine,
    fit_by_descent,
    fit_nonnegative,
    fit_symmetric,
    largest,
    positive,
    product,
    quotient,
    round_to_integer,
    sums,
)
from jaxq._jax.arithmetic import square_root
from jaxq._jax.barriers import barrier

__all__ = ["SUPER_BLOCK_RULES", "SuperBlockRule"]

_SIZE = 256  # The number of elements in a super-block of a K-quant.


class SuperBlockRule(NamedTuple):
    """A rule for the scales of super-blocks. A rule with `size == length` has no super-blocks.

    Attributes:
      element: the name of the format of the elements.
      scale_format: the name of the format of the sub-blocks' scales and minima.
      length: the number of elements in a sub-block.
      fallback: the recipe that llama.cpp uses for rows that a super-block does not divide.
      search: the function that quantizes super-blocks.
      minimum: True if sub-blocks have a minimum.
      size: the number of elements in a super-block, or in a sub-block if there are none.
      weighted: True if the search minimizes errors, which an importance can weight.
    """

    element: str
    scale_format: str
    length: int
    fallback: str | None
    search: Callable[[FloatBlocks], QuantizedBlocks]
    minimum: bool = False
    size: int = _SIZE
    weighted: bool = True


class _AffineRule(NamedTuple):
    """The parameters in which Q2_K, Q4_K and Q5_K differ.

    Attributes:
      length: the number of elements in a sub-block.
      code_limit: the largest code.
      scale_limit: the largest code of a scale.
      steps: the scales to try without an importance matrix.
      factor: the factor of a block's mean square in the weights of its errors.
    """

    length: int
    code_limit: int
    scale_limit: int
    steps: Steps
    factor: float


class _QuantizedScales(NamedTuple):
    """The quantized scales or minima of sub-blocks: the factor of each block, and the codes."""

    factor: jax.Array
    codes: jax.Array


def _quantize_affine(rule: _AffineRule, blocks: FloatBlocks) -> QuantizedBlocks:
    """Quantizes super-blocks whose sub-blocks have a scale and a minimum."""
    x = sub_blocks(blocks.x, rule.length)
    if blocks.weights is None:
        magnitude = jnp.abs(x)
        absolute = rule.code_limit == 3
        w = magnitude if absolute else square_root(mean_square(x, 1.0))[None] + magnitude
        fit = fit_affine(x, rule.code_limit, w, rule.steps, absolute)
        scales, minima = (
            _divide_by_largest(part, rule.scale_limit) for part in (fit.scale, fit.minimum)
        )
    else:
        square = mean_square(blocks.x, rule.factor)[None]
        w = error_weights(sub_blocks(blocks.weights, rule.length), x, square)
        fit = fit_affine(x, rule.code_limit, w, IMPORTANCE_STEPS)
        total = sums(lambda v: (v,), w)[0]
        scales, minima = (
            _QuantizedScales(*fit_nonnegative(part, rule.scale_limit, total))
            for part in (fit.scale, fit.minimum)
        )
    # The codes are computed again from the scales as stored. A sub-block whose stored scale is 0
    # keeps the codes of the search, which belong to other scales.
    step, low = (
        barrier(to_float16(part.factor)[None] * part.codes.astype(jnp.float32))
        for part in (scales, minima)
    )
    safe = jnp.where(step != 0, step, np.float32(1))
    safe = jnp.broadcast_to(safe[None], x.shape)
    q = jnp.clip(round_to_integer(quotient(x + low[None], safe)), 0, rule.code_limit)
    q = jnp.where((step != 0)[None], q, fit.codes)
    return QuantizedBlocks(
        d=scales.factor,
        scales=scales.codes.T,
        codes=join_sub_blocks(q).T,
        m=minima.factor,
        minima=minima.codes.T,
    )


def _divide_by_largest(x: jax.Array, limit: int) -> _QuantizedScales:
    """Quantizes numbers `[parts, blocks]` such that the largest has the code `limit`."""
    most = positive(first(jnp.greater, x))
    codes = jnp.minimum(round_to_integer(divide_or_zero(limit, most)[None] * x), limit)
    return _QuantizedScales(divided(most, limit), codes)


def _q2_k(blocks: FloatBlocks) -> QuantizedBlocks:
    return _quantize_affine(
        _AffineRule(
            length=16, code_limit=3, scale_limit=15, steps=Steps(-0.5, 0.1, 15), factor=1.0
        ),
        blocks,
    )


def _q4_k(blocks: FloatBlocks) -> QuantizedBlocks:
    return _quantize_affine(
        _AffineRule(
            length=32, code_limit=15, scale_limit=63, steps=Steps(-1.0, 0.1, 20), factor=2.0
        ),
        blocks,
    )


def _q5_k(blocks: FloatBlocks) -> QuantizedBlocks:
    return _quantize_affine(
        _AffineRule(
            length=32, code_limit=31, scale_limit=63, steps=Steps(-0.5, 0.1, 15), factor=2.0
        ),
        blocks,
    )


def _requantized(
    x: jax.Array, d: jax.Array, scales: jax.Array, limit: int, searched_codes: jax.Array
) -> jax.Array:
    """Returns codes for the scales as stored, or the searched codes where a stored scale is 0."""
    step = barrier(to_float16(d)[None] * scales.astype(jnp.float32))
    safe = jnp.where(step != 0, step, np.float32(1))
    q = jnp.clip(
        round_to_integer(quotient(x, jnp.broadcast_to(safe[None], x.shape))), -limit, limit - 1
    )
    return jnp.where((step != 0)[None], q, searched_codes)


def _q3_k(blocks: FloatBlocks) -> QuantizedBlocks:
    x = sub_blocks(blocks.x, 16)
    if blocks.weights is None:
        scale, searched_codes = fit_by_descent(x, 4)
        most = largest(scale)[1]
        inverse = divide_or_zero(-32, most)
        scales = jnp.clip(round_to_integer(inverse[None] * scale), -32, 31)
        scales = jnp.where((most != 0)[None], scales, -32)
        d = divide_or_zero(1, inverse)
    else:
        each = mean_square(blocks.x, 2.0)[None]
        w = error_weights(sub_blocks(blocks.weights, 16), x, each)
        scale, searched_codes = fit_symmetric(x, 4, w)
        total = sums(lambda v: (v,), w)[0]
        d, scales = fit_symmetric(scale, 32, total)
    q = join_sub_blocks(_requantized(x, d, scales, 4, searched_codes))
    return QuantizedBlocks(d, scales.T, q.T)


def _q6_k(blocks: FloatBlocks) -> QuantizedBlocks:
    x = sub_blocks(blocks.x, 16)
    w = product(x, x) if blocks.weights is None else sub_blocks(blocks.weights, 16)
    scale, searched_codes = fit_symmetric(x, 32, w)
    amax, most = largest(scale)
    empty = amax < EPS
    inverse = divide_or_zero(-128, jnp.where(empty, np.float32(1), most))
    scales = jnp.where(empty[None], 0, jnp.minimum(round_to_integer(inverse[None] * scale), 127))
    d = jnp.where(empty, np.float32(0), divide_or_zero(1, inverse))
    q = join_sub_blocks(_requantized(x, d, scales, 32, searched_codes))
    return QuantizedBlocks(d, scales.T, jnp.where(empty[None], -32, q).T)


SUPER_BLOCK_RULES: dict[str, SuperBlockRule] = {
    "q2_k": SuperBlockRule("uint2", "uint4", 16, "q4_0", _q2_k, minimum=True),
    "q3_k": SuperBlockRule("int3", "int6", 16, "q4_0", _q3_k),
    "q4_k": SuperBlockRule("uint4", "uint6", 32, "q5_0", _q4_k, minimum=True),
    "q5_k": SuperBlockRule("uint5", "uint6", 32, "q5_1", _q5_k, minimum=True),
    "q6_k": SuperBlockRule("int6", "int8", 16, "q8_0", _q6_k),
    "iq4_nl": SuperBlockRule("iq4", "float16", 32, None, iq4_nl, size=32),
    "iq4_xs": SuperBlockRule("iq4", "int6", 32, "iq4_nl", iq4_xs),
    "mxfp4_ggml": SuperBlockRule(
        "float4_e2m1fn", "float8_e8m0fnu", 32, None, mxfp4, size=32, weighted=False
    ),
    "nvfp4_ggml": SuperBlockRule(
        "float4_e2m1fn", "float8_e4m3fn", 16, None, nvfp4, size=16, weighted=False
    ),
}
