"""Integrals of the squared error of rounding random numbers to a grid, in NumPy only.

Between neighboring breakpoints (values, thresholds between them, and 0) the error is a smooth
function of the number, so a few Gauss-Legendre nodes per interval are accurate to many digits.
Every term is positive, so there is no cancellation. Numbers beyond the grid have closed forms.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxq.analysis.distributions import Distribution
from jaxq.formats import FloatFormat, Format, IntFormat, TaperedFormat

__all__ = ["CHANCES", "Grid", "Maps", "Moments", "legendre", "partial", "squares", "whole"]

_LISTED_BITS = 12  # For wider formats the error is averaged between neighboring values.
_AT_ONCE = 2**21  # The largest number of elements in a temporary array.

Chance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Maps(NamedTuple):
    """Affine maps to a grid and back, one per row.

    A number x is rounded to a value v as (x - origin) / divisor + shift, and dequantized to
    (v - shift) * step + back.
    """

    divisor: np.ndarray
    step: np.ndarray
    origin: np.ndarray
    shift: np.ndarray
    back: np.ndarray

    @classmethod
    def of(cls, step: np.ndarray, divisor: np.ndarray | None = None) -> "Maps":
        """Returns maps that only scale."""
        step = np.asarray(step, np.float64)
        zero = np.zeros_like(step)
        return cls(step if divisor is None else divisor, step, zero, zero, zero)

    def rows(self, part: slice) -> "Maps":
        """Returns a slice of the maps, with a trailing axis for broadcasting."""
        return Maps(*(a[part, None] for a in self))


class Moments(NamedTuple):
    """The integrals of the second and fourth powers of the error times the density."""

    second: np.ndarray
    fourth: np.ndarray


def _nearest(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place > 0.5).astype(np.float64)


def _stochastic(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return place


def _toward_zero(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    return (((units < 0) & (place > 0)) | (place >= 1)).astype(np.float64)


def _up(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place > 0).astype(np.float64)


def _down(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place >= 1).astype(np.float64)


# For each rounding mode, a function that returns the probability of rounding up from a position
# between two neighbors, 0 to 1. Rounding to nearest has its threshold at 1/2. The zero point is
# subtracted from the units.
CHANCES: dict[str, Chance] = {
    "nearest_even": _nearest,
    "nearest_away": _nearest,
    "stochastic": _stochastic,
    "toward_zero": _toward_zero,
    "up": _up,
    "down": _down,
}


class Grid(NamedTuple):
    """A format with its rounding mode, which is described by the probability of rounding up."""

    format: Format
    chance: Chance


@functools.cache
def legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `count` Gauss-Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return (x + 1) / 2, w / 2


def _listed(fmt: Format) -> bool:
    return fmt.bits <= _LISTED_BITS


@functools.cache
def _values(fmt: Format) -> np.ndarray:
    """Returns the values that nonzero numbers can round to; tapered formats exclude 0."""
    return fmt.values[fmt.values != 0] if isinstance(fmt, TaperedFormat) else fmt.values


@functools.cache
def _thresholds(fmt: Format) -> np.ndarray:
    """Returns the round-to-nearest thresholds between neighboring values.

    The code of a tapered format is a truncated longer code, so its thresholds are values of the
    format with one more bit.
    """
    if not isinstance(fmt, TaperedFormat) or not _listed(fmt):
        values = _values(fmt)
        return (values[1:] + values[:-1]) / 2
    longer = dataclasses.replace(fmt, bits=fmt.bits + 1)
    positive = np.array([longer.magnitude(2 * c + 1) for c in range(1, 2 ** (fmt.bits - 1) - 1)])
    return np.concatenate([-positive[::-1], [0.0], positive])


@functools.cache
def _breaks(fmt: Format) -> np.ndarray:
    """Returns the points where the error is not smooth, in units of the format.

    They are all values and the thresholds between them; for wide formats, the powers of two.
    """
    if _listed(fmt):
        return np.unique(np.concatenate([_values(fmt), _thresholds(fmt)]))
    low = int(np.floor(np.log2(max(fmt.min_positive, 2.0**-160))))
    high = int(np.ceil(np.log2(min(fmt.max, 2.0**160))))
    powers = np.exp2(np.arange(low, high))
    ends = [fmt.max, *([-fmt.max] if fmt.min < 0 else [])]
    negative = -powers if fmt.min < 0 else powers[:0]
    return np.unique(np.concatenate([powers, negative, [0.0], ends]))


def _around(fmt: Format, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values below and above each number; beyond an end, the two values next to it."""
    if fmt.bits > 16:
        assert isinstance(fmt, FloatFormat)
        exponent = np.clip(np.frexp(units)[1] - 1, fmt.emin, fmt.emax)
        step = np.ldexp(1.0, exponent - fmt.mantissa_bits)
        low = np.clip(np.floor(units / step) * step, fmt.min, fmt.max - step)
        return low, low + step
    values = _values(fmt)
    if isinstance(fmt, IntFormat):
        step = values[1] - values[0]
        low = np.clip(np.floor(units / step) * step, values[0], values[-2])
        return low, low + step
    at = np.clip(np.searchsorted(values, units, side="right") - 1, 0, len(values) - 2)
    return values[at], values[at + 1]


def _between(chance: Chance) -> tuple[float, float]:
    """Returns the mean second and fourth powers of the error between neighbors one apart."""
    nodes, weights = legendre(4)
    place = np.concatenate([nodes / 2, (nodes + 1) / 2])  # Split at the step of round-to-nearest.
    up = chance(place, np.ones_like(place))
    terms = [(1 - up) * place**k + up * (1 - place) ** k for k in (2, 4)]
    second, fourth = (float(np.tile(weights / 2, 2) @ term) for term in terms)
    return second, fourth


def _place(fmt: Format, units: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns the positions of numbers between two neighbors, 0 to 1, with the threshold at 1/2."""
    place = np.clip((units - low) / (high - low), 0, 1)
    if not isinstance(fmt, TaperedFormat) or not _listed(fmt):
        return place
    middle = _thresholds(fmt)[np.searchsorted(_values(fmt), low)]
    middle = (middle - low) / (high - low)
    below, above = place / (2 * middle), 0.5 + (place - middle) / (2 * (1 - middle))
    place = np.where(place <= middle, below, above)
    # Nonzero numbers never round to 0: those nearest to 0 round away from it in every mode.
    return np.where((low < 0) & (high > 0), (units > 0) * 1.0, place)


def squares(grid: Grid, maps: Maps, x: np.ndarray, units: np.ndarray | None = None) -> Moments:
    """Returns the expected second and fourth powers of the error of given numbers.

    Args:
      grid: the format and its rounding.
      maps: affine maps that broadcast against `x`.
      x: the numbers.
      units: the numbers divided by their scales, with the float32 rounding of the quantizer.
        Default: None, which computes them without this rounding.
    """
    signed = (x - maps.origin) / maps.divisor if units is None else units
    units = signed + maps.shift
    low, high = _around(grid.format, units)
    place = _place(grid.format, units, low, high)
    down, up = (x - (v - maps.shift) * maps.step - maps.back for v in (low, high))
    if _listed(grid.format):
        chance = grid.chance(place, signed)
        down, up = down * down, up * up  # Square twice: NumPy's general power is slow.
        second = (1 - chance) * down + chance * up
        return Moments(second, (1 - chance) * (down * down) + chance * (up * up))
    # Average over the positions between neighbors, because wide formats have many close values.
    outside = (place <= 0) | (place >= 1)
    inner = _between(grid.chance)
    width = np.abs((high - low) * maps.step)
    end = np.where(place <= 0, down, up)
    return Moments(
        *(np.where(outside, end**k, m * width**k) for k, m in zip((2, 4), inner, strict=True))
    )


def partial(
    grid: Grid, maps: Maps, low: np.ndarray, high: np.ndarray, distribution: Distribution
) -> Moments:
    """Integrates the powers of the error times the density from low to high, once per row."""
    breaks, (nodes, weights) = _breaks(grid.format), legendre(4)
    # Split cells over which the density changes much; Laplace's density has a corner at 0.
    coarse = np.concatenate([np.arange(0, 4, 0.5), np.geomspace(4, 2**10, 33)])
    coarse = np.concatenate([-coarse[:0:-1], coarse])
    second, fourth = np.empty(len(low)), np.empty(len(low))
    rows = max(1, _AT_ONCE // (len(nodes) * (len(breaks) + len(coarse) + 2)))
    for start in range(0, len(low), rows):
        part = slice(start, start + rows)
        row_maps, a, b = maps.rows(part), low[part, None], high[part, None]
        edges = (breaks - row_maps.shift) * row_maps.divisor + row_maps.origin
        edges = np.concatenate([edges, np.broadcast_to(coarse, (len(a), len(coarse))), a, b], 1)
        edges = np.sort(np.clip(edges, a, b), axis=1)
        width = np.diff(edges)[..., None]
        x = (edges[:, :-1, None] + width * nodes).reshape(len(a), -1)
        f = (width * weights).reshape(x.shape) * distribution.density(x)
        moments = squares(grid, row_maps, x)
        second[part], fourth[part] = ((m * f).sum(1) for m in moments)
    return Moments(second, fourth)


def whole(grid: Grid, maps: Maps, distribution: Distribution, size: int) -> Moments:
    """Integrates over the real line, per row; fourth powers up to the extreme of `size` draws."""
    far = float(distribution.beyond(np.array(0.5 / max(size, 2))))
    values = np.array([grid.format.min, grid.format.max])
    ends = (values - maps.shift[:, None]) * maps.step[:, None] + maps.back[:, None]
    clip = (values - maps.shift[:, None]) * maps.divisor[:, None] + maps.origin[:, None]
    reach = np.clip(np.abs(clip).max(1), 0.5, distribution.support)
    inside = partial(grid, maps, -reach, reach, distribution)
    second = inside.second
    tail = distribution.tail(reach)
    for sign in (1, -1):  # Numbers beyond an end saturate to one value.
        y = sign * np.where(maps.divisor * sign > 0, ends[:, 1], ends[:, 0])
        second = second + tail.second - 2 * y * tail.first + y * y * tail.mass
    more = partial(grid, maps, -np.maximum(far, reach), -reach, distribution).fourth
    more = more + partial(grid, maps, reach, np.maximum(far, reach), distribution).fourth
    return Moments(second, inside.fourth + more)
