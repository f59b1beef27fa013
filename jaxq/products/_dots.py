"""Quantized products with the signatures of JAX's, such as `dot_general` and `ragged_dot`.

Each function describes its bilinear function and its axes as an `Operation`; `_products.py` does
the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import array
from jaxq._jax.draws import checked_key
from jaxq.products._catalog import get_product_recipe
from jaxq.products._contractions import of_conv, of_dot, of_einsum, of_ragged_dot
from jaxq.products._execution import DotOfCodes
from jaxq.products._operation import Operation
from jaxq.products._products import keys_of, product
from jaxq.products._recipe import ProductRecipe

__all__ = ["conv_general_dilated", "dot_general", "einsum", "ragged_dot", "ragged_dot_general"]


def dot_general(
    lhs: jax.typing.ArrayLike,
    rhs: jax.typing.ArrayLike,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: str | ProductRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes a quantized `jax.lax.dot_general`.

    With the quantizers Q of a recipe, `y = dot(Q(lhs), Q(rhs))`. The gradients of lhs and rhs are
    defined by `jaxq.ProductRecipe`. In each of the three products, blocks of scales lie along the
    axes that this product contracts, without any transposition of tensors.

    Derivatives of every order are supported, in forward and reverse mode. Forward mode multiplies
    tangents by the residuals and does not quantize them. Second derivatives differentiate the
    quantizers of the gradient's products by their own `gradient`. Under `vmap`, every element has
    its own scales, even if the recipe has one scale for the whole operand.

    Args:
      lhs: the first operand, as in `jax.lax.dot_general`; float16, bfloat16 or float32 if it is
        quantized.
      rhs: the second operand, with the same dtypes.
      dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.
      recipe: a `jaxq.ProductRecipe` or a name in `jaxq.products.PRODUCT_RECIPES`; None (the
        default) computes JAX's own product.
      key: a `jax.random` key, only for recipes whose `draws` is not empty. If only the gradient's
        products draw, it is required only when the call is differentiated. It is split into nine
        keys: for each of the forward product and the gradients of lhs and rhs, one for each of the
        two operands and the signs of a transform.

    Returns:
      The product, with the shape and dtype of JAX's result.

    Raises:
      TypeError: if a quantized operand has another dtype.
      ValueError: if a block does not fit the contracted axes; a key is missing or not needed; or
        the recipe, operation or backend does not support the `execution`. Errors of the gradient's
        products are raised in the forward pass when the call is differentiated. The message names
        the product and the operand.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x, w = jnp.array([[0.5, -1.0]]), jnp.array([[7.0, 3.2], [2.1, -14.0]])
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> jaxq.dot_general(x, w, numbers, recipe="w4a16")
      Array([[ 1.5, 16. ]], dtype=float32)
      >>> jax.grad(lambda w: jaxq.dot_general(x, w, numbers, recipe="w4a16").sum())(w)
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
    lhs, rhs = as_operands("dot_general", lhs, rhs)
    contraction = of_dot(dimension_numbers, lhs.ndim, rhs.ndim)
    codes = DotOfCodes(contraction)
    operation = Operation("dot_general", ("lhs", "rhs"), function, contraction, codes)
    keys = keys_of(checked_key("dot_general", key))
    return product(operation, lhs, rhs, get_product_recipe(recipe), keys)


def einsum(
    subscripts: str,
    /,
    *operands: jax.typing.ArrayLike,
    optimize: Any = "auto",
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    recipe: str | ProductRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes a quantized `jax.numpy.einsum` of two operands; see `jaxq.dot_general`.

    Args:
      subscripts: as in JAX, with or without an ellipsis. With a recipe, there must be two operands,
        and neither may name an axis twice. The first operand is `lhs`, the second `rhs`.
      operands: the arrays; exactly two with a recipe.
      optimize: as in JAX.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.
      recipe: as in `jaxq.dot_general`.
      key: as in `jaxq.dot_general`.

    Returns:
      The product, with the shape and dtype of JAX's result.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`; or if the number of operands is not two.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> x, w = jnp.ones((8, 3, 64)), jnp.ones((64, 32))
      >>> jaxq.einsum("bsi,io->bso", x, w, recipe="mxfp8_training").shape
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
            "Split a longer product into several."
        )
    lhs, rhs = as_operands("einsum", *operands)
    contraction = of_einsum(subscripts, lhs.ndim, rhs.ndim)
    codes = DotOfCodes(contraction)
    operation = Operation(f"einsum {subscripts!r}", ("lhs", "rhs"), function, contraction, codes)
    keys = keys_of(checked_key("einsum", key))
    return product(operation, lhs, rhs, get_product_recipe(recipe), keys)


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
    recipe: str | ProductRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes a quantized `jax.lax.conv_general_dilated`; see `jaxq.dot_general`.

    The axes of the window count as contracted. Blocks lie along the input channels in the forward
    product, along the output channels in the gradient of lhs, and along the batch in the gradient
    of rhs. `PerToken()` therefore means one scale per image, and `PerChannel(-1)` of the kernel one
    scale per output feature.

    Args:
      lhs: the images, as in JAX; float16, bfloat16 or float32 if quantized.
      rhs: the kernel, with the same dtypes.
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
      recipe: as in `jaxq.dot_general`. `execution` must be `"emulated"` in the gradient's products
        and must not be an `Accumulation` in any product.
      key: as in `jaxq.dot_general`.

    Returns:
      The convolution, with the shape and dtype of JAX's result.

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
    lhs, rhs = as_operands("conv_general_dilated", lhs, rhs)
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
    keys = keys_of(checked_key("conv_general_dilated", key))
    return product(operation, lhs, rhs, get_product_recipe(recipe), keys)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
    out_sharding: Any = None,
    *,
    recipe: str | ProductRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes a quantized `jax.lax.ragged_dot`, for mixtures of experts; see `jaxq.dot_general`.

    The rows of `lhs` are sorted by group, and those of group g are multiplied by `rhs[g]`. The
    group axis of `rhs` is a batch axis: `PerChannel(-1)` means one scale per group and output,
    `PerBlock(32)` means blocks along the contraction of each group's matrix, and `PerTensor()`
    means one scale for all groups together.

    In the gradient of `rhs`, the contraction runs over the rows of each group. Scales along the
    rows ignore groups: `PerToken()` means one scale for a column of all rows, and blocks of rows
    are counted from the first row, so a block may straddle two groups. A Hadamard transform would
    mix groups in this product, so `"nvfp4_training"` raises an error when differentiated.

    The result is zero in rows beyond `sum(group_sizes)`, but these rows of `lhs` affect scales that
    span rows, such as those of `PerTensor()`. Fill them with zeros.

    Args:
      lhs: the rows, `[rows, contracted]`; float16, bfloat16 or float32 if quantized.
      rhs: the groups' matrices, `[groups, contracted, outputs]`, with the same dtypes.
      group_sizes: integers `[groups]`, the number of rows in each group.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      group_offset: as in JAX.
      out_sharding: as in JAX.
      recipe: as in `jaxq.dot_general`, with `execution="emulated"`.
      key: as in `jaxq.dot_general`.

    Returns:
      The product `[rows, outputs]`, with the dtype of JAX's result.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`; or if the recipe has a Hadamard transform along the
        ragged axis.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> x = jnp.array([[0.5, -1.0], [1.0, 0.0], [0.5, -1.0]])
      >>> w = jnp.array([[[7.0, 3.2], [2.1, -14.0]], [[70.0, 32.0], [21.0, -140.0]]])
      >>> jaxq.ragged_dot(x, w, jnp.array([2, 1]), recipe="w4a16")
      Array([[  1.5,  16. ],
             [  7. ,   4. ],
             [ 15. , 160. ]], dtype=float32)
    """
    numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    function = functools.partial(
        lax.ragged_dot,
        precision=precision,
        preferred_element_type=preferred_element_type,
        group_offset=group_offset,
        out_sharding=out_sharding,
    )
    return _ragged("ragged_dot", function, (lhs, rhs, group_sizes), numbers, recipe, key)


def ragged_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
    out_sharding: Any = None,
    *,
    recipe: str | ProductRecipe | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes a quantized `jax.lax.ragged_dot_general`; see `jaxq.ragged_dot`.

    Args:
      lhs: the first operand, as in JAX; float16, bfloat16 or float32 if quantized.
      rhs: the second operand, with the same dtypes.
      group_sizes: as in JAX.
      ragged_dot_dimension_numbers: as in JAX. All three modes are supported. As in JAX, only the
        mode with the ragged axis among the free axes of `lhs` can be differentiated.
      precision: as in JAX.
      preferred_element_type: as in JAX.
      group_offset: as in JAX.
      out_sharding: as in JAX.
      recipe: as in `jaxq.ragged_dot`.
      key: as in `jaxq.dot_general`.

    Returns:
      The product, with the shape and dtype of JAX's result.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.ragged_dot`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> from jax.lax import RaggedDotDimensionNumbers
      >>> numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
      >>> x, g = jnp.ones((8, 4)), jnp.ones((8, 2))  # The sum over the rows of each group.
      >>> jaxq.products.ragged_dot_general(x, g, jnp.array([5, 3]), numbers, recipe="w8a8")[:, 0, 0]
      Array([5., 3.], dtype=float32)
    """
    numbers = ragged_dot_dimension_numbers
    function = functools.partial(
        lax.ragged_dot_general,
        ragged_dot_dimension_numbers=numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        group_offset=group_offset,
        out_sharding=out_sharding,
    )
    return _ragged("ragged_dot_general", function, (lhs, rhs, group_sizes), numbers, recipe, key)


def as_operands(name: str, lhs: Any, rhs: Any) -> list[jax.Array]:
    """Returns the operands of a product as arrays."""
    remedy = "Pass an array of floats."
    named = (("lhs", lhs), ("rhs", rhs))
    return [array(name, argument, value, "an array", remedy) for argument, value in named]


def _ragged(
    name: str,
    function: Callable[..., jax.Array],
    operands: tuple[jax.Array, jax.Array, jax.Array],
    numbers: lax.RaggedDotDimensionNumbers,
    recipe: str | ProductRecipe | None,
    key: jax.Array | None,
) -> jax.Array:
    if recipe is None:
        return function(*operands)
    lhs, rhs = as_operands(name, *operands[:2])
    remedy = "Pass one number of rows per group."
    sizes = array(name, "group_sizes", operands[2], "integers", remedy)
    contraction = of_ragged_dot(numbers, lhs.ndim, rhs.ndim, owner=name)
    operation = Operation(name, ("lhs", "rhs"), function, contraction, arguments=(sizes,))
    keys = keys_of(checked_key(name, key))
    return product(operation, lhs, rhs, get_product_recipe(recipe), keys)
