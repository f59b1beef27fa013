"""The tensors of a product before and after quantization, for statistics."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxq._jax.meshes import like
from jaxq.products._operation import Operation
from jaxq.products._plan import Key, Pair, Plan
from jaxq.products._products import NO_SCALES, keys_by_product, product
from jaxq.products._recipe import PerProduct, ProductRecipe, SingleProduct
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe

__all__ = ["Gradient", "Results", "Running", "Tensor"]


class Tensor(NamedTuple):
    """An operand of a product before and after quantization.

    Attributes:
      value: the operand, after a Hadamard transform.
      quantized: the operand after quantization; `value` itself without a recipe.
      recipe: the recipe, on the operand's own axes, or None.
      scales: the scales that were given, or None if they were computed from the operand.
    """

    value: jax.Array
    quantized: jax.Array
    recipe: Recipe | None
    scales: Calibrated | None


class Results(NamedTuple):
    """A float product and the quantized product of the same operands."""

    exact: jax.Array
    quantized: jax.Array


class Gradient(NamedTuple):
    """One of the two products of a gradient.

    Attributes:
      cotangent: the cotangent.
      residual: the residual of the other operand.
      results: a function that computes the product in float, from the operand before all
        quantization, and by the recipe.
    """

    cotangent: Tensor
    residual: Tensor
    results: Callable[[], Results]


@dataclasses.dataclass(frozen=True)
class Running:
    """A product with everything that it is computed from, in the order of its recipe.

    Attributes:
      operation: the bilinear function and the labels of its axes.
      operands: both operands.
      recipe: the product recipe.
      keys: the result of `keys_of`, if the recipe draws random bits, otherwise None.
      scales: the precomputed scales.
    """

    operation: Operation
    operands: tuple[Any, Any]
    recipe: ProductRecipe
    keys: Key
    scales: PerProduct[Pair]

    @property
    def forward(self) -> tuple[Tensor, Tensor]:
        """The operands of the forward product."""
        key, scales = self._keys.forward, self.scales.forward
        return _tensors(self.operation, self.operands, self.recipe.forward, key, scales)

    def results(self, y: jax.Array) -> Results:
        """Returns the float product of the operands, and the product y itself."""
        return Results(self.operation.function(*self.operands, *self.operation.arguments), y)

    def gradient(self, of: int, cotangent: jax.Array) -> Gradient:
        """Returns the product that gives the gradient of operand 0 or 1."""
        operand = self.forward[1 - of]
        original = self.recipe.residuals == "original"
        residual = operand.value if original else operand.quantized
        operation = self.operation.gradient(of, like(self.operands[of]))
        single, key = self.recipe.products.gradients[of], self._keys.gradients[of]
        scales = self.scales.gradients[of]

        def results() -> Results:
            exact = operation.function(cotangent, operand.value, *operation.arguments)
            own = ProductRecipe(single.lhs, single.rhs, single.hadamard, single.execution)
            keys = None if key is None else key[None]
            given = NO_SCALES._replace(forward=scales)
            return Results(exact, product(operation, cotangent, residual, own, keys, given))

        pair = _tensors(operation, (cotangent, residual), single, key, scales)
        return Gradient(*pair, results)

    @property
    def _keys(self) -> PerProduct[Key]:
        return keys_by_product(self.recipe, self.keys)


def _tensors(
    operation: Operation, operands: tuple[Any, Any], single: SingleProduct, key: Key, scales: Pair
) -> tuple[Tensor, Tensor]:
    if single.operands == (None, None) and single.hadamard is None:
        left, right = (Tensor(x, x, None, None) for x in operands)
        return left, right
    plan = Plan.of(single, operation, *operands)
    values, quantized, given = plan.prepare(*operands, key, scales)
    left, right = map(Tensor, values, quantized, plan.quantizers, given)
    return left, right
