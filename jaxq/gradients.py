"""Gradient estimators: how a snapped value differentiates.

An estimator is a function `(tangent, x, y, low, high) -> tangent`, linear in its first argument:
`x` is the input, `y` the snapped value, and `low` and `high` bound what the grid can hold at each
element. Being a rule on tangents, it serves forward mode, reverse mode and second derivatives.

To add one: write the function and list it in `ALL`.
"""

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
from jax import numpy as jnp

__all__ = ["ALL", "Gradient", "get_gradient"]

Gradient: TypeAlias = Callable[..., jax.Array]


def straight_through(
    tangent: jax.Array, x: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """The tangent as it is: the snap counts as the identity (Bengio et al., 2013)."""
    del x, y, low, high
    return tangent


def clipped(
    tangent: jax.Array, x: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """The tangent inside [low, high], zero where the value was clipped."""
    del y
    return jnp.where((low <= x) & (x <= high), tangent, jnp.zeros_like(tangent))


def zero(
    tangent: jax.Array, x: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """Zero: the true derivative of a staircase, almost everywhere."""
    del x, y, low, high
    return jnp.zeros_like(tangent)


ALL: MappingProxyType[str, Gradient] = MappingProxyType(
    {"straight_through": straight_through, "clipped": clipped, "zero": zero}
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
    if not callable(spec):
        raise TypeError(f"`gradient` must be a name or a function, got {type(spec).__name__}.")
    return spec


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(estimator: Gradient, y: jax.Array, x: jax.Array, low: Any, high: Any) -> jax.Array:
    """`y`, with the derivative that the estimator gives with respect to `x`.

    The one place where a gradient is defined; `y`, `low` and `high` count as constants.
    """
    del estimator, x, low, high
    return y


@attach.defjvp
def _attach_jvp(estimator: Gradient, primals: tuple, tangents: tuple) -> tuple:
    y, x, low, high = primals
    # Attached once more, as the derivative may be differentiated again.
    return attach(estimator, *primals), estimator(tangents[1], x, y, low, high).astype(y.dtype)
