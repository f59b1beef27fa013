"""Cheap per-step diagnostics of a tensor and its format, for logging in a training loop."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import rounded
from jaxq._jax.serialization import named_tuple
from jaxq.analysis._arguments import (
    FormatOrRecipe,
    RoundingLimits,
    check_arguments,
    rounding_limits,
)
from jaxq.analysis._sums import blocks_of, largest_magnitude, over_blocks, share
from jaxq.formats import Format
from jaxq.numerics import widen
from jaxq.quantizers import check_takes_scales, measured
from jaxq.recipes import Recipe, Scales

__all__ = ["Diagnostics", "diagnostics", "scaled_limits"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))


@named_tuple
class Diagnostics(NamedTuple):
    """Four float32 scalars about one tensor; the rates are fractions, 0 for an empty tensor.

    Attributes:
      amax: the largest finite magnitude.
      overflow: the fraction of elements beyond the end of the format's grid by more than half of
        the grid's last step.
      underflow: the fraction of elements that are not 0 and become 0.
      nonfinite: the fraction of elements that are NaN or infinite. These elements do not count in
        the other fields.

    Example:
      >>> import jax.numpy as jnp
      >>> seen = diagnostics(jnp.array([1e-9, 0.5, 8.0, 70000.0]), "float16")
      >>> {name: float(value) for name, value in seen._asdict().items()}
      {'amax': 70000.0, 'overflow': 0.25, 'underflow': 0.25, 'nonfinite': 0.0}
    """

    amax: jax.Array
    overflow: jax.Array
    underflow: jax.Array
    nonfinite: jax.Array


def diagnostics(
    x: jax.typing.ArrayLike, recipe: FormatOrRecipe, *, scale: jax.typing.ArrayLike | None = None
) -> Diagnostics:
    """Returns the overflow and underflow rates of a tensor in a format, without rounding it.

    The tensor is read once; a recipe that computes its scales from the tensor needs one more pass,
    unless `scale` is given. Rounding to nearest is assumed for every recipe, and the ends of a
    scaled grid are rounded to float32.

    Args:
      x: a float16, bfloat16 or float32 tensor of any shape.
      recipe: a format or its name, for a cast without a scale; or a recipe or its name.
        With `ScaleAndMin` nothing counts as underflow, because 0 is not a special value.
      scale: float32 scales for a symmetric recipe, broadcastable to one value per block, as in
        `jaxq.fake_quant`; for example, those of the previous step. Default: None, computes them.

    Returns:
      A `Diagnostics`, whose gradient is zero. A block whose scale is not finite because it holds a
      NaN or an infinity counts only for `amax` and `nonfinite`.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if `scale` is given with a format, or with a recipe that takes no scale; or as in
        `jaxq.fake_quant`.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([1e-9, 0.5, 70000.0, jnp.nan])
      >>> [float(v) for v in diagnostics(grads, "float16")]
      [70000.0, 0.25, 0.25, 0.25]
    """
    x, target = check_arguments("diagnostics", x, recipe)
    if scale is not None:
        if not isinstance(target, Recipe) or target.scaling.two_sided:
            raise ValueError(
                f"diagnostics: `scale` requires a symmetric recipe, got {recipe!r:.60}. Leave it "
                "out, or use a recipe such as 'fp8_e4m3_tensor'."
            )
        check_takes_scales("diagnostics", target)
        counts = target.cut(x.shape).counts
        scale = jnp.asarray(scale, jnp.float32)
        try:
            fits = np.broadcast_shapes(scale.shape, counts) == counts
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"diagnostics: `scale` must broadcast to one number per block, shape {counts}, got "
                f"{scale.shape}. Use a scalar, or the scale of jaxq.quantize(x, recipe)."
            )
        scale = lax.stop_gradient(scale)
    return _diagnostics(lax.stop_gradient(x), scale, target)


@functools.partial(jax.jit, static_argnames="target")
def _diagnostics(x: jax.Array, scale: jax.Array | None, target: Format | Recipe) -> Diagnostics:
    wide = widen(x)
    if isinstance(target, Recipe):
        limits = _limits_of_recipe(x, scale, target)
    else:
        limits = rounding_limits(target)
    top = largest_magnitude(wide, _FLOAT32)
    bits = _FLOAT32.bits(wide)
    magnitude = bits & _FLOAT32.magnitude_mask
    nonfinite = magnitude >= _FLOAT32.inf
    overflow = ((wide > limits.high) | (wide < limits.low)) & ~nonfinite
    # Compared as integers, because float comparison may flush subnormals to 0; the bits of -1.0
    # are below every magnitude.
    negative, positive = (
        jnp.broadcast_to(_FLOAT32.bits(limit), x.shape)
        for limit in (limits.largest_flushed_negative, limits.largest_flushed_positive)
    )
    flush = lax.select(bits < 0, negative, positive)
    underflow = (magnitude > 0) & (magnitude <= flush) & ~overflow & ~nonfinite
    cut = blocks_of(x.shape, None)
    counts = [v.astype(jnp.int32) for v in (overflow, underflow, nonfinite)]
    top, *counts = over_blocks([top, *counts], cut, None, [lax.max] + [lax.add] * 3)
    size = np.float32(max(x.size, 1))
    rates = [share(c.astype(jnp.float32), size) for c in counts]
    return Diagnostics(_FLOAT32.floats(top), *rates)


def _limits_of_recipe(x: jax.Array, scale: jax.Array | None, recipe: Recipe) -> RoundingLimits:
    """Returns the limits of the scaled grid for each element.

    Args:
      x: the tensor.
      scale: scales from the caller, broadcastable to one per block; None computes them.
      recipe: the recipe.
    """
    cut = recipe.cut(x.shape)
    if recipe.outliers is not None:
        x, _ = recipe.outliers.take(x)
    if scale is None:
        scales = measured(widen(cut.split(x)), None, recipe.to_nearest(), cut)
    else:
        scale = cut.align_scales(jnp.broadcast_to(scale, cut.counts))
        scales = recipe.scaling.given(scale, None, recipe.element)
    return scaled_limits(x.shape, scales, recipe)


def scaled_limits(shape: tuple[int, ...], scales: Scales, recipe: Recipe) -> RoundingLimits:
    """Returns the limits of the scaled grid for each element of a tensor.

    Args:
      shape: the shape of the tensor.
      scales: its scales.
      recipe: the recipe.
    """
    cut, limits = recipe.cut(shape), rounding_limits(recipe.element)
    unit, shift, origin = scales.divisor, np.float32(0), np.float32(0)
    if scales.zero_point is not None:
        shift = scales.zero_point
    if scales.origin is not None:
        origin = scales.origin
    low, high = (rounded((bound - shift) * unit) + origin for bound in (limits.low, limits.high))
    flushed = (limits.largest_flushed_negative, limits.largest_flushed_positive)
    flushes = scales.minimum is None and limits.largest_flushed_positive >= 0
    size = jnp.abs(unit)
    parts = [lax.min(low, high), lax.max(low, high)]
    parts += [size * f if flushes else jnp.full_like(unit, -1) for f in flushed]
    return RoundingLimits(*(_to_elements(part, cut) for part in parts))


def _to_elements(part: jax.Array, cut: Cut) -> jax.Array:
    """Broadcasts one number per block to the elements of the block."""
    shape = tuple(n for pair in zip(cut.counts, cut.block, strict=True) for n in pair)
    return cut.merge(jnp.broadcast_to(part, shape))
