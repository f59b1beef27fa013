"""The squared error that rounding to a grid makes on random numbers, as integrals. NumPy alone.

Between two neighbouring breaks (values, the middles between them, 0) the error is a smooth function
of the number, so a few Gauss-Legendre nodes there are exact to many digits, and every term is
positive, so none are lost in differences. What lies beyond the grid has closed forms.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxq.analysis.distributions import Distribution
from jaxq.formats import FloatFormat, Format, IntFormat

__all__ = ["CHANCES", "Grid", "Maps", "Moments", "legendre", "partial", "squares", "whole"]

_LISTED_BITS = 12  # Formats wider than this have their error averaged between neighbours.
_AT_ONCE = 2**21  # Numbers in an array.

Chance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Maps(NamedTuple):
    """Affine maps to a grid and back, one a row.

    A number x is rounded as (x - origin) / divisor + shift to a value v, and becomes
    (v - shift) step + back.
    """

    divisor: np.ndarray
    step: np.ndarray
    origin: np.ndarray
    shift: np.ndarray
    back: np.ndarray

    @classmethod
    def of(cls, step: np.ndarray, divisor: np.ndarray | None = None) -> "Maps":
        """Those that scale and nothing else."""
        step = np.asarray(step, np.float64)
        zero = np.zeros_like(step)
        return cls(step if divisor is None else divisor, step, zero, zero, zero)

    def rows(self, part: slice) -> "Maps":
        """Some of them."""
        return Maps(*(a[part, None] for a in self))


class Moments(NamedTuple):
    """Integrals of the second and the fourth power of the error times the density."""

    second: np.ndarray
    fourth: np.ndarray


def _nearest(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place > 0.5).astype(np.float64)


def _stochastic(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return place


def _toward_zero(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    return ((units < 0) & (place > 0)).astype(np.float64)


def _up(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place > 0).astype(np.float64)


def _down(place: np.ndarray, units: np.ndarray) -> np.ndarray:
    del units
    return (place >= 1).astype(np.float64)


# The chance to go up from a place between two neighbours, 0 to 1, by the name of the rounding mode.
CHANCES: dict[str, Chance] = {
    "nearest_even": _nearest,
    "nearest_away": _nearest,
    "stochastic": _stochastic,
    "toward_zero": _toward_zero,
    "up": _up,
    "down": _down,
}


class Grid(NamedTuple):
    """A format and how it is rounded to."""

    format: Format
    chance: Chance


@functools.cache
def legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return (x + 1) / 2, w / 2


def _listed(fmt: Format) -> bool:
    return fmt.bits <= _LISTED_BITS


@functools.cache
def _breaks(fmt: Format) -> np.ndarray:
    """Where in the units of a format the error is not smooth; for wide ones where it changes much.

    All values and the middles between them; or the powers of two.
    """
    if _listed(fmt):
        values = fmt.values
        return np.sort(np.concatenate([values, (values[1:] + values[:-1]) / 2]))
    low = int(np.floor(np.log2(max(fmt.tiny, 2.0**-160))))
    high = int(np.ceil(np.log2(min(fmt.max, 2.0**160))))
    powers = np.exp2(np.arange(low, high))
    ends = [fmt.max, *([-fmt.max] if fmt.min < 0 else [])]
    negative = -powers if fmt.min < 0 else powers[:0]
    return np.unique(np.concatenate([powers, negative, [0.0], ends]))


def _around(fmt: Format, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values below and above each number; beyond the ends the last two."""
    if fmt.bits > 16:
        assert isinstance(fmt, FloatFormat)
        exponent = np.clip(np.frexp(units)[1] - 1, fmt.emin, fmt.emax)
        step = np.ldexp(1.0, exponent - fmt.mantissa_bits)
        low = np.clip(np.floor(units / step) * step, fmt.min, fmt.max - step)
        return low, low + step
    values = fmt.values
    if isinstance(fmt, IntFormat):
        step = values[1] - values[0]
        low = np.clip(np.floor(units / step) * step, values[0], values[-2])
        return low, low + step
    at = np.clip(np.searchsorted(values, units, side="right") - 1, 0, len(values) - 2)
    return values[at], values[at + 1]


def _between(chance: Chance) -> tuple[float, float]:
    """Means of the error's powers over the places between two neighbours at a distance of one."""
    nodes, weights = legendre(4)
    place = np.concatenate([nodes / 2, (nodes + 1) / 2])  # Rounding to nearest has a step at 1/2.
    up = chance(place, np.ones_like(place))
    terms = [(1 - up) * place**k + up * (1 - place) ** k for k in (2, 4)]
    second, fourth = (float(np.tile(weights / 2, 2) @ term) for term in terms)
    return second, fourth


def squares(grid: Grid, maps: Maps, x: np.ndarray) -> Moments:
    """The expected second and fourth power of the error of given numbers; maps that broadcast."""
    units = (x - maps.origin) / maps.divisor + maps.shift
    low, high = _around(grid.format, units)
    place = np.clip((units - low) / (high - low), 0, 1)
    down, up = (x - (v - maps.shift) * maps.step - maps.back for v in (low, high))
    if _listed(grid.format):
        chance = grid.chance(place, units)
        down, up = down * down, up * up  # Twice: NumPy's fourth power is a logarithm's work.
        second = (1 - chance) * down + chance * up
        return Moments(second, (1 - chance) * (down * down) + chance * (up * up))
    # A mean over the places between neighbours, which are many and close.
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
    """Integrals of the error's powers times the density, from low to high, one a row."""
    breaks, (nodes, weights) = _breaks(grid.format), legendre(4)
    # Cells wide as the density changes are cut; Laplace's has a corner at 0.
    coarse = np.concatenate([np.arange(0, 4, 0.5), np.geomspace(4, 2**10, 33)])
    coarse = np.concatenate([-coarse[:0:-1], coarse])
    second, fourth = np.empty(len(low)), np.empty(len(low))
    rows = max(1, _AT_ONCE // (len(nodes) * (len(breaks) + len(coarse) + 2)))
    for start in range(0, len(low), rows):
        part = slice(start, start + rows)
        some, a, b = maps.rows(part), low[part, None], high[part, None]
        edges = (breaks - some.shift) * some.divisor + some.origin
        edges = np.concatenate([edges, np.broadcast_to(coarse, (len(a), len(coarse))), a, b], 1)
        edges = np.sort(np.clip(edges, a, b), axis=1)
        width = np.diff(edges)[..., None]
        x = (edges[:, :-1, None] + width * nodes).reshape(len(a), -1)
        f = (width * weights).reshape(x.shape) * distribution.density(x)
        moments = squares(grid, some, x)
        second[part], fourth[part] = ((m * f).sum(1) for m in moments)
    return Moments(second, fourth)


def whole(grid: Grid, maps: Maps, distribution: Distribution, size: int) -> Moments:
    """Integrals over the whole line, one a row; fourth powers as far as `size` numbers go."""
    far = float(distribution.beyond(np.array(0.5 / max(size, 2))))
    values = np.array([grid.format.min, grid.format.max])
    ends = (values - maps.shift[:, None]) * maps.step[:, None] + maps.back[:, None]
    clip = (values - maps.shift[:, None]) * maps.divisor[:, None] + maps.origin[:, None]
    reach = np.clip(np.abs(clip).max(1), 0.5, distribution.support)
    inside = partial(grid, maps, -reach, reach, distribution)
    second = inside.second
    tail = distribution.tail(reach)
    for sign in (1, -1):  # All beyond becomes one value, as seen from its own side.
        y = sign * np.where(maps.divisor * sign > 0, ends[:, 1], ends[:, 0])
        second = second + tail.second - 2 * y * tail.first + y * y * tail.mass
    more = partial(grid, maps, -np.maximum(far, reach), -reach, distribution).fourth
    more = more + partial(grid, maps, reach, np.maximum(far, reach), distribution).fourth
    return Moments(second, inside.fourth + more)
