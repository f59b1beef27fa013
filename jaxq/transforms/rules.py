"""Rules: which product of a model gets which recipe. The first that matches a product holds."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax import numpy as jnp

from jaxq import dot_recipes
from jaxq.calibration import Calibrated
from jaxq.dot_recipes import DotRecipe, get_dot_recipe
from jaxq.formats import Format
from jaxq.histories import History
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer
from jaxq.transforms.reading import LOOK_UP

__all__ = ["Delayed", "Frozen", "Rule", "Rules", "as_rules"]

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
