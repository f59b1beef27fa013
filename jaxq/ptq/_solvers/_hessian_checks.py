"""Checks that the functions of one weight and its Hessian share (`gptq`, `owq`)."""

import contextlib

import jax
from jax import numpy as jnp

from jaxq._base.arguments import array, integer
from jaxq.numerics import floats

__all__ = ["check_solved", "checked_weight"]


def checked_weight(
    owner: str, weight: jax.typing.ArrayLike, hessian: jax.typing.ArrayLike, axis: int
) -> tuple[jax.Array, jax.Array, int]:
    """Returns the weight, the Hessian in float32, and the axis of the inputs.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the shape of the Hessian does not fit.
    """
    weight = floats(owner, weight, argument="weight", float64=False)
    requirement, remedy = "a matrix of numbers", "Pass the sum of x x^T of the inputs."
    gram = array(owner, "hessian", hessian, requirement, remedy).astype(jnp.float32)
    remedy = "Pass the axis of the inputs: -2 for kernels, -1 for weights [outputs, inputs]."
    axis = integer(owner, "axis", axis, remedy)
    inputs = weight.shape[axis] if -weight.ndim <= axis < weight.ndim else None
    if weight.ndim < 2 or inputs is None or gram.shape != (inputs, inputs):
        raise ValueError(
            f"{owner}: `hessian` must have the shape (n, n), where n is the length of `axis` of "
            f"`weight`, which needs two axes or more, got {gram.shape} and {weight.shape} with "
            f"axis={axis}. Pass the axis of the inputs as `axis`."
        )
    return weight, gram, axis


def check_solved(owner: str, hessian: jax.Array, is_solved: jax.Array) -> None:
    """Raises a ValueError if the Hessian could not be factorized; under `jit`, does nothing."""
    is_known_to_fail = False
    with contextlib.suppress(jax.errors.ConcretizationTypeError):  # Under `jit`.
        is_known_to_fail = not bool(is_solved)
    if is_known_to_fail:
        raise ValueError(
            f"{owner}: `hessian` must be positive semidefinite, finite and not zero, got one with "
            f"the mean diagonal {float(jnp.mean(jnp.diagonal(hessian))):.3g}, which has no "
            "Cholesky factor with any damping. Check the activations for NaN."
        )
