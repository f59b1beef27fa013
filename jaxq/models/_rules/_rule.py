"""The record of one rule, which assigns a recipe to products or to leaves of trees."""

import dataclasses
import re
from typing import Any

from jaxq._base.registry import suggestion
from jaxq.formats import FORMATS
from jaxq.models._reading import OPERATIONS
from jaxq.products import (
    PRODUCT_RECIPES,
    ProductRecipe,
    get_product_recipe,
    product_records,
)
from jaxq.recipes import RECIPES, Recipe, get_recipe

__all__ = ["Rule", "check_pattern", "rule_records"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule that assigns a recipe by weight, operation or scope. Frozen, hashable.

    Attributes:
      weight: a regular expression, searched for anywhere in the weight's path (the keys of its
        leaf joined by slashes); None requires no weight, and so also matches products of
        activations.
      recipe: the recipe, or its name. A product recipe describes the product, and its `rhs` is the
        weight on either side of it. A tensor recipe quantizes only the weight; leaves of trees take
        no other. None leaves the product or leaf unchanged.
      operation: `"dot_general"`, `"conv_general_dilated"`, `"ragged_dot_general"` (also for
        `lax.ragged_dot`), or `"gather"`, a look-up in a table. None matches any operation, but
        matches look-ups only by the table's path. Only for products.
      scope: a regular expression, searched for in the `jax.named_scope`s of the product. Only for
        products.
      output: a tensor recipe of the result, on the result's own axes. Only for products.

    Raises:
      ValueError: if a name is unknown, an expression is invalid, or the rule has no condition.
      TypeError: if a recipe is neither a name nor a record.

    Example:
      >>> Rule("attention", "w8a8").recipe.lhs.element.name
      'int8'
    """

    weight: str | None = None
    recipe: str | Recipe | ProductRecipe | None = None
    _: dataclasses.KW_ONLY
    operation: str | None = None
    scope: str | None = None
    output: str | Recipe | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "scope"):
            pattern = getattr(self, name)
            if pattern is not None:
                check_pattern("Rule", name, pattern)
        if self.operation not in (None, *OPERATIONS):
            raise ValueError(
                f"Rule: `operation` must be a product or a look-up, got {self.operation!r}. "
                f"{suggestion(str(self.operation), OPERATIONS)}"
            )
        if self.weight is None and self.operation is None and self.scope is None:
            raise ValueError(
                "Rule: `weight`, `operation` or `scope` must be given, got none of them. Rule('') "
                "matches every weight, Rule(operation='dot_general') every matrix product."
            )
        object.__setattr__(self, "recipe", _recipe(self.recipe))
        if self.output is not None:
            object.__setattr__(self, "output", get_recipe(self.output))

    def __str__(self) -> str:
        parts = {"operation": self.operation, "scope": self.scope}
        named = [f"{name}={value!r}" for name, value in parts.items() if value is not None]
        weight = [] if self.weight is None else [repr(self.weight)]
        return f"Rule({', '.join(weight + named)})"

    @property
    def product(self) -> ProductRecipe | None:
        """The recipe of a product, in which a tensor recipe quantizes only the weight."""
        recipe = self.recipe
        if recipe is None or isinstance(recipe, ProductRecipe):
            return recipe
        return ProductRecipe(None, get_recipe(recipe))


def rule_records() -> dict[str, type]:
    """Returns the frozen records that a rule may hold, by name."""
    return {**product_records(), "Rule": Rule}


def _recipe(recipe: Any) -> Recipe | ProductRecipe | None:
    """Returns the record of a recipe or a product recipe."""
    if recipe is None or isinstance(recipe, (Recipe, ProductRecipe)):
        return recipe
    if isinstance(recipe, str) and recipe in PRODUCT_RECIPES:
        return get_product_recipe(recipe)
    if isinstance(recipe, str) and recipe not in RECIPES and recipe not in FORMATS:
        hint = suggestion(recipe, PRODUCT_RECIPES, RECIPES, most=3)
        raise ValueError(f"Rule: no recipe is named {recipe!r}. {hint}")
    try:
        return get_recipe(recipe)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Rule: {error}") from error


def check_pattern(owner: str, name: str, pattern: Any) -> None:
    """Raises a ValueError unless a pattern is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{owner}: `{name}` must be a regular expression, got {pattern!r}: {error}. Escape "
            "special characters with a backslash."
        ) from error
