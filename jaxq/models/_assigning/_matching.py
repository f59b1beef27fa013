"""Matching of rules and products, and the errors for rules that apply to no product."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import numpy as jnp

from jaxq.models._assigning._experts import Experts, experts_of
from jaxq.models._reading import LOOK_UP, Product
from jaxq.models._rules import Rule, hidden_message, unmatched_message

__all__ = ["first_match", "match_parts", "unused_reason"]


def first_match(rules: Sequence[Rule], product: Product) -> tuple[int | None, bool]:
    """Returns the index of the first matching rule, and True if its weight is operand 0."""
    for n, rule in enumerate(rules):
        swapped = _match(rule, product)
        if swapped is not None:
            return n, swapped
    return None, False


def _match(rule: Rule, product: Product) -> bool | None:
    """Returns None if a rule does not match a product, else True if its weight is operand 0."""
    if rule.operation not in (None, product.operation):
        return None
    if rule.scope is not None and not re.search(rule.scope, product.scope):
        return None
    if rule.weight is None:
        if product.operation == LOOK_UP and rule.operation is None:
            return None
        weights = [i for i, o in enumerate(product.origins) if o is not None]
        return product.operation != LOOK_UP and weights == [0]
    if any(not outer.barred_reason and _match(rule, outer) is not None for outer in product.within):
        return None  # The computed weight is quantized instead of the values it depends on.
    for i in reversed(range(len(product.origins))):
        origin = product.origins[i]
        if origin is not None and any(re.search(rule.weight, path) for path in origin.paths):
            return i == 0 and len(product.origins) == 2
    return None


class MatchedParts(NamedTuple):
    """The rules that match parts of weights that a product multiplies as one.

    Attributes:
      used: their indices.
      experts: the recipes of these weights, if they are experts with different ones.
    """

    used: set[int]
    experts: Experts | None


def match_parts(owner: str, rules: Sequence[Rule], product: Product) -> MatchedParts:
    """Returns the rules that match parts of weights that a product multiplies as one.

    Raises:
      ValueError: if the rules give these weights different recipes, and they are not the experts of
        a stack.
    """
    used: set[int] = set()
    experts = None
    for i, origin in enumerate(product.origins):
        if origin is None or origin.computed or len(origin.paths) == 1:
            continue
        matched: list[Rule | None] = []
        for piece in origin.pieces:
            part = dataclasses.replace(origin, pieces=(piece,))
            origins = (*product.origins[:i], part, *product.origins[i + 1 :])
            n, _ = first_match(rules, dataclasses.replace(product, origins=origins))
            used |= set() if n is None else {n}
            matched.append(None if n is None else rules[n])
        recipes = {None if rule is None else (rule.product, rule.output) for rule in matched}
        if len(recipes) > 1:
            experts = experts_of(owner, product, i, matched)
    return MatchedParts(used, experts)


def unused_reason(
    rule: Rule,
    rules: Sequence[Rule],
    products: Sequence[Product],
    leaves: Mapping[str, Any],
    closed: bool,
) -> str:
    """Returns the reason why a rule applies to no product."""
    matches = [p for p in products if first_match((rule,), p)[0] is not None]
    for p in matches:
        if p.barred_reason:
            return (
                f"{rule} matches only {p.where}, which cannot be quantized: {p.barred_reason}. "
                "Remove it."
            )
    if matches:
        earlier = rules[first_match(rules, matches[0])[0] or 0]
        return hidden_message(rule, matches[0].where, earlier)
    if rule.weight is None:
        return _unmet(rule, products)
    weights = {path: p for p in products for o in p.origins if o for path in o.paths}
    for path, product in weights.items():
        if re.search(rule.weight, path):
            return (
                f"{rule} matches the weight of {product.where}, but not its operation or its "
                f"scope, {product.scope!r}. Correct or remove the condition."
            )
    for path, leaf in leaves.items():
        if re.search(rule.weight, path):
            return f"{rule} matches only leaf {path!r}, which {_no_weight(leaf)}."
    remedy = "Use jaxq.explain(fn, [])(*args) to list all."
    if closed and not any(weights):  # A data array that is a whole argument has the path ''.
        return (
            f"{rule} matches no weight. `fn` closes over arrays, as jax.vmap(module) does, and "
            "these are not parameters. Pass the module as an argument: "
            "lambda module, x: jax.vmap(module)(x)."
        )
    if not weights:
        remedy = "Pass the positions of the parameters as `argnums`."
    return unmatched_message(rule, "weight", weights, remedy)


def _unmet(rule: Rule, products: Sequence[Product]) -> str:
    """Returns the error for a rule without a weight whose conditions no product meets."""
    operations = ", ".join(sorted({p.operation for p in products})) or "none"
    scopes = ", ".join(sorted({p.scope for p in products if p.scope})[:3]) or "none"
    return (
        f"{rule} matches no product. Operations are {operations}; scopes are {scopes}. "
        "Use jaxq.explain(fn, [])(*args) to list all."
    )


def _no_weight(leaf: Any) -> str:
    """Returns the reason why a leaf of the parameters is not the weight of any product."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return f"is not an array but a {type(leaf).__name__}. Make it an array"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"has the dtype {dtype}, and only products of floats are quantized. Remove the rule"
    return (
        "is never multiplied as a matrix, directly or after operations on its elements. Match "
        "the product that uses it by `operation` or `scope`"
    )
