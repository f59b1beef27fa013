"""The mean squared error of a quantizer on normally distributed data, by quadrature.

The largest magnitude a of a block of n numbers has a known density. Given a, one number has this
magnitude and the others have a normal distribution truncated to ±a. The levels are fixed for each
a, so the error is a sum of integrals of (x - level)² times the normal density between midpoints,
which have closed forms. Two-sided ranges use the joint density of minimum and maximum. The module
uses only NumPy and SciPy.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr as cdf


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@dataclasses.dataclass(frozen=True)
class Model:
    """A quantizer given by formulas.

    Attributes:
      levels: the values at a scale of one; with `zero_point`, relative to the lowest one.
      scale: a function from the largest magnitude of a block to its scale; with `zero_point`, from
        the difference of maximum and minimum.
      block: the block size.
      zero_point: a function from minimum and scale to the offset of the levels. Default: no offset.
      signed: True if the largest magnitude, of either sign, maps to the lowest level.
      jumps: the scale is discontinuous at these numbers times powers of two.
    """

    levels: np.ndarray
    scale: Callable[[np.ndarray], np.ndarray]
    block: int
    zero_point: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    signed: bool = False
    jumps: tuple[float, ...] = ()


def partial_error(levels: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Integrates (x - nearest level)² φ(x) from low to high for each row of levels."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    edges = np.concatenate([np.full_like(middles[:, :1], -40), middles], 1)
    ends = np.concatenate([middles, np.full_like(middles[:, :1], 40)], 1)
    a = np.clip(edges, low[:, None], high[:, None])
    b = np.clip(ends, low[:, None], high[:, None])
    mass = cdf(b) - cdf(a)
    first = density(a) - density(b)
    second = mass + a * density(a) - b * density(b)
    return np.maximum(second - 2 * levels * first + levels**2 * mass, 0).sum(1)


def nearest_error(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(x[:, None] - levels).min(1) ** 2


def nodes(
    low: float, high: float, count: int, jumps: tuple[float, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns Gauss-Legendre nodes and weights on 20 panels, subdivided at the jumps."""
    x, w = np.polynomial.legendre.leggauss(count // 20)
    places = np.outer(jumps, 2.0 ** np.arange(-10, 4)).ravel()
    inside = places[(places > low) & (places < high)]
    edges = np.unique(np.concatenate([np.linspace(low, high, 21), inside]))
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel()


def mean_squared_error(model: Model, ends: tuple[float, float] | None = None) -> float:
    """Returns the expected squared error on standard normal numbers.

    Args:
      model: the quantizer.
      ends: the minimum and the maximum of a single block; None integrates over them.
    """
    if model.zero_point is not None:
        return _two_sided(model, ends)
    if ends is not None:
        a, weight = np.array([max(-ends[0], ends[1])]), np.ones(1)
    else:
        a, weight = nodes(1e-6, 7.0, 1200, model.jumps)
        weight = weight * density(a) * (2 * cdf(a) - 1) ** (model.block - 1)
    levels = model.scale(a)[:, None] * np.sort(model.levels)
    others = partial_error(levels, -a, a) / (2 * cdf(a) - 1)
    own = nearest_error(-a, levels)  # The number of the largest magnitude is a or -a.
    if not model.signed:
        own = (own + nearest_error(a, levels)) / 2
    n = model.block
    return float((weight * ((n - 1) * others + own) / n).sum() / weight.sum())


def _two_sided(model: Model, ends: tuple[float, float] | None) -> float:
    n = model.block
    assert model.zero_point is not None
    if ends is not None:
        low, high = (np.array([end]) for end in ends)
        weight = np.ones(1)
    else:
        grid, w = nodes(-6.5, 6.5, 100)
        low, high = (m.ravel() for m in np.meshgrid(grid, grid, indexing="ij"))
        chance = np.maximum(cdf(high) - cdf(low), 0) ** (n - 2)
        weight = np.outer(w, w).ravel() * density(low) * density(high) * chance
        some = (high > low) & (weight > weight.max() * 1e-9)
        low, high, weight = low[some], high[some], weight[some]
    scale = model.scale(high - low)
    levels = scale[:, None] * np.sort(model.levels) + model.zero_point(low, scale)[:, None]
    others = partial_error(levels, low, high) / (cdf(high) - cdf(low))
    own = nearest_error(low, levels) + nearest_error(high, levels)
    return float((weight * ((n - 2) * others + own) / n).sum() / weight.sum())
