"""The squared error that a recipe can be expected to make on random numbers, by quadrature.

Numbers are independent and of variance one. Of a block of n the largest magnitude a has a known
density; given a, one of the numbers is it and the others are cut off at ±a. So the expected error
is an integral over a of what a fixed grid makes of numbers between -a and a; with a zero point,
over the lowest and the largest. The scales for a are the recipe's own, from `jaxq.snapping`, with
all their rounding; everything else is float64 on NumPy.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.analysis.integrals import CHANCES, Grid, Maps, Moments, legendre, partial, squares, whole
from jaxq.analysis.specs import Spec, meaning
from jaxq.blocks import Cut
from jaxq.calibrators import get_calibrator
from jaxq.ranges import AbsMax, Extremum
from jaxq.recipes import Quantizer
from jaxq.rounding import HalfUp, Rounding, Stochastic
from jaxq.second_level import DoubleScale, TensorScale
from jaxq.snapping import scales_of

__all__ = ["Expected", "NoTheoryError", "expected_error"]

_SCALES = 2048  # Of a doubly quantized tensor's, how many are looked at.
_QUANTILES = 2**16  # That stand for a distribution where a calibrator measures it.
_LEAST = 1e-13  # Chances below this are left out.


class NoTheoryError(ValueError):
    """The recipe has no formula for its expected error."""


class Expected(NamedTuple):
    """What `expected_error` gives.

    Attributes:
      mse: the mean squared error of numbers of variance one.
      deviation: the standard deviation, from one tensor of that shape to another, of the mean
        squared error that would be measured.
    """

    mse: float
    deviation: float

    @property
    def sqnr_db(self) -> float:
        """-10 log10(mse): the signal-to-quantization-noise ratio."""
        return -10 * math.log10(self.mse) if self.mse > 0 else math.inf


def expected_error(
    spec: Spec,
    shape: tuple[int, ...] = (1024, 1024),
    distribution: "str | Distribution" = "gaussian",
) -> Expected:
    """The squared error to expect of a recipe, on random numbers of variance one.

    Args:
      spec: a recipe, a preset's name, or a format or its name, which is a cast without a scale
        (and is taken to saturate).
      shape: of the tensor, which says how large the blocks are. The last block of an axis counts
        as a whole one.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.

    Returns:
      An `Expected`. What is computed is the error of real-valued input, to about six digits; three
      where scales or zero points are rounded finely, as in float16 or float8_e4m3fn. Ranges other
      than the absmax, the extremum and the two extremes are taken to be those of the
      distribution itself, as in large blocks. Formats of more than 12 bits have their error
      averaged between neighbouring values. Of a double quantization 2048 random scales are looked
      at.

    Raises:
      NoTheoryError: a ValueError: there is no formula for outliers kept apart, a search, another
        rounding than nearest, stochastic and directed ones, or a zero point with blocks of one.
      ValueError: an unknown name; a recipe that does not fit the shape.

    Example:
      >>> round(expected_error("int8_tensor", (1024,)).sqnr_db, 1)
      42.1
      >>> round(expected_error("mxfp4", (64, 64), "laplace").sqnr_db, 1)
      18.0
    """
    kind, d = meaning(spec), get_distribution(distribution)
    size = math.prod(shape)
    if size == 0:
        return Expected(0.0, 0.0)
    if not isinstance(kind, Quantizer):
        grid = Grid(kind, CHANCES["nearest_even"])
        return _unscaled(grid, Maps.of(np.ones(1)), d, size)
    grid = Grid(kind.element, CHANCES[_rounding_name(kind)])
    cut = kind.cut(shape)
    calibrator = get_calibrator(kind.range)
    if not isinstance(calibrator, AbsMax | Extremum):
        return _unscaled(grid, _maps(kind, *_measured(kind, d)), d, size)
    n, blocks = math.prod(cut.block), math.prod(cut.counts)
    if kind.zero_point is not None:
        return _two_sided(kind, grid, n, blocks, d)
    return _one_sided(kind, grid, n, blocks, d)


def _rounding_name(recipe: Quantizer) -> str:
    """The name in `CHANCES` of a recipe's rounding."""
    mode: str | Rounding = recipe.rounding
    if isinstance(mode, HalfUp):
        mode = "nearest_away"
    if isinstance(mode, Stochastic):
        mode = "stochastic"
    reasons = [
        (recipe.outliers is not None, "without `outliers`"),
        (bool(recipe.search), "without a `search`"),
        (mode not in CHANCES, f"with a `rounding` among {', '.join(CHANCES)}"),
    ]
    for bad, wanted in reasons:
        if bad:
            raise NoTheoryError(
                f"expected_error: there is a theory for recipes {wanted}, got {recipe}. Measure "
                "it: jaxq.analysis.quantization_error."
            )
    assert isinstance(mode, str)
    return mode


def _unscaled(grid: Grid, maps: Maps, d: Distribution, size: int) -> Expected:
    """One grid for all numbers, whatever they are."""
    moments = whole(grid, maps, d, size)
    mse, fourth = float(moments.second[0]), float(moments.fourth[0])
    return Expected(mse, math.sqrt(max(fourth - mse**2, 0) / size))


def _measured(recipe: Quantizer, d: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """The range that a calibrator finds in a distribution: in its quantiles, all as likely."""
    half = d.beyond((np.arange(_QUANTILES // 2) + 0.5) / _QUANTILES)
    sample = jnp.asarray(np.concatenate([half, -half]), jnp.float32)[None]
    calibrator, two_sided = get_calibrator(recipe.range), recipe.zero_point is not None
    state = calibrator.measure(sample, Cut(sample.shape[1:], sample.shape[1:]), two_sided)
    low, high = calibrator.finalize(state, recipe.element, two_sided)
    return np.asarray(low).reshape(1), np.asarray(high).reshape(1)


def _maps(recipe: Quantizer, low: np.ndarray, high: np.ndarray) -> Maps:
    """What the recipe's scales for ranges do to numbers."""
    count = len(low)
    if not isinstance(recipe.second_level, DoubleScale):  # There every scale counts for all.
        # To a power of four, so that few operations are compiled.
        more = 4 ** -(-(count - 1).bit_length() // 2) - count
        low, high = (np.pad(end, (0, more), mode="edge") for end in (low, high))
    with jax.ensure_compile_time_eval():
        below, above = (jnp.asarray(end, jnp.float32) for end in (low, high))
        scales = scales_of(below, above, recipe)
    divisor, step, point, minimum = (
        np.zeros(count) if a is None else np.asarray(a, np.float64)[:count]
        for a in (scales.divisor, scales.step, scales.zero_point, scales.minimum)
    )
    # A block whose scale is 0 is zeros: the step is, and any divisor will do.
    divisor = np.where(divisor == 0, 1.0, divisor)
    zero = np.zeros(count)
    if recipe.zero_point == "integer":
        return Maps(divisor, step, zero, point, zero)
    return Maps(divisor, step, minimum, zero, point)


def _one_sided(recipe: Quantizer, grid: Grid, n: int, blocks: int, d: Distribution) -> Expected:
    """A mean over the largest magnitude of a block."""
    if isinstance(recipe.second_level, DoubleScale):
        # Scales as a tensor has them, in random order: they are quantized with each other.
        count = min(blocks, _SCALES)
        chance = np.random.default_rng(0).permutation((np.arange(count) + 0.5) / count)
        coarse = fine = _largest(chance, n, d), np.full(count, 1 / count)
    else:
        # The error of the largest itself goes up and down with every value of the grid.
        coarse, fine = _magnitudes(n, d, 8), _magnitudes(n, d, 512)
    tops: list[np.ndarray | None] = [None]
    if isinstance(recipe.second_level, TensorScale):
        # The scales are relative to the tensor's largest magnitude.
        tops = list(_largest((np.arange(8) + 0.5) / 8, n * blocks, d)[:, None])
    means, parts = [], []
    for top in tops:
        a, weight = _up_to(top, *coarse)
        maps = _maps(recipe, -a, a)
        second, fourth = (m / (1 - 2 * d.tail(a).mass) for m in partial(grid, maps, -a, a, d))
        others = Moments(second, fourth)
        own = _own(recipe, grid, maps, a)
        second, fourth = (((n - 1) * o + e) / n for o, e in zip(others, own, strict=True))
        block = Moments(second, fourth)
        parts.append(_mean(block, weight, n, blocks)[1])
        b, share = _up_to(top, *fine)
        largest = _own(recipe, grid, _maps(recipe, -b, b), b).second
        means.append(((n - 1) * (weight @ others.second) + share @ largest) / n)
    between = np.var(means) if len(means) > 1 else 0.0
    return Expected(float(np.mean(means)), math.sqrt(np.mean(np.square(parts)) + between))


def _up_to(
    top: np.ndarray | None, a: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of blocks of a tensor whose largest is known, that one last and of no weight."""
    return (
        (a, weight) if top is None else (np.append(np.minimum(a, top), top), np.append(weight, 0))
    )


def _own(recipe: Quantizer, grid: Grid, maps: Maps, a: np.ndarray) -> Moments:
    """The error's powers of the number that has the largest magnitude."""
    ends = [a] if recipe.scale == "min" else [a, -a]  # A signed scale knows on which side it is.
    columns = Maps(*(m[:, None] for m in maps))
    found = [squares(grid, columns, end[:, None]) for end in ends]
    second, fourth = (np.mean([f[k][:, 0] for f in found], axis=0) for k in range(2))
    return Moments(second, fourth)


def _two_sided(recipe: Quantizer, grid: Grid, n: int, blocks: int, d: Distribution) -> Expected:
    """A mean over the lowest and the largest number of a block."""
    if n < 2:
        raise NoTheoryError(
            f"expected_error: a zero point needs blocks of 2 numbers or more for a theory, got {n}."
        )
    high, weight = _highest(n, d)
    low, high = (m.ravel() for m in np.meshgrid(-high, high, indexing="ij"))
    weight = np.outer(weight, weight).ravel()
    some = high > low
    low, high, weight = low[some], high[some], weight[some]
    inside = _below(high, d) - _below(low, d)
    with np.errstate(divide="ignore"):
        log = (n - 2) * np.log(np.maximum(inside, 0))
    weight = weight * d.density(low) * d.density(high) * np.exp(log - log.max())
    some = weight * (high - low) ** 2 > (weight * (high - low) ** 2).max() * 1e-10
    low, high, weight, inside = low[some], high[some], weight[some], inside[some]
    maps = _maps(recipe, low, high)
    others = partial(grid, maps, low, high, d)
    columns = Maps(*(m[:, None] for m in maps))
    own = [squares(grid, columns, end[:, None]) for end in (low, high)]
    block = [
        ((n - 2) * cut / inside + own[0][k][:, 0] + own[1][k][:, 0]) / n
        for k, cut in enumerate(others)
    ]
    return Expected(*_mean(Moments(*block), weight / weight.sum(), n, blocks))


def _mean(block: Moments, weight: np.ndarray, n: int, blocks: int) -> tuple[float, float]:
    """Mean and deviation of a tensor's mean squared error, from those of blocks."""
    mse = float(weight @ block.second)
    between = weight @ np.square(block.second - mse)
    within = weight @ np.maximum(block.fourth - np.square(block.second), 0) / n
    return mse, math.sqrt((between + within) / blocks)


def _below(x: np.ndarray, d: Distribution) -> np.ndarray:
    """The chance of a number below x."""
    mass = d.tail(np.abs(x)).mass
    return np.where(x < 0, mass, 1 - mass)


def _largest(chance: np.ndarray, n: int, d: Distribution) -> np.ndarray:
    """The largest magnitude of n numbers that is not exceeded with some chance."""
    return d.beyond(-np.expm1(np.log(chance) / n) / 2)


def _far(d: Distribution) -> float:
    """The chance beyond which the squares of what is left no longer count."""
    df = getattr(d, "df", math.inf)
    share = 1.0 if math.isinf(df) else df / (df - 2)
    return max(10.0 ** (-16 if share == 1.0 else -5 * share), 1e-200)


def _magnitudes(n: int, d: Distribution, panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for a mean over the largest magnitude of n numbers.

    Panels divide octaves, as the scales of MX formats jump there.
    """
    low = math.log2(float(_largest(np.array(_LEAST), n, d)))
    high = math.log2(float(d.beyond(np.array(_far(d) / (2 * n)))))
    edges = np.arange(math.floor(low * panels), math.ceil(high * panels) + 1) / panels
    a, weight = _panels(np.clip(edges, low, high))
    a, weight = np.exp2(a), weight * np.exp2(a)
    with np.errstate(divide="ignore"):
        log = (n - 1) * np.log1p(-2 * d.tail(a).mass)
    weight = weight * d.density(a) * np.exp(log - log.max())
    return a, weight / weight.sum()


def _highest(n: int, d: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights, without any density, over where the largest of n numbers may be."""
    chance = -math.expm1(math.log(_LEAST) / n)  # Of being above what is the least of them.
    least = d.beyond(np.array(min(chance, 0.5)))
    least = -float(d.beyond(np.array(1 - chance))) if chance > 0.5 else float(least)
    most = float(d.beyond(np.array(_far(d) / n)))
    t, weight = _panels(np.linspace(math.asinh(least), math.asinh(most), 9))
    return np.sinh(t), weight * np.cosh(t)


def _panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on panels between edges."""
    nodes, weights = legendre(6)
    width = np.diff(edges)[:, None]
    return (edges[:-1, None] + width * nodes).ravel(), (width * weights).ravel()
