"""Kullback-Leibler divergences between two tensors, of their logits or of their histograms."""

import functools

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq.analysis._metrics import pair, to_elements
from jaxq.analysis._sums import blocks_of, largest_magnitude, over_blocks, power_of_two
from jaxq.recipes import Granularity

__all__ = ["kl_of_logits", "kl_of_values"]


@functools.partial(jax.jit, static_argnames="axis")
def kl_of_logits(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, *, axis: int = -1) -> jax.Array:
    """Returns the Kullback-Leibler divergence between the softmax distributions of two tensors.

    With p = softmax(x) and q = softmax(y), the divergence is the sum of p log(p / q) along an axis,
    in nats. It measures the loss of a quantized classifier or language model.

    Args:
      x: the original model's float16, bfloat16, float32 or float64 logits. Minus infinity means a
        probability of 0.
      y: the quantized model's logits, of the same shape.
      axis: the axis of the classes. Default: -1.

    Returns:
      One nonnegative number per distribution: infinity if q is 0 where p is not; NaN if a logit is
      NaN or plus infinity, or if all are minus infinity; 0 for an axis of length 0.

    Raises:
      TypeError: if a dtype is not a float.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(kl_of_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)]))), 4)
      0.1438
    """
    x, y = pair("kl_of_logits", x, y)
    p, q = jax.nn.log_softmax(x, axis), jax.nn.log_softmax(y, axis)
    # A large p - q makes even a subnormal probability matter, and XLA flushes subnormals to 0. The
    # square root of the probability is a normal number.
    root = jnp.exp(p * x.dtype.type(0.5))
    terms = where(root == 0, x.dtype.type(0) * root, root * (root * (p - q)))
    return lax.max(jnp.sum(terms, axis=axis), x.dtype.type(0))


@functools.partial(jax.jit, static_argnames=("per", "bins"))
def kl_of_values(
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    *,
    per: Granularity | None = None,
    bins: int = 64,
) -> jax.Array:
    """Returns the Kullback-Leibler divergence between the histograms of two tensors, in nats.

    The bins have equal width from the lowest to the largest finite value of x; values of y outside
    this range count in the first or last bin. Every bin gets an extra half count (Krichevsky and
    Trofimov), so that a bin that is empty for y has a high but finite cost. The divergence measures
    how much the shape of the distribution has changed, not the error of individual numbers.

    Args:
      x: the original tensor, as in `compare`.
      y: the approximation, of the same shape.
      per: the granularity, as in `compare`.
      bins: the number of bins, at least 2. Default: 64. If a quantized y has fewer levels than
        there are bins, the divergence is large.

    Returns:
      One nonnegative number per block. Elements that are NaN or infinite in x or y are ignored; a
      block without other elements has divergence 0.

    Raises:
      TypeError: if a dtype is not a float.
      ValueError: as in `compare`; or if `bins` is below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.linspace(-1.0, 1.0, 1000)
      >>> round(float(kl_of_values(x, x)), 4), round(float(kl_of_values(x, jnp.round(x))), 1)
      (0.0, 3.2)
    """
    if bins < 2:
        raise ValueError(
            f"kl_of_values: `bins` must be at least 2, got {bins}. Use, for example, 64."
        )
    x, y = pair("kl_of_values", x, y)
    layout, cut = FloatLayout.of(x.dtype), blocks_of(x.shape, per)
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    shape = cut.split(x.reshape(cut.shape)).shape
    blocks = int(np.prod(cut.counts))

    def split(a: jax.Array) -> jax.Array:
        return cut.split(a.reshape(cut.shape))

    # Subnormals are scaled to normal numbers, because XLA may flush them to zero.
    magnitude = where(finite, largest_magnitude(x, layout), layout.int_type(0))
    (top,) = over_blocks([magnitude], cut, per, [lax.max])
    exponent = (extended_bits(top, layout) >> layout.mantissa_bits) - layout.int_type(layout.bias)
    up = where(top == 0, layout.int_type(0), -exponent)
    up = up if per is None else to_elements(up, x, cut)
    x, y = (power_of_two(v, up, layout) for v in (x, y))
    inside, infinite = split(finite), layout.float_type(np.inf)
    low = jnp.min(where(inside, split(x), infinite), cut.axes, keepdims=True, initial=np.inf)
    high = jnp.max(where(inside, split(x), -infinite), cut.axes, keepdims=True, initial=-np.inf)
    half = layout.float_type(0.5)
    width = (high * half - low * half) / layout.float_type(bins)  # Halved: high - low may overflow.
    block = cut.align_scales(jnp.arange(blocks, dtype=jnp.int32).reshape(cut.counts))
    block = jnp.broadcast_to(block, shape)

    def logs(a: jax.Array) -> jax.Array:
        place = (split(a) * half - low * half) / where(width > 0, width, layout.float_type(1))
        place = lax.clamp(layout.float_type(0), place, layout.float_type(bins - 1))
        index = block * np.int32(bins) + place.astype(jnp.int32)
        index = where(inside, index, np.int32(blocks * bins))
        counts = jnp.zeros(blocks * bins, jnp.int32).at[index.reshape(-1)].add(1, mode="drop")
        counts = counts.reshape(blocks, bins).astype(x.dtype) + half
        return jnp.log(counts) - jnp.log(jnp.sum(counts, 1, keepdims=True))

    p, q = logs(x), logs(y)
    kl = lax.max(jnp.sum(jnp.exp(p) * (p - q), 1), layout.float_type(0))
    return kl.reshape(() if per is None else cut.counts)
