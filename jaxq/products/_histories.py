"""Delayed scaling: scales computed from the amax values of previous steps.

    history float32 [length], newest first; 0 marks a step in which no amax was observed
    amax    = max(history) 2^margin               gives the scale of this step
    y       = record(product, history, operand)   sends the observed amax to the history's cotangent

A history is an argument of the function whose products it scales, so that the function stays pure.
The amax observed in a step is returned as the history's cotangent, because the magnitudes of
cotangents are not known before the backward pass. JAX adds the cotangents of an array that is used
twice. Histories must not be added: where one history serves many products, as in a loop or under
`vmap`, the largest amax counts.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq._base.shapes import holds
from jaxq._jax.meshes import varying
from jaxq._jax.serialization import pytree
from jaxq.products._cotangents import with_transpose
from jaxq.quantizers import calibration
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import AbsMax, PerTensor, Recipe

__all__ = ["Amax", "History", "can_delay", "record"]


def can_delay(recipe: Recipe | None) -> bool:
    """Returns whether a recipe supports delayed scaling: one scale per tensor, from the amax."""
    return (
        recipe is not None
        and isinstance(recipe.granularity, PerTensor)
        and not recipe.scaling.two_sided
        and isinstance(recipe.scaling.calibrator, AbsMax)
        and recipe.scaling.takes_scales
    )


@pytree(static=("margin",))
@dataclasses.dataclass(frozen=True)
class Amax:
    """An amax from which a scale is computed.

    Attributes:
      value: the amax, a float32 scalar; 0 uses the amax of the tensor itself.
      margin: the exponent of a factor 2^margin by which the scale exceeds that of the amax.
    """

    value: jax.Array
    margin: int

    def scale(self, x: jax.Array, recipe: Recipe) -> Calibrated:
        """Returns the scale for a tensor."""
        amax = jnp.where(self.value > 0, self.value, _amax(x, recipe))
        high = jnp.broadcast_to(amax * np.float32(2.0**self.margin), (1,) * (2 * x.ndim))
        return calibration.finalize((-high, high), recipe)


@pytree(static=("margin",))
@dataclasses.dataclass(frozen=True)
class History:
    """The amax values of a tensor in previous steps.

    Attributes:
      amax: float32 `[..., length]`, newest first; 0 for a step in which no amax was observed.
      margin: the exponent of a factor 2^margin by which scales exceed those of the largest amax; 0
        by default.

    Example:
      >>> import jax.numpy as jnp
      >>> float(History(jnp.array([3.0, 8.0, 0.0])).largest().value)
      8.0
    """

    amax: jax.Array
    margin: int = 0

    def largest(self) -> Amax:
        """Returns the largest amax of the history, from which the scale is computed."""
        return Amax(lax.stop_gradient(self.amax.max()), self.margin)

    def copies_for_loop(self, count: int) -> "History":
        """Copies the history for `count` products.

        The gradient of the history is the elementwise maximum of the copies' gradients.
        """

        def copies(amax: jax.Array) -> jax.Array:
            return jnp.broadcast_to(amax, (count, *amax.shape))

        amax = with_transpose(copies, _largest, self.amax, join=_largest)
        return dataclasses.replace(self, amax=amax)


def _amax(x: jax.Array, recipe: Recipe) -> jax.Array:
    """Returns the largest magnitude of a tensor, or NaN if it has a NaN or an infinity."""
    state = calibration.update(calibration.init(x.shape, recipe), x, recipe)
    return state[1].reshape(())


def _largest(cotangents: jax.Array) -> jax.Array:
    return cotangents.max(0)


def record(
    y: jax.Array, history: History, recipe: Recipe, operand: jax.Array | None = None
) -> jax.Array:
    """Returns a product whose gradient records an amax in a history.

    Args:
      y: the product.
      history: the history of the operand or of the product's cotangent.
      recipe: the recipe whose scale comes from the history.
      operand: the operand whose amax is recorded; None (the default) records that of the product's
        cotangent.

    Returns:
      y. The first element of the history's cotangent is the largest magnitude of the operand or the
      cotangent, or 0 if any of their elements is not finite; all other elements are 0.
    """
    if holds(lambda: y.size == 0):
        return y
    static = _Static(recipe, y.shape, y.dtype, varying(y), varying(history.amax))
    return _recorded(static, y, history.amax, operand)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The static properties of a product whose amax is recorded."""

    recipe: Recipe
    shape: tuple[int, ...]
    dtype: np.dtype
    devices: frozenset[str]  # Mesh axes along which the product varies.
    shared: frozenset[str]  # Mesh axes along which the history varies.

    def zeros(self, history: jax.Array, *rest: jax.Array) -> jax.Array:
        """Returns the product's tangent, which is 0 for every tangent of the history."""
        del history, rest
        return lax.pcast(jnp.zeros(self.shape, self.dtype), tuple(self.devices), to="varying")

    def row(self, amax: jax.Array, length: int) -> jax.Array:
        """Returns a history's cotangent, whose first element is the amax over all devices."""
        extra_axes = tuple(self.devices - self.shared)
        finite_amax = jnp.where(jnp.isfinite(amax), amax, 0)
        finite_amax = lax.pmax(finite_amax, extra_axes) if extra_axes else finite_amax
        return jnp.zeros(length, jnp.float32).at[0].set(finite_amax)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recorded(static: _Static, y: jax.Array, history: jax.Array, operand: Any) -> jax.Array:
    del static, history, operand
    return y


@functools.partial(_recorded.defjvp, symbolic_zeros=True)
def _recorded_jvp(static: _Static, primals: tuple, tangents: tuple) -> tuple:
    y, history, operand = primals
    y_tangent, history_tangent, _ = tangents
    (length,) = history.shape
    parts = [] if isinstance(y_tangent, SymbolicZero) else [y_tangent]
    if isinstance(history_tangent, SymbolicZero):
        return y, parts[0] if parts else jnp.zeros_like(y)

    def record_operand(cotangent: jax.Array, amax: jax.Array) -> jax.Array:
        del cotangent
        return static.row(amax, length)

    def record_cotangent(cotangent: jax.Array, residual: jax.Array) -> jax.Array:
        del residual
        return static.row(_amax(cotangent, static.recipe), length)

    if operand is None:
        # An element of the product, so that `vmap` batches it whenever it batches the product.
        transpose, residual_array = record_cotangent, lax.stop_gradient(y[(0,) * y.ndim])
    else:
        transpose, residual_array = record_operand, _amax(operand, static.recipe)
    parts.append(
        with_transpose(static.zeros, transpose, history_tangent, residual_array, join=_largest)
    )
    return y, sum(parts[1:], start=parts[0])
