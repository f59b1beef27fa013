"""ggml's searches for the scales of IQ4_NL and IQ4_XS, whose elements are levels of a codebook."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._ggml.blocks import (
    FloatBlocks,
    QuantizedBlocks,
    divide_or_zero,
    error_weights,
    join_sub_blocks,
    mean_square,
    sub_blocks,
)
from jaxq._ggml.searches import (
    EPS,
    largest,
    nearest_levels,
    product,
    quotient,
    round_to_integer,
    sums,
)
from jaxq._jax.arithmetic import rounded
from jaxq.formats import get_format

__all__ = ["iq4_nl", "iq4_xs"]

# The levels of the codebook, in ascending order.
_IQ4 = get_format("iq4").values.astype(np.int64)


def _iq4_scales(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the best scales for the levels of IQ4_NL, one per block."""
    amax, signed = largest(x)
    empty = amax < EPS
    signed = jnp.where(empty, np.float32(1), signed)
    levels = _IQ4.astype(np.float32)

    def fit(inverse: jax.Array) -> tuple[jax.Array, ...]:
        def terms(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
            q = nearest_levels(rounded(inverse * x), _IQ4, levels)
            wq = product(w, q)
            return product(wq, x), product(wq, q)

        return sums(terms, x, weights)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, quotient(a, jnp.where(b > 0, b, np.float32(1))), np.float32(0))

    def attempt(i: jax.Array, best: tuple) -> tuple:
        d, score = best
        factor = (i - 7 + int(_IQ4[0])).astype(jnp.float32)
        sum_qx, sum_q2 = fit(quotient(jnp.broadcast_to(factor, signed.shape), signed))
        better = (sum_q2 > 0) & (product(sum_qx, sum_qx) > product(score, sum_q2))
        new = ratio(sum_qx, sum_q2)
        return jnp.where(better, new, d), jnp.where(better, product(new, sum_qx), score)

    first = divide_or_zero(1, quotient(-signed, jnp.full(signed.shape, _IQ4[0], jnp.float32)))
    sum_qx, sum_q2 = fit(first)
    d = ratio(sum_qx, sum_q2)
    d, _ = lax.fori_loop(0, 15, attempt, (d, product(d, sum_qx)))
    return jnp.where(empty, np.float32(0), d)


def _iq4_weights(blocks: FloatBlocks) -> jax.Array:
    """Returns the weights of the squared errors."""
    if blocks.weights is None:
        return product(blocks.x, blocks.x)
    return error_weights(blocks.weights, blocks.x, mean_square(blocks.x, 2.0))


def iq4_nl(blocks: FloatBlocks) -> QuantizedBlocks:
    """Quantizes blocks of 32 elements; codes are indices of levels."""
    d = _iq4_scales(blocks.x, _iq4_weights(blocks))
    return QuantizedBlocks(
        d, None, nearest_levels(rounded(blocks.x * divide_or_zero(1, d)[None]), _IQ4).T
    )


def iq4_xs(blocks: FloatBlocks) -> QuantizedBlocks:
    """Quantizes super-blocks of 8 sub-blocks; codes are indices of levels."""
    x = sub_blocks(blocks.x, 32)
    scale = _iq4_scales(x, sub_blocks(_iq4_weights(blocks), 32))
    d = largest(scale)[1] * np.float32(-1 / 32)
    scales = jnp.clip(round_to_integer(divide_or_zero(1, d)[None] * scale), -32, 31)
    step = product(d[None], scales.astype(jnp.float32))
    q = join_sub_blocks(nearest_levels(rounded(x * divide_or_zero(1, step)[None]), _IQ4))
    return QuantizedBlocks(d, scales.T, q.T)
