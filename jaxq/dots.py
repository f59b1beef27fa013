"""Quantized products with the signatures of JAX's, and recipes for the three products of training.

    operands -> (Hadamard transform) -> quantizers -> product, whose gradient is two more of these

`product` is the one function behind `dot_general`, `einsum` and `conv_general_dilated`: it takes a
bilinear function and the labels of its axes (see `contractions`). The gradient of that function,
quantizers, transforms and narrow sums included, is composed of JAX's own transposes, so that a
product without quantizers is JAX's to the last bit.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq import execution
from jaxq.casting import as_dtype, cast
from jaxq.contractions import Contraction, block_along, of_conv, of_dot, of_einsum, placed
from jaxq.cotangents import with_transpose
from jaxq.dot_recipes import DotRecipe, ProductRecipe, get_dot_recipe, is_stochastic
from jaxq.hadamard import Hadamard
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer

__all__ = ["Operation", "conv_general_dilated", "dot_general", "einsum", "product"]

Key = jax.Array | None
Keys = tuple[Key, ...]

_QUANTIZED = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A bilinear function of two arrays, and what its axes are.

    Attributes:
      name: what errors call it.
      operands: what errors call its operands.
      function: `(lhs, rhs) -> out`.
      contraction: the labels of the axes.
      codes: `(lhs, rhs, preferred_element_type) -> out` for arrays of codes; None where there is
        no such product.
      grouped: whether the contraction falls into groups, as in a grouped convolution.
    """

    name: str
    operands: tuple[str, str]
    function: Callable[[jax.Array, jax.Array], jax.Array]
    contraction: Contraction
    codes: execution.Codes | None = None
    grouped: bool = False

    def gradient(self, of: int, aval: Any) -> "Operation":
        """The product of the cotangent and the other operand that gives an operand's gradient."""

        def function(cotangent: jax.Array, residual: jax.Array) -> jax.Array:
            def linear(x: jax.Array) -> jax.Array:
                return self.function(*((x, residual) if of == 0 else (residual, x)))

            return jax.linear_transpose(linear, aval)(cotangent)[0]

        contraction = (self.contraction.dlhs, self.contraction.drhs)[of]
        plain = isinstance(self.codes, execution.DotOfCodes)
        return Operation(
            f"{self.name}, gradient of `{self.operands[of]}`",
            ("the cotangent", f"the residual of `{self.operands[1 - of]}`"),
            function,
            contraction,
            execution.DotOfCodes(contraction) if plain else None,
            self.grouped,
        )


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
      key: a key of `jax.random` if the recipe `draws` anything, its gradient's products included,
        and only then. It is split in three, for the forward product and those of the gradients of
        lhs and rhs, and each again in three, for the two operands and the signs of a transform.

    Returns:
      The product, of the shape and dtype that JAX gives it.

    Raises:
      TypeError: an operand of another dtype that the recipe quantizes.
      ValueError: a block that does not fit what is contracted, in any of the three products; a key
        missing or not needed; an `execution` that the recipe, operation or backend cannot have.
        The text names product and operand.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x, w = jnp.array([[0.5, -1.0]]), jnp.array([[1.0, 0.3], [0.25, 0.7]])
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> jaxq.dot_general(x, w, numbers, recipe="w4")
      Array([[ 0.21428573, -0.54999995]], dtype=float32)
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
    codes = execution.DotOfCodes(contraction)
    operation = Operation("dot_general", ("lhs", "rhs"), function, contraction, codes)
    return product(operation, lhs, rhs, get_dot_recipe(recipe), key)


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
    codes = execution.DotOfCodes(contraction)
    operation = Operation(f"einsum {subscripts!r}", ("lhs", "rhs"), function, contraction, codes)
    return product(operation, lhs, rhs, get_dot_recipe(recipe), key)


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
    return product(operation, lhs, rhs, get_dot_recipe(recipe), key)


def product(
    operation: Operation, lhs: jax.Array, rhs: jax.Array, recipe: DotRecipe, key: Key = None
) -> jax.Array:
    """A bilinear operation by a recipe: what all the functions above come to.

    Args:
      operation: what is done, and the labels of its axes.
      lhs: its first operand.
      rhs: its second operand.
      recipe: how it is quantized.
      key: a key, if the recipe draws.

    Returns:
      What the operation gives, its gradient as `DotRecipe` defines it.

    Raises:
      TypeError: as in `dot_general`.
      ValueError: as in `dot_general`.
    """
    if (key is None) == bool(recipe.draws):
        raise ValueError(
            f"{operation.name}: the recipe draws random numbers for {', '.join(recipe.draws)} and "
            "needs `key`, such as jax.random.key(seed)."
            if recipe.draws
            else f"{operation.name}: the recipe draws no random numbers, got a key. Leave it out."
        )
    keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
    return _product(operation, lhs, rhs, recipe, keys)


def _product(
    operation: Operation, lhs: jax.Array, rhs: jax.Array, recipe: DotRecipe, keys: Keys
) -> jax.Array:
    plan = _Plan.of(recipe, operation, lhs, rhs)
    own = (None,) * 3 if keys[0] is None else tuple(jax.random.split(keys[0], 3))
    lhs, rhs = plan.rotated(lhs, rhs, own[2])
    quantized = plan.quantized(lhs, rhs, own)
    emulated = recipe.execution == "emulated"
    if emulated and recipe.dlhs.plain and recipe.drhs.plain and recipe.residuals == "quantized":
        return operation.function(*quantized)

    out = jax.eval_shape(operation.function, lhs, rhs)
    linear = []
    for of, (how, x) in enumerate(((recipe.dlhs, lhs), (recipe.drhs, rhs))):
        gradient = operation.gradient(of, jax.ShapeDtypeStruct(x.shape, x.dtype))
        # What does not fit is said in the forward pass already.
        _Plan.of(how, gradient, out, (rhs, lhs)[of])
        linear.append(_linear(operation, gradient, how, of))

    def run(operands: tuple, originals: tuple, own: tuple) -> jax.Array:
        if emulated:
            return operation.function(*operands)
        result = execution.run(
            operation.name,
            recipe.execution,
            operation.contraction,
            operation.codes,
            *zip(operation.operands, originals, plan.quantizers, plan.keys(own), strict=True),
        )
        return as_dtype(result, out.dtype)

    @jax.custom_jvp
    def multiply(operands: tuple, originals: tuple, keys: tuple) -> jax.Array:
        return run(operands, originals, keys[0])

    def tangent(primals: tuple, tangents: tuple) -> tuple:
        operands, originals, keys = primals
        residuals = operands if recipe.residuals == "quantized" else originals
        parts = [
            linear[of](moved, residuals[1 - of], keys[1 + of])
            for of, moved in enumerate(tangents[0])
            if not isinstance(moved, SymbolicZero)
        ]
        y = multiply(*primals)
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    multiply.defjvp(tangent, symbolic_zeros=True)
    return multiply(quantized, (lhs, rhs), (own[:2], *keys[1:]))


def _linear(
    operation: Operation, gradient: Operation, how: ProductRecipe, of: int
) -> Callable[[jax.Array, jax.Array, Key], jax.Array]:
    """The operation in one operand's tangent, whose transpose is the gradient's product."""

    def forward(moved: jax.Array, residual: jax.Array, *key: jax.Array) -> jax.Array:
        del key
        return operation.function(*((moved, residual) if of == 0 else (residual, moved)))

    def backward(cotangent: jax.Array, residual: jax.Array, *key: jax.Array) -> jax.Array:
        recipe = DotRecipe(how.lhs, how.rhs, how.hadamard, how.execution)
        keys = (key[0] if key else None, None, None)
        return _product(gradient, cotangent, residual, recipe, keys)

    def linear(moved: jax.Array, residual: jax.Array, key: Key) -> jax.Array:
        if how.plain:
            return forward(moved, residual)
        return with_transpose(forward, backward, moved, residual, *((key,) if how.draws else ()))

    return linear


class _Plan(NamedTuple):
    """A product's recipe on the axes of its operands, all that can be wrong with it checked."""

    quantizers: tuple[Quantizer | None, Quantizer | None]
    hadamard: Hadamard | None
    sizes: tuple[dict[int, int], dict[int, int]]  # Of the transform's blocks, by axis.

    @classmethod
    def of(cls, recipe: ProductRecipe, operation: Operation, lhs: Any, rhs: Any) -> "_Plan":
        """The plan for two operands of which shapes and dtypes are known."""
        execution.check(recipe.execution, operation.name, operation.contraction, operation.codes)
        quantizers, sizes = [], [{}, {}]
        for name, x, quantizer, axes in zip(
            operation.operands, (lhs, rhs), recipe.operands, operation.contraction.axes, strict=True
        ):
            if quantizer is not None:
                with _naming(operation, name):
                    if str(x.dtype) not in _QUANTIZED:
                        raise TypeError(
                            f"must be of dtype {', '.join(_QUANTIZED)} to be quantized, got "
                            f"{x.dtype}. Convert it, or give it no quantizer."
                        )
                    granularity = placed(quantizer.granularity, x.shape, axes)
                    granularity.block(x.shape)
                quantizer = dataclasses.replace(quantizer, granularity=granularity)
            quantizers.append(quantizer)
        hadamard = recipe.hadamard
        if isinstance(hadamard, Hadamard):
            if operation.grouped:
                raise ValueError(f"{operation.name}: no Hadamard transform in a grouped product.")
            sizes = []
            for name, x, axes in zip(
                operation.operands, (lhs, rhs), operation.contraction.shared, strict=True
            ):
                with _naming(operation, name):
                    sizes.append(block_along(hadamard.size, axes, x.shape, str(hadamard)))
        assert not isinstance(hadamard, int)
        return cls(tuple(quantizers), hadamard, tuple(sizes))

    def keys(self, keys: Keys) -> Keys:
        """The keys of the quantizers that draw."""
        return tuple(
            key if quantizer is not None and is_stochastic(quantizer) else None
            for key, quantizer in zip(keys, self.quantizers, strict=False)
        )

    def rotated(self, lhs: jax.Array, rhs: jax.Array, key: Key) -> tuple[jax.Array, jax.Array]:
        """The operands after the Hadamard transform."""
        if self.hadamard is None:
            return lhs, rhs
        signs = self.hadamard.draw(key)
        rotated = []
        for x, sizes in zip((lhs, rhs), self.sizes, strict=True):
            y = self.hadamard.apply(x.astype(jnp.float32), sizes, signs)
            rotated.append(y if x.dtype == y.dtype else cast(y, x.dtype).astype(x.dtype))
        return rotated[0], rotated[1]

    def quantized(self, lhs: jax.Array, rhs: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
        """The operands after their quantizers."""
        return tuple(
            x if quantizer is None else fake_quant(x, quantizer, key=key)
            for x, quantizer, key in zip((lhs, rhs), self.quantizers, self.keys(keys), strict=True)
        )


@contextlib.contextmanager
def _naming(operation: Operation, operand: str) -> Iterator[None]:
    """Errors that begin with the names of product and operand."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{operation.name}: {operand}: {error}") from error
