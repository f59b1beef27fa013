"""Quantized bilinear functions and the two products of their gradients.

    operands -> (Hadamard transform) -> quantizers -> product, whose gradient is two more of these

`product` implements `dot_general`, `einsum` and `conv_general_dilated`. It takes a bilinear
function and the labels of its axes (see `_contractions.py`). The gradient of that function,
including quantizers, transforms and narrow sums, is composed of JAX's own transposes, so that a
product without quantizers equals JAX's to the last bit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq._jax.barriers import barrier_on_cpu
from jaxq._jax.draws import one_of, split
from jaxq._jax.meshes import like
from jaxq.numerics import as_dtype
from jaxq.products import _execution
from jaxq.products._cotangents import with_transpose
from jaxq.products._execution import Operand
from jaxq.products._operation import Operation, naming
from jaxq.products._plan import Key, Pair, Plan
from jaxq.products._recipe import PerProduct, ProductRecipe, SingleProduct

__all__ = ["NO_SCALES", "check", "check_gradients", "keys_by_product", "keys_of", "product"]

# Stands for the precomputed scales of the three products if none are given.
NO_SCALES: PerProduct[Pair] = PerProduct((None, None), (None, None), (None, None))


def product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: ProductRecipe,
    keys: Key = None,
    scales: PerProduct[Pair] = NO_SCALES,
) -> jax.Array:
    """Applies a bilinear operation quantized by a recipe.

    Args:
      operation: the bilinear function and the labels of its axes.
      lhs: the first operand.
      rhs: the second operand.
      recipe: the product recipe.
      keys: the result of `keys_of` for a key, if the recipe draws random bits.
      scales: for both operands of each product, a result of `jaxq.calibration.finalize` or an
        `Amax` record to use instead of scales computed from the operand, or None. In the products
        of the gradient, the operands are the cotangent and the residual. Precomputed scales apply
        to the untransformed tensor, so an operand under a Hadamard transform takes none.

    Returns:
      The result of the operation, with the gradient that `ProductRecipe` defines.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`.
    """
    if keys is not None and not recipe.draws:
        raise ValueError(
            f"{operation.name}: `key` must be None, as the recipe draws no random bits, got a key. "
            "Omit it."
        )
    _check_key(operation.name, recipe.forward, keys)
    return _product(operation, lhs, rhs, recipe, keys, scales)


def check(operation: Operation, lhs: Any, rhs: Any, recipe: SingleProduct) -> None:
    """Checks operands and recipe as `product` does, but not the random keys.

    Args:
      operation: the operation; its function is not called.
      lhs: the shape and dtype of the first operand.
      rhs: the shape and dtype of the second operand.
      recipe: the recipe of the forward product.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`.
    """
    plan = Plan.of(recipe, operation, lhs, rhs)
    for name, x, quantizer in zip(operation.operands, (lhs, rhs), plan.quantizers, strict=True):
        if quantizer is not None:
            with naming(operation, name):
                quantizer.cut(x.shape)
    if recipe.execution == "emulated":
        return

    def execute(lhs: jax.Array, rhs: jax.Array, keys: jax.Array) -> jax.Array:
        operands = (lhs, rhs), plan.quantizers, plan.keys(keys)
        return _execution.run(
            operation.name,
            recipe.execution,
            operation.contraction,
            operation.codes,
            *map(Operand, operation.operands, *operands),
        )

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    jax.eval_shape(execute, lhs, rhs, keys)


def check_gradients(
    operation: Operation, lhs: Any, rhs: Any, out: Any, recipe: ProductRecipe
) -> None:
    """Checks operands and recipe as differentiating `product` does, but not the random keys.

    Args:
      operation: the operation; its function is not called.
      lhs: the shape and dtype of the first operand.
      rhs: the shape and dtype of the second operand.
      out: the shape and dtype of the result.
      recipe: the product recipe.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`.
    """
    operands = (lhs, rhs)
    for of, single in enumerate(recipe.products.gradients):
        if not single.plain:
            check(operation.gradient(of, operands[of]), out, operands[1 - of], single)


def keys_of(key: Key) -> Key:
    """Splits a key for the two operands and the transform of each of the three products.

    Args:
      key: a key or an array of keys; None returns None.

    Returns:
      Keys `[..., product, place]`, where the places are the two operands and the transform.
    """
    if key is None:
        return None
    keys = split(key, 9)
    return keys.reshape(*keys.shape[:-1], 3, 3)


def keys_by_product(recipe: ProductRecipe, keys: Key) -> PerProduct[Key]:
    """Returns the keys of each product from those of `keys_of`, None if it draws no random bits."""
    forward, dlhs, drhs = (
        one_of(keys, i) if keys is not None and single.draws else None
        for i, single in enumerate(recipe.products)
    )
    return PerProduct(forward, dlhs, drhs)


def _check_key(name: str, recipe: SingleProduct, key: Key) -> None:
    if recipe.draws and key is None:
        raise ValueError(
            f"{name}: `key` must be given, as the recipe draws random bits for "
            f"{' and '.join(recipe.draws)}, got None. Pass, for example, jax.random.key(seed)."
        )


def _product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: ProductRecipe,
    keys: Key,
    scales: PerProduct[Pair],
) -> jax.Array:
    plan = Plan.of(recipe, operation, lhs, rhs)
    prepared = plan.prepare(lhs, rhs, keys_by_product(recipe, keys).forward, scales.forward)
    quantized = prepared.quantized
    emulated = recipe.execution == "emulated"
    if emulated and recipe.dlhs.plain and recipe.drhs.plain and recipe.residuals == "quantized":
        return operation.function(*quantized, *operation.arguments)
    out = jax.eval_shape(operation.function, *prepared.values, *operation.arguments)

    @jax.custom_jvp
    def multiply(
        operands: tuple,
        originals: tuple,
        keys: Key,
        scales: PerProduct[Any],
        arguments: tuple,
    ) -> jax.Array:
        if emulated:
            return operation.function(*operands, *arguments)
        result = _execution.run(
            operation.name,
            recipe.execution,
            operation.contraction,
            operation.codes,
            *map(
                Operand,
                operation.operands,
                originals,
                plan.quantizers,
                plan.keys(keys_by_product(recipe, keys).forward),
                scales.forward,
            ),
        )
        return as_dtype(result, out.dtype)

    def jvp(primals: tuple, tangents: tuple) -> tuple:
        operands, originals, keys, scales, arguments = primals
        current = dataclasses.replace(operation, arguments=arguments)
        residuals = operands if recipe.residuals == "quantized" else originals
        parts = []
        for of, single in enumerate(recipe.products.gradients):
            tangent, residual = tangents[0][of], residuals[1 - of]
            if not isinstance(tangent, SymbolicZero):
                part = _Part(of, single, out, keys if single.draws else None, scales.gradients[of])
                parts.append(_linear(current, part, tangent, residual))
        y = multiply(*primals)
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    multiply.defjvp(jvp, symbolic_zeros=True)
    scales = scales._replace(forward=prepared.scales)
    return multiply(quantized, prepared.values, keys, scales, operation.arguments)


class _Part(NamedTuple):
    """One product of a gradient.

    Attributes:
      of: 0 for the gradient of `lhs`, 1 for the gradient of `rhs`.
      recipe: its recipe.
      cotangent: the shape and dtype of the cotangent.
      keys: the keys of all three products, or None. The product selects its keys in the backward
        pass, so that a loop stores one array of keys for each forward product.
      scales: the precomputed scales of the cotangent and the residual.
    """

    of: int
    recipe: SingleProduct
    cotangent: Any
    keys: Key
    scales: Pair


def _linear(
    operation: Operation, part: _Part, tangent: jax.Array, residual: jax.Array
) -> jax.Array:
    """Applies the operation to an operand's tangent, with the gradient's product as transpose."""
    of, single = part.of, part.recipe
    flat_arguments, structure = jax.tree.flatten((operation.arguments, part.keys, part.scales))

    def forward(tangent: jax.Array, residual: jax.Array, *flat_arguments: jax.Array) -> jax.Array:
        arguments = jax.tree.unflatten(structure, flat_arguments)[0]
        operands = (tangent, residual) if of == 0 else (residual, tangent)
        return operation.function(*operands, *arguments)

    if single.plain:
        return forward(tangent, residual, *flat_arguments)
    gradient = operation.gradient(of, like(tangent))
    _check_key(gradient.name, single, part.keys)
    # Errors are raised in the forward pass already.
    Plan.of(single, gradient, part.cotangent, residual)

    def backward(
        cotangent: jax.Array, residual: jax.Array, *flat_arguments: jax.Array
    ) -> jax.Array:
        recipe = ProductRecipe(single.lhs, single.rhs, single.hadamard, single.execution)
        arguments, keys, scales = jax.tree.unflatten(structure, flat_arguments)
        if keys is not None:
            # With the barrier, the kernels of all products in a loop get their keys as an array of
            # one iteration, and those of equal shape are compiled once.
            keys = one_of(barrier_on_cpu(keys), 1 + of)[None]
        current = dataclasses.replace(gradient, arguments=arguments)
        return _product(
            current, cotangent, residual, recipe, keys, NO_SCALES._replace(forward=scales)
        )

    return with_transpose(forward, backward, tangent, residual, *flat_arguments)
