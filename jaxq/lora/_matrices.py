"""Low-rank approximations of matrices: pure array algorithms."""

from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import array, integer, number
from jaxq.numerics import floats

__all__ = ["Factors", "low_rank"]


class Factors(NamedTuple):
    """A product of two matrices, `a b`.

    Attributes:
      a: float32 `[..., inputs, rank]`.
      b: float32 `[..., rank, outputs]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import lora
      >>> a, b = lora.Factors(a=jnp.ones((4, 1)), b=jnp.ones((1, 2)))
      >>> (a @ b).shape
      (4, 2)
    """

    a: jax.Array
    b: jax.Array


def low_rank(
    w: jax.typing.ArrayLike,
    rank: int,
    *,
    hessian: jax.typing.ArrayLike | None = None,
    damping: float = 0.01,
) -> Factors:
    """Returns the best low-rank approximation of matrices as a product of two factors.

    Without a Hessian, the product minimizes the squared error `|w - a b|^2`. It is the truncated
    SVD, with the roots of the singular values in both factors. With the Hessian `H = sum x x^T` of
    the inputs x, it minimizes the squared error of the outputs, `tr((w - a b)^T H (w - a b))`: for
    `H = Q L Q^T`, it approximates `L^(1/2) Q^T w` and multiplies `a` by `Q L^(-1/2)`.

    Args:
      w: the matrices, `[..., inputs, outputs]`; computed in float32.
      rank: the rank, at most the smaller of the numbers of inputs and outputs.
      hessian: the Hessians, `[..., inputs, inputs]`, up to a positive factor; None (the default)
        gives all inputs the same weight.
      damping: the number added to the eigenvalues of H, relative to their mean; 0.01 by default. It
        bounds the inverse of H if there are fewer tokens than inputs.

    Returns:
      The two factors, in float32.

    Raises:
      ValueError: if the rank is out of range, or the Hessian has another shape.

    References:
      Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
      Approximation" (2024). Its implementation replaces negative eigenvalues by the least positive
      one instead of adding a damping.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = low_rank(jnp.array([[3.0, 0.0], [0.0, 1.0]]), 1)
      >>> jnp.abs(a @ b).round(4).tolist()
      [[3.0, 0.0], [0.0, 0.0]]
    """
    w = floats("low_rank", w, argument="w").astype(jnp.float32)
    if w.ndim < 2:
        raise ValueError(
            f"low_rank: `w` must have the shape (..., inputs, outputs), got {w.shape}. Reshape it."
        )
    inputs, outputs = w.shape[-2:]
    integer("low_rank", "rank", rank, "Use a lower rank.", least=1, most=min(inputs, outputs))
    requirement = "a number of at least 0"
    number("low_rank", "damping", damping, requirement, lambda v: v >= 0, "Use 0.01.")
    back = None
    if hessian is not None:
        remedy = "Pass the sum of x x^T of the inputs of `w`."
        h = array("low_rank", "hessian", hessian, "a matrix of numbers", remedy)
        h = h.astype(jnp.float32)
        if h.shape != (*w.shape[:-1], inputs):
            raise ValueError(
                f"low_rank: `hessian` must have the shape {(*w.shape[:-1], inputs)}, got "
                f"{h.shape}. Pass the Hessian of the inputs of `w`."
            )
        mean = jnp.trace(h, axis1=-2, axis2=-1)[..., None] / inputs
        # Without data all inputs have the same weight.
        unit = jnp.where(mean > 0, mean, 1)
        values, vectors = jnp.linalg.eigh(h / unit[..., None])
        values = jnp.where(mean > 0, lax.max(values, 0.0) + damping, 1)
        roots = jnp.sqrt(lax.max(values, 1e-12))
        w = _matmul(roots[..., None] * vectors.mT, w)
        back = vectors / roots[..., None, :]
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return Factors(a if back is None else _matmul(back, a), b)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
