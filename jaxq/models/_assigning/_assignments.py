"""Assignment of rules to the products of a program, and the checks of that assignment."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxq.models._assigning._experts import Experts
from jaxq.models._assigning._matching import first_match, match_parts, unused_reason
from jaxq.models._assigning._observers import Observable, Observer
from jaxq.models._reading import (
    LOOK_UP,
    Mark,
    Origin,
    Product,
    contraction_of,
    operation_of,
    table_axes,
)
from jaxq.models._rules import Rule, describe_recipe
from jaxq.products import Axes, PerProduct, ProductRecipe, can_delay, check, is_stochastic, placed
from jaxq.quantizers import fake_quant
from jaxq.recipes import PerTensor, Recipe

__all__ = [
    "OPERANDS_OF_PRODUCT",
    "Assigned",
    "WeightToQuantize",
    "assign",
    "axes_of",
    "prefix_errors",
    "recipe_on_operand_axes",
    "unassigned",
    "weight_of",
]

# The two tensors that each product multiplies: 0 is lhs, 1 rhs, 2 the cotangent.
OPERANDS_OF_PRODUCT: PerProduct[tuple[int, int]] = PerProduct((0, 1), (2, 1), (2, 0))


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The recipe and related settings assigned to one product.

    Attributes:
      recipe: the recipe, with the weight as `rhs`; None leaves the product unchanged.
      output_recipe: the recipe of the result, or None.
      swapped: True if the weight is the product's first operand, and so the recipe's second.
      name: the product's name, for calibration states.
      where: the product's name and source line, for errors.
      number: the product's number, for its key.
      loops: the lengths of the scans around the product, outermost first.
      stacked: the depths of the scans in which every iteration has its own weight.
      table_recipe: the recipe of a look-up's table, on the table's own axes.
      observers: for both operands, in the recipe's order, an observer or None. By default, only an
        activation with one scale per tensor, whose range may come from calibration, has one.
      is_differentiated: True if reverse-mode differentiation goes through the product.
      factor_name: the name of the factor by which the input of a weight is multiplied first, or
        None.
      rotation_block: the length of the blocks of that input that are Hadamard transformed after the
        factor, or None.
      scored_recipes: recipes whose errors, times the cotangent of the result, `ptq` uses as scores.
      experts: the recipes of the leaves of a stack of experts, in place of the weight's recipe, or
        None.
      chunk: the largest number of elements of a packed weight that are dequantized at a time, or
        None.
    """

    recipe: ProductRecipe | None
    output_recipe: Recipe | None
    swapped: bool
    name: str
    where: str
    number: int
    loops: tuple[int, ...]
    stacked: frozenset[int]
    table_recipe: Recipe | None
    observers: tuple[Observer | None, ...]
    is_differentiated: bool
    factor_name: str | None = None
    rotation_block: int | None = None
    scored_recipes: tuple[ProductRecipe, ...] = ()
    experts: Experts | None = None
    chunk: int | None = None

    @property
    def plain(self) -> bool:
        """True if the product and its result are not quantized."""
        return self.recipe is None and self.output_recipe is None and self.experts is None

    @property
    def delayed_per_product(self) -> PerProduct[tuple[Recipe | None, ...]]:
        """The recipes, or None, of the operands of each product that can use a history."""
        recipe = self.recipe
        if recipe is None or self.table_recipe is not None or not self.is_differentiated:
            return PerProduct((None, None), (None, None), (None, None))
        return PerProduct(
            *(
                tuple(
                    r if single.hadamard is None and can_delay(r) else None for r in single.operands
                )
                for single in recipe.products
            )
        )

    @property
    def delayed_per_tensor(self) -> tuple[Recipe | None, ...]:
        """The first recipe with delayed scaling for lhs, rhs and the cotangent, or None."""
        first_recipes: list[Recipe | None] = [None] * 3
        for recipes, tensors in zip(self.delayed_per_product, OPERANDS_OF_PRODUCT, strict=True):
            for recipe, tensor in zip(recipes, tensors, strict=True):
                first_recipes[tensor] = first_recipes[tensor] or recipe
        return tuple(first_recipes)

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the product's vectors in `ProductInputs.vectors`."""
        factor = () if self.factor_name is None else (self.factor_name,)
        return (*factor, self.name) if self.scored_recipes else factor

    @property
    def draws_random_bits(self) -> bool:
        """True if the product draws from a key, forward or backward."""
        return self.output_draws or (self.recipe is not None and bool(self.recipe.draws))

    @property
    def output_draws(self) -> bool:
        """True if the recipe of the result needs a key."""
        return self.output_recipe is not None and is_stochastic(self.output_recipe)

    @property
    def needs_key(self) -> bool:
        """True if the forward product draws from a key."""
        forward = self.recipe is not None and bool(self.recipe.forward.draws)
        return self.output_draws or forward

    def reorder_operands(self, operands: Sequence[Any]) -> Any:
        """Swaps the two operands if the weight is the first; its own inverse."""
        return tuple(reversed(operands)) if self.swapped else tuple(operands)


def assign(
    owner: str,
    rules: Sequence[Rule],
    products: Sequence[Product],
    leaves: Mapping[str, Any],
    *,
    closed: bool = False,
) -> list[Assigned | None]:
    """Returns the assignment of every product, None where no rule matches.

    Args:
      owner: the name of the calling function, for errors.
      rules: the rules.
      products: the products.
      leaves: the leaves of the parameters, by their paths.
      closed: True if the function closes over matrices, which an error then mentions.

    Raises:
      ValueError: if a rule applies to no product, one weight is quantized in two ways, or a recipe
        does not fit its product.
    """
    matches = [first_match(rules, product) for product in products]
    matched_parts = {
        p.number: match_parts(owner, rules, p) for p in products if not p.barred_reason
    }
    used_rules = {
        rule_index
        for (rule_index, _), p in zip(matches, products, strict=True)
        if not p.barred_reason
    }.union(*(parts.used for parts in matched_parts.values()))
    for rule_index, rule in enumerate(rules):
        if rule_index not in used_rules:
            reason = unused_reason(rule, rules, products, leaves, closed)
            raise ValueError(f"{owner}: {reason}")
    chosen: list[Assigned | None] = []
    for product, (rule_index, swapped) in zip(products, matches, strict=True):
        parts = matched_parts.get(product.number)
        if rule_index is None or product.barred_reason:
            chosen.append(None)
        elif parts is None or parts.experts is None:
            chosen.append(_assign_rule(owner, product, rules[rule_index], swapped))
        else:
            chosen.append(_assign_experts(owner, product, parts.experts))
    _check_same_recipe(owner, products, chosen)
    return chosen


class WeightToQuantize(NamedTuple):
    """The weight that a product will quantize.

    Attributes:
      origin: its origin.
      recipes: the recipes of the pieces of its origin: all the same, except for experts with
        different recipes; some may be None.
      operand: its index among the product's operands.
      experts: the recipes of such experts, or None.
    """

    origin: Origin
    recipes: tuple[Recipe | None, ...]
    operand: int
    experts: Experts | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the weight.

        Raises:
          ValueError: if it consists of experts with different recipes.
        """
        first = self.recipes[0]
        if self.experts is not None or first is None:
            raise ValueError(
                f"weight {self.origin.name!r} must have one recipe here, got different ones for "
                "its experts. Give all experts one rule."
            )
        return first


def weight_of(product: Product, assigned: Assigned) -> WeightToQuantize | None:
    """Returns the weight that a product quantizes, or None."""
    experts = assigned.experts
    if experts is not None:
        origin = product.origins[experts.operand]
        assert origin is not None
        recipes = tuple(map(experts.recipe, origin.pieces))
        return WeightToQuantize(origin, recipes, experts.operand, experts)
    if assigned.recipe is None or assigned.recipe.operands[1] is None:
        return None
    i = 0 if assigned.swapped or product.operation == LOOK_UP else 1
    origin, recipe = product.origins[i], assigned.recipe.operands[1]
    if origin is None:
        return None
    return WeightToQuantize(origin, (recipe,) * max(len(origin.pieces), 1), i)


def unassigned(target: Product | Mark) -> Assigned:
    """Returns an assignment that leaves a product, or a marked array, unchanged."""
    return Assigned(
        recipe=None,
        output_recipe=None,
        swapped=False,
        name=target.name,
        where=target.where,
        number=-1 if isinstance(target, Mark) else target.number,
        loops=target.loops,
        stacked=target.stacked,
        table_recipe=None,
        observers=(None, None),
        is_differentiated=target.is_differentiated,
    )


def _assign_rule(owner: str, product: Product, rule: Rule, swapped: bool) -> Assigned:
    """Returns the assignment of a rule to a product, after checking that it fits."""
    recipe, output = rule.product, rule.output
    assert output is None or isinstance(output, Recipe)
    assigned = dataclasses.replace(unassigned(product), output_recipe=output, swapped=swapped)
    if product.operation != LOOK_UP and recipe is not None:
        bilinear = operation_of(product.eqn, product.where, swapped)
        with prefix_errors(owner):
            first, second = assigned.reorder_operands(product.operands[:2])
            check(bilinear, first, second, recipe.forward)
    with prefix_errors(owner, product.where):
        if output is not None:
            _check_recipe(output, product.out)
        if recipe is None:
            return assigned
        if product.operation == LOOK_UP:
            return _assign_look_up(assigned, product, recipe.operands[1])
        observers = _range_observers(product, recipe, swapped)
    recipe = None if recipe.plain else recipe
    return dataclasses.replace(assigned, recipe=recipe, observers=observers)


def _assign_experts(owner: str, product: Product, experts: Experts) -> Assigned:
    """Returns the assignment of a product of experts with different recipes."""
    recipe, output = experts.shared
    rule = Rule("", recipe, output=output)
    assigned = _assign_rule(owner, product, rule, experts.operand == 0)
    with prefix_errors(owner, product.where):
        shape = product.operands[experts.operand]
        jax.eval_shape(lambda x: experts.quantized(product.eqn, x), shape)
    return dataclasses.replace(assigned, experts=experts)


def _assign_look_up(assigned: Assigned, product: Product, weight: Recipe | None) -> Assigned:
    """Returns the assignment of a look-up, which quantizes only the table."""
    table = recipe_on_operand_axes(weight, product, 0)
    if table is None:
        return assigned
    _check_recipe(table, product.operands[0])
    return dataclasses.replace(assigned, recipe=ProductRecipe(None, weight), table_recipe=table)


def _range_observers(
    product: Product, recipe: ProductRecipe, swapped: bool
) -> tuple[Observable | None, ...]:
    """Returns, for each operand, an observer if its range may come from calibration, else None."""

    def of_operand(operand_recipe: Recipe | None, i: int) -> Observable | None:
        operand_recipe = recipe_on_operand_axes(operand_recipe, product, i)
        if (
            operand_recipe is None
            or recipe.hadamard is not None
            or product.origins[i] is not None
            or not isinstance(operand_recipe.granularity, PerTensor)
            or not operand_recipe.scaling.takes_scales
        ):
            return None
        return Observable(product.operands[i].shape, operand_recipe)

    order = (1, 0) if swapped else (0, 1)
    return tuple(
        of_operand(operand_recipe, i)
        for operand_recipe, i in zip(recipe.operands, order, strict=True)
    )


@contextlib.contextmanager
def prefix_errors(*prefixes: str) -> Iterator[None]:
    """Prefixes the messages of errors raised in the context."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(": ".join([*prefixes, str(error)])) from error


def recipe_on_operand_axes(recipe: Recipe | None, product: Product, i: int) -> Recipe | None:
    """Returns an operand's recipe with its granularity on the operand's own axes."""
    if recipe is None:
        return None
    shape = product.operands[i].shape
    axes = axes_of(product)[i]
    return dataclasses.replace(recipe, granularity=placed(recipe.granularity, shape, axes))


def _check_recipe(recipe: Recipe, x: Any) -> None:
    """Raises the errors of `jaxq.fake_quant` for an array of a shape and dtype."""
    key = jax.eval_shape(jax.random.key, 0) if is_stochastic(recipe) else None
    jax.eval_shape(lambda x, key: fake_quant(x, recipe, key=key), x, key)


def _check_same_recipe(
    owner: str, products: Sequence[Product], chosen: Sequence[Assigned | None]
) -> None:
    """Checks that all products that quantize a weight use the same recipe."""
    first_uses: dict[str, tuple[Product, Recipe]] = {}
    for product, assigned in zip(products, chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        if weight is None or weight.origin.computed:
            continue
        for piece, recipe in zip(weight.origin.pieces, weight.recipes, strict=True):
            if recipe is None:
                continue
            path = piece.path
            other, first_recipe = first_uses.setdefault(path, (product, recipe))
            if first_recipe != recipe:
                raise ValueError(
                    f"{owner}: weight {path!r} must have one recipe, got "
                    f"{describe_recipe(first_recipe)} in {other.where} and "
                    f"{describe_recipe(recipe)} in {product.where}. Write one rule for "
                    "both products, or exclude one by an earlier rule with the recipe None."
                )


def axes_of(product: Product) -> tuple[Axes, ...]:
    """Returns the axes of a product's operands by their roles."""
    if product.operation == LOOK_UP:
        return (table_axes(product),)
    return contraction_of(product.eqn).axes
