"""Quantized bilinear functions and the two products of their gradients.

    operands -> (Hadamard transform) -> quantizers -> product, whose gradient is two more of these

`product` implements `dot_general`, `einsum` and `conv_general_dilated`. It takes a bilinear
function and the labels of its axes (see `_contractions.py`). The gradient of that function,
including quantizers, transforms and narrow sums, is composed of JAX's own transposes, so that a
product without quantizers equals JAX's to the last bit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq._jax.draws import one_of, split
from jaxq._jax.meshes import like
from jaxq.numerics import as_dtype, cast
from jaxq.products import _execution
from jaxq.products._contractions import Axes, Contraction, block_along, placed
from jaxq.products._cotangents import with_transpose
from jaxq.products._execution import DotOfCodes, Operand
from jaxq.products._hadamard import Hadamard
from jaxq.products._histories import Amax
from jaxq.products._recipe import ProductRecipe, SingleProduct, is_stochastic
from jaxq.quantizers import fake_quant
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe

__all__ = [
    "Key",
    "Operation",
    "Pair",
    "Plan",
    "Scales",
    "check",
    "check_gradients",
    "keys_of",
    "product",
]

Key = jax.Array | None
Keys = tuple[Key, ...]
Given = Calibrated | Amax | None
Pair = tuple[Given, Given]


class Scales(NamedTuple):
    """Precomputed scales for both operands of each product; None where scales are computed.

    A precomputed scale applies to the untransformed tensor, so an operand under a Hadamard
    transform takes none.

    Attributes:
      forward: the scales of the two operands of the forward product.
      dlhs: the scales of the cotangent and the residual in the product that gives the gradient of
        the first operand.
      drhs: likewise for the gradient of the second operand.
    """

    forward: Pair = (None, None)
    dlhs: Pair = (None, None)
    drhs: Pair = (None, None)


_OWN = Scales()
_QUANTIZED = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A bilinear function of two arrays, with the labels of its axes.

    Attributes:
      name: the name of the operation in error messages.
      operands: the names of the operands in error messages.
      function: the bilinear function, `(lhs, rhs, *arguments) -> out`.
      contraction: the labels of the axes.
      codes: the same product for arrays of codes, `(lhs, rhs, preferred_element_type) -> out`; None
        (the default) if there is none.
      grouped: whether the contraction falls into groups, as in a grouped convolution.
      arguments: further array arguments of the function, such as group sizes.
    """

    name: str
    operands: tuple[str, str]
    function: Callable[..., jax.Array]
    contraction: Contraction
    codes: _execution.Codes | None = None
    grouped: bool = False
    arguments: tuple[jax.Array, ...] = ()

    def gradient(self, of: int, aval: Any) -> "Operation":
        """Returns the product of the cotangent and one operand that gives the other's gradient.

        Args:
          of: 0 for the gradient of `lhs`, 1 for the gradient of `rhs`.
          aval: the shape and dtype of the operand whose gradient is computed.
        """

        def function(cotangent: jax.Array, residual: jax.Array, *arguments: jax.Array) -> jax.Array:
            def linear(x: jax.Array) -> jax.Array:
                operands = (x, residual) if of == 0 else (residual, x)
                return self.function(*operands, *arguments)

            return jax.linear_transpose(linear, aval)(cotangent)[0]

        contraction = (self.contraction.dlhs, self.contraction.drhs)[of]
        plain = isinstance(self.codes, DotOfCodes)
        return Operation(
            f"{self.name}, gradient of `{self.operands[of]}`",
            ("the cotangent", f"the residual of `{self.operands[1 - of]}`"),
            function,
            contraction,
            DotOfCodes(contraction) if plain else None,
            self.grouped,
            self.arguments,
        )


def product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: ProductRecipe,
    keys: Key = None,
    scales: Scales = _OWN,
) -> jax.Array:
    """Applies a bilinear operation quantized by a recipe.

    Args:
      operation: the bilinear function and the labels of its axes.
      lhs: the first operand.
      rhs: the second operand.
      recipe: the product recipe.
      keys: the result of `keys_of` for a key, if the recipe draws random bits.
      scales: results of `jaxq.calibration.finalize`, or `Amax` records, to use instead of scales
        computed from the operands.

    Returns:
      The result of the operation, with the gradient that `ProductRecipe` defines.

    Raises:
      TypeError: as in `jaxq.dot_general`.
      ValueError: as in `jaxq.dot_general`.
    """
    if keys is not None and not recipe.draws:
        raise ValueError(
            f"{operation.name}: the recipe draws no random numbers, got a key. Leave it out."
        )
    _check_key(operation.name, recipe.forward, keys)
    own = tuple(
        one_of(keys, i) if keys is not None and how.draws else None
        for i, how in enumerate((recipe.forward, recipe.dlhs, recipe.drhs))
    )
    return _product(operation, lhs, rhs, recipe, own, scales)


def check(operation: Operation, lhs: Any, rhs: Any, recipe: SingleProduct) -> None:
    """Raises the errors of `product` for its forward product, except those about keys.

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
            with _naming(operation, name):
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
    """Raises the errors of differentiating `product`, except those about keys.

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
    for of, how in enumerate((recipe.dlhs, recipe.drhs)):
        if not how.plain:
            check(operation.gradient(of, operands[of]), out, operands[1 - of], how)


def keys_of(key: Key) -> Key:
    """Splits a key for each of the three products, into both operands' keys and the transform's.

    Args:
      key: a key or an array of keys; None returns None.

    Returns:
      Keys `[..., product, place]`, where the places are the two operands and the transform.
    """
    return None if key is None else split(split(key, 3), 3)


def _check_key(name: str, recipe: SingleProduct, key: Key) -> None:
    if recipe.draws and key is None:
        raise ValueError(
            f"{name}: the recipe draws random numbers for {' and '.join(recipe.draws)}. Pass "
            "`key`, for example jax.random.key(seed)."
        )


def _product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: ProductRecipe,
    keys: Keys,
    scales: Scales,
) -> jax.Array:
    plan = Plan.of(recipe, operation, lhs, rhs)
    lhs, rhs = plan.rotated(lhs, rhs, keys[0])
    given = plan.given(lhs, rhs, scales.forward)
    quantized = plan.quantized(lhs, rhs, keys[0], given)
    emulated = recipe.execution == "emulated"
    if emulated and recipe.dlhs.plain and recipe.drhs.plain and recipe.residuals == "quantized":
        return operation.function(*quantized, *operation.arguments)
    out = jax.eval_shape(operation.function, lhs, rhs, *operation.arguments)

    @jax.custom_jvp
    def multiply(
        operands: tuple, originals: tuple, keys: tuple, scales: tuple, arguments: tuple
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
                plan.keys(keys[0]),
                scales[0],
            ),
        )
        return as_dtype(result, out.dtype)

    def tangent(primals: tuple, tangents: tuple) -> tuple:
        operands, originals, keys, scales, arguments = primals
        own = dataclasses.replace(operation, arguments=arguments)
        residuals = operands if recipe.residuals == "quantized" else originals
        parts = []
        for of, how in enumerate((recipe.dlhs, recipe.drhs)):
            moved, residual = tangents[0][of], residuals[1 - of]
            if not isinstance(moved, SymbolicZero):
                given = scales[1 + of]
                parts.append(_linear(own, how, of, moved, residual, out, keys[1 + of], given))
        y = multiply(*primals)
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    multiply.defjvp(tangent, symbolic_zeros=True)
    return multiply(quantized, (lhs, rhs), keys, (given, *scales[1:]), operation.arguments)


def _linear(
    operation: Operation,
    how: SingleProduct,
    of: int,
    moved: jax.Array,
    residual: jax.Array,
    out: Any,
    key: Key,
    scales: Pair,
) -> jax.Array:
    """Applies the operation to an operand's tangent, with the gradient's product as transpose."""
    drawn = (key,) if how.draws and key is not None else ()
    more, structure = jax.tree.flatten((operation.arguments, drawn, scales))

    def forward(moved: jax.Array, residual: jax.Array, *more: jax.Array) -> jax.Array:
        arguments = jax.tree.unflatten(structure, more)[0]
        operands = (moved, residual) if of == 0 else (residual, moved)
        return operation.function(*operands, *arguments)

    if how.plain:
        return forward(moved, residual, *more)
    gradient = operation.gradient(of, like(moved))
    _check_key(gradient.name, how, key)
    Plan.of(how, gradient, out, residual)  # Raises errors in the forward pass already.

    def backward(cotangent: jax.Array, residual: jax.Array, *more: jax.Array) -> jax.Array:
        recipe = ProductRecipe(how.lhs, how.rhs, how.hadamard, how.execution)
        arguments, key, scales = jax.tree.unflatten(structure, more)
        keys = (key[0] if key else None, None, None)
        own = dataclasses.replace(gradient, arguments=arguments)
        return _product(own, cotangent, residual, recipe, keys, Scales(scales))

    return with_transpose(forward, backward, moved, residual, *more)


class Plan(NamedTuple):
    """A product's recipe resolved to the axes of its operands and validated."""

    quantizers: tuple[Recipe | None, Recipe | None]
    hadamard: Hadamard | None
    sizes: tuple[dict[int, int], dict[int, int]]  # Block lengths of the transform, by axis.

    @classmethod
    def of(cls, recipe: SingleProduct, operation: Operation, lhs: Any, rhs: Any) -> "Plan":
        """Returns the plan for two operands of known shapes and dtypes."""
        _execution.check(recipe.execution, operation.name, operation.contraction, operation.codes)
        hadamard = recipe.hadamard
        assert not isinstance(hadamard, int), "the recipe has made it a record"
        if hadamard is not None and operation.grouped:
            raise ValueError(
                f"{operation.name}: a Hadamard transform would mix the groups of a grouped "
                "product. Use hadamard=None, or one product per group."
            )
        if hadamard is not None and operation.contraction.contracts_ragged:
            raise ValueError(
                f"{operation.name}: a Hadamard transform along the ragged axis would mix rows of "
                "different groups. Use hadamard=None."
            )
        quantizers, sizes = [], []
        for i, x in enumerate((lhs, rhs)):
            with _naming(operation, operation.operands[i]):
                quantizer, shared = recipe.operands[i], operation.contraction.shared[i]
                if (quantizer or hadamard) and str(x.dtype) not in _QUANTIZED:
                    raise TypeError(
                        f"must be of dtype {', '.join(_QUANTIZED)} to be quantized, got "
                        f"{x.dtype}. Convert it, or give it no recipe."
                    )
                quantizers.append(_on_axes(quantizer, x.shape, operation.contraction.axes[i]))
                size = {} if hadamard is None else _along(hadamard, shared, x.shape)
                sizes.append(size)
        return cls((quantizers[0], quantizers[1]), hadamard, (sizes[0], sizes[1]))

    def keys(self, keys: Key) -> tuple[Key, Key]:
        """Returns the keys of the two quantizers, None for one that draws no random bits."""
        left, right = (
            one_of(keys, i) if keys is not None and quantizer and is_stochastic(quantizer) else None
            for i, quantizer in enumerate(self.quantizers)
        )
        return left, right

    def rotated(self, lhs: jax.Array, rhs: jax.Array, keys: Key) -> tuple[jax.Array, jax.Array]:
        """Returns the operands after the Hadamard transform."""
        if self.hadamard is None:
            return lhs, rhs
        signs = self.hadamard.draw(None if keys is None else one_of(keys, 2))
        rotated = []
        for x, sizes in zip((lhs, rhs), self.sizes, strict=True):
            y = self.hadamard.apply(x.astype(jnp.float32), sizes, signs)
            rotated.append(y if x.dtype == y.dtype else cast(y, x.dtype).astype(x.dtype))
        return rotated[0], rotated[1]

    def given(self, lhs: jax.Array, rhs: jax.Array, scales: Pair) -> tuple[Calibrated | None, ...]:
        """Returns the precomputed scales of the operands, with `Amax` converted to scales."""
        found = []
        for x, quantizer, scale in zip((lhs, rhs), self.quantizers, scales, strict=True):
            if isinstance(scale, Amax):
                scale = None if quantizer is None else scale.scale(x, quantizer)
            found.append(scale)
        return tuple(found)

    def quantized(
        self, lhs: jax.Array, rhs: jax.Array, keys: Key, scales: tuple[Calibrated | None, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the operands after fake quantization."""
        left, right = (
            x
            if quantizer is None
            else fake_quant(x, quantizer, key=key, **({} if given is None else given._asdict()))
            for x, quantizer, key, given in zip(
                (lhs, rhs), self.quantizers, self.keys(keys), scales, strict=True
            )
        )
        return left, right


def _on_axes(recipe: Recipe | None, shape: tuple[int, ...], axes: Axes) -> Recipe | None:
    """Returns a recipe whose granularity refers to the tensor's own axes."""
    if recipe is None:
        return None
    return dataclasses.replace(recipe, granularity=placed(recipe.granularity, shape, axes))


def _along(hadamard: Hadamard, axes: tuple[int, ...], shape: tuple[int, ...]) -> dict[int, int]:
    """Returns the lengths of a transform's blocks on the contracted axes of both operands."""
    return block_along(hadamard.size, axes, shape, f"Hadamard({hadamard.size})")


@contextlib.contextmanager
def _naming(operation: Operation, operand: str) -> Iterator[None]:
    """Prefixes errors with the names of the operation and the operand."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{operation.name}: {operand}: {error}") from error
