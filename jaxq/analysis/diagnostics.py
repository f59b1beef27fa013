"""What a training loop can log each step about a tensor and its format, at little cost."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.analysis.specs import Ends, Spec, checked, ends
from jaxq.analysis.sums import blocks_of, largest_magnitude, over_blocks
from jaxq.bits import Layout
from jaxq.blocks import Cut
from jaxq.casting import widen
from jaxq.formats import Format
from jaxq.quantizers import check_plain_scales
from jaxq.recipes import Quantizer
from jaxq.snapping import given_scales, measured

__all__ = ["Diagnostics", "diagnostics"]

_FLOAT32 = Layout.of(np.dtype(np.float32))


class Diagnostics(NamedTuple):
    """Four float32 scalars about one tensor; the rates are shares of its elements, 0 of none.

    Attributes:
      amax: the largest finite magnitude.
      overflow: the share beyond the grid of the format by more than half its last step.
      underflow: the share that is not 0 and becomes 0.
      nonfinite: the share that is NaN or infinite, and counts for nothing else here.
    """

    amax: jax.Array
    overflow: jax.Array
    underflow: jax.Array
    nonfinite: jax.Array


def diagnostics(
    x: jax.typing.ArrayLike, spec: Spec, *, scale: jax.typing.ArrayLike | None = None
) -> Diagnostics:
    """How well a tensor fits a format: one pass over it, no rounding.

    Rounding to nearest is assumed, whatever the recipe's own, and the ends of a scaled grid are
    themselves rounded. With a recipe that makes its scales
    from the tensor there is a pass more, for these; with scales that are given there is none.

    Args:
      x: float16, bfloat16 or float32, any shape.
      spec: a format or its name, for a cast without a scale; or a recipe or a preset's name.
        With `zero_point="minimum"` nothing counts as underflow, as 0 is no special value there.
      scale: float32 scales for a symmetric recipe, which broadcast to one a block, as in
        `jaxq.fake_quant`; those of the step before, for instance.

    Returns:
      A `Diagnostics`, whose gradient is zero. A block without a finite scale, as it holds a NaN or
      an infinity, counts for `amax` and `nonfinite` only.

    Raises:
      TypeError: x is of another dtype.
      ValueError: a scale beside a format or a recipe that does not take one; as in
        `jaxq.fake_quant`.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([1e-9, 0.5, 70000.0, jnp.nan])
      >>> [float(v) for v in diagnostics(grads, "float16")]
      [70000.0, 0.25, 0.25, 0.25]
    """
    x, kind = checked("diagnostics", x, spec)
    if scale is not None:
        if not isinstance(kind, Quantizer) or kind.zero_point is not None:
            raise ValueError(
                "diagnostics: `scale` goes with a symmetric recipe, got "
                f"{spec!r}. Leave it out, or give a recipe such as 'fp8_e4m3_tensor'."
            )
        check_plain_scales("diagnostics", kind)
        counts = kind.cut(x.shape).counts
        scale = jnp.asarray(scale, jnp.float32)
        try:
            fits = np.broadcast_shapes(scale.shape, counts) == counts
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"diagnostics: `scale` must broadcast to one number a block, shape {counts}, got "
                f"{scale.shape}."
            )
        scale = lax.stop_gradient(scale)
    return _diagnostics(lax.stop_gradient(x), scale, kind)


@functools.partial(jax.jit, static_argnames="kind")
def _diagnostics(x: jax.Array, scale: jax.Array | None, kind: Format | Quantizer) -> Diagnostics:
    wide = widen(x)
    bounds = _in_a_recipe(x, scale, kind) if isinstance(kind, Quantizer) else ends(kind)
    top = largest_magnitude(wide, _FLOAT32)
    bits = _FLOAT32.bits(wide)
    magnitude = bits & _FLOAT32.magnitude_mask
    nonfinite = magnitude >= _FLOAT32.inf
    overflow = ((wide > bounds.high) | (wide < bounds.low)) & ~nonfinite
    # As integers: a comparison of floats takes subnormals for 0, and -1 is below every magnitude.
    negative, positive = (
        jnp.broadcast_to(_FLOAT32.bits(end), x.shape) for end in (bounds.negative, bounds.positive)
    )
    flush = lax.select(bits < 0, negative, positive)
    underflow = (magnitude > 0) & (magnitude <= flush) & ~overflow & ~nonfinite
    cut = blocks_of(x.shape, None)
    counts = [v.astype(jnp.int32) for v in (overflow, underflow, nonfinite)]
    top, *counts = over_blocks([top, *counts], cut, None, [lax.max] + [lax.add] * 3)
    rates = [c.astype(jnp.float32) / np.float32(max(x.size, 1)) for c in counts]
    return Diagnostics(_FLOAT32.floats(top), *rates)


def _in_a_recipe(x: jax.Array, scale: jax.Array | None, recipe: Quantizer) -> Ends:
    """The ends of the grid where its scales put it, for every element."""
    cut, end = recipe.cut(x.shape), ends(recipe.element)
    if recipe.outliers is not None:
        x, _ = recipe.outliers.take(x)
    if scale is None:
        scales = measured(widen(cut.split(x)), None, _to_nearest(recipe), cut)
    else:
        scales = given_scales(cut.spread(jnp.broadcast_to(scale, cut.counts)), None, recipe)
    unit, shift, origin = scales.divisor, np.float32(0), np.float32(0)
    if recipe.zero_point == "integer":
        assert scales.zero_point is not None
        shift = scales.zero_point
    if scales.minimum is not None:
        origin = scales.minimum
    low, high = ((bound - shift) * unit + origin for bound in (end.low, end.high))
    flushes = recipe.zero_point != "minimum" and end.positive >= 0
    size = jnp.abs(unit)
    parts = [lax.min(low, high), lax.max(low, high)]
    parts += [
        size * f if flushes else jnp.full_like(unit, -1) for f in (end.negative, end.positive)
    ]
    below, above, negative, positive = (_everywhere(part, cut) for part in parts)
    return Ends(low=below, high=above, negative=negative, positive=positive)


def _everywhere(part: jax.Array, cut: Cut) -> jax.Array:
    """One number a block, for every element."""
    shape = tuple(n for pair in zip(cut.counts, cut.block, strict=True) for n in pair)
    return cut.merge(jnp.broadcast_to(part, shape))


def _to_nearest(recipe: Quantizer) -> Quantizer:
    """The recipe without a need for a key."""
    return dataclasses.replace(recipe, rounding="nearest_even")
