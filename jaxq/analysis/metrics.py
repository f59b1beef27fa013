"""Errors of one tensor against another: as many as are wanted from two passes over the data.

The first pass finds the largest magnitude, the second adds up in units of a power of two near it,
so that squares neither overflow nor vanish, whatever the size of the numbers. To add a metric: a
field of `Comparison`, and the sum that it needs in `_compare`.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.analysis.sums import blocks_of, largest_magnitude, over_blocks, power_of_two
from jaxq.bits import Layout, where
from jaxq.blocks import Cut, Granularity
from jaxq.casting import floats, widen

__all__ = ["Comparison", "compare", "kl_of_logits", "kl_of_values", "pair"]


class Comparison(NamedTuple):
    """Errors e = y - x; arrays in the shape of the blocks, scalars for a whole tensor.

    Numbers count where x is finite. Where y then is not, the error is infinite: `mse`,
    `max_error`, `mean_error` and `mean_relative_error` are, and `sqnr_db` is minus infinity;
    `cosine` leaves such numbers out. Of no numbers at all the errors are 0, as of equal ones.

    Attributes:
      mse: the mean of e^2.
      max_error: the largest |e|.
      mean_error: the mean of |e|.
      mean_relative_error: the mean of |e / x| where x is not 0; 0 if it is nowhere else.
      power: the mean of x^2.
      sqnr_db: 10 log10(power / mse), infinite where the mse is 0 (of zeros too), and minus
        infinity where only the power is.
      cosine: of the angle between x and y; 1 if both are 0, 0 if one is.
      lost: the share of the numbers that y has as NaN or infinity.
      skipped: the share of all elements that do not count, as x is NaN or infinite.
    """

    mse: jax.Array
    max_error: jax.Array
    mean_error: jax.Array
    mean_relative_error: jax.Array
    power: jax.Array
    sqnr_db: jax.Array
    cosine: jax.Array
    lost: jax.Array
    skipped: jax.Array


def compare(
    x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, *, per: Granularity | None = None
) -> Comparison:
    """Errors of y, which stands for x.

    Sums are taken in float32 (float64 for float64 data), short runs in order and the rest as a
    tree: over millions of numbers they are right to a few parts in 10^7. Magnitudes below 2^-110
    of a block's largest, and float32 subnormals, may count as zero.

    Args:
      x: the original; float16, bfloat16, float32 or float64, any shape.
      y: of the same shape, in any of these dtypes.
      per: which numbers are compared together, as a recipe's granularity: `PerChannel((0,))` gives
        a comparison a channel. None: all.

    Returns:
      A `Comparison`. Its gradient is zero; train on an error of your own.

    Raises:
      TypeError: a dtype that is no float.
      ValueError: shapes that differ; a granularity that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> c = compare(jnp.array([1.0, -2.0, 0.0, 2.0]), jnp.array([1.0, -2.0, 0.5, 1.5]))
      >>> float(c.mse), float(c.max_error), round(float(c.sqnr_db), 2)
      (0.125, 0.5, 12.55)
    """
    x, y = pair("compare", x, y)
    return _compare(x, y, per)


def pair(
    name: str, x: jax.typing.ArrayLike, y: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Two arguments as arrays of one shape and one dtype, float32 or float64, without gradient."""
    x, y = (widen(floats(name, lax.stop_gradient(a))) for a in (x, y))
    if x.shape != y.shape:
        raise ValueError(
            f"{name}: `y` must have the shape of `x`, {x.shape}, got {y.shape}. "
            "Broadcast or reshape it first."
        )
    dtype = jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32
    return x.astype(dtype), y.astype(dtype)


@functools.partial(jax.jit, static_argnames="per")
def _compare(x: jax.Array, y: jax.Array, per: Granularity | None) -> Comparison:
    layout, cut = Layout.of(x.dtype), blocks_of(x.shape, per)
    zero, one = layout.float_type(0), layout.float_type(1)
    magnitudes = [largest_magnitude(v, layout) for v in (x, y)]
    top = lax.max(*over_blocks(magnitudes, cut, per, [lax.max] * 2))
    # Largest magnitudes go to 2^47: then 2^32 squares are within float32, and those of 2^-63 too.
    room = layout.int_type(47 if layout.float_type is np.float32 else 400)
    least, mantissa = layout.int_type(1), layout.int_type(layout.mantissa_bits)
    up = room - (lax.max(top >> mantissa, least) - layout.int_type(layout.bias))
    spread = up if per is None else _spread(up, x, cut)
    a, b = (power_of_two(v, spread, layout) for v in (x, y))
    counts, kept = jnp.isfinite(x), jnp.isfinite(x) & jnp.isfinite(y)
    a, b = where(kept, a, zero), where(kept, b, zero)
    error = jnp.abs(b - a)
    relative = where(a == 0, zero, error / where(a == 0, one, jnp.abs(a)))
    arrays = [error * error, error, relative, a * a, b * b, a * b, error]
    arrays += [v.astype(x.dtype) for v in (counts, kept, kept & (a != 0))]
    sums = over_blocks(arrays, cut, per, [lax.add] * 6 + [lax.max] + [lax.add] * 3)
    squares, total, ratio, signal, other, inner, largest, count, both, nonzero = sums
    n, lost = lax.max(count, one), count - both
    size = _sizes(cut, per, x.dtype)
    down = -up

    def errors(value: jax.Array) -> jax.Array:
        return where(lost > 0, layout.float_type(np.inf), value)

    sqnr = _decibels(signal, squares, layout)
    sqnr = where(signal == 0, layout.float_type(-np.inf), sqnr)
    sqnr = where(squares == 0, layout.float_type(np.inf), sqnr)
    norms = jnp.sqrt(signal) * jnp.sqrt(other)
    cosine = lax.clamp(-one, inner / where(norms == 0, one, norms), one)
    cosine = where(norms == 0, where(signal == other, one, zero), cosine)
    mean_square, power = (
        power_of_two(power_of_two(v / n, down, layout), down, layout) for v in (squares, signal)
    )
    return Comparison(
        mse=errors(mean_square),
        max_error=errors(power_of_two(largest, down, layout)),
        mean_error=errors(power_of_two(total / n, down, layout)),
        mean_relative_error=errors(ratio / lax.max(nonzero, one)),
        power=power,
        sqnr_db=where(lost > 0, layout.float_type(-np.inf), sqnr),
        cosine=cosine,
        lost=lost / n,
        skipped=(size - count) / lax.max(size, one),
    )


def _decibels(a: jax.Array, b: jax.Array, layout: Layout) -> jax.Array:
    """10 log10(a / b) of normal numbers, from their exponents and the ratio of their significands.

    The logarithms themselves would lose digits, as each is large where their difference is not.
    """
    digits, m = layout.int_type((1 << layout.mantissa_bits) - 1), layout.mantissa_bits
    a_bits, b_bits = layout.bits(a), layout.bits(b)
    octaves = ((a_bits >> m) - (b_bits >> m)).astype(layout.float_type)
    top, bottom = (layout.floats(bits & digits | layout.field(0)) for bits in (a_bits, b_bits))
    octave = layout.float_type(10 * math.log10(2))
    return octaves * octave + layout.float_type(10) * jnp.log10(top / bottom)


def _spread(values: jax.Array, x: jax.Array, cut: Cut) -> jax.Array:
    """One value a block, for each element."""
    wide = jnp.broadcast_to(cut.spread(values), jax.eval_shape(cut.split, x).shape)
    return cut.merge(wide)


def _sizes(cut: Cut, per: Granularity | None, dtype: np.dtype) -> jax.Array:
    sizes = np.asarray(cut.sizes, dtype)
    return jnp.asarray(sizes.reshape(() if per is None else cut.counts))


@functools.partial(jax.jit, static_argnames="axis")
def kl_of_logits(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, *, axis: int = -1) -> jax.Array:
    """The Kullback-Leibler divergence between the distributions that two tensors of logits mean.

    With p = softmax(x) and q = softmax(y), the sum of p log(p / q) along an axis, in nats: what a
    quantized classifier or language model loses against the original.

    Args:
      x: the original's logits; float16, bfloat16, float32 or float64. Minus infinity means a
        chance of 0.
      y: the other's, of the same shape.
      axis: the axis of the classes.

    Returns:
      One number for each distribution, not negative; infinite where q is 0 and p is not; NaN where
      a logit is NaN or plus infinity, or all are minus infinity; 0 for an axis of length 0.

    Raises:
      TypeError: a dtype that is no float.
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(kl_of_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)]))), 4)
      0.1438
    """
    x, y = pair("kl_of_logits", x, y)
    p, q = jax.nn.log_softmax(x, axis), jax.nn.log_softmax(y, axis)
    chance = jnp.exp(p)
    terms = where(chance == 0, x.dtype.type(0) * chance, chance * (p - q))
    return lax.max(jnp.sum(terms, axis=axis), x.dtype.type(0))


@functools.partial(jax.jit, static_argnames=("per", "bins"))
def kl_of_values(
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    *,
    per: Granularity | None = None,
    bins: int = 64,
) -> jax.Array:
    """The Kullback-Leibler divergence between the histograms of two tensors' numbers.

    Bins are of equal width from the lowest to the largest finite number of x; y beyond them counts
    in the last ones. Every bin gets half a count more (Krichevsky and Trofimov), so that a bin that
    y leaves empty costs much and not infinitely much. In nats. It says how much the shape of a
    distribution has changed, not whether any single number is right.

    Args:
      x: the original, as in `compare`.
      y: of the same shape.
      per: as in `compare`.
      bins: how many. With more bins than a quantized y has levels the divergence is large.

    Returns:
      One number for each block, not negative. Elements that are NaN or infinite in x or in y are
      in no bin; a block without others has 0.

    Raises:
      TypeError: a dtype that is no float.
      ValueError: as in `compare`; or `bins` is below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.linspace(-1.0, 1.0, 1000)
      >>> round(float(kl_of_values(x, x)), 4), round(float(kl_of_values(x, jnp.round(x))), 1)
      (0.0, 3.2)
    """
    if bins < 2:
        raise ValueError(f"kl_of_values: `bins` must be at least 2, got {bins}.")
    x, y = pair("kl_of_values", x, y)
    layout, cut = Layout.of(x.dtype), blocks_of(x.shape, per)
    kept = jnp.isfinite(x) & jnp.isfinite(y)
    shape = cut.split(x.reshape(cut.shape)).shape
    blocks = int(np.prod(cut.counts))

    def split(a: jax.Array) -> jax.Array:
        return cut.split(a.reshape(cut.shape))

    inside, infinite = split(kept), layout.float_type(np.inf)
    low = jnp.min(where(inside, split(x), infinite), cut.axes, keepdims=True, initial=np.inf)
    high = jnp.max(where(inside, split(x), -infinite), cut.axes, keepdims=True, initial=-np.inf)
    half = layout.float_type(0.5)
    width = (high * half - low * half) / layout.float_type(bins)  # Halved: it may be too large.
    block = cut.spread(jnp.arange(blocks, dtype=jnp.int32).reshape(cut.counts))
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
