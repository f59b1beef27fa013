"""Signal-to-noise ratios: measured and expected, bounds per bit width, and the Pareto front."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np

from jaxq._base.arguments import integer, items_of, shape_of
from jaxq._base.tables import Table
from jaxq.analysis._arguments import FormatOrRecipe, format_or_recipe
from jaxq.analysis._bounds import lloyd_max, optimal_clip, shannon_sqnr_db
from jaxq.analysis._metrics import compare
from jaxq.analysis._theory import NoTheoryError, expected_error
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.formats import CodebookFormat, IntFormat
from jaxq.numerics import Stochastic, cast
from jaxq.quantizers import fake_quant
from jaxq.recipes import RECIPES, Recipe

__all__ = ["BoundRow", "SqnrRow", "bounds_table", "label", "pareto", "sqnr_table"]


@dataclasses.dataclass(frozen=True)
class SqnrRow:
    """One recipe in an `sqnr_table`; ratios in dB relative to the distribution's variance.

    Attributes:
      recipe: the recipe's name.
      bits: bits per element, including scales.
      measured_db: the SQNR of a random sample; NaN if none was drawn.
      expected_db: the SQNR by quadrature; NaN if there is no theory for the recipe.
      deviation_db: the expected standard deviation of `measured_db`.
      shannon_db: Shannon's upper bound at this number of bits.
      gap_db: `shannon_db` minus the expected SQNR, or minus the measured one without a theory.
    """

    recipe: str
    bits: float
    measured_db: float
    expected_db: float
    deviation_db: float
    shannon_db: float
    gap_db: float


def sqnr_table(
    recipes: Iterable[FormatOrRecipe] | None = None,
    distribution: "str | Distribution" = "gaussian",
    *,
    shape: tuple[int, ...] = (1024, 1024),
    measure: bool = True,
    seed: int = 0,
) -> Table:
    """Returns the SQNR of recipes on random numbers: measured, expected, and Shannon's bound.

    Args:
      recipes: recipes or their names; or formats or their names, which mean saturating casts
        without a scale. Default: None, all recipes of the registry.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.
      shape: the shape of the tensor.
      measure: True to quantize a random sample.
      seed: the seed of the sample and of stochastic rounding.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: if a name is unknown or the blocks do not divide the shape.

    Example:
      >>> print(sqnr_table(["int4_g32", "mxfp4", "nvfp4"], measure=False))
      recipe    bits  measured_db  expected_db  deviation_db  shannon_db  gap_db
      int4_g32     5            -        20.26       0.01...        30.1   9.8...
      mxfp4     4.25            -        18.7...       0.01...       25.59   6.7...
      nvfp4      4.5            -        20.4...       0.009...       27.09   6.6...
    """
    d, shape = get_distribution(distribution), shape_of("sqnr_table", shape)
    integer("sqnr_table", "seed", seed, "Use, for example, 0.", least=0, most=2**32 - 1)
    x = None
    if measure:
        x = d.sample(np.random.default_rng(seed), shape).astype(np.float32)
    rows = []
    for spec in RECIPES if recipes is None else items_of("sqnr_table", "recipes", recipes):
        target = format_or_recipe(spec)
        bits = target.bits_per_weight(shape) if isinstance(target, Recipe) else float(target.bits)
        measured = math.nan if x is None else _measured(x, target, seed)
        try:
            expected = expected_error(target, shape, d)
            db, deviation = expected.sqnr_db, math.nan
            if expected.mse > 0:
                deviation = 10 / math.log(10) * expected.deviation / expected.mse
        except NoTheoryError:
            db = deviation = math.nan
        bound = shannon_sqnr_db(bits, d)
        gap = bound - (measured if math.isnan(db) else db)
        rows.append(SqnrRow(label(spec), bits, measured, db, deviation, bound, gap))
    return Table(tuple(rows))


def _measured(x: np.ndarray, target: FormatOrRecipe, seed: int) -> float:
    if isinstance(target, Recipe):
        random = target.rounding == "stochastic" or isinstance(target.rounding, Stochastic)
        y = fake_quant(x, target, key=jax.random.key(seed) if random else None)
    else:
        y = cast(x, target, overflow="saturate")
    mse = float(compare(x, y).mse)
    return -10 * math.log10(mse) if mse > 0 else math.inf


def label(recipe: FormatOrRecipe) -> str:
    """Returns the name in tables: that in the registry, or else that of the element format."""
    if isinstance(recipe, str):
        return recipe
    if not isinstance(recipe, Recipe):
        return recipe.name
    return RECIPES.name_of(recipe) or recipe.element.name


@dataclasses.dataclass(frozen=True)
class BoundRow:
    """A row of `bounds_table`: the SQNR of codes of one bit width.

    Attributes:
      bits: bits per element.
      uniform_db: the SQNR of the best 2^bits evenly spaced levels.
      lloyd_max_db: the SQNR of the best 2^bits levels.
      shannon_db: Shannon's bound on the SQNR of codes of any length.
      gap_db: `shannon_db` minus `lloyd_max_db`; 4.35 dB for many bits and Gaussian numbers.
    """

    bits: int
    uniform_db: float
    lloyd_max_db: float
    shannon_db: float
    gap_db: float


def bounds_table(
    bits: Iterable[int] = range(1, 9), distribution: "str | Distribution" = "gaussian"
) -> Table:
    """Returns the best SQNR per bit width: even levels, optimal levels, and Shannon's bound.

    Args:
      bits: the bit widths, integers from 1 to 16.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Example:
      >>> print(bounds_table([1, 2, 4]))
      bits  uniform_db  lloyd_max_db  shannon_db  gap_db
      1          4.396         4.396       6.021   1.624
      2           9.25           9.3       12.04   2.741
      4          19.38         20.22       24.08    3.86
    """
    d, rows = get_distribution(distribution), []
    for width in items_of("bounds_table", "bits", bits):
        integer("bounds_table", "bits", width, "Use, for example, range(2, 9).", least=1, most=16)
        count = 2**width
        even = IntFormat(f"int{width}", width)
        if count <= 256:  # Evenly spaced levels, symmetric around 0.
            levels = tuple(float(v) for v in np.arange(count) - (count - 1) / 2)
            even = CodebookFormat(f"even{count}", levels)
        best, bound = lloyd_max(count, d).sqnr_db, shannon_sqnr_db(width, d)
        rows.append(BoundRow(width, optimal_clip(even, d).sqnr_db, best, bound, bound - best))
    return Table(tuple(rows))


def pareto(bits: np.ndarray, db: np.ndarray) -> np.ndarray:
    """Returns the indices of the recipes on the Pareto front of bits and SQNR.

    Args:
      bits: bits per element, `[n]`; lower is better.
      db: SQNR in dB, `[n]`; higher is better.

    Returns:
      The indices in order of ascending bits; of equal recipes, only the first.

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
