"""Granularity, ranges and scales: from a tensor to the numbers that map it onto a format's grid.

To add a granularity: a frozen dataclass with `reduced_axes`. To add a scale rule: a function from
ranges to scales.
"""

import dataclasses
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.formats import Format, IntFormat
from jaxq.grids import Layout, where

__all__ = ["Granularity", "PerChannel", "PerTensor"]

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
    return _floored(amax / np.float32(fmt.max))


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
    scale = _floored((high * 0.5 - low * 0.5) / (highest - lowest) * 2.0)
    zero_point = lowest - lax.round(low / scale, lax.RoundingMethod.TO_NEAREST_EVEN)
    zero_point = lax.clamp(lowest, zero_point, highest)
    return scale, where(scale > 0, zero_point, np.float32(0))


def _floored(scale: jax.Array) -> jax.Array:
    """At least the least scale; NaN stays."""
    return where(scale < np.float32(_LEAST_SCALE), np.float32(_LEAST_SCALE), scale)
