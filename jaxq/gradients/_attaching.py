"""The definition of all gradients: a snapped value, its estimator and the chain rule.

A snap rounds a number to the nearest value of a grid, or to a neighbor of it. Everything around it
follows the chain rule. With a scale s, grid values q, and a zero point z or a minimum m, the
quantized value is y = s q + m with q = snap(u) and u = (x - m) / s. For a given `scale=` and
`zero_point=`

    dy = D(dx - u ds - dm + s dz)  +  q ds + dm - s dz

where D is the estimator. (Scales computed from the tensor itself count as constants.) An estimator
requests the neighbors on the grid with an attribute `neighbors = True`, and changes the derivatives
of scales and zero points with a method `of_scales(snap, scales) -> scales`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

__all__ = ["GivenScales", "Gradient", "Snap", "attach", "passed", "wants_neighbors"]


class Snap(NamedTuple):
    """The input and output of a snap, which an estimator receives: arrays that broadcast against x.

    All are float32 (float64 for a cast of float64), so that a float16 or bfloat16 input is compared
    with the exact ends of the range.

    Attributes:
      x: the input.
      y: the snapped value, with the shape and dtype of x.
      low: the lower end of the grid's range.
      high: the upper end of the grid's range.
      below: the largest grid value at or below x, except the maximum; None unless the estimator has
        `neighbors = True`. Outside the range it is the lower end of the outermost interval.
      above: the grid value after `below`; equal to `below` where an element is not quantized.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq.gradients import get_gradient
      >>> snap = Snap(jnp.array([0.4, 9.0]), jnp.array([0.0, 7.0]), low=-7.0, high=7.0)
      >>> get_gradient("clipped")(jnp.ones(2), snap).tolist()
      [1.0, 0.0]
    """

    x: jax.Array
    y: jax.Array
    low: Any
    high: Any
    below: Any = None
    above: Any = None


class GivenScales(NamedTuple):
    """The scales of a snap that were passed by the user: float32 arrays that broadcast against x.

    Attributes:
      scale: the scale s.
      zero_point: the zero point z, in units of the scale; None without an integer zero point.
      minimum: the minimum m; None for a recipe without a minimum.
      grid_values: the grid values q, with the zero point subtracted.
      count: the number of elements that share each scale.
      largest: the largest value of the element format, called Qp in LSQ.

    Example:
      >>> import jax.numpy as jnp
      >>> scales = GivenScales(jnp.array(0.5), None, None, jnp.array([1.0, 7.0]), 2, 7.0)
      >>> float(scales.differing(lambda v: 2 * v).scale)
      1.0
    """

    scale: jax.Array
    zero_point: jax.Array | None
    minimum: jax.Array | None
    grid_values: jax.Array
    count: Any
    largest: Any

    def differing(self, change: Callable[[jax.Array], jax.Array]) -> "GivenScales":
        """Returns the scales with `change` applied to the scale, zero point and minimum."""
        return self._replace(
            scale=change(self.scale),
            zero_point=None if self.zero_point is None else change(self.zero_point),
            minimum=None if self.minimum is None else change(self.minimum),
        )

    def moved(self, v: jax.Array) -> jax.Array:
        """Returns grid values whose derivatives follow the scale, zero point and minimum."""
        nonzero, m = self.scale != 0, 0 if self.minimum is None else self.minimum
        grid_values = (v.astype(jnp.float32) - m) / jnp.where(nonzero, self.scale, 1)
        units = lax.stop_gradient(jnp.where(nonzero, grid_values, 0))
        if self.zero_point is not None:
            units = units - (self.zero_point - lax.stop_gradient(self.zero_point))
        return passed(v, (units * self.scale + m).astype(v.dtype))

    def constant_where(self, mask: jax.Array) -> "GivenScales":
        """Returns the same scales with zero derivatives where a mask is true."""
        return self.differing(lambda v: jnp.where(mask, lax.stop_gradient(v), v))


Gradient: TypeAlias = Callable[[jax.Array, Snap], jax.Array]


def wants_neighbors(estimator: Gradient) -> bool:
    """Returns whether an estimator requests `below` and `above`."""
    return getattr(estimator, "neighbors", False)


def attach(
    estimator: Gradient, snap: Snap, scales: GivenScales | None, result: jax.Array
) -> jax.Array:
    """Returns the snapped value with the derivative defined by an estimator.

    All gradients are defined here. The result is differentiable with respect to `snap.x` and, if
    `scales` is given, its scale, zero point and minimum; everything else counts as constant.

    Args:
      estimator: the estimator.
      snap: its input.
      scales: the given scales, or None.
      result: `snap.y`, rounded to the dtype of the result.
    """
    if scales is not None and hasattr(estimator, "of_scales"):
        scales = estimator.of_scales(snap, scales)
    y = _attach(estimator, snap, scales)
    return y if result.dtype == y.dtype else passed(result, y)


def passed(y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the value of y with the derivative of x."""
    return _attach(_same, Snap(x, y, None, None), None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(estimator: Gradient, snap: Snap, scales: GivenScales | None) -> jax.Array:
    del estimator, scales
    return snap.y


@functools.partial(_attach.defjvp, symbolic_zeros=True)
def _attach_jvp(estimator: Gradient, primals: tuple, tangents: tuple) -> tuple:
    (snap, scales), (d_snap, d_scales) = primals, tangents
    # Attached again, because the derivative may itself be differentiated.
    y = _attach(estimator, snap, scales)
    snap = snap._replace(y=y)
    if scales is None or not any(map(_moves, d_scales[:3])):
        if not _moves(d_snap.x):
            return y, jnp.zeros_like(y)
        return y, estimator(d_snap.x, snap).astype(y.dtype)
    inner, outer = _scale_tangents(snap, scales, d_scales)
    if _moves(d_snap.x):
        inner = inner + d_snap.x.astype(jnp.float32)
    return y, (estimator(inner, snap) + outer).astype(y.dtype)


def _scale_tangents(
    snap: Snap, scales: GivenScales, tangents: GivenScales
) -> tuple[jax.Array, jax.Array]:
    """Returns the tangents due to scale, zero point and minimum, before and after the snap.

    The tangents before the snap are in units of x. A scale of 0 gets no gradient. An infinite x
    counts as 0 before the snap: an estimator that masks it could not cancel an infinite tangent.
    """
    x, y = snap.x.astype(jnp.float32), snap.y.astype(jnp.float32)
    inner = outer = jnp.zeros_like(x)
    if _moves(tangents.scale):
        nonzero = scales.scale != 0
        d_scale = jnp.where(nonzero, tangents.scale, 0)
        step = jnp.where(nonzero, scales.scale, 1)
        if scales.minimum is not None:
            x, y = x - scales.minimum, y - scales.minimum
        units = jnp.where(jnp.isinf(x), 0, x) / step
        inner, outer = -units * d_scale, passed(scales.grid_values, y / step) * d_scale
    for d, factor in ((tangents.minimum, 1), (tangents.zero_point, -scales.scale)):
        if d is not None and _moves(d):
            inner, outer = inner - factor * d, outer + factor * d
    return inner, outer


def _same(tangent: jax.Array, snap: Snap) -> jax.Array:
    del snap
    return tangent


def _moves(tangent: Any) -> bool:
    """Returns whether a tangent is present and not symbolically zero."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)
