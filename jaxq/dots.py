"""Quantized products with the signatures of JAX's: `dot_general`, `einsum`, `conv_general_dilated`.

Each says which bilinear function it is and what its axes are; the rest is in `products`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from jaxq.contractions import of_conv, of_dot, of_einsum
from jaxq.dot_recipes import DotRecipe, get_dot_recipe
from jaxq.execution import DotOfCodes
from jaxq.products import Operation, keys_of, product

__all__ = ["conv_general_dilated", "dot_general", "einsum"]


def dot_general(
    lhs: jax.typing.ArrayLike,
    rhs: jax.typing.ArrayLike,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: str | DotRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """A quantized `jax.lax.dot_general`.

    With the quantizers Q of a recipe, `y = dot(Q(lhs), Q(rhs))`; a cotangent g of y gives lhs and
    rhs the gradients that `jaxq.DotRecipe` defines. Blocks of scales lie along the axes that are
    contracted, in each of the three products along its own, and no tensor is transposed for that.

    Derivatives of every order and kind exist. Forward mode multiplies tangents by the residuals and
    leaves them otherwise alone; a second derivative goes through the quantizers of the gradient's
    products by their own `gradient`. `vmap` gives every element scales of its own, also where a
    recipe has one for the whole operand.

    Args:
      lhs: as in `jax.lax.dot_general`. Quantized operands are float16, bfloat16 or float32.
      rhs: likewise.
      dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.
      recipe: a `jaxq.DotRecipe` or a name in `jaxq.dot_recipes.ALL`; None is JAX's own product.
      key: a key of `jax.random` if the recipe `draws` anything, and only then; what the gradient's
        products draw asks for it where the call is differentiated. It is split in three, for the
        forward product and those of the gradients of lhs and rhs, and each again in three, for the
        two operands and the signs of a transform.

    Returns:
      The product, of the shape and dtype that JAX gives it.

    Raises:
      TypeError: an operand of another dtype that the recipe quantizes.
      ValueError: a block that does not fit what is contracted; a key missing or not needed; an
        `execution` that the recipe, operation or backend cannot have. Of the gradient's products
        that is said when the call is differentiated, in its forward pass. The text names product
        and operand.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x, w = jnp.array([[0.5, -1.0]]), jnp.array([[7.0, 3.2], [2.1, -14.0]])
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> jaxq.dot_general(x, w, numbers, recipe="w4")
      Array([[ 1.5, 16. ]], dtype=float32)
      >>> jax.grad(lambda w: jaxq.dot_general(x, w, numbers, recipe="w4").sum())(w)
      Array([[ 0.5,  0.5],
             [-1. , -1. ]], dtype=float32)
    """
    function = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if recipe is None:
        return function(lhs, rhs)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    contraction = of_dot(dimension_numbers, lhs.ndim, rhs.ndim)
    codes = DotOfCodes(contraction)
    operation = Operation("dot_general", ("lhs", "rhs"), function, contraction, codes)
    return product(operation, lhs, rhs, get_dot_recipe(recipe), keys_of(key))


def einsum(
    subscripts: str,
    /,
    *operands: jax.typing.ArrayLike,
    optimize: Any = "auto",
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    recipe: str | DotRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """A quantized `jax.numpy.einsum` of two operands: see `jaxq.dot_general`.

    Args:
      subscripts: as in JAX, with an ellipsis or without. With a recipe: two operands, neither of
        which names an axis twice. The first one is `lhs`, the second `rhs`.
      operands: the arrays.
      optimize: as in JAX.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.
      recipe: as in `jaxq.dot_general`.
      key: as in `jaxq.dot_general`.

    Returns:
      The product, of the shape and dtype that JAX gives it.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`; or other operands than two.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> x, w = jnp.ones((8, 3, 64)), jnp.ones((64, 32))
      >>> jaxq.einsum("bsi,io->bso", x, w, recipe="mxfp8").shape
      (8, 3, 32)
    """
    function = functools.partial(
        jnp.einsum,
        subscripts,
        optimize=optimize,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if recipe is None:
        return function(*operands)
    if not isinstance(subscripts, str) or len(operands) != 2:
        raise ValueError(
            f"einsum: a recipe needs subscripts and exactly two operands, got {len(operands)}. "
            "Write a longer product as several."
        )
    lhs, rhs = map(jnp.asarray, operands)
    contraction = of_einsum(subscripts, lhs.ndim, rhs.ndim)
    codes = DotOfCodes(contraction)
    operation = Operation(f"einsum {subscripts!r}", ("lhs", "rhs"), function, contraction, codes)
    return product(operation, lhs, rhs, get_dot_recipe(recipe), keys_of(key))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    recipe: str | DotRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """A quantized `jax.lax.conv_general_dilated`: see `jaxq.dot_general`.

    The axes of the window count as contracted. Blocks lie along the channels (of the result, in the
    gradient of lhs), and along the batch in the gradient of rhs. So `PerToken()` is one scale an
    image and `PerChannel(-1)` of the kernel one scale a feature.

    Args:
      lhs: as in JAX. Quantized operands are float16, bfloat16 or float32.
      rhs: likewise, the kernel.
      window_strides: as in JAX.
      padding: as in JAX.
      lhs_dilation: as in JAX.
      rhs_dilation: as in JAX.
      dimension_numbers: as in JAX.
      feature_group_count: as in JAX.
      batch_group_count: as in JAX.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.
      recipe: as in `jaxq.dot_general`. `execution` is `"emulated"` in the gradient's products, and
        no `Accumulation` in any.
      key: as in `jaxq.dot_general`.

    Returns:
      The convolution, of the shape and dtype that JAX gives it.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
      >>> jaxq.conv_general_dilated(x, w, (1, 1), "SAME", recipe="w8a8").shape
      (1, 4, 8, 8)
    """
    options: dict[str, Any] = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "out_sharding": out_sharding,
    }
    function = functools.partial(lax.conv_general_dilated, **options)
    plain = functools.partial(function, preferred_element_type=preferred_element_type)
    if recipe is None:
        return plain(lhs, rhs)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    grouped = feature_group_count != 1 or batch_group_count != 1

    def codes(lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any) -> jax.Array:
        return function(lhs, rhs, preferred_element_type=preferred_element_type)

    operation = Operation(
        "conv_general_dilated",
        ("lhs", "rhs"),
        plain,
        of_conv(numbers),
        None if grouped else codes,
        grouped,
    )
    return product(operation, lhs, rhs, get_dot_recipe(recipe), keys_of(key))
