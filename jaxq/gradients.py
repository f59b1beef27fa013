"""Gradient estimators: how a snapped value differentiates.

An estimator is a function `(tangent, snap) -> tangent`, linear in the tangent: it stands for the
derivative of the snap, a staircase whose true one is zero almost everywhere. `snap` says what was
snapped to what (`Snap`). Being a rule on tangents it serves forward mode, reverse mode and second
derivatives; whatever it computes of `snap.x` is differentiated in its turn.

All around the snap follows the chain rule: `jaxq.attaching` has it, and differentiates scales and
zero points by it. An estimator may ask for the neighbours on the grid by an attribute
`neighbours = True`, and may change how scales and zero points differentiate by a method
`of_scaling(snap, scaling) -> scaling`.

To add one: a function or a frozen record like those below, listed in `ALL`.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import ClassVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.attaching import Gradient, Scaling, Snap, passed

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


def _interval(snap: Snap) -> tuple[jax.Array, jax.Array]:
    assert snap.below is not None  # The estimator has asked for them.
    assert snap.above is not None
    return snap.below, snap.above


def _where(kept: jax.Array, tangent: jax.Array) -> jax.Array:
    return jnp.where(kept, tangent, jnp.zeros_like(tangent))
