"""The one place where a gradient is defined: a snapped value, its estimator and the chain rule.

All around the snap follows the chain rule. With a scale s, numbers q on the grid, a zero point z or
a minimum m, the quantized value is y = s q + m, q = snap(u), u = (x - m) / s, and for `scale=` and
`zero_point=` that are given

    dy = D(dx - u ds - dm + s dz)  +  q ds + dm - s dz

where D is the estimator. (Scales that a tensor gets from its own numbers count as constants.) An
estimator may ask for the neighbours on the grid by an attribute `neighbours = True`, and may change
how scales and zero points differentiate by a method `of_scaling(snap, scaling) -> scaling`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

__all__ = ["Gradient", "Scaling", "Snap", "attach", "passed", "wants_neighbours"]


class Snap(NamedTuple):
    """What an estimator sees: arrays that broadcast against x.

    Attributes:
      x: the input.
      y: the snapped value, in x's shape and dtype.
      low: the lower end of what the grid covers.
      high: the upper end.
      below: the grid's value at or below x, and of two the one that is not the largest; None unless
        the estimator has `neighbours = True`. Beyond the ends it is that of the last interval.
      above: the next value of the grid; equal to `below` where a number is kept as it is.
    """

    x: jax.Array
    y: jax.Array
    low: Any
    high: Any
    below: Any = None
    above: Any = None


class Scaling(NamedTuple):
    """The scales that a snap was given: float32, to broadcast against x.

    Attributes:
      scale: s.
      zero_point: z, in units of the scale; None for a recipe without an integer one.
      minimum: m; None for a recipe without.
      level: q, the numbers on the grid, the zero point taken away.
      count: how many elements share each scale.
      largest: the largest value of the element format, Qp of LSQ.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    minimum: jax.Array | None
    level: jax.Array
    count: Any
    largest: Any

    def differing(self, change: Callable[[jax.Array], jax.Array]) -> "Scaling":
        """The same numbers with other derivatives, as a function gives them to each array."""
        return self._replace(
            scale=change(self.scale),
            zero_point=None if self.zero_point is None else change(self.zero_point),
            minimum=None if self.minimum is None else change(self.minimum),
        )

    def moved(self, v: jax.Array) -> jax.Array:
        """A value of the grid, that moves with scale and zero point as the grid does."""
        some, m = self.scale != 0, 0 if self.minimum is None else self.minimum
        level = (v.astype(jnp.float32) - m) / jnp.where(some, self.scale, 1)
        units = lax.stop_gradient(jnp.where(some, level, 0))
        if self.zero_point is not None:
            units = units - (self.zero_point - lax.stop_gradient(self.zero_point))
        return passed(v, (units * self.scale + m).astype(v.dtype))

    def constant_where(self, mask: jax.Array) -> "Scaling":
        """The same numbers, without a derivative where a mask is true."""
        return self.differing(lambda v: jnp.where(mask, lax.stop_gradient(v), v))


Gradient: TypeAlias = Callable[[jax.Array, Snap], jax.Array]


def wants_neighbours(estimator: Gradient) -> bool:
    """Whether an estimator asks for `below` and `above`."""
    return getattr(estimator, "neighbours", False)


def attach(estimator: Gradient, snap: Snap, scaling: Scaling | None = None) -> jax.Array:
    """The snapped value, with the derivative that an estimator gives it.

    The one place where a gradient is defined. With respect to `snap.x`, and where there is a
    `scaling` to its scale, zero point and minimum; all else counts as constant.
    """
    if scaling is not None and hasattr(estimator, "of_scaling"):
        scaling = estimator.of_scaling(snap, scaling)
    return _attach(estimator, snap, scaling)


def passed(y: jax.Array, x: jax.Array) -> jax.Array:
    """The value of y with the derivative of x."""
    return _attach(_same, Snap(x, y, None, None), None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(estimator: Gradient, snap: Snap, scaling: Scaling | None) -> jax.Array:
    del estimator, scaling
    return snap.y


@functools.partial(_attach.defjvp, symbolic_zeros=True)
def _attach_jvp(estimator: Gradient, primals: tuple, tangents: tuple) -> tuple:
    (snap, scaling), (d_snap, d_scaling) = primals, tangents
    # Attached once more, as the derivative may be differentiated again.
    y = _attach(estimator, snap, scaling)
    snap = snap._replace(y=y)
    if scaling is None or not any(map(_moves, d_scaling[:3])):
        if not _moves(d_snap.x):
            return y, jnp.zeros_like(y)
        return y, estimator(d_snap.x, snap).astype(y.dtype)
    inner, outer = _halves(snap, scaling, d_scaling)
    if _moves(d_snap.x):
        inner = inner + d_snap.x.astype(jnp.float32)
    return y, (estimator(inner, snap) + outer).astype(y.dtype)


def _halves(snap: Snap, scaling: Scaling, tangents: Scaling) -> tuple[jax.Array, jax.Array]:
    """What scale and zero point do to the snap's argument, in x's units, and after the snap.

    A scale of 0, which has no units, gets no gradient. An infinite x counts as 0 in units, as an
    estimator that masks it could not take away what it multiplies.
    """
    x, y = snap.x.astype(jnp.float32), snap.y.astype(jnp.float32)
    inner = outer = jnp.zeros_like(x)
    if _moves(tangents.scale):
        some = scaling.scale != 0
        d_scale = jnp.where(some, tangents.scale, 0)
        step = jnp.where(some, scaling.scale, 1)
        if scaling.minimum is not None:
            x, y = x - scaling.minimum, y - scaling.minimum
        units = jnp.where(jnp.isinf(x), 0, x) / step
        inner, outer = -units * d_scale, passed(scaling.level, y / step) * d_scale
    for d, factor in ((tangents.minimum, 1), (tangents.zero_point, -scaling.scale)):
        if d is not None and _moves(d):
            inner, outer = inner - factor * d, outer + factor * d
    return inner, outer


def _same(tangent: jax.Array, snap: Snap) -> jax.Array:
    del snap
    return tangent


def _moves(tangent: Any) -> bool:
    """Whether something is differentiated at all."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)
