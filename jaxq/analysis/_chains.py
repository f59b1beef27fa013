"""Chains of conversions and the error after each step."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxq._base.arguments import items_of
from jaxq._base.tables import Table
from jaxq.analysis._arguments import FormatOrRecipe, format_or_recipe
from jaxq.numerics import cast, floats
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe

__all__ = ["chain", "chain_table"]


@dataclasses.dataclass(frozen=True)
class ChainRow:
    """One step of a `chain_table`, with errors relative to the input of the whole chain.

    `added_mse` is relative to the step's own input. An exact conversion has an SQNR of infinity; a
    conversion that overflows to infinity has an SQNR of minus infinity, and the `added_mse` of an
    infinite number is NaN.
    """

    step: str
    mse: float
    max_error: float
    sqnr_db: float
    added_mse: float


def chain(x: jax.typing.ArrayLike, steps: Sequence[FormatOrRecipe]) -> list[jax.Array]:
    """Converts a tensor from one format to the next.

    Args:
      x: a float16, bfloat16 or float32 tensor of any shape.
      steps: the conversions, in order. A recipe or its name means `jaxq.fake_quant`; a
        format or its name means `jaxq.cast`, without a scale.

    Returns:
      The tensor after each step, in x's dtype.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if a name is neither a recipe nor a format, or a recipe does not fit x.

    Example:
      >>> import jax.numpy as jnp
      >>> [y.tolist() for y in chain(jnp.array([0.3, 2.0]), ["float8_e5m2", "int4_tensor"])]
      [[0.3125, 2.0], [0.2857142984867096, 2.0]]
    """
    y, result = floats("chain", x), []
    for step in items_of("chain", "steps", steps):
        y = _convert(y, step)
        result.append(y)
    return result


def _convert(x: jax.Array, step: FormatOrRecipe) -> jax.Array:
    target = format_or_recipe(step)
    return fake_quant(x, target) if isinstance(target, Recipe) else cast(x, target)


def chain_table(x: jax.typing.ArrayLike, steps: Sequence[FormatOrRecipe]) -> Table:
    """Returns the error of a chain of conversions after each step.

    Args:
      x: a finite tensor, as in `chain`.
      steps: the conversions, as in `chain`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      TypeError: as in `chain`.
      ValueError: as in `chain`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(chain_table(jnp.array([0.3, 2.0]), ["float16", "float8_e5m2", "int8_tensor"]))
      step               mse  max_error  sqnr_db  added_mse
      float16      1.192e-09  4.882e-05    92.35  1.192e-09
      float8_e5m2  7.812e-05     0.0125    44.18  7.752e-05
      int8_tensor  0.0001119    0.01496    42.62  3.027e-06
    """
    first = np.asarray(floats("chain_table", x)).astype(np.float64)
    rows, before = [], first
    for step, y in zip(steps, chain(x, steps), strict=True):
        after = np.asarray(y).astype(np.float64)
        error, power = after - first, float(np.mean(first**2))
        mse = float(np.mean(error**2))
        with np.errstate(divide="ignore", invalid="ignore"):  # The error may be 0 or infinite.
            sqnr = float(10 * np.log10(np.float64(power) / mse))
            added = float(np.mean((after - before) ** 2))
        rows.append(
            ChainRow(
                step=_label(step),
                mse=mse,
                max_error=float(np.max(np.abs(error), initial=0)),
                sqnr_db=sqnr,
                added_mse=added,
            )
        )
        before = after
    return Table(tuple(rows))


def _label(step: FormatOrRecipe) -> str:
    if isinstance(step, str):
        return step
    if isinstance(step, Recipe):
        return step.element.name
    return step.name
