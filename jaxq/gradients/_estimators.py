"""Gradient estimators, which replace the derivative of a snapped value.

An estimator is a function `(tangent, snap) -> tangent`, linear in the tangent. It replaces the
derivative of the snap, a staircase whose true derivative is zero almost everywhere. `snap` contains
the input and the snapped value (`Snap`). Since the rule acts on tangents, it works in forward mode,
in reverse mode and for second derivatives; its own dependence on `snap.x` is differentiated too.

Everything around the snap follows the chain rule, including the derivatives of scales and zero
points: see `jaxq.gradients._attaching`. An estimator requests the neighbors on the grid with an
attribute `neighbors = True`, and changes the derivatives of scales and zero points with a method
`of_scales(snap, scales) -> scales`.

To add one, write a function or a frozen record like those below and list it in `ESTIMATORS`.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer, number
from jaxq._base.registry import Registry
from jaxq.gradients._attaching import GivenScales, Gradient, Snap, passed

__all__ = [
    "DSQ",
    "ESTIMATORS",
    "LSQ",
    "PACT",
    "GivenScales",
    "Gradient",
    "Snap",
    "TrustRegion",
    "get_gradient",
]


def straight_through(tangent: jax.Array, snap: Snap) -> jax.Array:
    """Returns the tangent unchanged, as if the snap were the identity (Bengio et al., 2013).

    This includes values outside the range of the grid, where it moves a learned scale in the wrong
    direction. Use another estimator to learn scales.
    """
    del snap
    return tangent


def clipped(tangent: jax.Array, snap: Snap) -> jax.Array:
    """Returns the tangent inside [low, high] and zero elsewhere: the derivative of clipping."""
    return _where((snap.low <= snap.x) & (snap.x <= snap.high), tangent)


def zero(tangent: jax.Array, snap: Snap) -> jax.Array:
    """Returns zero, the true derivative of a staircase almost everywhere."""
    del snap
    return jnp.zeros_like(tangent)


@dataclasses.dataclass(frozen=True)
class LSQ:
    """Learned step size quantization: straight-through inside, with a scaled gradient of the scale.

    With v = x / s, a grid that covers -Qn to Qp, and g = 1 / sqrt(N Qp):

        dy/dx = 1 where -Qn < v < Qp, else 0
        dy/ds = g (snap(v) - v) there, else -g Qn or g Qp

    For signed weights the paper uses all codes, Qn = Qp + 1. A symmetric recipe omits the lowest
    one, so that Qn = Qp, unless its scaling has `rule="half"`.

    A learned zero point (the offset of LSQ+) gets the gradient of the chain rule times g. It is
    zero inside the range; outside, the result moves with the end of the range.
    `jaxq.qat.lsq_scale` computes the initial scale.

    Attributes:
      count: the number N; None means the number of elements in a block, as for weights. For
        activations the paper uses the number of features of one example, which cannot be inferred
        from a tensor with a batch axis and must be given.

    Raises:
      ValueError: if `count` is below 1.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int4", gradient=LSQ(count=64)).gradient.count
      64

    References:
      Esser et al., "Learned Step Size Quantization" (2020), section 2; Bhalgat et al., "LSQ+"
      (2020).
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None:
            integer("LSQ", "count", self.count, "Use None for weights.", least=1)

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """Returns the tangent strictly inside the range, and zero elsewhere."""
        return _where((snap.low < snap.x) & (snap.x < snap.high), tangent)

    def of_scales(self, snap: Snap, scales: GivenScales) -> GivenScales:
        """Returns the scales with derivatives multiplied by g."""
        del snap
        count = scales.count if self.count is None else np.float32(self.count)
        g = 1 / jnp.sqrt(jnp.maximum(count, np.float32(1)) * scales.largest)
        return scales.differing(lambda v: passed(lax.stop_gradient(v), v * g))


@dataclasses.dataclass(frozen=True)
class PACT:
    """Parameterized clipping: the derivative of clipping to [low, high], for x and for the scale.

    With the clipping level a = Qp s, given as `scale=a / Qp`: dy/dx = 1 where low <= x < a, and
    dy/da = 1 where x >= a, else 0. Unlike in `LSQ`, rounding errors give the scale no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> snap = Snap(jnp.array([0.4, 9.0]), jnp.array([0.0, 7.0]), low=0.0, high=7.0)
      >>> PACT()(jnp.ones(2), snap).tolist()
      [1.0, 0.0]

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018),
      section 3.
    """

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """Returns the tangent inside the range, and zero elsewhere."""
        return _where(self._inside(snap), tangent)

    def of_scales(self, snap: Snap, scales: GivenScales) -> GivenScales:
        """Returns the scales with zero derivatives inside the range."""
        return scales.constant_where(self._inside(snap))

    def _inside(self, snap: Snap) -> jax.Array:
        return (snap.low <= snap.x) & (snap.x < snap.high)


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    """Trust gradient estimation: the tangent where the error is small, |y - x| <= T, else zero.

    T is `factor` times half the width of the grid interval that contains x, or of the outermost
    interval if x is out of range. The default keeps the tangent of all values rounded to nearest
    and of values out of range by at most half a step. (The bound is widened by the resolution of
    the dtype of x.)

    Attributes:
      factor: the bound T in half steps.

    Raises:
      ValueError: if `factor` is not positive.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("float4_e2m1fn", gradient=TrustRegion(2.0)).gradient
      TrustRegion(factor=2.0)

    References:
      Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations" (2025),
      section 3.3.
    """

    factor: float = 1.0
    neighbors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        remedy = "Use 1.0 for half a step."
        number("TrustRegion", "factor", self.factor, "a positive number", lambda f: f > 0, remedy)

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """Returns the tangent where the error is within the bound, and zero elsewhere."""
        x, y, below, above = (v.astype(jnp.float32) for v in (snap.x, snap.y, *_interval(snap)))
        width = above - below
        resolved = jnp.abs(x) * np.float32(jnp.finfo(snap.x.dtype).eps)
        near = jnp.abs(y - x) <= width * np.float32(self.factor / 2) + resolved
        return _where(near | (width == 0), tangent)


@dataclasses.dataclass(frozen=True)
class DSQ:
    """Differentiable soft quantization: the derivative of a tanh staircase, zero outside the range.

    Between two grid neighbors with midpoint c and distance w, and with t = (x - c) / w,

        dy/dx = k/2 (1 - tanh(k t)^2) / tanh(k/2),   k = ln(2 / alpha - 1)

    `jaxq.qat.soft_round` computes the staircase itself.

    Attributes:
      alpha: the deviation from a true staircase, in (0, 1). Toward 0 the derivative concentrates
        at the rounding thresholds; toward 1 it becomes straight-through. k is the inverse
        temperature of soft rounding.

    Raises:
      ValueError: if `alpha` is not in (0, 1).
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> x, low, high = jnp.array([0.1, 0.5]), jnp.zeros(2), jnp.ones(2)
      >>> snap = Snap(x, jnp.round(x), low=-7.0, high=7.0, below=low, above=high)
      >>> slope = DSQ(alpha=0.2)(jnp.ones(2), snap)
      >>> bool(slope[0] < 1 < slope[1])  # Steepest at the rounding threshold.
      True

    References:
      Gong et al., "Differentiable Soft Quantization" (2019), section 3.1; Agustsson and Theis,
      "Universally Quantized Neural Compression" (2020), section 4.
    """

    alpha: float = 0.2
    neighbors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        remedy = "Use, for example, 0.2."
        number("DSQ", "alpha", self.alpha, "a number in (0, 1)", lambda a: 0 < a < 1, remedy)

    def __call__(self, tangent: jax.Array, snap: Snap) -> jax.Array:
        """Returns the tangent times the slope of the staircase."""
        x, below, above = (v.astype(jnp.float32) for v in (snap.x, *_interval(snap)))
        inside = (snap.low <= snap.x) & (snap.x <= snap.high)
        width = above - below
        flat = ~(inside & (width > 0))  # Avoids a division by 0, also in second derivatives.
        t = jnp.where(flat, 0, x - below) / jnp.where(flat, 1, width) - 0.5
        k = math.log(2 / self.alpha - 1)
        slope = (1 - jnp.tanh(k * t) ** 2) * (k / 2 / math.tanh(k / 2))
        slope = jnp.where(width > 0, slope, 1)
        return _where(inside, tangent * slope.astype(tangent.dtype))


ESTIMATORS: Registry[Gradient] = Registry(
    "gradient estimator",
    {
        "straight_through": straight_through,
        "clipped": clipped,
        "zero": zero,
        "lsq": LSQ(),
        "pact": PACT(),
        "trust_region": TrustRegion(),
        "dsq": DSQ(),
    },
    {
        "ste": "straight_through",
        "identity": "straight_through",
        "clip": "clipped",
        "quest": "trust_region",
        "none": "zero",
    },
)


def get_gradient(gradient: str | Gradient) -> Gradient:
    """Returns the gradient estimator with a name, or the estimator that is passed.

    Args:
      gradient: a name in `jaxq.gradients.ESTIMATORS`, or a function as described in this module.

    Returns:
      The function.

    Raises:
      ValueError: if no estimator has that name.
      TypeError: if the argument is neither a name nor a function.

    Example:
      >>> get_gradient("trust_region")
      TrustRegion(factor=1.0)
    """
    return ESTIMATORS.resolve(gradient, "gradient")


def _interval(snap: Snap) -> tuple[jax.Array, jax.Array]:
    assert snap.below is not None  # Given, because the estimator has `neighbors = True`.
    assert snap.above is not None
    return snap.below, snap.above


def _where(mask: jax.Array, tangent: jax.Array) -> jax.Array:
    return jnp.where(mask, tangent, jnp.zeros_like(tangent))
