"""The squared error that a quantizer makes on normally distributed data, by quadrature.

Of a block of n numbers the largest magnitude a has a known density; given a, it is one of the
numbers, and the others are normal, cut off at ±a. For each a the levels are fixed, so the error is
a sum of integrals of (x - level)² times the normal density between midpoints, which have closed
forms. Ranges of two sides have the density of minimum and maximum together. NumPy and SciPy alone.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr as cdf


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@dataclasses.dataclass(frozen=True)
class Model:
    """A quantizer as a formula: the levels at a scale of one, and the scale for a magnitude.

    With `zero_point`, the scale is for a span, and levels are counted from the lowest. With
    `signed`, the largest magnitude goes to the lowest level, whatever its sign.
    """

    levels: np.ndarray
    scale: Callable[[np.ndarray], np.ndarray]
    block: int
    zero_point: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    signed: bool = False


def partial_error(levels: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The integral of (x - nearest level)² φ(x) from low to high, for rows of levels."""
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


def nodes(low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on an interval, in 20 panels."""
    x, w = np.polynomial.legendre.leggauss(count // 20)
    edges = np.linspace(low, high, 21)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel()


def mean_squared_error(model: Model, ends: tuple[float, float] | None = None) -> float:
    """The expected squared error of a number of variance one.

    Args:
      model: the quantizer.
      ends: None, or the lowest and the highest number, if they are known: of a single block.
    """
    if model.zero_point is not None:
        return _two_sided(model, ends)
    if ends is not None:
        a, weight = np.array([max(-ends[0], ends[1])]), np.ones(1)
    else:
        a, weight = nodes(1e-6, 7.0, 1200)
        weight = weight * density(a) * (2 * cdf(a) - 1) ** (model.block - 1)
    levels = model.scale(a)[:, None] * np.sort(model.levels)
    others = partial_error(levels, -a, a) / (2 * cdf(a) - 1)
    own = nearest_error(-a, levels)  # The largest lies at a or at -a.
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
