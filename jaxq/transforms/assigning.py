"""What every product of a program gets from rules, and what is wrong where that makes no sense."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from jaxq.blocks import PerTensor
from jaxq.contractions import Axes, of_conv, of_dot, placed
from jaxq.dot_recipes import DotRecipe, is_stochastic
from jaxq.histories import can_delay
from jaxq.quantizers import has_plain_scales
from jaxq.recipes import Quantizer
from jaxq.transforms.reading import LOOK_UP, Product, table_axes
from jaxq.transforms.rules import Rule

__all__ = ["TENSORS", "Assigned", "assign", "axes_of", "naming", "on_axes", "unassigned"]

# What the forward product and those of the two gradients multiply, of `lhs`, `rhs`, the cotangent.
TENSORS = ((0, 1), (2, 1), (2, 0))


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What a product gets.

    Attributes:
      recipe: with the weight as `rhs`; None leaves it as it is.
      output: the quantizer of the result, or None.
      swapped: whether the weight is the product's first operand, and so the recipe's second.
      name: of the product, for states of calibration.
      where: what errors call it.
      number: of the product, for its key.
      loops: the lengths of the scans around it, outermost first.
      stacked: those, by depth, every turn of which has a weight of its own.
      table: the quantizer of a look-up's table, on the table's own axes.
      calibrated: for both operands, in the recipe's order, the shape and the quantizer of those
        whose range may come from calibration: activations with one scale a tensor.
      reverse: whether reverse mode goes through the product.
    """

    recipe: DotRecipe | None
    output: Quantizer | None
    swapped: bool
    name: str
    where: str
    number: int
    loops: tuple[int, ...]
    stacked: frozenset[int]
    table: Quantizer | None
    calibrated: tuple[tuple[tuple[int, ...], Quantizer] | None, ...]
    reverse: bool

    @property
    def delayable(self) -> tuple[tuple[Quantizer | None, ...], ...]:
        """For both operands of the three products the quantizers that a history can serve."""
        recipe = self.recipe
        if recipe is None or self.table is not None or not self.reverse:
            return ((None, None),) * 3
        return tuple(
            tuple(q if how.hadamard is None and can_delay(q) else None for q in how.operands)
            for how in (recipe.forward, recipe.dlhs, recipe.drhs)
        )

    @property
    def delayed(self) -> tuple[Quantizer | None, ...]:
        """For `lhs`, `rhs` and the cotangent, the first of these: what a history is for."""
        found: list[Quantizer | None] = [None] * 3
        for quantizers, tensors in zip(self.delayable, TENSORS, strict=True):
            for quantizer, tensor in zip(quantizers, tensors, strict=True):
                found[tensor] = found[tensor] or quantizer
        return tuple(found)

    @property
    def draws(self) -> bool:
        """Whether it draws from a key, forward or backward."""
        return self.output_draws or (self.recipe is not None and bool(self.recipe.draws))

    @property
    def output_draws(self) -> bool:
        """Whether the quantizer of the result needs a key."""
        return self.output is not None and is_stochastic(self.output)

    @property
    def needs_key(self) -> bool:
        """Whether it draws in the forward product already."""
        forward = self.recipe is not None and bool(self.recipe.forward.draws)
        return self.output_draws or forward

    def order(self, operands: Sequence[Any]) -> Any:
        """Operands in the recipe's order, or back in the product's."""
        return tuple(reversed(operands)) if self.swapped else tuple(operands)


def assign(
    owner: str, rules: Sequence[Rule], products: Sequence[Product], leaves: Mapping[str, Any]
) -> list[Assigned | None]:
    """What every product gets; None where no rule matches.

    Args:
      owner: what errors call the caller.
      rules: the rules.
      products: the products.
      leaves: of the parameters, by their paths.

    Raises:
      ValueError: a rule holds for no product; one weight is quantized in two ways; a recipe does
        not fit its product.
    """
    matches = [_first_match(rules, product) for product in products]
    used = {n for (n, _), p in zip(matches, products, strict=True) if not p.barred}
    for n, rule in enumerate(rules):
        if n not in used:
            raise ValueError(f"{owner}: {_unused(rule, rules, products, leaves)}")
    chosen = [
        None if n is None or product.barred else _assigned(owner, product, rules[n], swapped)
        for product, (n, swapped) in zip(products, matches, strict=True)
    ]
    _check_one_way(owner, products, chosen)
    return chosen


def unassigned(product: Product) -> Assigned:
    """What leaves a product as it is."""
    p = product
    place = p.name, p.where, p.number, p.loops, p.stacked
    return Assigned(None, None, False, *place, None, (None, None), p.reverse)


def _assigned(owner: str, product: Product, rule: Rule, swapped: bool) -> Assigned:
    recipe, output, table = rule.recipe, rule.output, None
    assert recipe is None or isinstance(recipe, DotRecipe)
    assert output is None or isinstance(output, Quantizer)
    calibrated: tuple = (None, None)
    with naming(owner, product.where):
        if output is not None:
            output.cut(product.out.shape)  # Blocks that do not divide are found here.
        if product.operation == LOOK_UP and recipe is not None:
            # A look-up multiplies nothing: only its table is quantized.
            table = on_axes(recipe.operands[1], product, 0)
            recipe = None if table is None else DotRecipe(None, recipe.operands[1])
        elif recipe is not None:
            order = (1, 0) if swapped else (0, 1)
            axes = [on_axes(recipe.operands[i], product, order[i]) for i in (0, 1)]
            calibrated = tuple(
                (product.operands[of].shape, quantizer)
                if quantizer is not None
                and recipe.hadamard is None
                and isinstance(quantizer.granularity, PerTensor)
                and product.origins[of] is None
                and has_plain_scales(quantizer)
                else None
                for of, quantizer in zip(order, axes, strict=True)
            )
    return Assigned(
        None if recipe is None or recipe.plain else recipe,
        output,
        swapped,
        product.name,
        product.where,
        product.number,
        product.loops,
        product.stacked,
        table,
        calibrated,
        product.reverse,
    )


@contextlib.contextmanager
def naming(*where: str) -> Iterator[None]:
    """Errors within it begin with where they are: a function, a product and its line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(": ".join([*where, str(error)])) from error


def on_axes(quantizer: Quantizer | None, product: Product, i: int) -> Quantizer | None:
    """An operand's quantizer on the operand's own axes."""
    if quantizer is None:
        return None
    shape = product.operands[i].shape
    axes = axes_of(product)[i]
    quantizer = dataclasses.replace(
        quantizer, granularity=placed(quantizer.granularity, shape, axes)
    )
    quantizer.cut(shape)  # Blocks that do not divide are found here.
    return quantizer


def _first_match(rules: Sequence[Rule], product: Product) -> tuple[int | None, bool]:
    """The first rule that matches, and whether by the weight in the first operand."""
    for n, rule in enumerate(rules):
        if rule.operation not in (None, product.operation):
            continue
        if rule.scope is not None and not re.search(rule.scope, product.scope):
            continue
        if rule.weight is None:
            if product.operation == LOOK_UP and rule.operation is None:
                continue
            weights = [i for i, o in enumerate(product.origins) if o is not None]
            return n, product.operation != LOOK_UP and weights == [0]
        for i in reversed(range(len(product.origins))):
            origin = product.origins[i]
            if origin is not None and re.search(rule.weight, origin.path):
                return n, i == 0 and len(product.origins) == 2
    return None, False


def _unused(
    rule: Rule, rules: Sequence[Rule], products: Sequence[Product], leaves: Mapping[str, Any]
) -> str:
    """Why a rule holds for no product."""
    matched = [p for p in products if _first_match((rule,), p)[0] is not None]
    barred = [p for p in matched if p.barred]
    if barred:
        p = barred[0]
        return f"{rule} matches only what cannot be quantized: {p.where} is {p.barred}."
    if matched:
        earlier = rules[_first_match(rules, matched[0])[0] or 0]
        return (
            f"{rule} holds for no product: {matched[0].where} belongs to the earlier {earlier}. "
            "Move the narrower rule up, or leave it out."
        )
    if rule.weight is not None:
        weights = {o.path: p for p in products for o in p.origins if o is not None}
        for path, product in weights.items():
            if re.search(rule.weight, path):
                return (
                    f"{rule} holds for no product: {product.where} has such a weight, and stands "
                    f"in the scope {product.scope!r}."
                )
        for path, leaf in leaves.items():
            if re.search(rule.weight, path):
                return f"{rule} matches the weight of no product: {path!r} {_no_weight(leaf)}."
        near = difflib.get_close_matches(rule.weight, sorted(weights), n=3, cutoff=0.0)
        return (
            f"{rule} matches the weight of no product. The nearest are "
            f"{', '.join(near) or 'none: no product has a weight among the parameters'}. "
            "jaxq.explain(fn, [])(*args) lists all."
        )
    scopes = sorted({p.scope for p in products if p.scope})
    return (
        f"{rule} matches no product. Operations are "
        f"{', '.join(sorted({p.operation for p in products})) or 'none'}; scopes are "
        f"{', '.join(scopes[:5]) or 'none'}."
    )


def _no_weight(leaf: Any) -> str:
    """Why a leaf of the parameters is no product's weight."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return f"is no array but a {type(leaf).__name__}, which is static. Make it an array"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"is of {dtype}, and only products of floats are quantized"
    return (
        "is in no product as it is, and what is computed from a parameter is none. Name its "
        "product by `operation` and `scope`, if there is one"
    )


def _check_one_way(
    owner: str, products: Sequence[Product], chosen: Sequence[Assigned | None]
) -> None:
    """A weight has one quantizer, or none, wherever it is multiplied."""
    ways: dict[str, tuple[Product, Quantizer]] = {}
    for product, assigned in zip(products, chosen, strict=True):
        if assigned is None or assigned.recipe is None:
            continue
        operands = assigned.order(product.operands), assigned.order(product.origins)
        quantizer, origin = assigned.recipe.operands[1], operands[1][-1]
        if quantizer is None or origin is None:
            continue
        other, known = ways.setdefault(origin.path, (product, quantizer))
        if known != quantizer:
            raise ValueError(
                f"{owner}: weight {origin.path!r} is quantized in two ways: {known.element.name} "
                f"by {known.granularity} in {other.where}, {quantizer.element.name} by "
                f"{quantizer.granularity} in {product.where}. Give both products one quantizer for "
                "it, or leave one of them out by a rule with the recipe None before."
            )


def axes_of(product: Product) -> tuple[Axes, ...]:
    """The axes of a product's operands by the part that they play."""
    if product.operation == LOOK_UP:
        return (table_axes(product),)
    numbers = product.params["dimension_numbers"]
    if product.operation == "dot_general":
        return of_dot(numbers, *(len(operand.shape) for operand in product.operands)).axes
    return of_conv(numbers).axes
