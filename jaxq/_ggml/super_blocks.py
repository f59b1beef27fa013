"""Rules for the scales of super-blocks, and ggml's searches for those of K-quants.

Each search takes blocks `[elements, blocks]` and returns the scales of both levels and the codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._ggml.blocks import (
    IMPORTANCE_STEPS,
    Blocks,
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
from jaxq._ggml.searches import (
    EPS,
    Steps,
    affine,
    descent,
    largest,
    nearest,
    positive,
    product,
    quotient,
    sums,
    symmetric,
)
from jaxq._ggml.tables import iq4_nl, iq4_xs
from jaxq._jax.arithmetic import barrier

__all__ = ["SUPER_BLOCK_RULES", "SuperBlockRule"]

_SIZE = 256  # The number of elements in a super-block of a K-quant.


class SuperBlockRule(NamedTuple):
    """A rule for the scales of super-blocks.

    Attributes:
      element: the name of the format of the elements.
      scale_format: the name of the format of the scales and minima of the parts.
      length: the number of elements in a part.
      fallback: the recipe that llama.cpp uses for rows that a super-block does not divide.
      search: the search.
      minimum: True if parts have a minimum.
      size: the number of elements in a super-block.
      weighted: True if the search minimizes errors, which an importance can weight.
    """

    element: str
    scale_format: str
    length: int
    fallback: str | None
    search: Callable[[Blocks], QuantizedBlocks]
    minimum: bool = False
    size: int = _SIZE
    weighted: bool = True


class _AffineRule(NamedTuple):
    """The parameters in which Q2_K, Q4_K and Q5_K differ.

    Attributes:
      length: the number of elements in a part.
      code_limit: the largest code.
      scale_limit: the largest code of a scale.
      steps: the scales to try without an importance matrix.
      factor: the factor of a block's mean square in its weights.
    """

    length: int
    code_limit: int
    scale_limit: int
    steps: Steps
    factor: float


def _parts_of(x: jax.Array, count: int) -> jax.Array:
    """Returns one number per part, `[parts, blocks]`."""
    return x.reshape(-1, count)


def _with_minima(rule: _AffineRule, blocks: Blocks) -> QuantizedBlocks:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, rule.length)
    if blocks.weights is None:
        magnitude = jnp.abs(x)
        absolute = rule.code_limit == 3
        w = magnitude if absolute else jnp.sqrt(mean_square(x, 1.0))[None] + magnitude
        fit = affine(x, rule.code_limit, w, rule.steps, absolute)
        scale, minimum = (_parts_of(part, count) for part in (fit.scale, fit.minimum))
        top = [jnp.maximum(part.max(axis=0), np.float32(0)) for part in (scale, minimum)]
        codes = [
            jnp.minimum(
                nearest(divide_or_zero(rule.scale_limit, most)[None] * part), rule.scale_limit
            )
            for most, part in zip(top, (scale, minimum), strict=True)
        ]
        d, m = (divided(most, rule.scale_limit) for most in top)
    else:
        square = mean_square(blocks.x, rule.factor)
        each = jnp.tile(square, _SIZE // rule.length)
        w = error_weights(sub_blocks(blocks.weights, rule.length), x, each)
        fit = affine(x, rule.code_limit, w, IMPORTANCE_STEPS)
        total = _parts_of(sums(lambda v: (v,), w)[0], count)
        scale, minimum = (_parts_of(part, count) for part in (fit.scale, fit.minimum))
        (d, first), (m, second) = (positive(v, rule.scale_limit, total) for v in (scale, minimum))
        codes = [first, second]
    # The codes are computed again from the scales as stored. A part whose scale is 0 keeps those
    # of the search, whose scale and minimum are other numbers.
    step = barrier((to_float16(d)[None] * codes[0].astype(jnp.float32)).reshape(-1))
    low = barrier((to_float16(m)[None] * codes[1].astype(jnp.float32)).reshape(-1))
    safe = jnp.where(step != 0, step, np.float32(1))
    safe = jnp.broadcast_to(safe[None], x.shape)
    q = jnp.clip(nearest(quotient(x + low[None], safe)), 0, rule.code_limit)
    q = jnp.where((step != 0)[None], q, fit.codes)
    return QuantizedBlocks(d, codes[0].T, join_sub_blocks(q, count).T, m, codes[1].T)


def _q2_k(blocks: Blocks) -> QuantizedBlocks:
    return _with_minima(
        _AffineRule(
            length=16, code_limit=3, scale_limit=15, steps=Steps(-0.5, 0.1, 15), factor=1.0
        ),
        blocks,
    )


def _q4_k(blocks: Blocks) -> QuantizedBlocks:
    return _with_minima(
        _AffineRule(
            length=32, code_limit=15, scale_limit=63, steps=Steps(-1.0, 0.1, 20), factor=2.0
        ),
        blocks,
    )


def _q5_k(blocks: Blocks) -> QuantizedBlocks:
    return _with_minima(
        _AffineRule(
            length=32, code_limit=31, scale_limit=63, steps=Steps(-0.5, 0.1, 15), factor=2.0
        ),
        blocks,
    )


def _requantized(
    x: jax.Array, d: jax.Array, scales: jax.Array, limit: int, searched_codes: jax.Array
) -> jax.Array:
    """Returns the codes of parts from scales as stored; those of the search where a scale is 0."""
    step = barrier((to_float16(d)[None] * scales.astype(jnp.float32)).reshape(-1))
    safe = jnp.where(step != 0, step, np.float32(1))
    q = jnp.clip(nearest(quotient(x, jnp.broadcast_to(safe[None], x.shape))), -limit, limit - 1)
    return jnp.where((step != 0)[None], q, searched_codes)


def _q3_k(blocks: Blocks) -> QuantizedBlocks:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 16)
    if blocks.weights is None:
        scale, searched_codes = descent(x, 4)
        scale = _parts_of(scale, count)
        most = largest(scale)[1]
        inverse = divide_or_zero(-32, most)
        scales = jnp.clip(nearest(inverse[None] * scale), -32, 31)
        scales = jnp.where((most != 0)[None], scales, -32)
        d = divide_or_zero(1, inverse)
    else:
        each = jnp.tile(mean_square(blocks.x, 2.0), 16)
        w = error_weights(sub_blocks(blocks.weights, 16), x, each)
        scale, searched_codes = symmetric(x, 4, w)
        total = _parts_of(sums(lambda v: (v,), w)[0], count)
        d, scales = symmetric(_parts_of(scale, count), 32, total)
    q = join_sub_blocks(_requantized(x, d, scales, 4, searched_codes), count)
    return QuantizedBlocks(d, scales.T, q.T)


def _q6_k(blocks: Blocks) -> QuantizedBlocks:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 16)
    w = product(x, x) if blocks.weights is None else sub_blocks(blocks.weights, 16)
    scale, searched_codes = symmetric(x, 32, w)
    scale = _parts_of(scale, count)
    amax, most = largest(scale)
    empty = amax < EPS
    inverse = divide_or_zero(-128, jnp.where(empty, np.float32(1), most))
    scales = jnp.where(empty[None], 0, jnp.minimum(nearest(inverse[None] * scale), 127))
    d = jnp.where(empty, np.float32(0), divide_or_zero(1, inverse))
    q = join_sub_blocks(_requantized(x, d, scales, 32, searched_codes), count)
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
