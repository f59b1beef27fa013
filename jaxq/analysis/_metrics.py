"""Error metrics between two tensors, all computed in two passes over the data.

The first pass finds the largest magnitudes of x, y and e = y - x. The second accumulates sums in
units of powers of two near them, so that squares neither overflow nor underflow at any magnitude.
To add a metric, add a field to `Comparison` and the sum it needs to `measure`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq._base.cutting import Cut
from jaxq._jax.barriers import barrier
from jaxq._jax.serialization import named_tuple
from jaxq.analysis._sums import blocks_of, largest_magnitude, over_blocks, power_of_two, share
from jaxq.numerics import floats, widen
from jaxq.recipes import Granularity

__all__ = [
    "Comparison",
    "Energies",
    "Total",
    "compare",
    "measure",
    "pair",
    "to_elements",
    "total",
]


@named_tuple
class Comparison(NamedTuple):
    """Metrics of the error e = y - x, one value per block, or scalars for a whole tensor.

    Only elements with finite x are included. If y is not finite at one of them, the error is
    infinite: `mse`, `max_error`, `mean_error` and `mean_relative_error` are infinite, and `sqnr_db`
    is minus infinity; `cosine` ignores such elements. If no elements are included, the errors are
    0, as for equal tensors.

    Attributes:
      mse: the mean of e^2.
      max_error: the largest |e|.
      mean_error: the mean of |e|.
      mean_relative_error: the mean of |e / x| over elements with nonzero x; 0 if there are none.
      power: the mean of x^2.
      sqnr_db: 10 log10(power / mse); infinity if the mse is 0 (even if the power is 0 too), and
        minus infinity if only the power is 0.
      cosine: the cosine of the angle between x and y; 1 if both are 0, 0 if one of them is.
      lost: the fraction of the included elements that are NaN or infinite in y.
      skipped: the fraction of all elements that are excluded because x is NaN or infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 2.0, jnp.inf, jnp.nan])
      >>> c = compare(x, jnp.array([1.0, jnp.nan, 3.0, 4.0]))
      >>> float(c.mse), float(c.lost), float(c.skipped)
      (inf, 0.5, 0.5)
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


class Energies(NamedTuple):
    """Sums of e^2 and x^2 as value * 4^exponent, which cannot overflow or underflow float32.

    Attributes:
      noise: the sum of e^2, divided by 4^noise_exponent; infinite if any numbers are lost.
      noise_exponent: the integer exponent of `noise`.
      signal: the sum of x^2, divided by 4^signal_exponent.
      signal_exponent: the integer exponent of `signal`.
      count: the number of included elements.
    """

    noise: jax.Array
    noise_exponent: jax.Array
    signal: jax.Array
    signal_exponent: jax.Array
    count: jax.Array


class Total(NamedTuple):
    """The errors of many tensors treated as one, in float64."""

    mse: float
    power: float
    sqnr_db: float


def compare(
    x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, *, per: Granularity | None = None
) -> Comparison:
    """Returns the errors of y as an approximation of x.

    Sums are accumulated in float32 (float64 for float64 data), sequentially in short runs that are
    then added as a tree. Over millions of numbers they are accurate to a few parts in 10^7, or to
    one part in 10^5 for equal numbers. This holds at every magnitude, including subnormals. A
    result that the dtype cannot represent, such as the mean square of numbers near 1e30, becomes
    infinite or is rounded to a subnormal or 0; `sqnr_db` and `cosine` remain accurate even then.
    Ratios |e / x| above 2^126 count as infinite.

    Args:
      x: the original float16, bfloat16, float32 or float64 tensor, of any shape.
      y: the approximation, of the same shape, in any of these dtypes.
      per: the granularity of the comparison, as in a recipe: `PerChannel((0,))` gives one result
        per channel. Default: None, one result for the whole tensor.

    Returns:
      A `Comparison`. Its gradient is zero, so it cannot be used as a training loss.

    Raises:
      TypeError: if a dtype is not a float.
      ValueError: if the shapes differ or the granularity does not fit.

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
    """Converts two arguments to a common dtype, float32 or float64, and stops their gradients."""
    x, y = (
        lax.stop_gradient(widen(floats(name, value, argument=argument)))
        for argument, value in (("x", x), ("y", y))
    )
    if x.shape != y.shape:
        raise ValueError(
            f"{name}: `y` must have the shape of `x`, {x.shape}, got {y.shape}. "
            "Broadcast or reshape it first."
        )
    dtype = jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32
    return x.astype(dtype), y.astype(dtype)


@functools.partial(jax.jit, static_argnames="per")
def _compare(x: jax.Array, y: jax.Array, per: Granularity | None) -> Comparison:
    return measure(x, y, per)[0]


def measure(
    x: jax.Array, y: jax.Array, per: Granularity | None = None
) -> tuple[Comparison, Energies]:
    """Returns the result of `compare`, and the energies that `total` adds up over tensors.

    Args:
      x: the original float32 or float64 tensor.
      y: the approximation, of the same shape and dtype.
      per: the granularity, as in `compare`.
    """
    layout, cut = FloatLayout.of(x.dtype), blocks_of(x.shape, per)
    zero, one, none = layout.float_type(0), layout.float_type(1), layout.int_type(0)
    x_finite, both_finite = jnp.isfinite(x), jnp.isfinite(x) & jnp.isfinite(y)
    octave = _difference(x, y, layout).octave
    tops = [where(both_finite, largest_magnitude(v, layout), none) for v in (x, y)]
    tops += [largest_magnitude(x, layout), where(both_finite, octave, none)]
    *tops, e_top = over_blocks(tops, cut, per, [lax.max] * 4)
    # Without the barrier XLA on CPU (JAX 0.10 and 0.12) stores tensor-sized values that both passes
    # compute, which takes up to twice as long.
    x, y, e_top = barrier((x, y, e_top))
    x_finite, both_finite = jnp.isfinite(x), jnp.isfinite(x) & jnp.isfinite(y)
    difference = _difference(x, y, layout)
    # The largest magnitude is scaled to 2^47, so that the sum of 2^32 squares fits in float32 and
    # the squares of magnitudes down to 2^-63 are normal.
    top_exponent = layout.int_type(47 if layout.float_type is np.float32 else 400)
    exponents = [
        top_exponent
        - (extended_bits(top, layout) >> layout.mantissa_bits)
        + layout.int_type(layout.bias)
        for top in tops
    ]
    exponents = [where(t == 0, none, e) for t, e in zip(tops, exponents, strict=True)]
    up = where(e_top == 0, none, top_exponent + layout.int_type(_LIFT * layout.bias) - e_top)
    element_exponents = [v if per is None else to_elements(v, x, cut) for v in (*exponents, up)]
    a, b, all_x = (
        _lifted(v, k, layout) for v, k in zip((x, y, x), element_exponents[:3], strict=True)
    )
    pairs = ((both_finite, a), (both_finite, b), (x_finite, all_x))
    a, b, all_x = (where(mask, v, zero) for mask, v in pairs)
    exponent = lax.clamp(
        layout.int_type(1 - layout.bias),
        difference.exponent + element_exponents[3],
        layout.int_type(layout.bias),
    )
    error = where(both_finite, difference.units * layout.floats(layout.field(exponent)), zero)
    nonzero = both_finite & (layout.bits(x) & layout.magnitude_mask != 0)
    # Scaled down so that the sum cannot overflow; no ratio but 0 is below 2^-54.
    ratios = difference.units * layout.float_type(1 / _ROOM)
    relative = where(nonzero, ratios / where(nonzero, difference.original, one), zero)
    arrays = [error * error, error, relative, all_x * all_x, a * a, b * b, a * b, error]
    arrays += [v.astype(x.dtype) for v in (x_finite, both_finite, nonzero)]
    sums = over_blocks(arrays, cut, per, [lax.add] * 7 + [lax.max] + [lax.add] * 3)
    squares, total, ratio, signal, x_energy, y_energy, inner, largest, *counts = sums
    count, both_count, nonzero_count = counts
    n, lost = lax.max(count, one), count - both_count
    size = _sizes(cut, per, x.dtype)
    infinite = layout.float_type(np.inf)

    def errors(value: jax.Array) -> jax.Array:
        return where(lost > 0, infinite, value)

    two = layout.int_type(2)
    sqnr = _decibels(signal, squares, two * (up - exponents[2]), layout)
    sqnr = where(signal == 0, -infinite, sqnr)
    sqnr = where(squares == 0, infinite, sqnr)
    norms = jnp.sqrt(x_energy) * jnp.sqrt(y_energy)
    cosine = lax.clamp(-one, inner / where(norms == 0, one, norms), one)
    cosine = where(norms == 0, where(x_energy == y_energy, one, zero), cosine)
    comparison = Comparison(
        mse=errors(power_of_two(squares / n, -two * up, layout)),
        max_error=errors(power_of_two(largest, -up, layout)),
        mean_error=errors(power_of_two(total / n, -up, layout)),
        mean_relative_error=errors(ratio / lax.max(nonzero_count, one) * layout.float_type(_ROOM)),
        power=power_of_two(signal / n, -two * exponents[2], layout),
        sqnr_db=where(lost > 0, -infinite, sqnr),
        cosine=cosine,
        lost=share(lost, n),
        skipped=share(size - count, lax.max(size, one)),
    )
    return comparison, Energies(errors(squares), -up, signal, -exponents[2], count)


def total(energies: Sequence[Energies]) -> Total:
    """Returns the errors of several tensors treated as one, computed in float64 by NumPy.

    Args:
      energies: the energies of whole tensors, from `measure`.
    """
    noise, noise_top = _sum([(e.noise, e.noise_exponent) for e in energies])
    signal, signal_top = _sum([(e.signal, e.signal_exponent) for e in energies])
    count = max(math.fsum(float(e.count) for e in energies), 1)
    if noise == 0 or math.isinf(noise) or signal == 0:
        sqnr = math.inf if noise == 0 else -math.inf
    else:
        sqnr = 10 * (math.log10(signal / noise) + (signal_top - noise_top) * math.log10(4))
    with np.errstate(over="ignore", under="ignore"):
        mse = float(np.ldexp(noise / count, 2 * noise_top))
        power = float(np.ldexp(signal / count, 2 * signal_top))
    return Total(mse, power, sqnr)


def _sum(terms: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[float, int]:
    """Adds terms value * 4^exponent; returns the sum's value and the largest term's exponent."""
    plain = [(float(value), int(exponent)) for value, exponent in terms]
    top = max((exponent for value, exponent in plain if value != 0), default=0)
    return math.fsum(value * 4.0 ** max(k - top, -500) for value, k in plain), top


class _Difference(NamedTuple):
    """Elementwise |y - x| and |x| in units of a power of two near the larger of |x| and |y|."""

    units: jax.Array
    original: jax.Array
    exponent: jax.Array  # The exponent of the power of two.
    octave: jax.Array  # The exponent of |y - x| plus `_LIFT` biases, thus positive; 0 if x = y.


_LIFT = 4
_ROOM = 2.0**40


def _difference(x: jax.Array, y: jax.Array, layout: FloatLayout) -> _Difference:
    """Returns elementwise differences that neither overflow nor become subnormal."""
    magnitudes = [layout.bits(v) & layout.magnitude_mask for v in (x, y)]
    top = lax.max(*magnitudes)
    exponent = (extended_bits(top, layout) >> layout.mantissa_bits) - layout.int_type(layout.bias)
    a, b = (_lifted(v, -exponent, layout) for v in (x, y))
    units = jnp.abs(b - a)
    octave = (layout.bits(units) >> layout.mantissa_bits) + exponent
    octave = octave + layout.int_type((_LIFT - 1) * layout.bias)
    octave = where(units == 0, layout.int_type(0), octave)
    return _Difference(units, jnp.abs(a), exponent, octave)


def _lifted(x: jax.Array, exponent: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns x * 2^exponent, or 0 if the result is subnormal; it must not overflow.

    Unlike a product, this keeps subnormal x even when XLA flushes subnormals to zero.
    """
    bits = layout.bits(x)
    magnitude = bits & layout.magnitude_mask
    moved = extended_bits(magnitude, layout) + layout.shifted(exponent)
    moved = where((moved < layout.shifted(1)) | (magnitude == 0), layout.int_type(0), moved)
    return layout.floats(moved | (bits & layout.sign))


def _decibels(a: jax.Array, b: jax.Array, octaves: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns 10 log10(2^octaves a / b) of normal numbers, from exponents and significands.

    Subtracting two logarithms would lose digits, as both may be large when their difference is not.
    """
    digits, m = layout.int_type((1 << layout.mantissa_bits) - 1), layout.mantissa_bits
    a_bits, b_bits = layout.bits(a), layout.bits(b)
    octaves = (octaves + (a_bits >> m) - (b_bits >> m)).astype(layout.float_type)
    top, bottom = (layout.floats(bits & digits | layout.field(0)) for bits in (a_bits, b_bits))
    octave = layout.float_type(10 * math.log10(2))
    return octaves * octave + layout.float_type(10) * jnp.log10(top / bottom)


def to_elements(values: jax.Array, x: jax.Array, cut: Cut) -> jax.Array:
    """Broadcasts one value per block to the elements of the block."""
    wide = jnp.broadcast_to(cut.align_scales(values), jax.eval_shape(cut.split, x).shape)
    return cut.merge(wide)


def _sizes(cut: Cut, per: Granularity | None, dtype: np.dtype) -> jax.Array:
    sizes = jnp.asarray(cut.sizes, dtype)
    return sizes.reshape(() if per is None else cut.counts)
