"""Calibrators by extremes and moments: what part of the numbers of a block the grid shall cover.

A calibrator measures a tensor, merges two measurements, and makes a range of one. Measurements form
a monoid: `merge` is associative and `nothing` adds nothing, so that batches, devices and steps can
be put together in any grouping (for `Ema` in their order). A quantizer that is given no scales
measures the tensor itself.

Ranges are pairs (low, high), in the form that `Cut.spread` gives. A *two-sided* one is what a
recipe with a zero point asks for; the other kind is (-high, high), and only magnitudes count.

To add one: a frozen dataclass like those below, listed in `calibrators.ALL`.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, where
from jaxq.blocks import Cut
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.scaling import absmax, divide, extrema, extremum

__all__ = [
    "AbsMax",
    "AbsMean",
    "Calibrator",
    "Ema",
    "Extremum",
    "Gaussian",
    "Laplace",
    "Range",
    "Sigmas",
]

Range = tuple[jax.Array, jax.Array]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ANY = (CodebookFormat, FloatFormat, IntFormat, TaperedFormat)


class Calibrator(Protocol):
    """What a calibrator looks like. A state is any pytree of arrays.

    Attributes:
      formats: the kinds of element formats that it serves.
      two_sided: whether it gives ranges of two sides.
    """

    formats: ClassVar[tuple[type, ...]]
    two_sided: ClassVar[bool]

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Any:
        """The state of one split float32 tensor."""
        ...

    def nothing(self, cut: Cut, two_sided: bool) -> Any:
        """The state of no tensor at all."""
        ...

    def merge(self, first: Any, second: Any) -> Any:
        """The state of all that two states are of."""
        ...

    def finalize(self, state: Any, fmt: Format, two_sided: bool) -> Range:
        """The range for a format: NaN where a NaN or an infinity was seen, 0 where nothing was."""
        ...


def filled(cut: Cut, value: Any, *more: int) -> jax.Array:
    """One value a block, in the form that `Cut.spread` gives, with axes added behind."""
    shape = tuple(n for count in cut.counts for n in (count, 1))
    return jnp.full((*shape, *more), value)


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """Every number: the largest magnitude, or the lowest and the largest number (min-max)."""

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """The range itself."""
        if two_sided:
            return extrema(x, cut)
        high = absmax(x, cut)
        return -high, high

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """An infinite range turned inside out, or 0."""
        end = np.float32(np.inf if two_sided else 0)
        return filled(cut, end), filled(cut, -end)

    def merge(self, first: Range, second: Range) -> Range:
        """The range of both; NaN if either is."""
        low, high = lax.min(first[0], second[0]), lax.max(first[1], second[1])
        bad = jnp.isnan(first[1]) | jnp.isnan(second[1])
        return where(bad, np.float32(np.nan), low), where(bad, np.float32(np.nan), high)

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """The range itself."""
        del fmt
        if not two_sided:
            return state
        low, high = (where(jnp.isinf(end), np.float32(0), end) for end in state)
        return low, high


@dataclasses.dataclass(frozen=True)
class Extremum:
    """The number of largest magnitude with its sign, for `scale="min"`: GGUF's Q4_0 and Q5_0."""

    formats: ClassVar = (IntFormat,)
    two_sided: ClassVar = False

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """The number, as the upper end."""
        del two_sided
        end = extremum(x, cut)
        return -end, end

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """A range of 0."""
        del two_sided
        return filled(cut, np.float32(0)), filled(cut, np.float32(0))

    def merge(self, first: Range, second: Range) -> Range:
        """The larger of both; of equal magnitudes the first."""
        bits = [_FLOAT32.bits(end) & _FLOAT32.magnitude_mask for _, end in (first, second)]
        end = where(bits[1] > bits[0], second[1], first[1])
        return -end, end

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """The number, as the upper end."""
        del fmt, two_sided
        return state


class Averages(NamedTuple):
    """Decaying sums of ranges: what is left of the weight of all before, and the sums."""

    left: jax.Array
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Ema:
    """A moving average of `AbsMax` over the updates, corrected for its start as Adam's are.

    A merge of two states takes the second for the later one.

    Attributes:
      decay: the weight that an average keeps at each update, in [0, 1).

    Raises:
      ValueError: another decay.
    """

    decay: float = 0.99

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Ema: `decay` must be in [0, 1), got {self.decay}.")

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Averages:
        """One range, by its weight."""
        ends = AbsMax().measure(x, cut, two_sided)
        low, high = (end * np.float32(1 - self.decay) for end in ends)
        return Averages(jnp.full_like(high, self.decay), low, high)

    def nothing(self, cut: Cut, two_sided: bool) -> Averages:
        """No weight."""
        del two_sided
        zero = filled(cut, np.float32(0))
        return Averages(jnp.ones_like(zero), zero, zero)

    def merge(self, first: Averages, second: Averages) -> Averages:
        """The first decayed by as many updates as the second is of."""
        return Averages(
            first.left * second.left,
            first.low * second.left + second.low,
            first.high * second.left + second.high,
        )

    def finalize(self, state: Averages, fmt: Format, two_sided: bool) -> Range:
        """The averages."""
        del fmt, two_sided
        weight = where(state.left < 1, 1 - state.left, np.float32(1))
        return state.low / weight, state.high / weight


class Moments(NamedTuple):
    """Count, mean, sum of squared distances to it, mean magnitude, and the extremes."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    magnitude: jax.Array
    range: Range


@dataclasses.dataclass(frozen=True)
class _OfMoments:
    """What the calibrators by moments share: each says how far from the mean its range goes.

    Without two sides that is from 0: the mean's magnitude is added. No range goes beyond the
    extremes.
    """

    formats: ClassVar = _ANY
    two_sided: ClassVar = True

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """The distance from the mean to an end of the range."""
        raise NotImplementedError

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Moments:
        """The moments, in two passes."""
        size = jnp.broadcast_to(cut.sizes, filled(cut, np.float32(0)).shape)
        mean = _mean(x, size, cut)
        away, inside = x - mean, cut.inside
        if inside is not None:
            away = where(jnp.broadcast_to(inside, x.shape), away, np.float32(0))
        squares = jnp.sum(away * away, axis=cut.axes, keepdims=True)
        ends = AbsMax().measure(x, cut, two_sided)
        return Moments(size, mean, squares, _mean(jnp.abs(x), size, cut), ends)

    def nothing(self, cut: Cut, two_sided: bool) -> Moments:
        """All 0."""
        zero = filled(cut, np.float32(0))
        return Moments(zero, zero, zero, zero, AbsMax().nothing(cut, two_sided))

    def merge(self, first: Moments, second: Moments) -> Moments:
        """The moments of both (Chan, Golub and LeVeque, 1979)."""
        count = first.count + second.count
        share = second.count / lax.max(count, np.float32(1))
        away = second.mean - first.mean
        return Moments(
            count,
            first.mean + away * share,
            first.squares + second.squares + away * away * first.count * share,
            first.magnitude + (second.magnitude - first.magnitude) * share,
            AbsMax().merge(first.range, second.range),
        )

    def finalize(self, state: Moments, fmt: Format, two_sided: bool) -> Range:
        """Mean and reach, within the extremes."""
        low, high = AbsMax().finalize(state.range, fmt, two_sided)
        reach = self.reach(state, fmt)
        if not two_sided:
            # Its own way round: a comparison with NaN is false.
            inside = jnp.abs(state.mean) + reach
            high = where(inside < high, inside, high)
            return -high, high
        below, above = state.mean - reach, state.mean + reach
        return where(below > low, below, low), where(above < high, above, high)


def _mean(x: jax.Array, size: jax.Array, cut: Cut) -> jax.Array:
    total = jnp.sum(x, axis=cut.axes, keepdims=True)
    return divide(total, lax.max(size, np.float32(1)))


def _deviation(state: Moments) -> jax.Array:
    return jnp.sqrt(state.squares / lax.max(state.count, np.float32(1)))


@dataclasses.dataclass(frozen=True)
class AbsMean(_OfMoments):
    """The mean magnitude; numbers beyond it are clipped: BitNet b1.58 (2024), XNOR-Net (2016)."""

    two_sided: ClassVar = False

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Moments:
        """The mean magnitude; the other moments are not needed."""
        size = jnp.broadcast_to(cut.sizes, filled(cut, np.float32(0)).shape)
        zero = jnp.zeros_like(size)
        ends = AbsMax().measure(x, cut, two_sided)
        return Moments(size, zero, zero, _mean(jnp.abs(x), size, cut), ends)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """The mean magnitude."""
        del fmt
        return state.magnitude


@dataclasses.dataclass(frozen=True)
class Sigmas(_OfMoments):
    """Mean ± k standard deviations.

    Attributes:
      k: how many.

    Raises:
      ValueError: k is not positive.
    """

    k: float = 3.0

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"Sigmas: `k` must be positive, got {self.k}.")

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """K standard deviations."""
        del fmt
        return _deviation(state) * np.float32(self.k)


@dataclasses.dataclass(frozen=True)
class Gaussian(_OfMoments):
    """ACIQ: the clip that minimises the squared error of normally distributed data.

    With levels evenly spaced over [-a, a] and M bits, in units of the standard deviation, a solves
    d/da [(1 + a^2) erfc(a / √2) - a √(2 / π) exp(-a^2 / 2) + a^2 / (3 · 4^M)] = 0.

    References:
      Banner, Nahshan, Hoffer and Soudry, "Post training 4-bit quantization of convolutional
      networks for rapid-deployment" (2019), section 3.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """The clip."""
        # The derivative, 2 a erfc(a/√2) - 2 √(2/π) exp(-a²/2) + 2 a / (3 · 4^M), by bisection.
        low, high = 0.5, 12.0
        for _ in range(60):
            a = (low + high) / 2
            slope = a * math.erfc(a / math.sqrt(2)) + a / (3 * 4**fmt.bits)
            falling = slope < math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
            low, high = (a, high) if falling else (low, a)
        return _deviation(state) * np.float32(low)


@dataclasses.dataclass(frozen=True)
class Laplace(_OfMoments):
    """ACIQ: the clip that minimises the squared error of Laplace distributed data.

    With levels evenly spaced over [-a, a] and M bits, in units of the mean magnitude b, which is
    the scale of a Laplace distribution around 0, 2 exp(-a) + a^2 / (3 · 4^M) is least where
    a exp(a) = 3 · 4^M: a = W(3 · 4^M), Lambert's function.

    References:
      As for `Gaussian`.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """The clip."""
        target = math.log(3 * 4**fmt.bits)
        a = target
        for _ in range(60):  # A contraction: a + log(a) = log(3 · 4^M).
            a = target - math.log(a)
        return state.magnitude * np.float32(a)
