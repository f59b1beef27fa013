"""Granularity, ranges and scales: from a tensor to the numbers that map it onto a format's grid.

To add a granularity: a frozen dataclass with `reduced_axes`. To add a scale rule: a function from
ranges to scales.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.formats import Format, IntFormat
from jaxq.grids import Layout, where

__all__ = ["Granularity", "PerChannel", "PerTensor", "divide"]

# The least scale: dividing by anything smaller would meet float32 subnormals, which XLA flushes.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that share a scale."""
        return tuple(range(ndim))


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for every index along the given axes.

    Attributes:
      axes: the axes that keep scales of their own, negative ones counted from the end. For a
        weight `[inputs, outputs]`, `(-1,)` gives one scale an output.

    Raises:
      ValueError: when used: an axis that the tensor lacks, or one named twice.
    """

    axes: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        axes = (self.axes,) if isinstance(self.axes, int) else tuple(self.axes)
        object.__setattr__(self, "axes", axes)

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that share a scale."""
        for axis in self.axes:
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"PerChannel(axes={self.axes}): axis {axis} needs a tensor of at least "
                    f"{axis + 1 if axis >= 0 else -axis} axes, got {ndim}. Use PerTensor() for "
                    "tensors without channels."
                )
        kept = {axis % ndim for axis in self.axes}
        if len(kept) != len(self.axes):
            raise ValueError(
                f"PerChannel(axes={self.axes}): the axes must be distinct in a tensor of {ndim} "
                "axes. Name each once."
            )
        return tuple(axis for axis in range(ndim) if axis not in kept)


Granularity: TypeAlias = PerTensor | PerChannel


def absmax(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Largest magnitudes, the reduced axes kept at length 1; NaN where a NaN or inf is.

    Taken as integers in the order of the magnitudes: a maximum of floats may lose a NaN, and sees
    float32 subnormals as zero, on CPU. An empty tensor has 0.
    """
    layout = Layout.of(x.dtype)
    magnitude = layout.bits(x) & layout.magnitude_mask
    axes = granularity.reduced_axes(x.ndim)
    top = jnp.max(magnitude, axis=axes, keepdims=True, initial=0)
    return layout.floats(where(top < layout.inf, top, layout.nan))


def symmetric_scale(amax: jax.Array, fmt: Format) -> jax.Array:
    """Ratio of amax to the format's max, at least the smallest normal float32; NaN where amax is.

    The floor makes an all-zero group a group of zeros, with no case of its own.
    """
    return _floored(divide(amax, jnp.float32(fmt.max)))


def extrema(x: jax.Array, granularity: Granularity) -> tuple[jax.Array, jax.Array]:
    """Lowest and largest values, widened to hold 0; both NaN where a NaN or inf is."""
    axes = granularity.reduced_axes(x.ndim)
    low = jnp.min(x, axis=axes, keepdims=True, initial=0)
    high = jnp.max(x, axis=axes, keepdims=True, initial=0)
    finite = absmax(x, granularity) >= 0  # Else NaN, which `min` and `max` may lose.
    nan = np.float32(np.nan)
    return where(finite, low, nan), where(finite, high, nan)


def affine_scale(low: jax.Array, high: jax.Array, fmt: IntFormat) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point that map [low, high], which holds 0, onto all integers of a format.

    s = (high - low) / (qmax - qmin) and z = qmin - rne(low / s), clamped to [qmin, qmax]. The zero
    point is whole: 0 maps to it and back exactly.

    Returns:
      Scales and zero points, float32; scale NaN and zero point 0 where the range is NaN.
    """
    lowest, highest = np.float32(fmt.min_int), np.float32(fmt.max_int)
    # By halves, as a range may be wider than the largest float32.
    scale = _floored(divide(high * 0.5 - low * 0.5, jnp.float32(highest - lowest)) * 2.0)
    zero_point = lowest - lax.round(divide(low, scale), lax.RoundingMethod.TO_NEAREST_EVEN)
    zero_point = lax.clamp(lowest, zero_point, highest)
    return scale, where(scale > 0, zero_point, np.float32(0))


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Correctly rounded quotients of finite (or NaN) float32 by positive ones, on every backend.

    XLA does not give them. It multiplies by the reciprocal when the divisor is a constant or a
    broadcast, and its division on GPU is up to two ulps off
    (https://github.com/openxla/xla/issues/37181). Subnormal operands and quotients count as zero.
    """
    b = jnp.broadcast_to(b, a.shape)
    return lax.platform_dependent(a, b, cpu=_divide_by_array, default=_divide_in_integers)


def _divide_by_array(a: jax.Array, b: jax.Array) -> jax.Array:
    """`divide` where division itself is correctly rounded, once XLA sees no broadcast."""
    return a / (b + a * np.float32(0))


def _divide_in_integers(a: jax.Array, b: jax.Array, quotient: Callable = lax.div) -> jax.Array:
    """`divide` from any quotient of significands that is off by at most 3 ulps."""
    layout = Layout.of(np.dtype(np.float32))
    low, one = np.int32(2**23 - 1), layout.field(0)
    a_bits, b_bits = layout.bits(a) & layout.magnitude_mask, layout.bits(b)
    a_significand, b_significand = (bits & low | np.int32(2**23) for bits in (a_bits, b_bits))
    below = (a_significand < b_significand).astype(jnp.int32)
    near = quotient(layout.floats(a_bits & low | one), layout.floats(b_bits & low | one))
    # 24 bits of quotient, too low by 0 to 6, and what then remains: products wrap, their
    # difference does not.
    whole = (near * (1 + below).astype(jnp.float32) * np.float32(2**23)).astype(jnp.int32) - 3
    rest = (a_significand << (23 + below)) - whole * b_significand
    for step in (4, 2, 1):
        more = (rest >= b_significand * step).astype(jnp.int32) * step
        whole, rest = whole + more, rest - b_significand * more
    whole = whole + (2 * rest > b_significand).astype(jnp.int32)  # A quotient is never half way.
    exponent = (a_bits >> 23) - (b_bits >> 23) - below + (whole >> 24) + layout.bias
    magnitude = (exponent << 23) + (whole & low)
    magnitude = where(exponent > 2 * layout.bias, layout.inf, magnitude)
    magnitude = where((exponent < 1) | (a_bits <= low), np.int32(0), magnitude)
    magnitude = where((a_bits < layout.inf) & (b_bits < layout.inf), magnitude, layout.nan)
    return layout.floats(magnitude | (layout.bits(a) & layout.sign))


def _floored(scale: jax.Array) -> jax.Array:
    """At least the least scale; NaN stays."""
    return where(scale < np.float32(_LEAST_SCALE), np.float32(_LEAST_SCALE), scale)
