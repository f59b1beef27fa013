"""Rules: which product of a model gets which recipe. The first that matches a product holds."""

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax import numpy as jnp

from jaxq import dot_recipes
from jaxq.blocks import PerTensor
from jaxq.calibration import Calibrated
from jaxq.contractions import Axes, of_conv, of_dot, placed
from jaxq.dot_recipes import DotRecipe, get_dot_recipe, is_stochastic
from jaxq.formats import Format
from jaxq.histories import History, can_delay
from jaxq.presets import get_quantizer
from jaxq.quantizers import has_plain_scales
from jaxq.recipes import Quantizer
from jaxq.transforms.reading import LOOK_UP, Product, table_axes

__all__ = [
    "Assigned",
    "Delayed",
    "Frozen",
    "Rule",
    "Rules",
    "as_rules",
    "assign",
    "axes_of",
    "naming",
    "on_axes",
    "unassigned",
]

OPERATIONS = ("dot_general", "conv_general_dilated", LOOK_UP)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What products with some weights, operations or scopes get. Frozen, hashable.

    Attributes:
      weight: a regular expression, searched for anywhere in the path of the weight, the keys of
        its leaf joined by slashes; None asks for no weight, and so also matches products of
        activations.
      recipe: of the product. A `DotRecipe` or a name in `jaxq.dot_recipes.ALL` says everything,
        the weight being its `rhs` wherever it stands in the product; else a `Quantizer`, a format,
        or a name of one, which quantizes the weight alone. None leaves the product as it is.
      operation: `"dot_general"`, `"conv_general_dilated"` or `"gather"`, a look-up in a table;
        None is any, but look-ups only by the table's path.
      scope: a regular expression, searched for in the `jax.named_scope`s of the product.
      output: a quantizer of the result, on the result's own axes.

    Raises:
      ValueError: an unknown name, a broken expression, or a rule that is about nothing.

    Example:
      >>> Rule("attention", "w8a8").recipe.lhs.element.name
      'int8'
    """

    weight: str | None = None
    recipe: str | DotRecipe | Format | Quantizer | None = None
    _: dataclasses.KW_ONLY
    operation: str | None = None
    scope: str | None = None
    output: str | Format | Quantizer | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "scope"):
            pattern = getattr(self, name)
            try:
                if pattern is not None:
                    re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"Rule: `{name}` must be a regular expression, got {pattern!r}: {error}."
                ) from error
        if self.operation not in (None, *OPERATIONS):
            raise ValueError(
                f"Rule: `operation` must be one of {', '.join(OPERATIONS)}, got {self.operation!r}."
            )
        if self.weight is None and self.operation is None and self.scope is None:
            raise ValueError(
                "Rule: needs at least one of `weight`, `operation` and `scope`. Rule('') matches "
                "every weight, Rule(operation='dot_general') every matrix product."
            )
        object.__setattr__(self, "recipe", _recipe(self.recipe))
        if self.output is not None:
            object.__setattr__(self, "output", get_quantizer(self.output))

    def __str__(self) -> str:
        parts = {"operation": self.operation, "scope": self.scope}
        named = [f"{name}={value!r}" for name, value in parts.items() if value is not None]
        weight = [] if self.weight is None else [repr(self.weight)]
        return f"Rule({', '.join(weight + named)})"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scales"], meta_fields=["rules"])
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Rules with scales from calibration, as `jaxq.freeze` makes them: a pytree.

    Attributes:
      rules: the rules.
      scales: by the products' names, what `jaxq.calibration.finalize` gave for both operands.
    """

    rules: tuple[Rule, ...]
    scales: Mapping[str, tuple[Calibrated | None, ...]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["histories"], meta_fields=["rules"]
)
@dataclasses.dataclass(frozen=True)
class Delayed:
    """Rules with delayed scaling, as `jaxq.delayed_scaling` makes them: a pytree.

    Attributes:
      rules: the rules.
      histories: by the products' names, those of both operands and of the cotangent; None where no
        quantizer has one scale a tensor. Products in a scan over layers have a leading axis, one
        history a layer.
    """

    rules: tuple[Rule, ...]
    histories: Mapping[str, tuple[History | None, ...]]

    def update(self, seen: "Delayed") -> "Delayed":
        """The state for the next step.

        Args:
          seen: the gradient for this state: what was seen in this step.
        """

        def moved(history: jax.Array, seen: jax.Array) -> jax.Array:
            return jnp.concatenate([seen[..., :1], history[..., :-1]], -1)

        return jax.tree.map(moved, self, seen)

    def merge(self, other: "Delayed") -> "Delayed":
        """What two micro-batches of one step have seen: the larger of each, never the sum.

        Args:
          other: the gradient for the same state, of another micro-batch.
        """
        return jax.tree.map(jnp.maximum, self, other)

    def gather(self, axis_name: str) -> "Delayed":
        """What all devices along an axis of `jax.shard_map` or `jax.vmap` have seen."""
        return jax.tree.map(lambda seen: lax.pmax(seen, axis_name), self)


Rules: TypeAlias = (
    Frozen | Delayed | Sequence[Rule | tuple[str, str | DotRecipe | Format | Quantizer | None]]
)


def _recipe(spec: Any) -> DotRecipe | None:
    if spec is None or isinstance(spec, DotRecipe):
        return spec
    if isinstance(spec, str) and spec in dot_recipes.ALL:
        return get_dot_recipe(spec)
    try:
        return DotRecipe(None, get_quantizer(spec))
    except ValueError as error:
        raise ValueError(
            f"Rule: {error} Recipes for products: {', '.join(dot_recipes.ALL)}."
        ) from error


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
    def delayed(self) -> tuple[Quantizer | None, ...]:
        """For both operands and the cotangent, the quantizer whose scale a history can give."""
        recipe = self.recipe
        if recipe is None or self.table is not None or not self.reverse:
            return None, None, None
        uses = (
            [(recipe, 0), (recipe.drhs, 1)],
            [(recipe, 1), (recipe.dlhs, 1)],
            [(recipe.dlhs, 0), (recipe.drhs, 0)],
        )
        found = []
        for places in uses:
            quantizers = [how.operands[i] for how, i in places if how.hadamard is None]
            found.append(next(filter(can_delay, quantizers), None))
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


def as_rules(owner: str, rules: Rules) -> tuple[Rule, ...]:
    """Rules as records.

    Raises:
      TypeError: something is neither a rule nor a pair.
    """
    if isinstance(rules, (Frozen, Delayed)):
        return rules.rules
    if isinstance(rules, (str, Rule, Mapping)):
        raise TypeError(f"{owner}: `rules` must be a sequence of rules, got {rules!r}.")
    found = []
    for rule in rules:
        if not isinstance(rule, Rule):
            if not isinstance(rule, tuple) or len(rule) != 2:
                raise TypeError(
                    f"{owner}: a rule must be a jaxq.Rule or a pair (pattern, recipe), got "
                    f"{rule!r}."
                )
            rule = Rule(*rule)
        found.append(rule)
    return tuple(found)


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
