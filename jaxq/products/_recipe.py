"""Records that describe the quantization of the three matrix products of training."""

import dataclasses
from typing import Generic, Literal, NamedTuple, TypeVar

from jaxq._base.arguments import choice
from jaxq._base.records import short_repr
from jaxq._jax.serialization import from_json, to_json
from jaxq.numerics import Stochastic, get_rounding
from jaxq.products._accumulation import Accumulation
from jaxq.products._hadamard import Hadamard
from jaxq.recipes import Recipe, get_recipe, records

__all__ = [
    "PerProduct",
    "ProductRecipe",
    "SingleProduct",
    "is_stochastic",
    "product_records",
]


T = TypeVar("T")


class PerProduct(NamedTuple, Generic[T]):
    """One value for each product of a quantized product and its gradient.

    Attributes:
      forward: the value of the forward product.
      dlhs: the value of the product that gives the gradient of the first operand.
      drhs: the value of the product that gives the gradient of the second operand.
    """

    forward: T
    dlhs: T
    drhs: T

    @property
    def gradients(self) -> tuple[T, T]:
        """The values of `dlhs` and `drhs`."""
        return self.dlhs, self.drhs


@dataclasses.dataclass(frozen=True)
class SingleProduct:
    """The quantization of one product of two operands. Frozen, hashable, static in jit.

    A granularity refers to the operand as a matrix `[free, contract]`, whatever the order of its
    axes. `PerBlock(32)` means blocks along the contraction, `PerToken()` one scale per vector along
    the contraction, `PerBlock((16, 16))` tiles, `PerChannel(-1)` one scale per index of the last
    free axis, and `PerTensor()` one scale for the whole operand. Only `PerTensor()` shares scales
    between the indices of batch axes, which include the groups of a ragged product. A recipe
    that rounds stochastically draws from the product's key; a custom rounding function gets no key.

    Attributes:
      lhs: the first operand's recipe, as accepted by `jaxq.get_recipe`; None (the default)
        leaves the operand unquantized.
      rhs: the second operand's recipe, in the same forms.
      hadamard: a `Hadamard`, or its size, to transform both operands along the contraction before
        they are quantized; None (the default) applies no transform.
      execution: `"emulated"` (the default) multiplies the dequantized operands in their own dtype.
        `"native"` multiplies codes, integers to int32 and float8 to float32, and scales the result;
        blocks of an MX format are passed to `jax.nn.scaled_matmul`. Native execution that is not
        supported is an error. A `jaxq.Accumulation` emulates a narrower accumulator, which sums
        unscaled elements where the scales do not lie along the contraction.

    Raises:
      ValueError: if a name is unknown, or fields contradict each other.

    Example:
      >>> SingleProduct("int8_token", "int8_channel", execution="native").draws
      ()
    """

    lhs: str | Recipe | None = None
    rhs: str | Recipe | None = None
    hadamard: Hadamard | int | None = None
    execution: Literal["emulated", "native"] | Accumulation = "emulated"

    def __post_init__(self) -> None:
        for name in ("lhs", "rhs"):
            recipe = getattr(self, name)
            if recipe is not None:
                object.__setattr__(self, name, get_recipe(recipe))
        if self.hadamard is not None and not isinstance(self.hadamard, Hadamard):
            object.__setattr__(self, "hadamard", Hadamard(self.hadamard))
        if not isinstance(self.execution, Accumulation):
            names, remedy = ("emulated", "native"), "Use one of them, or a jaxq.Accumulation."
            choice(self._owner, "execution", self.execution, names, remedy)
            if self.execution == "native" and None in (self.lhs, self.rhs):
                missing = " and ".join(n for n in ("lhs", "rhs") if getattr(self, n) is None)
                raise ValueError(
                    f"{self._owner}: execution='native' multiplies codes and needs both operands "
                    f"quantized, got None for {missing}. Give each operand a recipe."
                )

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def operands(self) -> tuple[Recipe | None, Recipe | None]:
        """The recipes of both operands as records."""
        lhs, rhs = (None if q is None else get_recipe(q) for q in (self.lhs, self.rhs))
        return lhs, rhs

    @property
    def plain(self) -> bool:
        """True if the recipe changes nothing and the product is JAX's own."""
        return (
            self.operands == (None, None) and self.hadamard is None and self.execution == "emulated"
        )

    @property
    def draws(self) -> tuple[str, ...]:
        """The names of the fields that draw random bits from the key."""
        names = [
            name
            for name, recipe in zip(("lhs", "rhs"), self.operands, strict=True)
            if recipe is not None and is_stochastic(recipe)
        ]
        drawn = isinstance(self.hadamard, Hadamard) and self.hadamard.signs is None
        return (*names, "hadamard") if drawn else tuple(names)


@dataclasses.dataclass(frozen=True, repr=False)
class ProductRecipe(SingleProduct):
    """The quantization of a product and of the two products of its gradient.

    The fields `lhs`, `rhs`, `hadamard` and `execution` describe the forward product, as in
    `SingleProduct`. Given a cotangent g and a residual of each operand, the gradient is defined as

    - for lhs: the product of g and the residual of rhs, quantized by the recipe `dlhs`;
    - for rhs: the product of g and the residual of lhs, quantized by the recipe `drhs`;

    each followed by the `gradient` rule of the operand's own recipe. In both products, the first
    operand (`lhs`) is the cotangent and the second (`rhs`) the residual, and blocks lie along the
    axes that this product contracts. For example, `ProductRecipe("int8_token", "int8_channel")` has
    the gradient of a product of two `fake_quant` calls and quantizes no cotangent.

    Attributes:
      dlhs: the recipe of the input's gradient; unquantized by default.
      drhs: the recipe of the weight's gradient; unquantized by default.
      residuals: `"quantized"` (the default) uses the operands of the forward product as residuals,
        which `dlhs` and `drhs` may quantize once more. `"original"` uses the operands before
        quantization (but after a Hadamard transform).

    Raises:
      ValueError: as in `SingleProduct`.

    Example:
      >>> dlhs = SingleProduct("fp8_e5m2_tensor")
      >>> recipe = ProductRecipe("int8_token", "int8_channel", dlhs=dlhs)
      >>> from jaxq.products import PRODUCT_RECIPES
      >>> recipe.draws, PRODUCT_RECIPES["nvfp4_training"].draws
      ((), ('dlhs.lhs', 'drhs.lhs'))
    """

    _: dataclasses.KW_ONLY
    dlhs: SingleProduct = SingleProduct()
    drhs: SingleProduct = SingleProduct()
    residuals: Literal["quantized", "original"] = "quantized"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dlhs", "drhs"):
            if type(getattr(self, name)) is not SingleProduct:
                raise ValueError(
                    f"ProductRecipe: `{name}` must be a jaxq.SingleProduct, got "
                    f"{getattr(self, name)!r:.60}. Write SingleProduct(cotangent, residual)."
                )
        remedy = "Use 'quantized' for the gradient of fake quantization."
        choice("ProductRecipe", "residuals", self.residuals, ("quantized", "original"), remedy)

    @property
    def forward(self) -> SingleProduct:
        """The recipe of the forward product alone."""
        return SingleProduct(self.lhs, self.rhs, self.hadamard, self.execution)

    @property
    def products(self) -> PerProduct[SingleProduct]:
        """The recipes of the three products."""
        return PerProduct(self.forward, self.dlhs, self.drhs)

    @property
    def draws(self) -> tuple[str, ...]:
        """The names of all fields that draw from the key, those of the gradient as `"dlhs.lhs"`."""
        gradient_draws = [
            f"{name}.{field}" for name in ("dlhs", "drhs") for field in getattr(self, name).draws
        ]
        return (*self.forward.draws, *gradient_draws)

    def to_json(self) -> str:
        """Returns the recipe as JSON text, from which `from_json` makes an equal recipe.

        Raises:
          TypeError: if a rounding or a gradient is a user-defined function.
        """
        return to_json("ProductRecipe.to_json", self, product_records())

    @staticmethod
    def from_json(text: str) -> "ProductRecipe":
        """Returns the recipe that `to_json` wrote.

        Raises:
          ValueError: if the text does not describe a product recipe.
        """
        owner, kinds = "ProductRecipe.from_json", product_records()
        return from_json(owner, text, kinds, ProductRecipe, "a product recipe")


def product_records() -> dict[str, type]:
    """Returns the frozen records that a product recipe may hold, by name."""
    record_types = (ProductRecipe, SingleProduct, Hadamard, Accumulation)
    return {**records(), **{record_type.__name__: record_type for record_type in record_types}}


def is_stochastic(recipe: str | Recipe) -> bool:
    """Returns whether a recipe draws random bits from a key.

    Args:
      recipe: a recipe for one tensor, or its name.

    Returns:
      True if its rounding mode is stochastic; functions that take the recipe then need a key.

    Example:
      >>> from jaxq.recipes import Recipe
      >>> is_stochastic(Recipe("int8", rounding="stochastic"))
      True
    """
    return isinstance(get_rounding(get_recipe(recipe).rounding), Stochastic)
