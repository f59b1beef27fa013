"""The expected squared error of a recipe on random numbers, by quadrature.

The numbers are independent and have variance one. The largest magnitude a of a block of n numbers
has a known density; given a, one of the numbers is a or -a and the others are truncated at ±a. The
expected error is therefore an integral over a of the error of a fixed grid on numbers between -a
and a; with a zero point, the integral is over the lowest and the largest number. The recipe's own
code computes the scales for a, with all their rounding; everything else is float64 NumPy. When
scales are rounded to few values, the error is a discontinuous function of a, and the integral is
split at the jumps, which are found by bisection.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import shape_of
from jaxq.analysis._arguments import FormatOrRecipe, format_or_recipe
from jaxq.analysis._extremes import (
    highest_nodes,
    largest_of,
    magnitude_nodes,
    panel_edges,
    probability_below,
)
from jaxq.analysis._integrals import CHANCES, Grid, Maps, Moments, partial, squares, whole
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.formats import FloatFormat, TaperedFormat
from jaxq.numerics import HalfUp, Rounding, Stochastic
from jaxq.recipes import (
    E8M0,
    EMA,
    AbsMax,
    AbsMean,
    Extremum,
    Gaussian,
    Laplace,
    Percentile,
    Recipe,
    Sigmas,
)
from jaxq.recipes import Moments as BlockMoments

__all__ = ["Expected", "NoTheoryError", "expected_error"]

_SCALES = 2048  # The number of scales sampled for a double quantization.
_AT_ONCE = 4096  # The number of scales computed in one call.
_STEPS = 4  # Jumps are located for scale formats with at most this many mantissa bits.
_ENOUGH = 4096, 256  # The fewest numbers for a range by moments and by a percentile.


class NoTheoryError(ValueError):
    """The error of `expected_error` for a recipe without a formula for its expected error."""


class Expected(NamedTuple):
    """The result of `expected_error`.

    Attributes:
      mse: the expected mean squared error on numbers of variance one.
      deviation: the standard deviation of the measured mean squared error across random tensors
        of the given shape.

    Example:
      >>> expected = Expected(mse=1e-4, deviation=2e-6)
      >>> expected.sqnr_db
      40.0
      >>> round((1.03e-4 - expected.mse) / expected.deviation, 1)  # A measured error of 1.03e-4.
      1.5
    """

    mse: float
    deviation: float

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in dB, -10 log10(mse)."""
        return -10 * math.log10(self.mse) if self.mse > 0 else math.inf


def expected_error(
    recipe: FormatOrRecipe,
    shape: tuple[int, ...] = (1024, 1024),
    distribution: "str | Distribution" = "gaussian",
) -> Expected:
    """Returns the expected squared error of a recipe on random numbers of variance one.

    Args:
      recipe: a recipe or its name; or a format or its name, which means a saturating cast
        without a scale.
      shape: the tensor's shape, which determines the block size. A partial last block of an axis
        is treated as a full one.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.

    Returns:
      An `Expected` for real-valued input. Its relative accuracy is about

      - 1e-4 for casts, and for scales from the absmax or the extremum in float32 or in a format of
        at most 4 mantissa bits, such as float8_e8m0fnu and float8_e4m3fn;
      - 1e-3 for finer scale formats, second levels and zero points; and for formats of more than 12
        bits, whose error is averaged between neighboring values;
      - 1e-2 when a calibrator estimates the range from moments or a percentile of a block. The
        range is then assumed to be that of the distribution itself, limited to the extremes of the
        block, and its fluctuation is not included in `deviation`.

      The error of a double quantization is estimated from 2048 random scales.

    Raises:
      NoTheoryError: if there is no formula for the recipe. This subclass of ValueError is raised
        for separately stored outliers; a search, by a recipe or by the calibrators `"mse"` and
        `"entropy"`; moments of blocks of fewer than 4096 numbers; percentiles that fewer than 256
        numbers of a block exceed; zero points with blocks of one; rounding other than nearest,
        directed, or stochastic with at least 8 bits; and stochastic rounding to posits or takums.
      ValueError: if a name is unknown or the recipe does not fit the shape.

    Example:
      >>> round(expected_error("int8_tensor", (1024,)).sqnr_db, 1)
      42.1
      >>> round(expected_error("mxfp4", (64, 64), "laplace").sqnr_db, 1)
      18.0
    """
    target, d = format_or_recipe(recipe), get_distribution(distribution)
    shape = shape_of("expected_error", shape)
    size = math.prod(shape)
    if size == 0:
        return Expected(0.0, 0.0)
    if not isinstance(target, Recipe):
        grid = Grid(target, CHANCES["nearest_even"])
        return _unscaled(grid, Maps.of(np.ones(1)), d, size)
    grid = Grid(target.element, CHANCES[_rounding_name(target)])
    cut = target.cut(shape)
    n, blocks = math.prod(cut.block), math.prod(cut.counts)
    clip = _clip(target, n, d)
    if target.scaling.two_sided:
        return _two_sided(target, grid, n, blocks, d, clip)
    return _one_sided(target, grid, n, blocks, d, clip)


def _rounding_name(recipe: Recipe) -> str:
    """Returns the key in `CHANCES` for a recipe's rounding."""
    mode: str | Rounding = recipe.rounding
    if isinstance(mode, HalfUp):
        mode = "nearest_away"
    if isinstance(mode, Stochastic) and mode.bits >= 8:
        mode = "stochastic"
    tapered = isinstance(recipe.element, TaperedFormat) and mode == "stochastic"
    if recipe.outliers is not None:
        raise _no_theory("without `outliers`", "outliers")
    if recipe.scaling.search:
        raise _no_theory("without a `search`", "a search")
    if recipe.scaling.searches_elements:
        raise _no_theory("whose scales follow from the range of a block", f"{recipe.scaling!r:.60}")
    if mode not in CHANCES or tapered:
        where = " to posits and takums" if tapered else ""
        raise _no_theory(f"with a `rounding` among {', '.join(CHANCES)}", f"{mode!r:.60}{where}")
    assert isinstance(mode, str)
    return mode


def _no_theory(wanted: str, got: str) -> NoTheoryError:
    return NoTheoryError(
        f"expected_error: the theory covers only recipes {wanted}, got {got}. Measure the error "
        "with jaxq.analysis.quantization_error."
    )


def _clip(recipe: Recipe, n: int, d: Distribution) -> float:
    """Returns the range that a calibrator computes; infinity for the absmax and the extremum."""
    calibrator, two_sided = recipe.scaling.calibrator, recipe.scaling.two_sided
    if isinstance(calibrator, AbsMax | Extremum | EMA):  # EMA averages one value here.
        return math.inf
    name, fmt = type(calibrator).__name__, recipe.element
    if isinstance(calibrator, Percentile):
        # With a zero point each side excludes the whole remainder.
        outside = 1 - calibrator.percent / 100
        _enough(name, n * outside, _ENOUGH[1])
        return float(d.beyond(np.array(outside if two_sided else outside / 2)))
    if not isinstance(calibrator, AbsMean | Sigmas | Gaussian | Laplace):
        raise _no_theory("whose `range` is the absmax, moments or a percentile", name)
    _enough(name, n, _ENOUGH[0])
    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    magnitude = jnp.asarray(2 * d.tail(np.zeros(())).first, jnp.float32)
    state = BlockMoments(
        count=one, mean=zero, deviation=one, magnitude=magnitude, range=(zero, zero)
    )
    reach = float(calibrator.reach(state, fmt))
    # A symmetric range adds the magnitude of the block's mean, which is not exactly 0.
    mean = not two_sided and not isinstance(calibrator, AbsMean)
    return reach + mean * math.sqrt(2 / (math.pi * n))


def _enough(name: str, count: float, least: int) -> None:
    """Raises an error if a block is too small for its range to match the distribution's."""
    if count < least:
        purpose = f"for which range={name}() uses at least {least} numbers per block"
        raise _no_theory(purpose, f"{count:.3g}")


def _unscaled(grid: Grid, maps: Maps, d: Distribution, size: int) -> Expected:
    """Returns the expected error of a cast to one fixed grid."""
    moments = whole(grid, maps, d, size)
    mse, fourth = float(moments.second[0]), float(moments.fourth[0])
    return Expected(mse, math.sqrt(max(fourth - mse**2, 0) / size))


def _maps(recipe: Recipe, low: np.ndarray, high: np.ndarray) -> Maps:
    """Returns the affine maps that the recipe's scales define for each range.

    The last range is added to every chunk, because it is the whole tensor's range, on which the
    scales of some recipes depend.
    """
    count, size = len(low), _AT_ONCE - 1
    if recipe.scaling.second_level == "blocks":  # Each scale depends on all the others.
        size = count
    parts = []
    for start in range(0, count, size):
        ranges = [end[start : start + size] for end in (low, high)]
        if size != count:  # Pad all chunks to one shape, so that each operation compiles once.
            more = _AT_ONCE - len(ranges[0])
            ranges = [
                np.append(s, np.full(more, e[-1])) for s, e in zip(ranges, (low, high), strict=True)
            ]
        with jax.ensure_compile_time_eval():
            ends = [jnp.asarray(end, jnp.float32) for end in ranges]
            scales = recipe.scaling.scales((ends[0], ends[1]), recipe.element)
        arrays = (scales.divisor, scales.step, scales.origin, scales.zero_point, scales.minimum)
        zeros = np.zeros(len(ranges[0]))
        parts.append([zeros if a is None else np.asarray(a, np.float64) for a in arrays])
    divisor, *others = (
        np.concatenate([part[i][:size] for part in parts])[:count] for i in range(5)
    )
    # A block with scale 0 dequantizes to zeros because its step is 0; any divisor works.
    return Maps(np.where(divisor == 0, 1.0, divisor), *others)


def _one_sided(
    recipe: Recipe, grid: Grid, n: int, blocks: int, d: Distribution, clip: float
) -> Expected:
    """Returns the error averaged over the largest magnitude of a block."""
    if recipe.scaling.second_level == "blocks":
        # Scales at evenly spaced quantiles, shuffled because blocks of them share a scale.
        count = min(blocks, _SCALES)
        chance = np.random.default_rng(0).permutation((np.arange(count) + 0.5) / count)
        coarse = fine = largest_of(chance, n, d), np.full(count, 1 / count)
    else:
        # The error of the largest number oscillates with every grid value: it needs finer panels.
        edges = [panel_edges(n, d, panels) for panels in (_panels_for(recipe), 512)]
        if _has_jumps(recipe):
            jumps = _jumps(recipe, edges[0][0], edges[0][-1], clip)
            edges = [np.unique([*e, *jumps]) for e in edges]
        coarse, fine = (magnitude_nodes(e, n, d) for e in edges)
    tops: list[float | None] = [None]
    if recipe.scaling.second_level == "tensor":
        # The scales are relative to the tensor's largest magnitude.
        tops = [float(a) for a in largest_of((np.arange(8) + 0.5) / 8, n * blocks, d)]
    means, parts = [], []
    for top in tops:
        a, weight = _up_to(top, *coarse)
        maps = _maps(recipe, *_range(a, clip))
        second, fourth = (m / (1 - 2 * d.tail(a).mass) for m in partial(grid, maps, -a, a, d))
        others = Moments(second, fourth)
        extreme = _of_largest(recipe, grid, maps, a)
        second, fourth = (((n - 1) * o + e) / n for o, e in zip(others, extreme, strict=True))
        block = Moments(second, fourth)
        parts.append(_mean(block, weight, n, blocks)[1])
        b, share = _up_to(top, *fine)
        largest = _of_largest(recipe, grid, _maps(recipe, *_range(b, clip)), b).second
        means.append(((n - 1) * (weight @ others.second) + share @ largest) / n)
    between = np.var(means) if len(means) > 1 else 0.0
    return Expected(float(np.mean(means)), math.sqrt(np.mean(np.square(parts)) + between))


def _range(a: np.ndarray, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranges of blocks with the given largest magnitudes."""
    high = np.minimum(a, clip)
    return -high, high


def _panels_for(recipe: Recipe) -> int:
    """Returns the panels per octave, with more if the scale has too many jumps to locate."""
    return 8 if _has_jumps(recipe) or recipe.scale_format.bits == 32 else 64


def _has_jumps(recipe: Recipe) -> bool:
    """Returns whether the scale format is coarse enough for its jumps to be located."""
    fmt = recipe.scale_format
    narrow = isinstance(fmt, FloatFormat) and fmt.mantissa_bits <= _STEPS
    return narrow and recipe.scaling.second_level is None


def _jumps(recipe: Recipe, low: float, high: float, clip: float) -> np.ndarray:
    """Returns the base-2 logarithms of the magnitudes at which the scale changes."""

    def scales(a: np.ndarray) -> np.ndarray:
        return _maps(recipe, *_range(a, clip)).step

    assert isinstance(recipe.scale_format, FloatFormat)
    steps = 4 << recipe.scale_format.mantissa_bits
    a = np.exp2(np.arange(math.floor(low * steps), math.ceil(high * steps) + 1) / steps)
    step = scales(a)
    at = np.flatnonzero(step[1:] != step[:-1])
    if len(at) == 0:
        return np.zeros(0)
    below, above, first = a[at], a[at + 1], step[at]
    for _ in range(20):
        middle = (below + above) / 2
        same = scales(middle) == first
        below, above = np.where(same, middle, below), np.where(same, above, middle)
    jumps = np.log2(above)
    return jumps[(jumps > low) & (jumps < high)]


def _up_to(top: float | None, a: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Caps the blocks' magnitudes at the tensor's and appends that with weight 0."""
    return (
        (a, weight) if top is None else (np.append(np.minimum(a, top), top), np.append(weight, 0))
    )


def _of_largest(recipe: Recipe, grid: Grid, maps: Maps, a: np.ndarray) -> Moments:
    """Returns the error moments of the number with the largest magnitude."""
    # A signed scale carries the sign of the number.
    ends = [a] if isinstance(recipe.scaling.calibrator, Extremum) else [a, -a]
    moments = [_of_extreme(recipe, grid, maps, end) for end in ends]
    second, fourth = (np.mean([f[k] for f in moments], axis=0) for k in range(2))
    return Moments(second, fourth)


def _of_extreme(recipe: Recipe, grid: Grid, maps: Maps, x: np.ndarray) -> Moments:
    """Returns the error moments of the extremes from which the scales are computed.

    Divided by its scale, such a number lies next to a grid value, so for directed rounding the
    result depends on the rounding of the float32 division.
    """
    x = x.astype(np.float32)
    away = x - maps.origin.astype(np.float32)
    divisor = maps.divisor.astype(np.float32)
    with np.errstate(over="ignore"):
        if recipe.scaling.reciprocal and recipe.scale_format != E8M0:
            units = away * (np.float32(1) / divisor)
        else:
            units = away / divisor
    return squares(grid, maps, x.astype(np.float64), units.astype(np.float64))


def _two_sided(
    recipe: Recipe, grid: Grid, n: int, blocks: int, d: Distribution, clip: float
) -> Expected:
    """Returns the error averaged over the lowest and the largest number of a block."""
    if n < 2:
        raise NoTheoryError(
            f"expected_error: the theory of zero points needs blocks of 2 or more numbers, got "
            f"{n}. Use longer blocks."
        )
    high, weight = highest_nodes(n, d)
    low, high = (m.ravel() for m in np.meshgrid(-high, high, indexing="ij"))
    weight = np.outer(weight, weight).ravel()
    relevant = high > low
    low, high, weight = low[relevant], high[relevant], weight[relevant]
    inside = probability_below(high, d) - probability_below(low, d)
    with np.errstate(divide="ignore"):
        log = (n - 2) * np.log(np.maximum(inside, 0))
    weight = weight * d.density(low) * d.density(high) * np.exp(log - log.max())
    relevant = weight * (high - low) ** 2 > (weight * (high - low) ** 2).max() * 1e-10
    low, high, weight, inside = low[relevant], high[relevant], weight[relevant], inside[relevant]
    maps = _maps(recipe, np.maximum(low, -clip), np.minimum(high, clip))
    others = partial(grid, maps, low, high, d)
    extremes = [_of_extreme(recipe, grid, maps, end) for end in (low, high)]
    block = [
        ((n - 2) * cut / inside + extremes[0][k] + extremes[1][k]) / n
        for k, cut in enumerate(others)
    ]
    return Expected(*_mean(Moments(*block), weight / weight.sum(), n, blocks))


def _mean(block: Moments, weight: np.ndarray, n: int, blocks: int) -> tuple[float, float]:
    """Returns the mean and deviation of a tensor's MSE from the moments of its blocks."""
    mse = float(weight @ block.second)
    between = weight @ np.square(block.second - mse)
    within = weight @ np.maximum(block.fourth - np.square(block.second), 0) / n
    return mse, math.sqrt((between + within) / blocks)
