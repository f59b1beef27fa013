"""The quantization error of a tensor, split by cause."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._jax.draws import checked_key
from jaxq._jax.serialization import named_tuple
from jaxq.analysis._arguments import (
    FormatOrRecipe,
    check_arguments,
    rounding_limits,
    spacing_exponent,
)
from jaxq.analysis._metrics import Comparison, compare
from jaxq.analysis._sums import blocks_of, over_blocks, power_of_two
from jaxq.formats import Format, get_format
from jaxq.numerics import cast, widen
from jaxq.quantizers import grid_values, measured, restored, units_of
from jaxq.recipes import Granularity, Recipe

__all__ = ["QuantizationError", "quantization_error"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_ZERO = np.float32(0)


@named_tuple
class QuantizationError(NamedTuple):
    """The error of a quantizer by cause, one value per block, or scalars for a whole tensor.

    `clipped`, `flushed` and `rounded` are fractions of the finite elements. No element counts in
    more than one of them, and an element that counts in none is exact. `clip_mse` and
    `rounding_mse` add up to `errors.mse`.

    Attributes:
      errors: the errors of the quantized tensor relative to the original.
      clipped: the fraction of elements beyond the end of the grid by more than half of its last
        step. They become the end of the grid, infinity or NaN.
      flushed: the fraction of elements that are not 0 and become 0.
      rounded: the fraction of elements that change and are neither clipped nor flushed.
      clip_mse: the part of the mean squared error that is due to clipped elements.
      rounding_mse: the part of the mean squared error that is due to all other elements.
      mean_ulp: the mean error in units of the grid's spacing at the element; clipped elements use
        the spacing at the end of the grid.
      max_ulp: the largest error in the same units. With rounding to nearest it is at most 1/2 for
        elements that are not clipped, up to the rounding error of the scaling.

    Example:
      >>> import jax.numpy as jnp
      >>> e = quantization_error(jnp.array([0.0, 1.0, 2.25, 8.0]), "float4_e2m1fn")
      >>> float(e.clip_mse), float(e.rounding_mse), float(e.errors.mse)
      (1.0, 0.015625, 1.015625)
      >>> float(e.max_ulp)  # 8 becomes 6, and the last step is 2.
      1.0
    """

    errors: Comparison
    clipped: jax.Array
    flushed: jax.Array
    rounded: jax.Array
    clip_mse: jax.Array
    rounding_mse: jax.Array
    mean_ulp: jax.Array
    max_ulp: jax.Array


def quantization_error(
    x: jax.typing.ArrayLike,
    recipe: FormatOrRecipe,
    *,
    per: Granularity | None = None,
    key: jax.Array | None = None,
) -> QuantizationError:
    """Returns the quantization error of a tensor, split by cause.

    Args:
      x: a float16, bfloat16 or float32 tensor of any shape.
      recipe: a recipe or its name; or a format or its name, which means a cast without a
        scale.
      per: the granularity of the result, as in `compare`; `recipe.granularity` gives one result per
        scale. Default: None, one result for the whole tensor.
      key: a key of `jax.random`, required for a stochastic recipe and not allowed otherwise.

    Returns:
      A `QuantizationError`. A NaN or an infinity may invalidate the scale of its whole block, whose
      errors are then infinite. Outliers that a recipe stores separately are included in the errors,
      but count as neither clipped nor flushed.

    Raises:
      TypeError: if x has another dtype.
      ValueError: as in `jaxq.fake_quant` and `compare`.

    Example:
      >>> import jax.numpy as jnp
      >>> e = quantization_error(jnp.array([0.001, 0.3, 7.0, 100.0]), "float4_e2m1fn")
      >>> float(e.clipped), float(e.flushed), float(e.rounded)
      (0.5, 0.25, 0.25)
    """
    x, target = check_arguments("quantization_error", x, recipe)
    key = checked_key("quantization_error", key)
    return _quantization_error(lax.stop_gradient(x), key, target, per)


@functools.partial(jax.jit, static_argnames=("target", "per"))
def _quantization_error(
    x: jax.Array, key: jax.Array | None, target: Format | Recipe, per: Granularity | None
) -> QuantizationError:
    wide = widen(x)
    if isinstance(target, Recipe):
        y, units, snap, is_outlier, shift = _in_units(x, key, target)
        fmt = target.element
    else:
        y, fmt, is_outlier = cast(wide, target), target, np.zeros((), bool)
        units, snap, shift = wide, cast(wide, target, overflow="saturate"), np.float32(0)
    finite = jnp.isfinite(wide)
    limits = rounding_limits(fmt)
    clipped = (units > limits.high - shift) | (units < limits.low - shift)
    clipped = clipped & finite & ~jnp.broadcast_to(is_outlier, finite.shape)
    zero = (_FLOAT32.bits(y) & _FLOAT32.magnitude_mask) == 0
    flushed = zero & ((_FLOAT32.bits(wide) & _FLOAT32.magnitude_mask) != 0) & ~clipped & finite
    changed = (_FLOAT32.bits(y + np.float32(0)) != _FLOAT32.bits(wide + np.float32(0))) & finite
    changed = changed & ~clipped & ~flushed
    spacing = spacing_exponent(units + shift, fmt)
    ulp = jnp.abs(power_of_two(snap, -spacing, _FLOAT32) - power_of_two(units, -spacing, _FLOAT32))
    ulp = where(finite & jnp.isfinite(ulp) & ~jnp.broadcast_to(is_outlier, ulp.shape), ulp, _ZERO)
    cut = blocks_of(x.shape, per)
    parts = [v.astype(jnp.float32) for v in (finite, clipped, flushed, changed)]
    sums = over_blocks([*parts, ulp, ulp], cut, per, [lax.add] * 5 + [lax.max])
    n = lax.max(sums[0], np.float32(1))
    errors = compare(wide, y, per=per)
    inside = compare(wide, where(clipped, wide, y), per=per)
    outside = compare(wide, where(clipped, y, wide), per=per)
    return QuantizationError(
        errors=errors,
        clipped=sums[1] / n,
        flushed=sums[2] / n,
        rounded=sums[3] / n,
        clip_mse=outside.mse,
        rounding_mse=inside.mse,
        mean_ulp=sums[4] / n,
        max_ulp=sums[5],
    )


def _in_units(x: jax.Array, key: jax.Array | None, recipe: Recipe) -> tuple:
    """Returns the intermediate values of `jaxq.fake_quant`, in float32.

    Returns:
      The quantized tensor; the tensor divided by its scales; these numbers after rounding; the
      mask of outliers; and the zero point, which is already subtracted from the scaled numbers.
    """
    cut, inliers, outliers = recipe.cut(x.shape), x, ()
    if recipe.outliers is not None:
        inliers, outliers = recipe.outliers.take(x)
    split = widen(cut.split(inliers))
    scales = measured(split, key, recipe, cut)
    values = grid_values(split, scales, key, recipe)
    y = cut.merge(restored(values, scales.step, scales.minimum, recipe))
    units = units_of(split, scales, recipe)
    shift = _ZERO
    if scales.zero_point is not None:
        shift = cut.merge(jnp.broadcast_to(scales.zero_point, units.shape))
    is_outlier = np.zeros((), bool)
    if recipe.outliers is not None:
        y, is_outlier = recipe.outliers.put(y, outliers), recipe.outliers.mask(x.shape, outliers)
    # Round the result to the tensor's own dtype.
    y = widen(y if x.dtype == jnp.float32 else cast(y, get_format(x.dtype)))
    return y, cut.merge(units), cut.merge(values), is_outlier, shift
