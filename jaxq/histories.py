"""Delayed scaling: scales from the largest magnitudes of the steps before, and how these are seen.

    history float32 [length], newest first; 0 is a step in which nothing was seen
    amax    = max(history) 2^margin               what the scale of this step is for
    y       = record(product, history, operand)   its cotangent for the history: what was seen now

A history is an argument of the function whose products it scales, so that the function stays pure;
what a step sees is the history's cotangent, as the magnitudes of cotangents are known no earlier.
Cotangents of one array are added wherever it is used twice. Here they must not be: where one
history serves many products, as in a loop or under `vmap`, the largest counts.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq import calibration
from jaxq.blocks import PerTensor
from jaxq.calibration import Calibrated
from jaxq.calibrators import get_calibrator
from jaxq.cotangents import with_transpose
from jaxq.meshes import varying
from jaxq.quantizers import has_plain_scales
from jaxq.ranges import AbsMax
from jaxq.recipes import Quantizer

__all__ = ["Amax", "History", "can_delay", "record"]


def can_delay(quantizer: Quantizer | None) -> bool:
    """Whether a quantizer can take its scale from a history: it has one, from the largest value."""
    return (
        quantizer is not None
        and isinstance(quantizer.granularity, PerTensor)
        and quantizer.zero_point is None
        and isinstance(get_calibrator(quantizer.range), AbsMax)
        and has_plain_scales(quantizer)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Amax:
    """A largest magnitude in the place of a scale.

    Attributes:
      value: float32; 0 is that of the tensor itself.
      margin: the scale is 2^margin times what the largest magnitude asks for.
    """

    value: jax.Array
    margin: int = dataclasses.field(metadata={"static": True})

    def scale(self, x: jax.Array, quantizer: Quantizer) -> Calibrated:
        """The scale for a tensor."""
        amax = jnp.where(self.value > 0, self.value, _amax(x, quantizer))
        high = jnp.broadcast_to(amax * np.float32(2.0**self.margin), (1,) * (2 * x.ndim))
        return calibration.finalize((-high, high), quantizer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The largest magnitudes of a tensor in the steps before.

    Attributes:
      amax: float32 `[..., length]`, newest first; 0 for a step in which nothing was seen.
      margin: scales are 2^margin times what the largest magnitude asks for.
    """

    amax: jax.Array
    margin: int = dataclasses.field(default=0, metadata={"static": True})

    def largest(self) -> Amax:
        """What scales are for."""
        return Amax(lax.stop_gradient(self.amax.max()), self.margin)

    def spread(self, count: int) -> "History":
        """One for each of many products, along a leading axis; this sees what any of them sees."""

        def copies(amax: jax.Array) -> jax.Array:
            return jnp.broadcast_to(amax, (count, *amax.shape))

        amax = with_transpose(copies, _largest, self.amax, join=_largest)
        return dataclasses.replace(self, amax=amax)


def _amax(x: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The largest magnitude of a tensor; NaN where a NaN or an infinity is."""
    state = calibration.update(calibration.init(x.shape, quantizer), x, quantizer)
    return state[1].reshape(())


def _row(amax: jax.Array, length: int, apart: tuple) -> jax.Array:
    """What a history's cotangent is: the largest magnitude in its first place, of all devices."""
    seen = jnp.where(jnp.isfinite(amax), amax, 0)
    seen = lax.pmax(seen, apart) if apart else seen
    return jnp.zeros(length, jnp.float32).at[0].set(seen)


def _largest(cotangents: jax.Array) -> jax.Array:
    return cotangents.max(0)


def record(
    y: jax.Array, history: History, quantizer: Quantizer, operand: jax.Array | None = None
) -> jax.Array:
    """A product, whose gradient tells a history what was seen.

    Args:
      y: the product.
      history: of the operand or the cotangent.
      quantizer: what the history is for.
      operand: what was multiplied; None records the product's cotangent.

    Returns:
      y. The history's cotangent has in its first place the largest magnitude of the operand or the
      cotangent, or 0 if any number of it is no finite one, and 0 in all others.
    """
    if y.size == 0:
        return y
    (length,) = history.amax.shape
    devices = tuple(varying(y))
    apart = tuple(varying(y) - varying(history.amax))

    @jax.custom_jvp
    def recorded(y: jax.Array, history: jax.Array, operand: Any) -> jax.Array:
        del history, operand
        return y

    def zeros(history: jax.Array, *rest: jax.Array) -> jax.Array:
        del history, rest
        return lax.pcast(jnp.zeros(y.shape, y.dtype), devices, to="varying")

    def seen(cotangent: jax.Array, amax: jax.Array) -> jax.Array:
        del cotangent
        return _row(amax, length, apart)

    def seen_backward(cotangent: jax.Array, some: jax.Array) -> jax.Array:
        del some
        return _row(_amax(cotangent, quantizer), length, apart)

    def tangent(primals: tuple, tangents: tuple) -> tuple:
        y, _, operand = primals
        moved, moved_history, _ = tangents
        parts = [] if isinstance(moved, SymbolicZero) else [moved]
        if isinstance(moved_history, SymbolicZero):
            return y, parts[0] if parts else jnp.zeros_like(y)
        if operand is None:
            # An element of the product, so that where that is batched, this is.
            how, known = seen_backward, lax.stop_gradient(y[(0,) * y.ndim])
        else:
            how, known = seen, _amax(operand, quantizer)
        parts.append(with_transpose(zeros, how, moved_history, known, join=_largest))
        return y, sum(parts[1:], start=parts[0])

    recorded.defjvp(tangent, symbolic_zeros=True)
    return recorded(y, history.amax, operand)
