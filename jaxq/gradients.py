"""Gradient estimators: how a snapped value differentiates.

An estimator is a function `(tangent, snap) -> tangent`, linear in the tangent: it stands for the
derivative of the snap, a staircase whose true one is zero almost everywhere. `snap` says what was
snapped to what (`Snap`). Being a rule on tangents it serves forward mode, reverse mode and second
derivatives; whatever it computes of `snap.x` is differentiated in its turn.

All around the snap follows the chain rule. With a scale s, numbers q on the grid, a zero point z or
a minimum m, the quantized value is y = s q + m, q = snap(u), u = (x - m) / s, and for `scale=` and
`zero_point=` that are given

    dy = D(dx - u ds - dm + s dz)  +  q ds + dm - s dz

where D is the estimator. (Scales that a tensor gets from its own numbers count as constants.) An
estimator may ask for the neighbours on the grid by an attribute `neighbours = True`, and may change
how scales and zero points differentiate by a method `of_scaling(snap, scaling) -> scaling`.

To add one: a function or a frozen record like those below, listed in `ALL`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

__all__ = [
    "ALL",
    "Dsq",
    "Gradient",
    "Lsq",
    "Pact",
    "Scaling",
    "Snap",
    "TrustRegion",
    "get_gradient",
]


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


def straight_through(tangent: jax.Array, snap: Snap) -> jax.Array:
    """The tangent as it is: the snap counts as the identity (Bengio et al., 2013).

    So it does beyond the ends of the grid, which draws a learned scale the wrong way there: learn
    scales with another.
    """
    del snap
    return tangent


def clipped(tangent: jax.Array, snap: Snap) -> jax.Array:
    """The tangent inside [low, high], zero where the value was clipped: a clip's derivative."""
    return _where((snap.low <= snap.x) & (snap.x <= snap.high), tangent)


def zero(tangent: jax.Array, snap: Snap) -> jax.Array:
    """Zero: the true derivative of a staircase, almost everywhere."""
    del snap
    return jnp.zeros_like(tangent)


@dataclasses.dataclass(frozen=True)
class Lsq:
    """Learned step size quantization: straight through inside, and a scaled gradient of the scale.

    With v = x / s, of which the grid holds -Qn to Qp, and g = 1 / sqrt(N Qp):

        dy/dx = 1 where -Qn < v < Qp, else 0
        dy/ds = g (snap(v) - v) there, else -g Qn or g Qp

    A learned zero point, LSQ+'s offset, gets what the chain rule gives it, times g: nothing inside,
    and outside its own change. `jaxq.qat.lsq_scale` is the scale to begin with.

    Attributes:
      count: N. None takes the elements of a block, as for weights. For activations the paper takes
        the features of one example, which a tensor with a batch axis cannot know: give it.

    Raises:
      ValueError: `count` is below 1.

    References:
      Esser et al., "Learned Step Size Quantization" (2020), section 2; Bhalgat et al., "LSQ+"
      (2020).
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"Lsq: `count` must be at least 1, or None, got {self.count}.")

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """The tangent strictly inside."""
        return _where((snap.low < snap.x) & (snap.x < snap.high), tangent)

    def of_scaling(self, snap: Snap, scaling: Scaling) -> Scaling:
        """Derivatives times g."""
        del snap
        count = scaling.count if self.count is None else np.float32(self.count)
        g = 1 / jnp.sqrt(count * scaling.largest)
        return scaling.differing(lambda v: passed(lax.stop_gradient(v), v * g))


@dataclasses.dataclass(frozen=True)
class Pact:
    """Parameterized clipping: the derivative of a clip to [low, high], for x and for the scale.

    With the clip a = Qp s, given as `scale=a / Qp`: dy/dx = 1 where low <= x < a, dy/da = 1 where
    x >= a, and else 0. What is rounded away gives the scale no gradient, other than in `Lsq`.

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018),
      section 3.
    """

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """The tangent inside."""
        return _where(self._inside(snap), tangent)

    def of_scaling(self, snap: Snap, scaling: Scaling) -> Scaling:
        """Constant inside, where the value is not the end's."""
        return scaling.constant_where(self._inside(snap))

    def _inside(self, snap: Snap) -> jax.Array:
        return (snap.low <= snap.x) & (snap.x < snap.high)


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    """Trust gradient estimation: the tangent where the error is small, |y - x| <= T, else zero.

    T is `factor` times half the interval of the grid in which x lies, or the last one. The default
    keeps all that rounds to nearest, and what lies beyond the ends by no more than half a step.
    (The bound is widened by what the dtype of x resolves.)

    Attributes:
      factor: T in half steps.

    Raises:
      ValueError: `factor` is not positive.

    References:
      Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations" (2025),
      section 3.3.
    """

    factor: float = 1.0
    neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"TrustRegion: `factor` must be positive, got {self.factor}.")

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """The tangent where the error is trusted."""
        x, y, below, above = (v.astype(jnp.float32) for v in (snap.x, snap.y, *_interval(snap)))
        width = above - below
        resolved = jnp.abs(x) * np.float32(jnp.finfo(snap.x.dtype).eps)
        near = jnp.abs(y - x) <= width * np.float32(self.factor / 2) + resolved
        return _where(near | (width == 0), tangent)


@dataclasses.dataclass(frozen=True)
class Dsq:
    """Differentiable soft quantization: the derivative of a staircase of tanh, zero outside.

    In an interval of width w around the middle c of two neighbours of the grid, t = (x - c) / w,

        dy/dx = k/2 (1 - tanh(k t)^2) / tanh(k/2),   k = ln(2 / alpha - 1)

    `jaxq.qat.soft_round` has the staircase itself.

    Attributes:
      alpha: how far the staircase is from a true one, in (0, 1): towards 0 the derivative gathers
        where numbers change sides, towards 1 it becomes straight-through. k is the inverse
        temperature of soft rounding.

    Raises:
      ValueError: `alpha` is not in (0, 1).

    References:
      Gong et al., "Differentiable Soft Quantization" (2019), section 3.1; Agustsson and Theis,
      "Universally Quantized Neural Compression" (2020), section 4.
    """

    alpha: float = 0.2
    neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"Dsq: `alpha` must be in (0, 1), got {self.alpha}.")

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """The tangent times the slope."""
        x, below, above = (v.astype(jnp.float32) for v in (snap.x, *_interval(snap)))
        inside = (snap.low <= snap.x) & (snap.x <= snap.high)
        width = above - below
        flat = ~(inside & (width > 0))  # Nothing is divided by 0, in a second derivative neither.
        t = jnp.where(flat, 0, x - below) / jnp.where(flat, 1, width) - 0.5
        k = math.log(2 / self.alpha - 1)
        slope = (1 - jnp.tanh(k * t) ** 2) * (k / 2 / math.tanh(k / 2))
        slope = jnp.where(width > 0, slope, 1)
        return _where(inside, tangent * slope.astype(tangent.dtype))


ALL: MappingProxyType[str, Gradient] = MappingProxyType(
    {
        "straight_through": straight_through,
        "clipped": clipped,
        "zero": zero,
        "lsq": Lsq(),
        "pact": Pact(),
        "trust_region": TrustRegion(),
        "dsq": Dsq(),
    }
)


def get_gradient(spec: str | Gradient) -> Gradient:
    """The estimator that a name or a function stands for.

    Args:
      spec: a name in `jaxq.gradients.ALL`, or a function as this module describes.

    Returns:
      The function.

    Raises:
      ValueError: no estimator has that name.
      TypeError: the argument is neither.
    """
    if isinstance(spec, str):
        if spec not in ALL:
            raise ValueError(f"No gradient estimator is named {spec!r}. Known: {', '.join(ALL)}.")
        return ALL[spec]
    if isinstance(spec, type):
        raise TypeError(f"`gradient` must be a name or a function, got a class: {spec.__name__}().")
    if not callable(spec):
        raise TypeError(f"`gradient` must be a name or a function, got {type(spec).__name__}.")
    return spec


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
    return _attach(straight_through, Snap(x, y, None, None), None)


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


def _moves(tangent: Any) -> bool:
    """Whether something is differentiated at all."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def _interval(snap: Snap) -> tuple[jax.Array, jax.Array]:
    assert snap.below is not None  # The estimator has asked for them.
    assert snap.above is not None
    return snap.below, snap.above


def _where(kept: jax.Array, tangent: jax.Array) -> jax.Array:
    return jnp.where(kept, tangent, jnp.zeros_like(tangent))
