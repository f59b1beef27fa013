"""The distribution of the extreme values of a block of random numbers, with nodes for integrals."""

import math

import numpy as np

from jaxq.analysis._integrals import legendre
from jaxq.analysis.distributions import Distribution

__all__ = ["highest_nodes", "largest_of", "magnitude_nodes", "panel_edges", "probability_below"]

_LEAST = 1e-13  # Probabilities below this are neglected.


def probability_below(x: np.ndarray, d: Distribution) -> np.ndarray:
    """Returns the probability of a number below x."""
    mass = d.tail(np.abs(x)).mass
    return np.where(x < 0, mass, 1 - mass)


def largest_of(chance: np.ndarray, n: int, d: Distribution) -> np.ndarray:
    """Returns the quantile of the largest magnitude of n numbers at a probability."""
    return d.beyond(-np.expm1(np.log(chance) / n) / 2)


def _negligible_tail(d: Distribution) -> float:
    """Returns the tail probability beyond which squared values are negligible."""
    df = getattr(d, "df", math.inf)
    share = 1.0 if math.isinf(df) else df / (df - 2)
    return max(10.0 ** (-16 if share == 1.0 else -5 * share), 1e-200)


def panel_edges(n: int, d: Distribution, panels: int) -> np.ndarray:
    """Returns panel edges, as base-2 logarithms, for the largest magnitude of n numbers.

    Panels divide both octaves and the probability that the block holds a larger number, because
    the largest of many bounded numbers is close to the bound.
    """
    low = math.log2(float(largest_of(np.array(_LEAST), n, d)))
    high = math.log2(float(d.beyond(np.array(_negligible_tail(d) / (2 * n)))))
    octaves = np.arange(math.floor(low * panels), math.ceil(high * panels) + 1) / panels
    expected = np.geomspace(30, 1e-4, 25) / (2 * n)  # 30 to 1e-4 numbers expected beyond.
    chances = np.log2(d.beyond(expected[expected < 0.45]))
    return np.unique(np.clip([*octaves, *chances], low, high))


def magnitude_nodes(edges: np.ndarray, n: int, d: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and weights for a mean over the largest magnitude of n numbers."""
    a, weight = _panels(edges)
    a, weight = np.exp2(a), weight * np.exp2(a)
    with np.errstate(divide="ignore"):
        log = (n - 1) * np.log1p(-2 * d.tail(a).mass)
    weight = weight * d.density(a) * np.exp(log - log.max())
    relevant = weight * a**2 > (weight * a**2).max() * 1e-16  # Drop negligible nodes to save time.
    return a[relevant], weight[relevant] / weight[relevant].sum()


def highest_nodes(n: int, d: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and weights, without the density factor, for the largest of n numbers."""
    chance = -math.expm1(math.log(_LEAST) / n)  # One number's probability of exceeding `least`.
    least = d.beyond(np.array(min(chance, 0.5)))
    least = -float(d.beyond(np.array(1 - chance))) if chance > 0.5 else float(least)
    most = float(d.beyond(np.array(_negligible_tail(d) / n)))
    t, weight = _panels(np.linspace(math.asinh(least), math.asinh(most), 9))
    return np.sinh(t), weight * np.cosh(t)


def _panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns quadrature nodes and weights on the panels between edges."""
    nodes, weights = legendre(6)
    width = np.diff(edges)[:, None]
    return (edges[:-1, None] + width * nodes).ravel(), (width * weights).ravel()
