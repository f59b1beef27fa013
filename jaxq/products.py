"""Products by recipe: one bilinear function, quantized, and the two products of its gradient.

    operands -> (Hadamard transform) -> quantizers -> product, whose gradient is two more of these

`product` is the one function behind `dot_general`, `einsum` and `conv_general_dilated`: it takes a
bilinear function and the labels of its axes (see `contractions`). The gradient of that function,
quantizers, transforms and narrow sums included, is composed of JAX's own transposes, so that a
product without quantizers is JAX's to the last bit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq import execution
from jaxq.calibration import Calibrated
from jaxq.casting import as_dtype, cast
from jaxq.contractions import Axes, Contraction, block_along, placed
from jaxq.cotangents import with_transpose
from jaxq.dot_recipes import DotRecipe, ProductRecipe, is_stochastic
from jaxq.draws import one_of, split
from jaxq.execution import DotOfCodes, Operand
from jaxq.hadamard import Hadamard
from jaxq.histories import Amax
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer

__all__ = ["Operation", "Scales", "keys_of", "product"]

Key = jax.Array | None
Keys = tuple[Key, ...]
Given = Calibrated | Amax | None
Pair = tuple[Given, Given]


class Scales(NamedTuple):
    """Scales that are given, for both operands of each product; None where they have their own.

    A given scale is for a tensor as it is, so an operand under a Hadamard transform takes none.

    Attributes:
      forward: of the two operands.
      dlhs: of the cotangent, and of the residual, in the product of the first operand's gradient.
      drhs: likewise for the second.
    """

    forward: Pair = (None, None)
    dlhs: Pair = (None, None)
    drhs: Pair = (None, None)


_OWN = Scales()
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
        """The product of the cotangent and the other operand that gives an operand's gradient.

        Args:
          of: 0 for the gradient of `lhs`, 1 for that of `rhs`.
          aval: that operand's shape and dtype.
        """

        def function(cotangent: jax.Array, residual: jax.Array) -> jax.Array:
            def linear(x: jax.Array) -> jax.Array:
                return self.function(*((x, residual) if of == 0 else (residual, x)))

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
        )


def product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: DotRecipe,
    keys: Key = None,
    scales: Scales = _OWN,
) -> jax.Array:
    """A bilinear operation by a recipe: what every quantized product comes to.

    Args:
      operation: what is done, and the labels of its axes.
      lhs: its first operand.
      rhs: its second operand.
      recipe: how it is quantized.
      keys: those that `keys_of` makes of a key, if the recipe draws.
      scales: what `jaxq.calibration.finalize` gave, or largest magnitudes, for operands that do not
        have scales of their own.

    Returns:
      What the operation gives, its gradient as `DotRecipe` defines it.

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


def keys_of(key: Key) -> Key:
    """All keys of a product: for each of the three products, of both operands and the transform.

    Args:
      key: a key, or an array of them; None has none.

    Returns:
      Keys `[..., product, place]`.
    """
    return None if key is None else split(split(key, 3), 3)


def _check_key(name: str, recipe: ProductRecipe, key: Key) -> None:
    if recipe.draws and key is None:
        raise ValueError(
            f"{name}: the recipe draws random numbers for {' and '.join(recipe.draws)}, and needs "
            "`key`, such as jax.random.key(seed)."
        )


def _product(
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    recipe: DotRecipe,
    keys: Keys,
    scales: Scales,
) -> jax.Array:
    plan = _Plan.of(recipe, operation, lhs, rhs)
    lhs, rhs = plan.rotated(lhs, rhs, keys[0])
    given = plan.given(lhs, rhs, scales.forward)
    quantized = plan.quantized(lhs, rhs, keys[0], given)
    emulated = recipe.execution == "emulated"
    if emulated and recipe.dlhs.plain and recipe.drhs.plain and recipe.residuals == "quantized":
        return operation.function(*quantized)
    out = jax.eval_shape(operation.function, lhs, rhs)

    @jax.custom_jvp
    def multiply(operands: tuple, originals: tuple, keys: tuple, scales: tuple) -> jax.Array:
        if emulated:
            return operation.function(*operands)
        result = execution.run(
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
        operands, originals, keys, scales = primals
        residuals = operands if recipe.residuals == "quantized" else originals
        parts = []
        for of, how in enumerate((recipe.dlhs, recipe.drhs)):
            moved, residual = tangents[0][of], residuals[1 - of]
            if not isinstance(moved, SymbolicZero):
                given = scales[1 + of]
                parts.append(_linear(operation, how, of, moved, residual, out, keys[1 + of], given))
        y = multiply(*primals)
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    multiply.defjvp(tangent, symbolic_zeros=True)
    return multiply(quantized, (lhs, rhs), keys, (given, *scales[1:]))


def _linear(
    operation: Operation,
    how: ProductRecipe,
    of: int,
    moved: jax.Array,
    residual: jax.Array,
    out: Any,
    key: Key,
    scales: Pair,
) -> jax.Array:
    """The operation on one operand's tangent, whose transpose is the gradient's product."""
    drawn = (key,) if how.draws and key is not None else ()
    more, structure = jax.tree.flatten((drawn, scales))

    def forward(moved: jax.Array, residual: jax.Array, *more: jax.Array) -> jax.Array:
        del more
        return operation.function(*((moved, residual) if of == 0 else (residual, moved)))

    if how.plain:
        return forward(moved, residual)
    aval = jax.typeof(moved)
    mesh = aval.sharding.mesh
    known = aval.sharding if mesh.explicit_axes or mesh.manual_axes else None
    like = jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=known, manual_axis_type=aval.manual_axis_type
    )
    gradient = operation.gradient(of, like)
    _check_key(gradient.name, how, key)
    _Plan.of(how, gradient, out, residual)  # What does not fit is said in the forward pass.

    def backward(cotangent: jax.Array, residual: jax.Array, *more: jax.Array) -> jax.Array:
        recipe = DotRecipe(how.lhs, how.rhs, how.hadamard, how.execution)
        key, scales = jax.tree.unflatten(structure, more)
        keys = (key[0] if key else None, None, None)
        return _product(gradient, cotangent, residual, recipe, keys, Scales(scales))

    return with_transpose(forward, backward, moved, residual, *more)


class _Plan(NamedTuple):
    """A product's recipe on the axes of its operands, all that can be wrong with it checked."""

    quantizers: tuple[Quantizer | None, Quantizer | None]
    hadamard: Hadamard | None
    sizes: tuple[dict[int, int], dict[int, int]]  # Of the transform's blocks, by axis.

    @classmethod
    def of(cls, recipe: ProductRecipe, operation: Operation, lhs: Any, rhs: Any) -> "_Plan":
        """The plan for two operands of which shapes and dtypes are known."""
        execution.check(recipe.execution, operation.name, operation.contraction, operation.codes)
        hadamard = recipe.hadamard
        assert not isinstance(hadamard, int), "the recipe has made it a record"
        if hadamard is not None and operation.grouped:
            raise ValueError(
                f"{operation.name}: a Hadamard transform mixes what a grouped product keeps apart. "
                "Use hadamard=None, or one product a group."
            )
        quantizers, sizes = [], []
        for i, x in enumerate((lhs, rhs)):
            with _naming(operation, operation.operands[i]):
                quantizer, shared = recipe.operands[i], operation.contraction.shared[i]
                if (quantizer or hadamard) and str(x.dtype) not in _QUANTIZED:
                    raise TypeError(
                        f"must be of dtype {', '.join(_QUANTIZED)} to be quantized, got "
                        f"{x.dtype}. Convert it, or give it no quantizer."
                    )
                quantizers.append(_on_axes(quantizer, x.shape, operation.contraction.axes[i]))
                size = {} if hadamard is None else _along(hadamard, shared, x.shape)
                sizes.append(size)
        return cls((quantizers[0], quantizers[1]), hadamard, (sizes[0], sizes[1]))

    def keys(self, keys: Key) -> tuple[Key, Key]:
        """The keys of the quantizers that draw."""
        left, right = (
            one_of(keys, i) if keys is not None and quantizer and is_stochastic(quantizer) else None
            for i, quantizer in enumerate(self.quantizers)
        )
        return left, right

    def rotated(self, lhs: jax.Array, rhs: jax.Array, keys: Key) -> tuple[jax.Array, jax.Array]:
        """The operands after the Hadamard transform."""
        if self.hadamard is None:
            return lhs, rhs
        signs = self.hadamard.draw(None if keys is None else one_of(keys, 2))
        rotated = []
        for x, sizes in zip((lhs, rhs), self.sizes, strict=True):
            y = self.hadamard.apply(x.astype(jnp.float32), sizes, signs)
            rotated.append(y if x.dtype == y.dtype else cast(y, x.dtype).astype(x.dtype))
        return rotated[0], rotated[1]

    def given(self, lhs: jax.Array, rhs: jax.Array, scales: Pair) -> tuple[Calibrated | None, ...]:
        """Scales that are given, those for largest magnitudes among them."""
        found = []
        for x, quantizer, scale in zip((lhs, rhs), self.quantizers, scales, strict=True):
            if isinstance(scale, Amax):
                scale = None if quantizer is None else scale.scale(x, quantizer)
            found.append(scale)
        return tuple(found)

    def quantized(
        self, lhs: jax.Array, rhs: jax.Array, keys: Key, scales: tuple[Calibrated | None, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """The operands after their quantizers."""
        left, right = (
            x
            if quantizer is None
            else fake_quant(x, quantizer, key=key, **({} if given is None else given._asdict()))
            for x, quantizer, key, given in zip(
                (lhs, rhs), self.quantizers, self.keys(keys), scales, strict=True
            )
        )
        return left, right


def _on_axes(quantizer: Quantizer | None, shape: tuple[int, ...], axes: Axes) -> Quantizer | None:
    """A quantizer whose granularity is on the tensor's own axes."""
    if quantizer is None:
        return None
    return dataclasses.replace(quantizer, granularity=placed(quantizer.granularity, shape, axes))


def _along(hadamard: Hadamard, axes: tuple[int, ...], shape: tuple[int, ...]) -> dict[int, int]:
    """The lengths of a transform's blocks on the axes that both operands have."""
    return block_along(hadamard.size, axes, shape, f"Hadamard({hadamard.size})")


@contextlib.contextmanager
def _naming(operation: Operation, operand: str) -> Iterator[None]:
    """Errors that begin with the names of product and operand."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{operation.name}: {operand}: {error}") from error
