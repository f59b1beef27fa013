"""Quantization to K-quants (`_k_types.py`) and to types with a table of levels, as ggml does it.

Each function takes blocks and returns the fields of the type's layout.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax.arithmetic import rounded
from jaxq.interop.gguf._blocks import as_bytes
from jaxq.interop.gguf._k_types import searched
from jaxq.interop.gguf._layouts import IQ4, Fields
from jaxq.recipes import (
    EPS,
    SUPER_BLOCK_RULES,
    Blocks,
    largest,
    levels,
    mean_square,
    nearest,
    over,
    product,
    quotient,
    sub_blocks,
    sums,
    weighted,
    whole,
)

__all__ = ["SEARCHED"]


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
    return {"d": d, "q": as_bytes(levels(rounded(blocks.x * over(1, d)[None]), IQ4).T)}


def _parts_of(x: jax.Array, count: int) -> jax.Array:
    """Returns one number per part, `[parts, blocks]`."""
    return x.reshape(-1, count)


def _iq4_xs(blocks: Blocks) -> Fields:
    count, x = blocks.x.shape[1], sub_blocks(blocks.x, 32)
    scale = _parts_of(_iq4_scales(x, _iq4_weights(blocks, x, 8)), count)
    d = largest(scale)[1] * np.float32(-1 / 32)
    scales = jnp.clip(nearest(over(1, d)[None] * scale), -32, 31)
    step = product(d[None], scales.astype(jnp.float32)).reshape(-1)
    q = as_bytes(whole(levels(rounded(x * over(1, step)[None]), IQ4), count).T)
    codes = (scales + 32).astype(jnp.uint8).T
    return {"d": d, "top": codes >> np.uint8(4), "low": codes & np.uint8(15), "q": q}


SEARCHED: dict[str, Callable[[Blocks], Fields]] = {
    **{name: functools.partial(searched, name) for name in SUPER_BLOCK_RULES},
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
