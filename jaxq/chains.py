"""Chains of conversions, and the error after each step."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxq import catalog, presets
from jaxq.casting import cast, floats
from jaxq.catalog import get_format
from jaxq.formats import Format
from jaxq.presets import get_quantizer
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer
from jaxq.tables import Table

__all__ = ["chain", "chain_table"]


@dataclasses.dataclass(frozen=True)
class ChainRow:
    """One step of a `chain_table`: errors of the result against the input of the whole chain.

    `added_mse` is against the step's own input. A conversion that is exact has an SQNR of infinity,
    one that overflows to infinity minus infinity; an error added to an infinite number is NaN.
    """

    step: str
    mse: float
    max_error: float
    sqnr_db: float
    added_mse: float


def chain(x: jax.typing.ArrayLike, steps: Sequence[str | Format | Quantizer]) -> list[jax.Array]:
    """Converts a tensor from format to format.

    Args:
      x: float16, bfloat16 or float32, any shape.
      steps: what it goes through, in order. A preset's name or a `Quantizer` is `jaxq.fake_quant`;
        a format or its name is `jaxq.cast`, without a scale.

    Returns:
      The tensor after each step, in x's dtype.

    Raises:
      TypeError: x is of another dtype.
      ValueError: a name that is neither; a recipe that does not fit x.

    Example:
      >>> import jax.numpy as jnp
      >>> [y.tolist() for y in chain(jnp.array([0.3, 2.0]), ["float8_e5m2", "int4_tensor"])]
      [[0.3125, 2.0], [0.2857142984867096, 2.0]]
    """
    y, result = floats("chain", x), []
    for step in steps:
        y = _convert(y, step)
        result.append(y)
    return result


def _convert(x: jax.Array, step: str | Format | Quantizer) -> jax.Array:
    if isinstance(step, Quantizer) or step in presets.ALL:
        return fake_quant(x, step)
    if isinstance(step, Format) or step in catalog.ALL:
        return cast(x, get_format(step))
    return fake_quant(x, get_quantizer(step))  # It names what is nearest.


def chain_table(x: jax.typing.ArrayLike, steps: Sequence[str | Format | Quantizer]) -> Table:
    """The error of a chain of conversions after each step.

    Args:
      x: as in `chain`; finite.
      steps: as in `chain`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      TypeError: as in `chain`.
      ValueError: as in `chain`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(chain_table(jnp.array([0.3, 2.0]), ["float16", "float8_e5m2", "int8_tensor"]))
      step                 mse    max_error  sqnr_db    added_mse
      float16      1.19151e-09  4.88162e-05   92.346  1.19151e-09
      float8_e5m2  7.81249e-05       0.0125   44.179  7.75158e-05
      int8_tensor   0.00011191    0.0149606  42.6182  3.02735e-06
    """
    first = np.asarray(floats("chain_table", x)).astype(np.float64)
    rows, before = [], first
    for step, y in zip(steps, chain(x, steps), strict=True):
        after = np.asarray(y).astype(np.float64)
        error, power = after - first, float(np.mean(first**2))
        mse = float(np.mean(error**2))
        with np.errstate(divide="ignore", invalid="ignore"):  # Exact, or no longer finite.
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


def _label(step: str | Format | Quantizer) -> str:
    if isinstance(step, str):
        return step
    if isinstance(step, Quantizer):
        return step.element.name
    return step.name
