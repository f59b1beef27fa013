"""Calibrators that choose the range of each block, which the grid covers, by extremes or moments.

A calibrator measures a tensor, merges two measurements, and computes a range from a measurement.
Measurements form a monoid: `merge` is associative and `nothing` is its identity, so that batches,
devices and steps can be combined in any grouping (for `EMA`, in their order). A quantizer that is
given no scales measures the tensor itself.

Ranges are pairs (low, high) in the layout of `Cut.spread`. Recipes with a zero point use a
*two-sided* range; for other recipes the range is (-high, high), and only magnitudes count.

To add a calibrator, write a frozen dataclass like those below and list it in `CALIBRATORS`.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import Layout, where
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import divide, rounded
from jaxq._jax.reductions import total
from jaxq._jax.serialization import named_tuple
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.numerics import BinaryGrid
from jaxq.recipes._arithmetic import absmax, extrema, extremum, finite, powers

__all__ = [
    "EMA",
    "AbsMax",
    "AbsMean",
    "Calibrator",
    "Extremum",
    "Gaussian",
    "Laplace",
    "Range",
    "Sigmas",
]

Range = tuple[jax.Array, jax.Array]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ANY = (BinaryGrid, CodebookFormat, FloatFormat, IntFormat, TaperedFormat)


class Calibrator(Protocol):
    """The interface of a calibrator. A state is any pytree of arrays.

    Attributes:
      formats: the classes of element formats that the calibrator supports.
      two_sided: True if the calibrator supports two-sided ranges.
    """

    formats: ClassVar[tuple[type, ...]]
    two_sided: ClassVar[bool]

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Any:
        """Returns the state of one split float32 tensor."""
        ...

    def nothing(self, cut: Cut, two_sided: bool) -> Any:
        """Returns the state before any data."""
        ...

    def merge(self, first: Any, second: Any) -> Any:
        """Returns the state of both data sets together."""
        ...

    def finalize(self, state: Any, fmt: Format, two_sided: bool) -> Range:
        """Returns the range for a format; NaN after a NaN or an infinity, 0 without data."""
        ...


def filled(cut: Cut, value: Any, *more: int) -> jax.Array:
    """Returns one value per block, in the layout of `Cut.spread` with trailing axes added."""
    shape = tuple(n for count in cut.counts for n in (count, 1))
    return jnp.full((*shape, *more), value)


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The full range: the largest magnitude, or the lowest and the largest value (min-max)."""

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """Returns the range of a tensor."""
        if two_sided:
            return extrema(x, cut)
        high = absmax(x, cut)
        return -high, high

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """Returns the empty range, (inf, -inf) if it is two-sided, else 0."""
        end = np.float32(np.inf if two_sided else 0)
        return filled(cut, end), filled(cut, -end)

    def merge(self, first: Range, second: Range) -> Range:
        """Returns the range that covers both ranges; NaN if either is NaN."""
        low, high = lax.min(first[0], second[0]), lax.max(first[1], second[1])
        bad = jnp.isnan(first[1]) | jnp.isnan(second[1])
        return where(bad, np.float32(np.nan), low), where(bad, np.float32(np.nan), high)

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """Returns the range; 0 if there was no data."""
        del fmt
        if not two_sided:
            return state
        low, high = (where(jnp.isinf(end), np.float32(0), end) for end in state)
        return low, high


@dataclasses.dataclass(frozen=True)
class Extremum:
    """The value of largest magnitude with its sign, which only `SignedScale` supports."""

    formats: ClassVar = (IntFormat,)
    two_sided: ClassVar = False

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """Returns the value as the upper end of a range."""
        del two_sided
        end = extremum(x, cut)
        return -end, end

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """Returns a range of 0."""
        del two_sided
        return filled(cut, np.float32(0)), filled(cut, np.float32(0))

    def merge(self, first: Range, second: Range) -> Range:
        """Returns the range with the larger magnitude; the first on ties."""
        bits = [_FLOAT32.bits(end) & _FLOAT32.magnitude_mask for _, end in (first, second)]
        end = where(bits[1] > bits[0], second[1], first[1])
        return -end, end

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """Returns the value as the upper end of a range."""
        del fmt, two_sided
        return state


@named_tuple
class Averages(NamedTuple):
    """Decaying sums of ranges, and `left`, the remaining weight of all earlier data."""

    left: jax.Array
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class EMA:
    """A moving average of `AbsMax` over updates, bias-corrected as in Adam.

    When two states are merged, the second is the later one.

    Attributes:
      decay: the weight that the average keeps at each update, in [0, 1).

    Raises:
      ValueError: `decay` is out of range.
    """

    decay: float = 0.99

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA: `decay` must be in [0, 1), got {self.decay}.")

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Averages:
        """Returns the range of a tensor times its weight, 1 - decay."""
        ends = AbsMax().measure(x, cut, two_sided)
        low, high = (end * np.float32(1 - self.decay) for end in ends)
        return Averages(jnp.full_like(high, self.decay), low, high)

    def nothing(self, cut: Cut, two_sided: bool) -> Averages:
        """Returns sums of 0, with all weight left."""
        del two_sided
        zero = filled(cut, np.float32(0))
        return Averages(jnp.ones_like(zero), zero, zero)

    def merge(self, first: Averages, second: Averages) -> Averages:
        """Returns the first state, decayed by the updates of the second, plus the second."""
        return Averages(
            first.left * second.left,
            rounded(first.low * second.left) + second.low,
            rounded(first.high * second.left) + second.high,
        )

    def finalize(self, state: Averages, fmt: Format, two_sided: bool) -> Range:
        """Returns the bias-corrected averages."""
        del fmt, two_sided
        weight = where(state.left < 1, 1 - state.left, np.float32(1))
        # The operation on bits also keeps XLA on CPU from merging this division with the next one.
        return finite(divide(state.low, weight)), finite(divide(state.high, weight))


@named_tuple
class Moments(NamedTuple):
    """Count, mean, standard deviation, mean magnitude and extremes, in the units of the data."""

    count: jax.Array
    mean: jax.Array
    deviation: jax.Array
    magnitude: jax.Array
    range: Range

    def times(self, power: jax.Array) -> "Moments":
        """Returns the moments of the data times a power of two, with unchanged extremes."""
        return self._replace(
            mean=self.mean * power,
            deviation=self.deviation * power,
            magnitude=self.magnitude * power,
        )


@dataclasses.dataclass(frozen=True)
class _OfMoments:
    """The base class of calibrators by moments, each of which defines the reach of its range.

    A two-sided range is mean ± reach; a symmetric one is ± (|mean| + reach). No range goes beyond
    the extremes. Moments are computed from data divided by a power of two near the largest
    magnitude, so that no sum or square overflows or vanishes.
    """

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns the distance from the mean to an end of the range."""
        raise NotImplementedError

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Moments:
        """Returns the moments, in two passes after a first pass that finds the extremes."""
        ends, size = AbsMax().measure(x, cut, two_sided), _sizes(cut)
        down, up = powers(_largest(ends))
        x = x * down
        mean = _mean(x, size, cut)
        away, inside = x - mean, cut.inside
        if inside is not None:
            away = where(jnp.broadcast_to(inside, x.shape), away, np.float32(0))
        deviation = jnp.sqrt(_mean(away * away, size, cut))
        return Moments(size, mean, deviation, _mean(jnp.abs(x), size, cut), ends).times(up)

    def nothing(self, cut: Cut, two_sided: bool) -> Moments:
        """Returns moments of 0 and an empty range."""
        zero = filled(cut, np.float32(0))
        return Moments(zero, zero, zero, zero, AbsMax().nothing(cut, two_sided))

    def merge(self, first: Moments, second: Moments) -> Moments:
        """Returns the moments of both data sets together (Chan, Golub and LeVeque, 1979)."""
        ends = AbsMax().merge(first.range, second.range)
        down, up = powers(_largest(ends))
        first, second = first.times(down), second.times(down)
        count = first.count + second.count
        share = divide(second.count, lax.max(count, np.float32(1)))
        away = second.mean - first.mean
        variances = [jnp.square(moments.deviation) for moments in (first, second)]
        between = away * away * share * (1 - share)
        return Moments(
            count,
            first.mean + away * share,
            jnp.sqrt(variances[0] + (variances[1] - variances[0]) * share + between),
            first.magnitude + rounded((second.magnitude - first.magnitude) * share),
            ends,
        ).times(up)

    def finalize(self, state: Moments, fmt: Format, two_sided: bool) -> Range:
        """Returns the range given by mean and reach, within the extremes."""
        low, high = AbsMax().finalize(state.range, fmt, two_sided)
        reach = self.reach(state, fmt)
        if not two_sided:
            # In this order NaN extremes stay NaN, because a comparison with NaN is false.
            inside = jnp.abs(state.mean) + reach
            high = where(inside < high, inside, high)
            return -high, high
        below, above = state.mean - reach, state.mean + reach
        return where(below > low, below, low), where(above < high, above, high)


def _largest(ends: Range) -> jax.Array:
    """Returns the largest magnitude of a range."""
    return lax.max(-ends[0], ends[1])


def _sizes(cut: Cut) -> jax.Array:
    """Returns the number of elements in each block, as float32."""
    return jnp.broadcast_to(cut.sizes, filled(cut, np.float32(0)).shape)


def _mean(x: jax.Array, size: jax.Array, cut: Cut) -> jax.Array:
    total = jnp.sum(x, axis=cut.axes, keepdims=True)
    return divide(total, lax.max(size, np.float32(1)))


@dataclasses.dataclass(frozen=True)
class AbsMean(_OfMoments):
    """The mean magnitude; larger values are clipped: BitNet b1.58 (2024), XNOR-Net (2016).

    The mean is computed in integers, so that its bits do not depend on the order of summation,
    which differs between backends and between layouts over devices. Magnitudes are rounded to
    multiples of 2^-24 of the largest one, or of twice that.
    """

    two_sided: ClassVar = False

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Moments:
        """Returns the mean magnitude, with 0 for the mean and the standard deviation."""
        ends, size = AbsMax().measure(x, cut, two_sided), _sizes(cut)
        down, up = powers(_largest(ends))
        zero = jnp.zeros_like(size)
        mean = divide(total(jnp.abs(x) * down, cut), lax.max(size, np.float32(1)))
        mean = where(jnp.isnan(ends[1]), np.float32(np.nan), mean)
        return Moments(size, zero, zero, mean, ends).times(up)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns the mean magnitude."""
        del fmt
        return state.magnitude


@dataclasses.dataclass(frozen=True)
class Sigmas(_OfMoments):
    """The mean ± k standard deviations.

    Attributes:
      k: the number of standard deviations, positive.

    Raises:
      ValueError: k is not positive.
    """

    k: float = 3.0

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"Sigmas: `k` must be positive, got {self.k}.")

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns k standard deviations."""
        del fmt
        return state.deviation * np.float32(self.k)


@dataclasses.dataclass(frozen=True)
class Gaussian(_OfMoments):
    """ACIQ's clip, which minimizes the squared error of normally distributed data.

    For M bits and levels evenly spaced over [-a, a], in units of the standard deviation, a solves
    d/da [(1 + a^2) erfc(a / √2) - a √(2 / π) exp(-a^2 / 2) + a^2 / (3 · 4^M)] = 0.

    References:
      Banner, Nahshan, Hoffer and Soudry, "Post training 4-bit quantization of convolutional
      networks for rapid-deployment" (2019), section 3.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns the clip."""
        # Bisects on the derivative, 2 a erfc(a/√2) - 2 √(2/π) exp(-a²/2) + 2 a / (3 · 4^M).
        low, high = 0.5, 12.0
        for _ in range(60):
            a = (low + high) / 2
            slope = a * math.erfc(a / math.sqrt(2)) + a / (3 * 4**fmt.bits)
            falling = slope < math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
            low, high = (a, high) if falling else (low, a)
        return state.deviation * np.float32(low)


@dataclasses.dataclass(frozen=True)
class Laplace(_OfMoments):
    """ACIQ's clip, which minimizes the squared error of Laplace distributed data.

    For M bits and levels evenly spaced over [-a, a], in units of the mean magnitude b, which is the
    scale of a Laplace distribution around 0, the error 2 exp(-a) + a^2 / (3 · 4^M) is smallest if
    a exp(a) = 3 · 4^M. The solution is a = W(3 · 4^M), with Lambert's W function.

    References:
      As for `Gaussian`.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns the clip."""
        target = math.log(3 * 4**fmt.bits)
        a = target
        for _ in range(60):  # A contraction: a + log(a) = log(3 · 4^M).
            a = target - math.log(a)
        return state.magnitude * np.float32(a)
