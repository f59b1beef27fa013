"""The forms in which rules are given, and the errors of rules that apply to nothing.

Models, parameter trees and optimizers take rules in the same forms: one recipe for everything, a
mapping from patterns to recipes, or a sequence of `Rule` records and pairs (pattern, recipe). The
first matching rule applies. `as_rules` reads the rules of products, `leaf_rules` those of leaves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from jaxq._base.registry import suggestion
from jaxq._jax.serialization import from_json, to_json
from jaxq.models._rules._adapters import Adapted
from jaxq.models._rules._monitored import Monitored
from jaxq.models._rules._rule import Rule, check_pattern, rule_records
from jaxq.models._rules._states import Delayed, Frozen, Switched
from jaxq.products import PRODUCT_RECIPES, ProductRecipe
from jaxq.recipes import RECIPES, Recipe

__all__ = [
    "LeafRules",
    "PlainRules",
    "Rules",
    "as_rules",
    "describe_recipe",
    "hidden_message",
    "leaf_rules",
    "pairs",
    "rules_from_json",
    "rules_to_json",
    "unmatched_message",
]

_Value = TypeVar("_Value")

_RecipeLike: TypeAlias = str | Recipe | ProductRecipe
# The rules of products. `Rules` adds states, which hold arrays.
PlainRules: TypeAlias = (
    _RecipeLike | Mapping[str, _RecipeLike | None] | Sequence[Rule | tuple[str, _RecipeLike | None]]
)
Rules: TypeAlias = Frozen | Delayed | Monitored | Switched | Adapted | PlainRules
# The rules of leaves.
LeafRules: TypeAlias = (
    str
    | Recipe
    | Mapping[str, str | Recipe | None]
    | Sequence[Rule | tuple[str, str | Recipe | None]]
)


def _entries(owner: str, rules: Any) -> list[Rule | tuple[str, Any]]:
    """Returns rules in any form as a list of `Rule` records and pairs (pattern, value)."""
    if isinstance(rules, Mapping):
        return list(rules.items())
    if isinstance(rules, Rule):
        raise TypeError(f"{owner}: `rules` must be a sequence, got {rules}. Put it into a list.")
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        return [("", rules)]
    for rule in rules:
        if not isinstance(rule, Rule) and not (isinstance(rule, tuple) and len(rule) == 2):
            raise TypeError(
                f"{owner}: a rule must be a jaxq.Rule or a pair (pattern, recipe), got "
                f"{repr(rule)[:60]}. Write, for example, [('kernel', 'int8_channel')]."
            )
    return list(rules)


def pairs(
    owner: str, rules: Any, look_up: Callable[[Any], _Value]
) -> list[tuple[str, _Value | None]]:
    """Returns rules with values that are not recipes as pairs of a pattern and a value.

    Args:
      owner: the name of the calling function, for errors.
      rules: one value for everything, a mapping from patterns to values, or a sequence of pairs.
      look_up: the function that converts a value of a rule other than None.

    Raises:
      TypeError: if a rule is a `Rule`.
      ValueError: if a pattern is not a regular expression, or `look_up` raises it.
    """
    result = []
    for rule in _entries(owner, rules):
        if isinstance(rule, Rule):
            raise TypeError(
                f"{owner}: {rule} assigns a recipe, which this function does not take. Write a "
                "pair (pattern, format)."
            )
        check_pattern(owner, "pattern", rule[0])
        result.append((rule[0], None if rule[1] is None else look_up(rule[1])))
    return result


def as_rules(owner: str, rules: Rules) -> tuple[Rule, ...]:
    """Returns the rules of products, in any form, as a tuple of `Rule` records.

    Args:
      owner: the name of the calling function, for errors.
      rules: the argument of the calling function.

    Raises:
      TypeError: if `rules` is None, or an entry is neither a rule nor a pair.
      ValueError: if a recipe is unknown, or a pattern is not a regular expression.
    """
    if isinstance(rules, (Frozen, Delayed, Monitored, Switched, Adapted)):
        return rules.rules
    if rules is None:
        raise TypeError(f"{owner}: `rules` must be recipes, got None. Pass [] for no rules.")
    result = []
    for rule in _entries(owner, rules):
        if not isinstance(rule, Rule):
            try:
                rule = Rule(*rule)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{owner}: {error}") from error
        result.append(rule)
    return tuple(result)


def rules_to_json(rules: Rules) -> str:
    """Returns rules as JSON text, from which `rules_from_json` makes equal rules.

    Args:
      rules: one recipe for everything, a mapping from patterns to recipes, or a sequence of rules
        and pairs, as for `jaxq.quantize_fn`. Of `Frozen` and `Delayed` rules, which also hold
        arrays, only the rules are written.

    Returns:
      A JSON list with one object per rule.

    Raises:
      TypeError: if a rounding or a gradient is a user-defined function.
      ValueError: if a recipe is unknown, or a pattern is not a regular expression.

    Example:
      >>> import jaxq
      >>> text = rules_to_json({"head": None, "kernel": "w8a8"})
      >>> rules_from_json(text)[1] == jaxq.Rule("kernel", "w8a8")
      True
    """
    return to_json("rules_to_json", as_rules("rules_to_json", rules), rule_records())


def rules_from_json(text: str) -> tuple[Rule, ...]:
    """Returns the rules that `rules_to_json` wrote.

    Args:
      text: the JSON text.

    Returns:
      The rules as records.

    Raises:
      ValueError: if the text does not describe a list of rules.

    Example:
      >>> rules_from_json(rules_to_json({"kernel": "w8a8"}))[0].weight
      'kernel'
    """
    rules = from_json("rules_from_json", text, rule_records(), tuple, "a list of rules")
    if not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(
            "rules_from_json: `text` must describe a list of rules only, got another record in it. "
            "Write it by rules_to_json."
        )
    return rules


def leaf_rules(owner: str, rules: LeafRules) -> list[tuple[str, Recipe | None]]:
    """Returns the rules of leaves, in any form, as pairs of a pattern and a tensor recipe.

    Args:
      owner: as in `as_rules`.
      rules: as in `as_rules`.

    Raises:
      TypeError: as in `as_rules`, or if the rules are a state of the products of a function.
      ValueError: as in `as_rules`, or if a rule holds a product recipe or has a condition that only
        products can meet.
    """
    if isinstance(rules, (Frozen, Delayed, Monitored, Switched, Adapted)):
        raise TypeError(
            f"{owner}: `rules` must be tensor recipes, got {type(rules).__name__} rules, which "
            "belong to the products of a function. Pass a recipe, or rules with recipes."
        )
    result = []
    for rule in as_rules(owner, rules):
        conditions = [n for n in ("operation", "scope", "output") if getattr(rule, n) is not None]
        if conditions:
            raise ValueError(
                f"{owner}: {rule} sets `{conditions[0]}`, which only products have, and a tree has "
                f"no products. Leave `{conditions[0]}` out, or use jaxq.quantize_fn."
            )
        if isinstance(rule.recipe, ProductRecipe):
            raise ValueError(f"{owner}: {rule}: {_not_for_leaves(rule.recipe)}")
        assert rule.weight is not None
        result.append((rule.weight, rule.recipe))
    return result


def _not_for_leaves(recipe: ProductRecipe) -> str:
    """Returns the error for a product recipe in the rules of a tree."""
    name, rhs = PRODUCT_RECIPES.name_of(recipe), recipe.operands[1]
    weight_name = None if rhs is None else RECIPES.name_of(rhs)
    remedy = f"Use the recipe of its weight, {weight_name!r}" if weight_name else "Use its `rhs`"
    if rhs is None:
        remedy = "Use a recipe such as 'int8_channel'"
    return (
        "`recipe` must be a tensor recipe, as a leaf of a tree is in no product, got "
        f"{'a ProductRecipe' if name is None else f'the product recipe {name!r}'}. {remedy}."
    )


def describe_recipe(recipe: Recipe) -> str:
    """Returns a recipe's name, or its element format and granularity if it has none."""
    return RECIPES.name_of(recipe) or f"{recipe.element.name} with {recipe.granularity}"


def unmatched_message(rule: Rule | str, noun: str, paths: Iterable[str], remedy: str) -> str:
    """Returns the error for a rule whose pattern is found in no path.

    Args:
      rule: the rule, or its pattern.
      noun: the things that have paths, such as `"leaf"`.
      paths: their paths.
      remedy: the last sentence.
    """
    rule, pattern = _named(rule)
    paths = sorted(paths)
    if not paths:
        return f"{rule} matches no {noun}, because there is none. {remedy}"
    if not any(paths):
        return f"{rule} matches no {noun}. The only {noun} has the empty path ''. {remedy}"
    return f"{rule} matches no {noun}. {suggestion(pattern, paths, most=3)} {remedy}"


def hidden_message(rule: Rule | str, where: str, earlier: Rule | str) -> str:
    """Returns the error for a rule all of whose matches belong to earlier rules.

    Args:
      rule: the rule, or its pattern.
      where: the first product or leaf that it matches.
      earlier: the rule that applies there, or its pattern.
    """
    rule, earlier = _named(rule)[0], _named(earlier)[0]
    return (
        f"{rule} applies to nothing: the earlier {earlier} applies to {where}. Move {rule} before "
        "it, or remove it."
    )


def _named(rule: Rule | str) -> tuple[str, str]:
    """Returns a rule as text, and its pattern."""
    if isinstance(rule, str):
        return f"Rule({rule!r})", rule
    return str(rule), rule.weight or ""
