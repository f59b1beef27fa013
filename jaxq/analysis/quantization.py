"""What a quantizer does to a tensor: its errors, by their causes."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.analysis.metrics import Comparison, compare
from jaxq.analysis.specs import Spec, checked, ends, spacing_exponent
from jaxq.analysis.sums import blocks_of, over_blocks, power_of_two
from jaxq.bits import Layout, where
from jaxq.blocks import Granularity
from jaxq.casting import cast, widen
from jaxq.catalog import get_format
from jaxq.formats import Format
from jaxq.recipes import Quantizer
from jaxq.scaling import in_units
from jaxq.snapping import measured, numbers, restored

__all__ = ["QuantizationError", "quantization_error"]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ZERO = np.float32(0)


class QuantizationError(NamedTuple):
    """What a quantizer does to a tensor; arrays in the shape of the blocks, or scalars.

    The shares are of the elements that are finite, and no element is in two of them; what is in
    none is exact. `clip_mse` and `rounding_mse` add up to `errors.mse`.

    Attributes:
      errors: of the result against the tensor.
      clipped: the share beyond the grid by more than half its last step, so that not rounding but
        the end of the grid moves it: to the end, or to infinity or NaN.
      flushed: the share that is not 0 and becomes 0.
      rounded: the share of all others that change.
      clip_mse: the part of the mean squared error that comes from what is clipped.
      rounding_mse: the part that comes from all else.
      mean_ulp: the mean error in units of the grid's spacing where the number lies; clipped
        numbers count with the spacing at the end of the grid.
      max_ulp: the largest; 1/2 at most for nearest roundings of what is not clipped, but for the
        last bits of the scaling.
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
    spec: Spec,
    *,
    per: Granularity | None = None,
    key: jax.Array | None = None,
) -> QuantizationError:
    """The error that a quantizer makes on a tensor, by its causes.

    Args:
      x: float16, bfloat16 or float32, any shape.
      spec: a recipe, a preset's name, or a format or its name, which is a cast without a scale.
      per: which numbers are taken together, as in `compare`: `recipe.granularity` for one result a
        scale. None: all.
      key: a key of `jax.random` for a stochastic recipe, and only then.

    Returns:
      A `QuantizationError`. A block that a NaN or an infinity poisons is lost as a whole, and says
      so: its errors are infinite. Numbers that a recipe keeps apart are errors like others, and
      neither clipped nor flushed.

    Raises:
      TypeError: x is of another dtype.
      ValueError: as `jaxq.fake_quant` and `compare` raise.

    Example:
      >>> import jax.numpy as jnp
      >>> e = quantization_error(jnp.array([0.001, 0.3, 7.0, 100.0]), "float4_e2m1fn")
      >>> float(e.clipped), float(e.flushed), float(e.rounded)
      (0.5, 0.25, 0.25)
    """
    x, kind = checked("quantization_error", x, spec)
    return _quantization_error(lax.stop_gradient(x), key, kind, per)


@functools.partial(jax.jit, static_argnames=("kind", "per"))
def _quantization_error(
    x: jax.Array, key: jax.Array | None, kind: Format | Quantizer, per: Granularity | None
) -> QuantizationError:
    wide = widen(x)
    if isinstance(kind, Quantizer):
        y, units, snap, apart, shift = _in_units(x, key, kind)
        fmt = kind.element
    else:
        y, fmt, apart = cast(wide, kind), kind, np.zeros((), bool)
        units, snap, shift = wide, cast(wide, kind, overflow="saturate"), np.float32(0)
    finite = jnp.isfinite(wide)
    end = ends(fmt)
    clipped = (units > end.high - shift) | (units < end.low - shift)
    clipped = clipped & finite & ~jnp.broadcast_to(apart, finite.shape)
    zero = (_FLOAT32.bits(y) & _FLOAT32.magnitude_mask) == 0
    flushed = zero & ((_FLOAT32.bits(wide) & _FLOAT32.magnitude_mask) != 0) & ~clipped & finite
    moved = (_FLOAT32.bits(y + np.float32(0)) != _FLOAT32.bits(wide + np.float32(0))) & finite
    moved = moved & ~clipped & ~flushed
    spacing = spacing_exponent(units + shift, fmt)
    ulp = jnp.abs(power_of_two(snap, -spacing, _FLOAT32) - power_of_two(units, -spacing, _FLOAT32))
    ulp = where(finite & jnp.isfinite(ulp) & ~jnp.broadcast_to(apart, ulp.shape), ulp, _ZERO)
    cut = blocks_of(x.shape, per)
    parts = [v.astype(jnp.float32) for v in (finite, clipped, flushed, moved)]
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


def _in_units(x: jax.Array, key: jax.Array | None, recipe: Quantizer) -> tuple:
    """Result, numbers in units of their scales, the same snapped, which are kept apart, zero point.

    As `jaxq.fake_quant` has them, in float32; the zero point is taken away from the units.
    """
    cut, held, kept = recipe.cut(x.shape), x, None
    if recipe.outliers is not None:
        held, kept = recipe.outliers.take(x)
    split = widen(cut.split(held))
    scales = measured(split, key, recipe, cut)
    values = numbers(split, scales, key, recipe)
    y = cut.merge(restored(values, scales.step, scales.zero_point, recipe))
    if scales.minimum is not None:
        split = split - scales.minimum
    units = in_units(split, scales.divisor, recipe.held, reciprocal=recipe.reciprocal)
    shift = _ZERO
    if recipe.zero_point == "integer":
        assert scales.zero_point is not None
        shift = cut.merge(jnp.broadcast_to(scales.zero_point, units.shape))
    apart = np.zeros((), bool)
    if recipe.outliers is not None:
        assert kept is not None
        y, apart = recipe.outliers.put(y, kept), recipe.outliers.mask(x.shape, kept)
    # As the tensor's own dtype holds the result.
    y = widen(y if x.dtype == jnp.float32 else cast(y, get_format(x.dtype)))
    return y, cut.merge(units), cut.merge(values), apart, shift
