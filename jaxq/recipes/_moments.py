"""Calibrators that choose the range of each block by its moments."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import number
from jaxq._base.bits import where
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import divide, rounded
from jaxq._jax.reductions import total
from jaxq._jax.serialization import named_tuple
from jaxq.formats import Format, IntFormat
from jaxq.recipes._arithmetic import powers
from jaxq.recipes._ranges import ALL_FORMATS, AbsMax, Range, filled

__all__ = ["AbsMean", "Gaussian", "Laplace", "Moments", "Sigmas"]


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

    formats: ClassVar = ALL_FORMATS
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
        deviations, inside = x - mean, cut.inside
        if inside is not None:
            deviations = where(jnp.broadcast_to(inside, x.shape), deviations, np.float32(0))
        deviation = jnp.sqrt(_mean(deviations * deviations, size, cut))
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
        difference = second.mean - first.mean
        variances = [jnp.square(moments.deviation) for moments in (first, second)]
        between = difference * difference * share * (1 - share)
        return Moments(
            count,
            first.mean + difference * share,
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
    """The mean magnitude, as in BitNet b1.58 and XNOR-Net; larger values are clipped.

    The mean is computed in integers, so that its bits do not depend on the order of summation,
    which differs between backends and between layouts over devices. Magnitudes are rounded to
    multiples of 2^-24 of the largest one, or of twice that.

    Example:
      >>> import jaxq
      >>> jaxq.get_recipe("ternary_absmean").scaling.calibrator == AbsMean()
      True

    References:
      Ma et al., "The Era of 1-bit LLMs" (2024); Rastegari et al., "XNOR-Net" (2016).
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
      ValueError: if k is not positive.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int4", scaling=jaxq.recipes.Symmetric(range=Sigmas(2.5))).scaling
      Symmetric(range=Sigmas(k=2.5))
    """

    k: float = 3.0

    def __post_init__(self) -> None:
        remedy = "Use 3.0, for example."
        number("Sigmas", "k", self.k, "a positive number", lambda k: k > 0, remedy)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns k standard deviations."""
        del fmt
        return state.deviation * np.float32(self.k)


@dataclasses.dataclass(frozen=True)
class Gaussian(_OfMoments):
    """ACIQ's clip, which minimizes the squared error of normally distributed data.

    For M bits and levels evenly spaced over [-a, a], in units of the standard deviation, a solves
    d/da [(1 + a^2) erfc(a / √2) - a √(2 / π) exp(-a^2 / 2) + a^2 / (3 · 4^M)] = 0.

    Example:
      >>> import jaxq
      >>> jaxq.recipes.get_calibrator("gaussian") == Gaussian()
      True

    References:
      Banner, Nahshan, Hoffer and Soudry, "Post training 4-bit quantization of convolutional
      networks for rapid-deployment" (2019), section 3.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns ACIQ's clipping threshold."""
        # Bisects on the derivative of the squared error with respect to the clip a, in standard
        # deviations, for M bits: 2 a erfc(a/√2) - 2 √(2/π) exp(-a²/2) + 2 a / (3 · 4^M).
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

    Example:
      >>> import jaxq
      >>> jaxq.recipes.get_calibrator("laplace") == Laplace()
      True

    References:
      As for `Gaussian`.
    """

    formats: ClassVar = (IntFormat,)

    def reach(self, state: Moments, fmt: Format) -> jax.Array:
        """Returns ACIQ's clipping threshold."""
        target = math.log(3 * 4**fmt.bits)
        a = target
        for _ in range(60):  # A contraction: a + log(a) = log(3 · 4^M).
            a = target - math.log(a)
        return state.magnitude * np.float32(a)
