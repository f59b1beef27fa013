"""Products of a stored tensor that is dequantized part by part, in a loop."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq.products._contractions import Contraction, of_dot
from jaxq.quantizers import Quantized, Slices, slices

__all__ = ["CHUNK", "in_parts", "stored_dot_general"]

CHUNK = 2**20


def stored_dot_general(
    lhs: jax.typing.ArrayLike,
    rhs: Quantized,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    chunk: int = CHUNK,
) -> jax.Array:
    """Computes `jax.lax.dot_general` of an array and a stored tensor that is dequantized in parts.

    A loop dequantizes one part of `rhs` at a time and multiplies it, so the whole float tensor is
    never in memory. Parts lie along a free axis of `rhs`, such as the outputs of a weight, or along
    a batch axis. Each element of the result is then one sum, as in the product of the whole tensor,
    but XLA may add its terms in another order. If no such axis can be cut into parts that are small
    enough, parts lie along a contracted axis, and their products are added in float32.

    The gradient of `lhs` dequantizes the parts again.

    Args:
      lhs: the array.
      rhs: the stored tensor.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      chunk: the largest number of elements of `rhs` that are dequantized at a time; 2^20 by
        default. A part is at least one block, even if that has more elements.

    Returns:
      The product, with the shape and dtype of `lax.dot_general(lhs, rhs.dequantize(), ...)`.

    Raises:
      ValueError: if `chunk` is less than 1, or `rhs` cannot be sliced, because it has outliers.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x, w = jnp.ones((2, 64)), jaxq.quantize(jnp.ones((48, 64)), "int4_g32")
      >>> numbers = (((1,), (1,)), ((), ()))
      >>> jaxq.products.stored_dot_general(x, w, numbers, chunk=1024).shape
      (2, 48)
    """
    sliced = slices(rhs)
    if sliced is None:
        raise ValueError(
            "stored_dot_general: `rhs` must be sliceable, got a tensor with outliers. Dequantize "
            "it, or use a recipe without outliers."
        )
    chunk = integer("stored_dot_general", "chunk", chunk, "Omit it for 2^20.", least=1)
    lhs = jnp.asarray(lhs)

    def function(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    owner = "stored_dot_general"
    contraction = of_dot(dimension_numbers, lhs.ndim, len(sliced.shape), owner=owner)
    return in_parts(function, contraction, lhs, sliced, chunk)


class _Cut(NamedTuple):
    """A division of a tensor into equal parts: the axis, and the length of a part along it."""

    axis: int
    size: int


def in_parts(
    function: Callable[..., jax.Array],
    contraction: Contraction,
    x: jax.Array,
    weight: Slices,
    chunk: int,
) -> jax.Array:
    """Returns a product of an array and a stored tensor that is dequantized part by part.

    Args:
      function: the bilinear function, `(x, weight) -> out`.
      contraction: the labels of its axes.
      x: the array, the first operand.
      weight: the stored tensor, the second operand.
      chunk: the largest number of elements of a part.
    """
    cut = _cut(contraction, weight, chunk)
    if cut is None:
        return function(x, weight.take(0, 0, weight.shape[0]))
    axis, size = cut
    length, label = weight.shape[axis], contraction.rhs[axis]
    x_axis = contraction.lhs.index(label) if label in contraction.lhs else None
    whole = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    out = jax.eval_shape(function, x, whole)

    @jax.checkpoint  # The backward pass dequantizes each part again.
    def part(x: jax.Array, start: jax.Array) -> jax.Array:
        x_part = x if x_axis is None else lax.dynamic_slice_in_dim(x, start, size, x_axis)
        return function(x_part, weight.take(axis, start, size))

    if label in contraction.out:
        out_axis = contraction.out.index(label)

        def place(y: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            return lax.dynamic_update_slice_in_dim(y, part(x, start), start, out_axis), None

        # The last part may overlap the one before it; it has the same values there.
        starts = lax.min(jnp.arange(0, length, size, dtype=jnp.int32), jnp.int32(length - size))
        return lax.scan(place, jnp.zeros(out.shape, out.dtype), starts)[0]

    def add(y: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return y + part(x, start).astype(y.dtype), None

    sum_dtype = jnp.float32 if out.dtype.itemsize < 4 else out.dtype
    y, _ = lax.scan(
        add, jnp.zeros(out.shape, sum_dtype), jnp.arange(0, length, size, dtype=jnp.int32)
    )
    return y.astype(out.dtype)


def _cut(contraction: Contraction, weight: Slices, chunk: int) -> _Cut | None:
    """Returns the best parts of a tensor; None if it is small or cannot be cut."""
    total = math.prod(weight.shape)
    if total <= chunk:
        return None
    candidates = []
    for axis, (length, unit) in enumerate(zip(weight.shape, weight.units, strict=True)):
        label = contraction.rhs[axis]
        shared, in_out = label in contraction.lhs, label in contraction.out
        if length % unit or label == contraction.group or not (shared or in_out):
            continue
        largest = min(max(chunk * length // total // unit, 1), length // unit)
        if not in_out:  # Parts of a sum must not overlap.
            largest = next(k for k in range(largest, 0, -1) if length // unit % k == 0)
        if largest * unit < length:
            fits = largest * unit * (total // length) <= chunk
            candidates.append((not fits, not in_out, axis, largest * unit))
    if not candidates:
        return None
    *_, axis, size = min(candidates)
    return _Cut(axis, size)
