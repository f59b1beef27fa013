"""The tensors of a product before and after quantization, for statistics."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import numpy as jnp

from jaxq._jax.barriers import computed_once
from jaxq._jax.meshes import like
from jaxq.formats import Format
from jaxq.products._accumulation import Accumulation
from jaxq.products._operation import Operation
from jaxq.products._plan import Key, Pair, Plan
from jaxq.products._products import NO_SCALES, keys_by_product, product
from jaxq.products._recipe import PerProduct, ProductRecipe
from jaxq.quantizers import simulate
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe, Scales

__all__ = ["Gradient", "Operands", "Results", "Running", "Tensor"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "quantized", "scales", "given"],
    meta_fields=["recipe"],
)
@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor before and after quantization. A pytree.

    Attributes:
      value: the tensor; for an operand of a product, after its Hadamard transform.
      quantized: the tensor after quantization; `value` itself without a recipe.
      recipe: the recipe, on the tensor's own axes, or the format to which it was cast, or None.
      scales: the scales that were used, or None without a recipe.
      given: the scales that were given, or None if they were computed from the tensor.
    """

    value: jax.Array
    quantized: jax.Array
    recipe: Recipe | Format | None = None
    scales: Scales | None = None
    given: Calibrated | None = None

    @classmethod
    def of(
        cls, value: jax.Array, recipe: Recipe | None, key: Key, given: Calibrated | None
    ) -> "Tensor":
        """Quantizes an operand of a product."""
        if recipe is None:
            return cls(value, value)
        # As in `Plan`, so that XLA quantizes the operand only once.
        source, scales = computed_once(value), {} if given is None else given._asdict()
        simulated = simulate(source, recipe, key=key, **scales)
        return cls(value, simulated.values, recipe, simulated.scales, given)


Operands: TypeAlias = tuple[Tensor, Tensor]


class Results(NamedTuple):
    """The results of a product of the same operands, computed in several ways.

    Attributes:
      exact: the float product of the operands before all quantization.
      wide: the quantized product with sums in float32, in the same order, if the recipe emulates
        accumulation in a narrower format; otherwise None.
      quantized: the quantized product.
    """

    exact: jax.Array
    wide: jax.Array | None
    quantized: jax.Array


class Gradient(NamedTuple):
    """The operands of one of the two products of a gradient.

    Attributes:
      cotangent: the cotangent.
      residual: the residual of the other operand; None if the operands are unknown.
    """

    cotangent: Tensor
    residual: Tensor | None


@dataclasses.dataclass(frozen=True)
class Running:
    """A quantized product with all of its inputs, from which its statistics are computed.

    The operands are in the order of the recipe: the weight is `rhs`.

    Attributes:
      operation: the bilinear function and the labels of its axes.
      operands: both operands, before the Hadamard transform and quantization.
      recipe: the product recipe.
      keys: the result of `keys_of`, if the recipe draws random bits, otherwise None.
      scales: the precomputed scales of the operands of the three products.
    """

    operation: Operation
    operands: tuple[Any, Any]
    recipe: ProductRecipe
    keys: Key
    scales: PerProduct[Pair]

    @property
    def forward(self) -> Operands:
        """The operands of the forward product."""
        plan = Plan.of(self.recipe.forward, self.operation, *self.operands)
        key = self._keys.forward
        values = plan.rotated(*self.operands, key)
        given = plan.given(*values, self.scales.forward)
        left, right = map(Tensor.of, values, plan.quantizers, plan.keys(key), given)
        return left, right

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the quantized tensors by their names in statistics."""
        products = self.recipe.products
        names = (("", ("lhs", "rhs")), ("dlhs/", ("cotangent", "residual")))
        names = (*names, ("drhs/", ("cotangent", "residual")))
        return {
            f"{prefix}{part}": recipe
            for single, (prefix, parts) in zip(products, names, strict=True)
            for part, recipe in zip(parts, single.operands, strict=True)
            if recipe is not None
        }

    def results(self, y: jax.Array) -> Results:
        """Returns the results of the forward product, given its quantized result y."""
        exact = self.operation.function(*self.operands, *self.operation.arguments)
        wide = _with_wide_sums(self.recipe)
        if wide is not None:
            wide = product(self.operation, *self.operands, wide, self.keys, self.scales)
        return Results(exact, wide, y)

    def gradients(
        self, cotangent: jax.Array, operands: Operands | None
    ) -> tuple[Gradient, Gradient]:
        """Returns the operands of the products of the gradient.

        Args:
          cotangent: the cotangent of the product.
          operands: the result of `forward`, or None if the residuals are not needed.

        Returns:
          The operands of the products that give the gradients of operands 0 and 1. A tensor that
          both products quantize equally is quantized once.
        """
        cache: dict[Any, Tensor] = {}

        def tensor(value: jax.Array, recipe: Recipe | None, key: Key, pair: tuple) -> Tensor:
            source, given = pair
            if key is not None:
                return Tensor.of(value, recipe, key, given)
            cache_key = id(value), recipe, id(source)
            if cache_key not in cache:
                cache[cache_key] = Tensor.of(value, recipe, None, given)
            return cache[cache_key]

        def gradient(of: int) -> Gradient:
            residual = jnp.zeros_like(self.operands[1 - of])
            if operands is not None:
                residual = self._residual(of, operands)
            single, key = self.recipe.products.gradients[of], self._keys.gradients[of]
            plan = Plan.of(single, self._gradient(of), cotangent, residual)
            values, scales = plan.rotated(cotangent, residual, key), self.scales.gradients[of]
            pairs = zip(scales, plan.given(*values, scales), strict=True)
            parts = zip(values, plan.quantizers, plan.keys(key), pairs, strict=True)
            first, second = parts
            return Gradient(tensor(*first), None if operands is None else tensor(*second))

        return gradient(0), gradient(1)

    def gradient_results(self, of: int, cotangent: jax.Array, operands: Operands) -> Results:
        """Returns the results of the product that gives the gradient of operand 0 or 1.

        Args:
          of: 0 or 1.
          cotangent: the cotangent of the product.
          operands: the result of `forward`.
        """
        operation, single = self._gradient(of), self.recipe.products.gradients[of]
        exact = operation.function(cotangent, operands[1 - of].value, *operation.arguments)
        recipe = ProductRecipe(single.lhs, single.rhs, single.hadamard, single.execution)
        residual, key = self._residual(of, operands), self._keys.gradients[of]
        keys = None if key is None else key[None]
        scales = NO_SCALES._replace(forward=self.scales.gradients[of])

        def multiply(recipe: ProductRecipe) -> jax.Array:
            return product(operation, cotangent, residual, recipe, keys, scales)

        wide = _with_wide_sums(recipe)
        return Results(exact, None if wide is None else multiply(wide), multiply(recipe))

    def _residual(self, of: int, operands: Operands) -> jax.Array:
        """Returns the residual from which the gradient of operand 0 or 1 is computed."""
        operand = operands[1 - of]
        return operand.value if self.recipe.residuals == "original" else operand.quantized

    def _gradient(self, of: int) -> Operation:
        return self.operation.gradient(of, like(self.operands[of]))

    @property
    def _keys(self) -> PerProduct[Key]:
        return keys_by_product(self.recipe, self.keys)


def _with_wide_sums(recipe: ProductRecipe) -> ProductRecipe | None:
    """Returns the recipe with sums in float32; None if it does not emulate accumulation."""
    execution = recipe.execution
    if not isinstance(execution, Accumulation):
        return None
    execution = dataclasses.replace(execution, format="float32", outer_format=None)
    return dataclasses.replace(recipe, execution=execution)
