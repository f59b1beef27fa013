"""The tensors of a product before and after quantization, for statistics."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxq._jax.draws import one_of
from jaxq._jax.meshes import like
from jaxq.products._products import Key, Operation, Pair, Plan, Scales, product
from jaxq.products._recipe import ProductRecipe, SingleProduct
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
    scales: Scales

    @property
    def forward(self) -> tuple[Tensor, Tensor]:
        """The operands of the forward product."""
        return _tensors(
            self.operation, self.operands, self.recipe.forward, self.key(0), self.scales.forward
        )

    def results(self, y: jax.Array) -> Results:
        """Returns the float product of the operands, and the product y itself."""
        return Results(self.operation.function(*self.operands, *self.operation.arguments), y)

    def gradient(self, of: int, cotangent: jax.Array) -> Gradient:
        """Returns the product that gives the gradient of operand 0 or 1."""
        operand = self.forward[1 - of]
        original = self.recipe.residuals == "original"
        residual = operand.value if original else operand.quantized
        operation = self.operation.gradient(of, like(self.operands[of]))
        how, key = (self.recipe.dlhs, self.recipe.drhs)[of], self.key(1 + of)
        scales = self.scales[1 + of]

        def results() -> Results:
            exact = operation.function(cotangent, operand.value, *operation.arguments)
            own = ProductRecipe(how.lhs, how.rhs, how.hadamard, how.execution)
            keys = None if key is None else key[None]
            return Results(
                exact, product(operation, cotangent, residual, own, keys, Scales(scales))
            )

        pair = _tensors(operation, (cotangent, residual), how, key, scales)
        return Gradient(*pair, results)

    def key(self, i: int) -> Key:
        """Returns the keys of one of the three products, None if it draws no random bits."""
        how = (self.recipe.forward, self.recipe.dlhs, self.recipe.drhs)[i]
        return one_of(self.keys, i) if self.keys is not None and how.draws else None


def _tensors(
    operation: Operation, operands: tuple[Any, Any], how: SingleProduct, key: Key, scales: Pair
) -> tuple[Tensor, Tensor]:
    if how.operands == (None, None) and how.hadamard is None:
        left, right = (Tensor(x, x, None, None) for x in operands)
        return left, right
    plan = Plan.of(how, operation, *operands)
    values = plan.rotated(*operands, key)
    given = plan.given(*values, scales)
    quantized = plan.quantized(*values, key, given)
    left, right = map(Tensor, values, quantized, plan.quantizers, given)
    return left, right
