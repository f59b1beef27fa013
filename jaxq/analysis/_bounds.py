"""Bounds on quantizers: Lloyd-Max levels, the optimal clip, and Shannon's bound."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxq._base.arguments import integer, number
from jaxq.analysis._integrals import CHANCES, Grid, Maps, legendre, whole
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.formats import Format, IntFormat, get_format

__all__ = ["Clip", "LloydMax", "lloyd_max", "optimal_clip", "shannon_sqnr_db"]

_NARROW = 0.25  # Cells up to this width use quadrature; wider cells use closed forms.


class LloydMax(NamedTuple):
    """The result of `lloyd_max`, in float64.

    Attributes:
      levels: the levels, `[count]`, in ascending order.
      thresholds: the midpoints between neighboring levels, `[count - 1]`.
      mse: the mean squared error on numbers of variance one.

    Example:
      >>> import numpy as np
      >>> best = lloyd_max(4)
      >>> codes = np.searchsorted(best.thresholds, [-2.0, 0.1])
      >>> codes.tolist(), best.levels[codes].round(4).tolist(), round(best.sqnr_db, 2)
      ([0, 2], [-1.5104, 0.4528], 9.3)
    """

    levels: np.ndarray
    thresholds: np.ndarray
    mse: float

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in dB, -10 log10(mse)."""
        return -10 * math.log10(self.mse)


def lloyd_max(count: int, distribution: "str | Distribution" = "gaussian") -> LloydMax:
    """Returns the levels with the least mean squared error for a distribution.

    No format with as many values has a lower error. Each level is the mean of the numbers nearest
    to it. This system of equations is solved by Newton's method with a tridiagonal matrix, starting
    from levels whose density is proportional to the cube root of the distribution's density.

    Args:
      count: the number of levels, 1 to 2^16.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.

    Returns:
      A `LloydMax`. For Student's t it is the symmetric solution, which may not be the only one.

    Raises:
      ValueError: if `count` is out of range.

    Example:
      >>> best = lloyd_max(4)
      >>> best.levels.round(4).tolist(), round(best.mse, 4)
      ([-1.5104, -0.4528, 0.4528, 1.5104], 0.1175)

    References:
      Max, "Quantizing for Minimum Distortion" (1960), table 1; Lloyd, "Least Squares Quantization
      in PCM" (1957, printed 1982).
    """
    integer("lloyd_max", "count", count, "Use 16 for 4 bits.", least=1, most=2**16)
    d = get_distribution(distribution)
    if count == 1:
        return LloydMax(np.zeros(1), np.zeros(0), 1.0)
    odd = count % 2 == 1
    half = _dense(count, d)  # The positive levels; the negative ones follow by symmetry.
    for _ in range(1000):
        mass, first, second = _cells(half, odd, d)
        offset = first / mass
        if np.abs(offset).max() <= 1e-13 * half[-1]:
            break
        trial, size = half, 1.0
        while size > 1e-3:  # Halve the step until the levels stay ordered and the error falls.
            trial = half - size * _newton(half, odd, mass, first, d)
            if trial[0] > 0 and (np.diff(trial) > 0).all() and trial[-1] <= d.support:
                trial_cells = _cells(trial, odd, d)
                closer = np.abs(trial_cells[1]).max() < np.abs(first).max()
                if closer or trial_cells[2].sum() < second.sum() * (1 - 1e-9):
                    break
            size /= 2
        else:
            # Lloyd's own step always lowers the error, up to rounding.
            if np.abs(offset).max() <= 1e-9 * half[-1]:
                break
            trial = half + offset
        half = trial
    levels = np.concatenate([-half[::-1], np.zeros(int(odd)), half])
    mse = 2 * float(_cells(half, odd, d)[2].sum())
    if odd:  # Add the cell of the level 0.
        mse += 2 * float(_moments(np.zeros(1), half[:1] / 2, np.zeros(1), d)[2][0])
    return LloydMax(levels, (levels[1:] + levels[:-1]) / 2, mse)


def _dense(count: int, d: Distribution) -> np.ndarray:
    """Returns positive levels with density proportional to cbrt(f), asymptotically optimal."""
    far = math.asinh(float(d.beyond(np.array(min(1e-3, 0.1 / count**3)))))
    t = np.linspace(0, far, 10001)
    rate = np.cbrt(d.density(np.sinh(t))) * np.cosh(t)
    total = np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    places = (np.arange(count // 2) + (0.5 if count % 2 == 0 else 1)) / (count / 2)
    return np.sinh(np.interp(places * total[-1], total, t))


def _cells(half: np.ndarray, odd: bool, d: Distribution) -> tuple[np.ndarray, ...]:
    """Returns the mass and two moments about the level for the cell of each positive level."""
    first = half[:1] / 2 if odd else np.zeros(1)
    edges = np.concatenate([first, (half[1:] + half[:-1]) / 2, [np.inf]])
    return _moments(edges[:-1], edges[1:], half, d)


def _moments(
    below: np.ndarray, above: np.ndarray, levels: np.ndarray, d: Distribution
) -> tuple[np.ndarray, ...]:
    """Returns the mass and the first two moments about `levels` between nonnegative bounds."""
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
    offset = x - levels[narrow, None]
    for k, moment in enumerate(moments):
        moment[narrow] = (f * offset**k).sum(1)
    return moments


def _newton(
    half: np.ndarray, odd: bool, mass: np.ndarray, first: np.ndarray, d: Distribution
) -> np.ndarray:
    """Returns the Newton step for (level - cell mean) * cell mass = 0 at each level."""
    from scipy import linalg

    # A threshold moves by half as much as a level, which shifts mass between the adjacent cells.
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
    """The result of `optimal_clip`.

    Attributes:
      clip: the magnitude that maps to the format's largest value, in standard deviations.
      mse: the mean squared error with this clip on numbers of variance one.

    Example:
      >>> best = Clip(clip=3.5, mse=0.01)
      >>> best.sqnr_db
      20.0
      >>> best.clip / 7  # The scale of int4, whose largest value is 7.
      0.5
    """

    clip: float
    mse: float

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in dB, -10 log10(mse)."""
        return -10 * math.log10(self.mse)


def optimal_clip(fmt: "str | Format", distribution: "str | Distribution" = "gaussian") -> Clip:
    """Returns the clip that minimizes the mean squared error with a single scale.

    The scale is clip / max; numbers beyond the clip saturate. As in symmetric recipes, signed
    integers range from -max to max. A grid search over four decades of clips is followed by a
    golden-section search around the best one.

    Args:
      fmt: the format, as `jaxq.get_format` takes it.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.

    Returns:
      A `Clip`. For a wide float, many clips are nearly optimal, and one of them is returned.

    Raises:
      ValueError: if the format has no finite, positive largest value.

    Example:
      >>> best = optimal_clip("int4")
      >>> round(best.clip, 2), round(best.sqnr_db, 2)
      (2.47, 18.9)

    References:
      Max, "Quantizing for Minimum Distortion" (1960), table 2, lists the best evenly spaced levels.
    """
    fmt, d = get_format(fmt), get_distribution(distribution)
    if isinstance(fmt, IntFormat) and fmt.signed:
        fmt = dataclasses.replace(fmt, narrow=True)
    if not 0 < fmt.max < math.inf:
        raise ValueError(
            f"optimal_clip: `fmt` must have a finite, positive `max`, got {fmt.name!r}. Use, for "
            "example, 'int4'."
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
    """Returns the largest SQNR that any code with a given number of bits per element can reach.

    For Gaussian numbers this is the rate-distortion function, 20 log10(2) bits = 6.02 dB per bit.
    For others it follows from Shannon's lower bound on distortion, 10 log10(2 π e) + 20 log10(2)
    (bits - h) with the differential entropy h in bits, which is not tight at few bits.

    Args:
      bits: bits per element, nonnegative, possibly fractional.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.

    Returns:
      The upper bound on the SQNR, in dB.

    Raises:
      ValueError: if `bits` is negative.

    Example:
      >>> round(shannon_sqnr_db(4), 2), round(shannon_sqnr_db(4, "uniform"), 2)
      (24.08, 25.62)

    References:
      Shannon, "Coding Theorems for a Discrete Source with a Fidelity Criterion" (1959).
    """
    remedy = "Use, for example, 4."
    number("shannon_sqnr_db", "bits", bits, "a number of at least 0", lambda b: b >= 0, remedy)
    h = get_distribution(distribution).entropy
    return 10 * math.log10(2 * math.pi * math.e) + 20 * math.log10(2) * (bits - h)
