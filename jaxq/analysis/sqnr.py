"""Signal-to-noise ratios: measured beside theory, bounds for every bit width, the best for it."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np

from jaxq import presets
from jaxq.analysis.bounds import lloyd_max, optimal_clip, shannon_sqnr_db
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.analysis.metrics import compare
from jaxq.analysis.specs import Spec, meaning
from jaxq.analysis.theory import NoTheoryError, expected_error
from jaxq.casting import cast
from jaxq.formats import CodebookFormat, IntFormat
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer
from jaxq.rounding import Stochastic
from jaxq.tables import Table

__all__ = ["BoundRow", "SqnrRow", "bounds_table", "label", "pareto", "sqnr_table"]


@dataclasses.dataclass(frozen=True)
class SqnrRow:
    """One recipe in an `sqnr_table`; dB relative to the distribution's variance.

    Attributes:
      recipe: its name.
      bits: bits a number, scales included.
      measured_db: of the sample; NaN if none was taken.
      expected_db: by quadrature; NaN where there is no theory.
      deviation_db: the standard deviation to expect of `measured_db`.
      shannon_db: the most that so many bits can give.
      gap_db: how far the expected (else the measured) ratio is below that.
    """

    recipe: str
    bits: float
    measured_db: float
    expected_db: float
    deviation_db: float
    shannon_db: float
    gap_db: float


def sqnr_table(
    recipes: Iterable[Spec] | None = None,
    distribution: "str | Distribution" = "gaussian",
    *,
    shape: tuple[int, ...] = (1024, 1024),
    measure: bool = True,
    seed: int = 0,
) -> Table:
    """What recipes lose on random numbers: measured, expected, and against Shannon's bound.

    Args:
      recipes: recipes, presets' names, or formats or their names, which are saturating casts
        without a scale; None means all presets.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.
      shape: of the tensor.
      measure: whether to quantize a sample.
      seed: of the sample, and of stochastic rounding.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: an unknown name, or blocks that do not divide the shape.

    Example:
      >>> print(sqnr_table(["int4_g32", "mxfp4", "nvfp4"], measure=False))
      recipe       bits  measured_db  expected_db  deviation_db  shannon_db   gap_db
      int4_g32        5            -      20.2642     0.0103...      30.103  9.838...
      mxfp4        4.25            -      18.788...     0.0112...     25.5875  6.799...
      nvfp4     4.50003            -      20.43...     0.011...     27.0929  6.65...
    """
    d = get_distribution(distribution)
    x = None
    if measure:
        x = d.sample(np.random.default_rng(seed), shape).astype(np.float32)
    rows = []
    for spec in presets.ALL if recipes is None else recipes:
        kind = meaning(spec)
        bits = kind.bits_per_weight(shape) if isinstance(kind, Quantizer) else float(kind.bits)
        measured = math.nan if x is None else _measured(x, kind, seed)
        try:
            expected = expected_error(kind, shape, d)
            db, deviation = expected.sqnr_db, math.nan
            if expected.mse > 0:
                deviation = 10 / math.log(10) * expected.deviation / expected.mse
        except NoTheoryError:
            db = deviation = math.nan
        bound = shannon_sqnr_db(bits, d)
        gap = bound - (measured if math.isnan(db) else db)
        rows.append(SqnrRow(label(spec), bits, measured, db, deviation, bound, gap))
    return Table(tuple(rows))


def _measured(x: np.ndarray, kind: Spec, seed: int) -> float:
    if isinstance(kind, Quantizer):
        random = kind.rounding == "stochastic" or isinstance(kind.rounding, Stochastic)
        y = fake_quant(x, kind, key=jax.random.key(seed) if random else None)
    else:
        y = cast(x, kind, overflow="saturate")
    mse = float(compare(x, y).mse)
    return -10 * math.log10(mse) if mse > 0 else math.inf


def label(spec: Spec) -> str:
    """What a table calls a recipe: its name, or that of its element format."""
    if isinstance(spec, str):
        return spec
    if not isinstance(spec, Quantizer):
        return spec.name
    known = [name for name, recipe in presets.ALL.items() if recipe == spec]
    return known[0] if known else spec.element.name


@dataclasses.dataclass(frozen=True)
class BoundRow:
    """One bit width in a `bounds_table`, in dB.

    Attributes:
      bits: bits a number.
      uniform_db: of the best evenly spaced levels, as many as the bits can tell apart.
      lloyd_max_db: of the best levels.
      shannon_db: of the best code of any length.
      gap_db: from Lloyd and Max to Shannon; 4.35 for many bits and normal numbers.
    """

    bits: int
    uniform_db: float
    lloyd_max_db: float
    shannon_db: float
    gap_db: float


def bounds_table(
    bits: Iterable[int] = range(1, 9), distribution: "str | Distribution" = "gaussian"
) -> Table:
    """What bits can buy: evenly spaced levels, the best levels, the best code.

    Args:
      bits: whole numbers from 1 to 16.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Example:
      >>> print(bounds_table([1, 2, 4]))
      bits  uniform_db  lloyd_max_db  shannon_db   gap_db
      1        4.39639       4.39639      6.0206  1.62421
      2        9.25...       9.30029     12.0412  2.74...
      4        19.37...       20.2223     24.0824   3.86...
    """
    d, rows = get_distribution(distribution), []
    for width in bits:
        count = 2**width
        even = IntFormat(f"int{width}", width)
        if count <= 256:  # Levels on both sides of 0, at equal distances.
            levels = tuple(float(v) for v in np.arange(count) - (count - 1) / 2)
            even = CodebookFormat(f"even{count}", levels)
        best, bound = lloyd_max(count, d).sqnr_db, shannon_sqnr_db(width, d)
        rows.append(BoundRow(width, optimal_clip(even, d).sqnr_db, best, bound, bound - best))
    return Table(tuple(rows))


def pareto(bits: np.ndarray, db: np.ndarray) -> np.ndarray:
    """Which of several recipes no other beats: fewer bits and no less signal to noise, or as many.

    Args:
      bits: `[n]`, less is better.
      db: `[n]`, more is better.

    Returns:
      Indices, by bits ascending; of equal recipes the first.

    Example:
      >>> pareto(np.array([4, 4, 8, 9]), np.array([20, 18, 40, 40])).tolist()
      [0, 2]
    """
    order, best, front = np.lexsort((-np.asarray(db), np.asarray(bits))), -np.inf, []
    for i in order:
        if db[i] > best:
            front.append(i)
            best = db[i]
    return np.array(front, int)
