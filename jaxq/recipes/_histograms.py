"""Calibrators by histogram: percentiles, and searches for the clip of least error or divergence.

A bin is given by the exponent and the leading mantissa bits of a float, so that the bins need no
range beforehand, fit data of any magnitude, and add up exactly. The count of a bin saturates at the
largest int32.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer, number
from jaxq._base.bits import FloatLayout, where
from jaxq._base.cutting import Cut
from jaxq._base.shapes import holds
from jaxq._jax.arithmetic import divide, logarithm, rounded
from jaxq._jax.serialization import named_tuple
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat, get_format
from jaxq.numerics import cast, encode
from jaxq.recipes._arithmetic import in_units, powers, span, zero_point_of
from jaxq.recipes._ranges import AbsMax, Range, filled

__all__ = ["Entropy", "MeanSquaredError", "Percentile"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_SCALE_FORMAT = get_format("float32")
_MOST = np.int32(2**31 - 1)
_OCTAVES = 16  # Octaves below the largest magnitude whose bins a search keeps separate.


@named_tuple
class Histogram(NamedTuple):
    """Bin counts of each block, in ascending order along the last axis, and the extremes."""

    counts: jax.Array
    range: Range


def edges(digits: int, two_sided: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 lower and upper edges of all bins; infinities and NaN have no bins."""
    first = np.arange((255 << digits) + 1, dtype=np.int64) << (23 - digits)
    values = first.astype(np.uint32).view(np.float32)
    values[-1] = np.finfo(np.float32).max
    low, high = values[:-1], values[1:]
    if two_sided:
        low, high = np.concatenate([-high[::-1], low]), np.concatenate([-low[::-1], high])
    return low, high


@dataclasses.dataclass(frozen=True)
class _OfHistogram:
    """The base class of calibrators by histogram.

    Attributes:
      digits: the number of leading mantissa bits that define a bin, 1 to 12. The width of a bin is
        2^-digits of its values, and a block has 255 · 2^digits bins, twice as many if two-sided.

    Raises:
      ValueError: if `digits` is not 1 to 12.
      TypeError: if a field has another type.
    """

    digits: int = dataclasses.field(default=7, kw_only=True)

    formats: ClassVar = (CodebookFormat, FloatFormat, IntFormat, TaperedFormat)
    two_sided: ClassVar = True

    def __post_init__(self) -> None:
        remedy = "Omit it for the default."
        integer(type(self).__name__, "digits", self.digits, remedy, least=1, most=12)

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Histogram:
        """Counts the elements in each bin. NaN and infinities affect only the extremes."""
        bins = 255 << self.digits
        bits = _FLOAT32.bits(x)
        magnitude = bits & _FLOAT32.magnitude_mask
        place = magnitude >> np.int32(23 - self.digits)
        width = bins * (1 + two_sided)
        if two_sided:
            place = where(bits < 0, np.int32(bins - 1) - place, place + np.int32(bins))
        blocks = math.prod(cut.counts)
        fits = holds(lambda: blocks * width <= _MOST)
        if fits is None:
            raise ValueError(
                f"{type(self).__name__}: a symbolic number of blocks needs an upper bound, as each "
                f"has {width} bins, got {blocks} blocks. Export with the constraint '{blocks} <= "
                f"{_MOST // width}' in jax.export.symbolic_shape, or use a coarser granularity."
            )
        if not fits:
            raise ValueError(
                f"{self}: the histograms must have at most 2^31 - 1 bins, got {blocks} blocks of "
                f"{width} bins. Use a coarser granularity or fewer digits."
            )
        number = cut.align_scales(jnp.arange(blocks, dtype=jnp.int32).reshape(cut.counts))
        place = jnp.broadcast_to(number, x.shape) * np.int32(width) + place
        counted = magnitude < _FLOAT32.inf
        if cut.inside is not None:
            counted = counted & jnp.broadcast_to(cut.inside, x.shape)
        place = where(counted, place, np.int32(-1)).reshape(-1)
        counts = jnp.zeros(blocks * width, jnp.int32)
        counts = counts.at[place].add(1, mode="drop", wrap_negative_indices=False)
        shape = filled(cut, np.float32(0)).shape
        return Histogram(counts.reshape(*shape, width), AbsMax().measure(x, cut, two_sided))

    def nothing(self, cut: Cut, two_sided: bool) -> Histogram:
        """Returns counts of 0."""
        counts = filled(cut, np.int32(0), (255 << self.digits) * (1 + two_sided))
        return Histogram(counts, AbsMax().nothing(cut, two_sided))

    def merge(self, first: Histogram, second: Histogram) -> Histogram:
        """Returns the sums of the counts, which saturate at the largest int32."""
        counts = first.counts + lax.min(second.counts, _MOST - first.counts)
        return Histogram(counts, AbsMax().merge(first.range, second.range))


@dataclasses.dataclass(frozen=True)
class Percentile(_OfHistogram):
    """A percentile of the magnitudes or, if two-sided, a percentile of the values at each end.

    Values count as evenly spread within a bin, so the range is accurate to the width of a bin,
    2^-digits of the range. No range goes beyond the extremes.

    Attributes:
      percent: the percentage of magnitudes below the upper end, in (0, 100]. If two-sided, the
        percentage of values below the upper end and of values above the lower end.
      digits: the number of leading mantissa bits that define a bin, 1 to 12; 7 by default.

    Raises:
      ValueError: if `percent` or `digits` is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int8", scaling=jaxq.recipes.Symmetric(range=Percentile(99.9))).scaling
      Symmetric(range=Percentile(digits=7, percent=99.9))
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        requirement, remedy = "a number in (0, 100]", "Use 99.99, for example."
        number("Percentile", "percent", self.percent, requirement, lambda p: 0 < p <= 100, remedy)

    def finalize(self, state: Histogram, fmt: Format, two_sided: bool) -> Range:
        """Returns the percentiles."""
        low, high = AbsMax().finalize(state.range, fmt, two_sided)
        lower, upper = edges(self.digits, two_sided)
        above = self._end(state.counts[..., ::-1], upper[::-1], lower[::-1])
        high = where(above < high, above, high)
        if not two_sided:
            return -high, high
        below = self._end(state.counts, lower, upper)
        return where(below > low, below, low), high

    def _end(self, counts: jax.Array, outer: np.ndarray, inner: np.ndarray) -> jax.Array:
        """Returns one end of the range, given bins in order from the outermost inward."""
        cumulative = jnp.cumsum(counts, axis=-1, dtype=jnp.int32)
        outside = cumulative[..., -1:].astype(jnp.float32) * np.float32(1 - self.percent / 100)
        index = lax.argmax(
            cumulative.astype(jnp.float32) > outside, cumulative.ndim - 1, jnp.int32
        )[..., None]
        inside = jnp.take_along_axis(counts, index, -1)
        before = jnp.take_along_axis(cumulative, index, -1) - inside
        part = lax.max(inside, np.int32(1)).astype(jnp.float32)
        share = divide(outside - before.astype(jnp.float32), part)
        first, last = jnp.asarray(outer)[index], jnp.asarray(inner)[index]
        return (first + rounded((last - first) * share))[..., 0]


class _QuantizedBins(NamedTuple):
    """The bins of histograms, `[..., bins]`, quantized with a range per histogram, `[..., 1]`."""

    counts: jax.Array
    x: jax.Array  # The centers of the bins.
    low: jax.Array  # The ends of the range.
    high: jax.Array
    y: jax.Array  # The quantized centers.
    codes: jax.Array


@dataclasses.dataclass(frozen=True)
class _Searched(_OfHistogram):
    """The base class of searches over ranges of 1, 2^(-1/16), 2^(-2/16), … times the extremes.

    Attributes:
      tries: the number of ranges to try, at least 1.

    Raises:
      ValueError: if `tries` is below 1.
      TypeError: if a field has another type.
    """

    tries: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        integer(type(self).__name__, "tries", self.tries, "Use 64, for example.", least=1)

    def _loss(self, bins: _QuantizedBins, fmt: Format) -> jax.Array:
        """Returns the loss of a range, one value per block."""
        raise NotImplementedError

    def finalize(self, state: Histogram, fmt: Format, two_sided: bool) -> Range:
        """Returns the range with the least loss; the widest on ties."""
        low, high = AbsMax().finalize(state.range, fmt, two_sided)
        factors, losses = self._losses(state, fmt, two_sided)
        best = factors[lax.argmin(losses, 0, jnp.int32)]
        return low * best, high * best

    def _losses(
        self, state: Histogram, fmt: Format, two_sided: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the ranges to try, relative to the extremes, and their losses."""
        low, high = AbsMax().finalize(state.range, fmt, two_sided)
        x, counts = self._window(state.counts, lax.max(-low, high), two_sided)

        def tried(factor: jax.Array) -> jax.Array:
            ends = (low * factor)[..., None], (high * factor)[..., None]
            y, codes = _quantized(x, *ends, fmt, two_sided)
            return self._loss(_QuantizedBins(counts, x, *ends, y, codes), fmt)

        factors = jnp.asarray(np.exp2(-np.arange(self.tries) / 16), jnp.float32)
        return factors, lax.map(tried, factors)

    def _window(
        self, counts: jax.Array, amax: jax.Array, two_sided: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns centers and counts of the bins of the octaves below amax, in ascending order.

        All smaller magnitudes are counted in the bin nearest to 0.
        """
        shift = np.int32(23 - self.digits)
        size = _OCTAVES << self.digits
        behind = np.arange(1 - size, 1, dtype=np.int32).reshape((1,) * amax.ndim + (size,))
        top = (_FLOAT32.bits(amax) >> shift)[..., None]
        place = lax.max(jnp.broadcast_to(top, (*amax.shape, size)) + behind, np.int32(0))
        middles = _FLOAT32.floats((place << shift) | (np.int32(1) << shift >> 1))
        sides = jnp.split(counts, 1 + two_sided, axis=-1)
        if two_sided:
            sides[0] = sides[0][..., ::-1]
        window_counts = []
        for side in sides:
            first = lax.max(top - np.int32(size - 1), np.int32(0))
            is_first = (behind == 1 - size) | (place > first)  # Near 0 an index is repeated.
            side_counts = where(is_first, jnp.take_along_axis(side, place, -1), np.int32(0))
            remaining = _total(side) - _total(side_counts)
            window_counts.append(side_counts + remaining * (behind == 1 - size).astype(np.int32))
        if not two_sided:
            return middles, window_counts[0]
        return (
            jnp.concatenate([-middles[..., ::-1], middles], axis=-1),
            jnp.concatenate([window_counts[0][..., ::-1], window_counts[1]], axis=-1),
        )


def _quantized(
    x: jax.Array, low: jax.Array, high: jax.Array, fmt: Format, two_sided: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns quantized values and codes, with float32 scales that map a format to a range."""
    if not two_sided:
        scale = divide(high, jnp.float32(fmt.scaled_max))
        units = in_units(x, jnp.broadcast_to(scale, x.shape), _SCALE_FORMAT)
        return cast(units, fmt, overflow="saturate") * scale, encode(
            units, fmt, overflow="saturate"
        )
    assert isinstance(fmt, IntFormat)  # The recipe has checked it.
    low, high = lax.min(low, np.float32(0)), lax.max(high, np.float32(0))
    scale = span(low, high, fmt)
    zero_point = zero_point_of(low, scale, fmt, _SCALE_FORMAT)
    units = in_units(x, jnp.broadcast_to(scale, x.shape), _SCALE_FORMAT)
    integers = lax.round(units, lax.RoundingMethod.TO_NEAREST_EVEN) + zero_point
    codes = lax.clamp(np.float32(fmt.min_int), integers, np.float32(fmt.max_int))
    return (codes - zero_point) * scale, (codes - np.float32(fmt.min_int)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(_Searched):
    """The range with the least mean squared error.

    Attributes:
      tries: the number of ranges to try, each 2^(-1/16) times the previous one; 64 by default.
      digits: the number of leading mantissa bits that define a bin, 1 to 12; 7 by default.

    Raises:
      ValueError: if `tries` or `digits` is out of range.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int4", scaling=jaxq.recipes.Symmetric(range=MeanSquaredError())).scaling
      Symmetric(range=MeanSquaredError(digits=7, tries=64))
    """

    def _loss(self, bins: _QuantizedBins, fmt: Format) -> jax.Array:
        """Returns the sum of squared errors, in units that depend on the largest bin alone."""
        del fmt
        down, _ = powers(bins.x[..., -1:])
        # The squares of the outermost bins, which ordinary data leave empty, are infinite.
        error = (rounded(bins.y) - bins.x) * down
        squares = where(bins.counts > 0, jnp.square(error), np.float32(0))
        return _sum(rounded(bins.counts.astype(jnp.float32) * squares))


def _sum(x: jax.Array) -> jax.Array:
    """Returns float sums over the last axis, of 2^n numbers, in the same order everywhere."""
    while x.shape[-1] > 1:
        low, high = jnp.split(x, 2, axis=-1)
        x = low + high
    return x[..., 0]


@dataclasses.dataclass(frozen=True)
class Entropy(_Searched):
    """The range with the least Kullback-Leibler divergence, as in TensorRT's calibration.

    P is the histogram with all counts beyond the range added to the outermost bin within it. Q has,
    for each code, the counts of the code's bins within the range (without those added), spread
    evenly over the bins that are not empty. The bins must be finer than the format's steps.

    Attributes:
      tries: the number of ranges to try, each 2^(-1/16) times the previous one; 64 by default.
      digits: the number of leading mantissa bits that define a bin, 1 to 12; 9 by default.

    Raises:
      ValueError: if `tries` or `digits` is out of range.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int8", scaling=jaxq.recipes.Symmetric(range=Entropy(tries=32))).scaling
      Symmetric(range=Entropy(digits=9, tries=32))

    References:
      Migacz, "8-bit Inference with TensorRT" (GPU Technology Conference, 2017).
    """

    digits: int = dataclasses.field(default=9, kw_only=True)

    def _loss(self, bins: _QuantizedBins, fmt: Format) -> jax.Array:
        """Returns KL(P || Q)."""
        size = bins.counts.shape[-1]
        inside = (bins.x >= bins.low) & (bins.x <= bins.high)
        within = where(inside, bins.counts, np.int32(0))
        number = np.arange(size, dtype=np.int32).reshape((1,) * (within.ndim - 1) + (size,))
        first, last = (
            jnp.expand_dims(
                reduce(where(inside, jnp.broadcast_to(number, within.shape), none), -1), -1
            )
            for reduce, none in ((jnp.min, _MOST), (jnp.max, np.int32(-1)))
        )
        p = within
        for edge, beyond in ((first, bins.x < bins.low), (last, bins.x > bins.high)):
            mass = _total(where(beyond, bins.counts, np.int32(0)))
            p = p + where(number == edge, jnp.broadcast_to(mass, p.shape), np.int32(0))

        def per_code(values: jax.Array) -> jax.Array:
            flat = values.reshape(-1, size), bins.codes.astype(jnp.int32).reshape(-1, size)
            sums = jax.vmap(lambda v, c: jnp.zeros(2**fmt.bits, jnp.int32).at[c].add(v)[c])
            return sums(*flat).reshape(values.shape)

        full = (within > 0).astype(jnp.int32)
        # Counts are added as integers, and terms in a fixed order, so no backend's result differs.
        q = _quotient(per_code(within), lax.max(per_code(full), np.int32(1)))
        q = where(within > 0, q, np.float32(0))
        p = _quotient(p, lax.max(_total(p), np.int32(1)))
        q = _quotient(q, lax.max(_total(within), np.int32(1)))
        ratio = lax.max(_quotient(p, lax.max(q, np.float32(1e-9))), np.float32(1e-30))
        return _sum_of_rows(where(p > 0, rounded(p * logarithm(ratio)), np.float32(0)))


def _sum_of_rows(x: jax.Array) -> jax.Array:
    """Returns float sums over the last axis, of 2^n numbers, in the same order everywhere.

    A loop adds rows of 128 elements, because XLA on CPU would compute long terms several times
    within the operations of `_sum` (JAX 0.10 to 0.12).
    """
    if x.shape[-1] > 128:
        rows = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 128), -2, 0)
        x, _ = lax.scan(lambda total, row: (total + row, None), rows[0], rows[1:])
    return _sum(x)


def _total(counts: jax.Array) -> jax.Array:
    """Returns the sums of counts over the last axis, which is kept."""
    return jnp.sum(counts, axis=-1, dtype=jnp.int32, keepdims=True)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns float32 quotients, rounded before XLA can combine two divisions into one."""
    return rounded(divide(a.astype(jnp.float32), b.astype(jnp.float32)))
