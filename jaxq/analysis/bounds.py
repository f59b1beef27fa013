"""What no quantizer, or none of a kind, can do better: Lloyd-Max, the best clip, Shannon."""

import math
from typing import NamedTuple

import numpy as np

from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.analysis.integrals import CHANCES, Grid, Maps, legendre, whole
from jaxq.catalog import get_format
from jaxq.formats import Format

__all__ = ["Clip", "LloydMax", "lloyd_max", "optimal_clip", "shannon_sqnr_db"]

_NARROW = 0.25  # Cells up to this wide are integrated with nodes, wider ones in closed form.


class LloydMax(NamedTuple):
    """What `lloyd_max` gives; float64.

    Attributes:
      levels: ascending.
      thresholds: half way between neighbours.
      mse: the mean squared error of numbers of variance one.
    """

    levels: np.ndarray
    thresholds: np.ndarray
    mse: float

    @property
    def sqnr_db(self) -> float:
        """-10 log10(mse)."""
        return -10 * math.log10(self.mse)


def lloyd_max(count: int, distribution: "str | Distribution" = "gaussian") -> LloydMax:
    """The levels of least mean squared error for a distribution: no format of as many does better.

    Each level is the mean of the numbers nearest to it. That system of equations is solved by
    Newton's method, whose matrix has three diagonals, from levels as dense as the cube root of the
    density.

    Args:
      count: how many levels, 1 to 2^16.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.

    Returns:
      A `LloydMax`. For Student's t it is the symmetric solution, which need not be the only one.

    Raises:
      ValueError: a count out of range.

    Example:
      >>> best = lloyd_max(4)
      >>> best.levels.round(4).tolist(), round(best.mse, 4)
      ([-1.5104, -0.4528, 0.4528, 1.5104], 0.1175)

    References:
      Max, "Quantizing for Minimum Distortion" (1960), table 1; Lloyd, "Least Squares Quantization
      in PCM" (1957, printed 1982).
    """
    if not 1 <= count <= 2**16:
        raise ValueError(f"lloyd_max: `count` must be 1 to 65536, got {count}.")
    d = get_distribution(distribution)
    if count == 1:
        return LloydMax(np.zeros(1), np.zeros(0), 1.0)
    odd = count % 2 == 1
    half = _dense(count, d)  # The positive levels; the others mirror them.
    for _ in range(1000):
        mass, first, second = _cells(half, odd, d)
        away = first / mass
        if np.abs(away).max() <= 1e-13 * half[-1]:
            break
        tried, size = half, 1.0
        while size > 1e-3:  # No further than the levels keep their order and the error falls.
            tried = half - size * _newton(half, odd, mass, first, d)
            if tried[0] > 0 and (np.diff(tried) > 0).all() and tried[-1] <= d.support:
                now = _cells(tried, odd, d)
                closer = np.abs(now[1]).max() < np.abs(first).max()
                if closer or now[2].sum() < second.sum() * (1 - 1e-9):
                    break
            size /= 2
        else:
            # Lloyd's own step always lowers the error, until there are no digits left to gain.
            if np.abs(away).max() <= 1e-9 * half[-1]:
                break
            tried = half + away
        half = tried
    levels = np.concatenate([-half[::-1], np.zeros(int(odd)), half])
    mse = 2 * float(_cells(half, odd, d)[2].sum())
    if odd:  # The cell of 0 itself.
        mse += 2 * float(_moments(np.zeros(1), half[:1] / 2, np.zeros(1), d)[2][0])
    return LloydMax(levels, (levels[1:] + levels[:-1]) / 2, mse)


def _dense(count: int, d: Distribution) -> np.ndarray:
    """Positive levels with a density of the cube root of f: the best, of very many."""
    far = math.asinh(float(d.beyond(np.array(min(1e-3, 0.1 / count**3)))))
    t = np.linspace(0, far, 10001)
    rate = np.cbrt(d.density(np.sinh(t))) * np.cosh(t)
    total = np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    places = (np.arange(count // 2) + (0.5 if count % 2 == 0 else 1)) / (count / 2)
    return np.sinh(np.interp(places * total[-1], total, t))


def _cells(half: np.ndarray, odd: bool, d: Distribution) -> tuple[np.ndarray, ...]:
    """Mass, first and second moment about its level of the cell of every positive level."""
    first = half[:1] / 2 if odd else np.zeros(1)
    edges = np.concatenate([first, (half[1:] + half[:-1]) / 2, [np.inf]])
    return _moments(edges[:-1], edges[1:], half, d)


def _moments(
    below: np.ndarray, above: np.ndarray, levels: np.ndarray, d: Distribution
) -> tuple[np.ndarray, ...]:
    """Mass, first and second moment about a level, from one positive number to another."""
    last = np.isinf(above)
    ends = d.tail(np.where(last, 0, above))
    parts = (b - np.where(last, 0, a) for b, a in zip(d.tail(below), ends, strict=True))
    mass, first, second = parts
    moments = (mass, first - levels * mass, second - 2 * levels * first + levels**2 * mass)
    narrow = above - below < _NARROW
    nodes, weights = legendre(12)
    low, width = below[narrow, None], (above - below)[narrow, None]
    x = low + width * nodes
    f = width * weights * d.density(x)
    away = x - levels[narrow, None]
    for k, moment in enumerate(moments):
        moment[narrow] = (f * away**k).sum(1)
    return moments


def _newton(
    half: np.ndarray, odd: bool, mass: np.ndarray, first: np.ndarray, d: Distribution
) -> np.ndarray:
    """Newton's step: each level less the mean of its cell, times the cell's mass, shall be 0."""
    from scipy import linalg

    # What a threshold that moves with a level by half takes from the cells on both sides.
    pull = d.density((half[1:] + half[:-1]) / 2) * np.diff(half) / 4
    bands = np.zeros((3, len(half)))
    bands[1] = mass
    bands[1, :-1] -= pull
    bands[1, 1:] -= pull
    bands[0, 1:] = bands[2, :-1] = -pull
    if odd:
        bands[1, 0] -= float(d.density(half[0] / 2)) * half[0] / 4
    return -first / bands[1] if len(half) == 1 else linalg.solve_banded((1, 1), bands, -first)


class Clip(NamedTuple):
    """What `optimal_clip` gives.

    Attributes:
      clip: the magnitude that goes to the format's largest value, in standard deviations.
      mse: the mean squared error then, of numbers of variance one.
    """

    clip: float
    mse: float

    @property
    def sqnr_db(self) -> float:
        """-10 log10(mse)."""
        return -10 * math.log10(self.mse)


def optimal_clip(fmt: "str | Format", distribution: "str | Distribution" = "gaussian") -> Clip:
    """The one scale for all numbers that gives the least mean squared error.

    The scale is clip / max; what lies beyond the clip becomes the format's end. A search over four
    decades of clips, then golden sections around the best.

    Args:
      fmt: the format, as `jaxq.get_format` takes it.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.

    Returns:
      A `Clip`. For a wide float many clips are nearly as good; it is then one of those.

    Raises:
      ValueError: a format without a finite, positive largest value.

    Example:
      >>> best = optimal_clip("int4")
      >>> round(best.clip, 2), round(best.sqnr_db, 2)
      (2.37, 19.26)

    References:
      Max (1960), table 2, has the best evenly spaced levels.
    """
    fmt, d = get_format(fmt), get_distribution(distribution)
    if not 0 < fmt.max < math.inf:
        raise ValueError(
            f"optimal_clip: needs a format with a finite, positive `max`, got {fmt.name!r}."
        )
    grid = Grid(fmt, CHANCES["nearest_even"])

    def error(logs: np.ndarray) -> np.ndarray:
        return whole(grid, Maps.of(np.exp2(logs) / fmt.max), d, 2**20).second

    logs = np.linspace(-2, 11, 105)
    best = int(np.argmin(error(logs)))
    low, high = logs[max(best - 1, 0)], logs[min(best + 1, len(logs) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left, right = error(np.array([a, b]))
        low, high = (low, b) if left < right else (a, high)
    middle = float(low + high) / 2
    return Clip(2.0**middle, float(error(np.array([middle]))[0]))


def shannon_sqnr_db(bits: float, distribution: "str | Distribution" = "gaussian") -> float:
    """The largest SQNR that any code of so many bits a number can have.

    For normal numbers 20 log10(2) bits = 6.02 dB a bit, the rate-distortion function; for others
    Shannon's lower bound of it, 10 log10(2 π e) + 20 log10(2) (bits - h) with the differential
    entropy h in bits, which few bits do not reach.

    Args:
      bits: bits a number, not negative; a fraction will do.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.

    Returns:
      A bound in dB.

    Raises:
      ValueError: negative bits.

    Example:
      >>> round(shannon_sqnr_db(4), 2), round(shannon_sqnr_db(4, "uniform"), 2)
      (24.08, 25.62)

    References:
      Shannon, "Coding Theorems for a Discrete Source with a Fidelity Criterion" (1959).
    """
    if not bits >= 0:
        raise ValueError(f"shannon_sqnr_db: `bits` must not be negative, got {bits}.")
    h = get_distribution(distribution).entropy
    return 10 * math.log10(2 * math.pi * math.e) + 20 * math.log10(2) * (bits - h)
