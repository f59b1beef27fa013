"""Quantization to K-quants and to the types with a table of levels, as ggml does it.

Each function takes blocks and returns the fields of the type's layout.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax.arithmetic import barrier, rounded
from jaxq.interop.gguf._blocks import (
    IMPORTANT,
    Blocks,
    as_bytes,
    as_half,
    divided,
    mean_square,
    over,
    split_bits,
    sub_blocks,
    weighted,
    whole,
)
from jaxq.interop.gguf._layouts import IQ4, Fields, two_scales_bytes
from jaxq.interop.gguf._searches import (
    EPS,
    Steps,
    affine,
    descent,
    largest,
    levels,
    nearest,
    positive,
    product,
    quotient,
    sums,
    symmetric,
)

__all__ = ["SEARCHED"]


# K-quants: blocks of 256, whose parts have scales that are quantized themselves.


class _KType(NamedTuple):
    """The parameters in which Q2_K, Q4_K and Q5_K differ.

    Attributes:
      length: the number of elements in a part.
      limit: the largest code.
      scales: the largest code of a scale.
      steps: the scales to try without an importance matrix.
      factor: the factor of a block's mean square in its weights.
    """

    length: int
    limit: int
    scales: int
    steps: Steps
    factor: float


def _parts_of(x: jax.Array, count: int) -> jax.Array:
    """Returns one number per part, `[parts, blocks]`."""
    return x.reshape(-1, count)


class _Parts(NamedTuple):
    d: jax.Array
    m: jax.Array
    scales: jax.Array
    minima: jax.Array
    q: jax.Array


def _k_affine(blocks: Blocks, kind: _KType) -> _Parts:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, kind.length)
    if blocks.weights is None:
        magnitude = jnp.abs(x)
        absolute = kind.limit == 3
        w = magnitude if absolute else jnp.sqrt(mean_square(x, 1.0))[None] + magnitude
        found = affine(x, kind.limit, w, kind.steps, absolute)
        scale, minimum = (_parts_of(part, count) for part in (found.scale, found.minimum))
        top = [jnp.maximum(part.max(axis=0), np.float32(0)) for part in (scale, minimum)]
        codes = [
            jnp.minimum(nearest(over(kind.scales, most)[None] * part), kind.scales)
            for most, part in zip(top, (scale, minimum), strict=True)
        ]
        d, m = (divided(most, kind.scales) for most in top)
    else:
        square = mean_square(blocks.x, kind.factor)
        each = jnp.tile(square, 256 // kind.length)
        w = weighted(sub_blocks(blocks.weights, kind.length), x, each)
        found = affine(x, kind.limit, w, IMPORTANT)
        total = _parts_of(sums(lambda v: (v,), w)[0], count)
        scale, minimum = (_parts_of(part, count) for part in (found.scale, found.minimum))
        (d, first), (m, second) = (positive(v, kind.scales, total) for v in (scale, minimum))
        codes = [first, second]
    scales, minima = (code.astype(jnp.uint8).T for code in codes)
    # The codes are computed again from the scales as stored. A part whose scale is 0 keeps those
    # of the search, whose scale and minimum are other numbers.
    step = barrier((as_half(d)[None] * codes[0].astype(jnp.float32)).reshape(-1))
    low = barrier((as_half(m)[None] * codes[1].astype(jnp.float32)).reshape(-1))
    safe = jnp.where(step != 0, step, np.float32(1))
    safe = jnp.broadcast_to(safe[None], x.shape)
    q = jnp.clip(nearest(quotient(x + low[None], safe)), 0, kind.limit)
    q = jnp.where((step != 0)[None], q, found.codes)
    return _Parts(d, m, scales, minima, whole(q, count))


def _q2_k(blocks: Blocks) -> Fields:
    parts = _k_affine(blocks, _KType(16, 3, 15, Steps(-0.5, 0.1, 15), 1.0))
    scales = parts.scales | parts.minima << np.uint8(4)
    return {"scales": scales, "q": as_bytes(parts.q), "d": parts.d, "m": parts.m}


def _q4_k(blocks: Blocks) -> Fields:
    parts = _k_affine(blocks, _KType(32, 15, 63, Steps(-1.0, 0.1, 20), 2.0))
    scales = two_scales_bytes(parts.scales, parts.minima)
    return {"d": parts.d, "m": parts.m, "scales": scales, "q": as_bytes(parts.q)}


def _q5_k(blocks: Blocks) -> Fields:
    parts = _k_affine(blocks, _KType(32, 31, 63, Steps(-0.5, 0.1, 15), 2.0))
    scales = two_scales_bytes(parts.scales, parts.minima)
    return {"d": parts.d, "m": parts.m, "scales": scales, **split_bits(parts.q)}


def _requantized(
    x: jax.Array, d: jax.Array, scales: jax.Array, limit: int, found: jax.Array
) -> jax.Array:
    """Returns the codes of parts from scales as stored; those of the search where a scale is 0."""
    step = barrier((as_half(d)[None] * scales.astype(jnp.float32)).reshape(-1))
    safe = jnp.where(step != 0, step, np.float32(1))
    q = jnp.clip(nearest(quotient(x, jnp.broadcast_to(safe[None], x.shape))), -limit, limit - 1)
    return jnp.where((step != 0)[None], q, found)


def _q3_k(blocks: Blocks) -> Fields:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 16)
    if blocks.weights is None:
        scale, found = descent(x, 4)
        scale = _parts_of(scale, count)
        most = largest(scale)[1]
        inverse = over(-32, most)
        scales = jnp.clip(nearest(inverse[None] * scale), -32, 31)
        scales = jnp.where((most != 0)[None], scales, -32)
        d = over(1, inverse)
    else:
        each = jnp.tile(mean_square(blocks.x, 2.0), 16)
        w = weighted(sub_blocks(blocks.weights, 16), x, each)
        scale, found = symmetric(x, 4, w)
        total = _parts_of(sums(lambda v: (v,), w)[0], count)
        d, scales = symmetric(_parts_of(scale, count), 32, total)
    q = as_bytes(whole(_requantized(x, d, scales, 4, found), count) + 4)
    codes = (scales + 32).astype(jnp.uint8).T
    high, low, four = q >> np.uint8(2), q & np.uint8(3), np.uint8(4)
    return {"high": high, "q": low, "low": codes & np.uint8(15), "top": codes >> four, "d": d}


def _q6_k(blocks: Blocks) -> Fields:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 16)
    w = product(x, x) if blocks.weights is None else sub_blocks(blocks.weights, 16)
    scale, found = symmetric(x, 32, w)
    scale = _parts_of(scale, count)
    amax, most = largest(scale)
    empty = amax < EPS
    inverse = over(-128, jnp.where(empty, np.float32(1), most))
    scales = jnp.where(empty[None], 0, jnp.minimum(nearest(inverse[None] * scale), 127))
    d = jnp.where(empty, np.float32(0), over(1, inverse))
    q = whole(_requantized(x, d, scales, 32, found), count)
    q = jnp.where(empty[None], -32, q)
    return {**split_bits(q + 32), "scales": scales.astype(jnp.int8).T, "d": d}


# Types with a table of levels.


def _iq4_scales(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the scales that fit the levels of IQ4_NL best."""
    amax, signed = largest(x)
    empty = amax < EPS
    signed = jnp.where(empty, np.float32(1), signed)
    table = jnp.asarray(IQ4.astype(np.float32))

    def fit(inverse: jax.Array) -> tuple[jax.Array, ...]:
        def terms(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
            q = table[levels(rounded(inverse * x), IQ4)]
            wq = product(w, q)
            return product(wq, x), product(wq, q)

        return sums(terms, x, weights)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, quotient(a, jnp.where(b > 0, b, np.float32(1))), np.float32(0))

    def attempt(i: jax.Array, best: tuple) -> tuple:
        d, score = best
        factor = (i - 7 + int(IQ4[0])).astype(jnp.float32)
        sum_qx, sum_q2 = fit(quotient(jnp.broadcast_to(factor, signed.shape), signed))
        better = (sum_q2 > 0) & (product(sum_qx, sum_qx) > product(score, sum_q2))
        new = ratio(sum_qx, sum_q2)
        return jnp.where(better, new, d), jnp.where(better, product(new, sum_qx), score)

    first = over(1, quotient(-signed, jnp.full(signed.shape, IQ4[0], jnp.float32)))
    sum_qx, sum_q2 = fit(first)
    d = ratio(sum_qx, sum_q2)
    d, _ = lax.fori_loop(0, 15, attempt, (d, product(d, sum_qx)))
    return jnp.where(empty, np.float32(0), d)


def _iq4_weights(blocks: Blocks, x: jax.Array, parts: int) -> jax.Array:
    if blocks.weights is None:
        return product(x, x)
    square = jnp.tile(mean_square(blocks.x, 2.0), parts)
    return weighted(sub_blocks(blocks.weights, 32), x, square)


def _iq4_nl(blocks: Blocks) -> Fields:
    d = _iq4_scales(blocks.x, _iq4_weights(blocks, blocks.x, 1))
    return {"d": d, "q": as_bytes(levels(rounded(blocks.x * over(1, d)[None]), IQ4))}


def _iq4_xs(blocks: Blocks) -> Fields:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 32)
    scale = _parts_of(_iq4_scales(x, _iq4_weights(blocks, x, 8)), count)
    d = largest(scale)[1] * np.float32(-1 / 32)
    scales = jnp.clip(nearest(over(1, d)[None] * scale), -32, 31)
    step = product(d[None], scales.astype(jnp.float32)).reshape(-1)
    q = as_bytes(whole(levels(rounded(x * over(1, step)[None]), IQ4), count))
    codes = (scales + 32).astype(jnp.uint8).T
    return {"d": d, "top": codes >> np.uint8(4), "low": codes & np.uint8(15), "q": q}


SEARCHED: dict[str, Callable[[Blocks], Fields]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
