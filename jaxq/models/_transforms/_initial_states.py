"""Initial states of models whose products are monitored or switched."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from jaxq.models._assigning import Assigned, prefix_errors, unassigned
from jaxq.models._reading import QUANTIZED, Mark, Product, find_unreached, operation_of
from jaxq.models._rules import (
    Adapted,
    Delayed,
    Frozen,
    Monitored,
    PlainRules,
    Rules,
    Switch,
    Switched,
    as_rules,
    unmatched_message,
)
from jaxq.models._transforms._planning import plan
from jaxq.products import (
    NO_SCALES,
    PassLayouts,
    Probe,
    ProductRecipe,
    Row,
    Running,
    array_layouts,
    keys_of,
    layouts_of,
)
from jaxq.recipes import Recipe

__all__ = ["make_monitored", "make_switched", "switch"]

_UNREACHED = "no floating-point result of the function is differentiable with respect to it"


def make_monitored(
    owner: str,
    fn: Callable[..., Any],
    rules: Rules,
    probe: Probe,
    patterns: Sequence[str],
    argnums: int | Sequence[int],
) -> Callable[..., Monitored]:
    """Returns the function that makes the initial state for a model.

    Args:
      owner: the name of the calling function, for errors.
      fn: the function.
      rules: the rules.
      probe: the definition of the statistics.
      patterns: regular expressions; a product is monitored if one is found in its name.
      argnums: the positions of the parameters.
    """

    def initial_state(*args: Any, **kwargs: Any) -> Monitored:
        planned = plan(owner, fn, rules, argnums, args, kwargs)
        reasons = {p.name: _reason(p) for p in (*planned.products, *planned.marks)}
        for p in find_unreached(planned.node):
            reasons[p.name] = reasons[p.name] or _UNREACHED
        chosen = _chosen(owner, patterns, [*planned.products, *planned.marks], reasons)
        rows: dict[str, Row] = {}
        for product, assigned in zip(planned.products, planned.chosen, strict=True):
            if product.name in chosen:
                with prefix_errors(owner, product.where):
                    rows[product.name] = _row(probe, product, assigned or unassigned(product))
        for mark in planned.marks:
            if mark.name in chosen:
                with prefix_errors(owner, mark.where):
                    rows[mark.name] = _empty(mark.stacks, array_layouts(probe, mark.out), probe)
        rows = {name: row for name, row in rows.items() if row.layout.size}
        scaling = rules if isinstance(rules, Frozen | Delayed | Switched) else None
        return Monitored(rows, scaling, as_rules(owner, rules), probe)

    return initial_state


def switch(
    fn: Callable[..., Any], rules: PlainRules, *, argnums: int | Sequence[int] = 0
) -> Callable[..., Switched]:
    """Returns the function that makes rules whose recipes can be turned off by traced flags.

    The result is passed to `jaxq.quantize_fn` or `jaxq.analysis.monitor` in place of rules. Its
    flags may depend on the step, so one compiled program begins or ends quantization at some step,
    and `jax.vmap` over flags runs a bisection over products. All flags are on at first. The flag of
    a product is read by a `lax.cond`, so a recipe that is off costs nothing; under `jax.vmap` over
    flags both results are computed. While a recipe is off, its product has no statistics.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`, but recipes only: not the result of `jaxq.freeze`,
        `jaxq.delayed_scaling`, `jaxq.analysis.monitor` or `jaxq.lora.adapt`.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> jaxq.models.Switched`. Only the shapes and dtypes of the arguments are used.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or if the rules are a state, or no product has a
        recipe.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: ((x @ params["w"]) ** 2).sum()
      >>> params, x = {"w": jnp.full((2, 2), 0.3)}, jnp.ones((1, 2))
      >>> rules = jaxq.models.switch(loss, {"w": "w4a16"})(params, x)
      >>> @jax.jit
      ... def step(params, number):
      ...     return jaxq.quantize_fn(loss, rules.where("w", number < 1000))(params, x)
      >>> bool(step(params, 1000) == loss(params, x)), len(rules.names)
      (True, 1)
    """
    if isinstance(rules, Frozen | Delayed | Monitored | Switched | Adapted):
        raise ValueError(
            f"switch: `rules` must be recipes without a state, got {type(rules).__name__} "
            "rules. Pass the original rules, from which this state was made."
        )
    return make_switched("switch", fn, rules, argnums)


def make_switched(
    owner: str, fn: Callable[..., Any], rules: Rules, argnums: int | Sequence[int]
) -> Callable[..., Switched]:
    """Returns the function that makes the rules of a model with all recipes turned on.

    Args:
      owner: the name of the calling function, for errors.
      fn: the function.
      rules: the rules, without scales.
      argnums: the positions of the parameters.
    """

    def initial_state(*args: Any, **kwargs: Any) -> Switched:
        planned = plan(owner, fn, rules, argnums, args, kwargs)
        switches = {}
        for product, assigned in zip(planned.products, planned.chosen, strict=True):
            recipes = None if assigned is None else (assigned.recipe or assigned.output_recipe)
            if recipes is not None:
                switches[product.name] = Switch(jnp.ones(product.stacks, jnp.float32))
        if not switches:
            raise ValueError(
                f"{owner}: `rules` must give some product a recipe, got none. Use, for example, "
                "'w8a8'."
            )
        return Switched(as_rules(owner, rules), switches)

    return initial_state


def _chosen(
    owner: str,
    patterns: Sequence[str],
    products: Sequence[Product | Mark],
    reasons: Mapping[str, str],
) -> dict[str, Product | Mark]:
    """Returns the products and marked arrays to monitor, by their names.

    Args:
      owner: the name of the calling function, for errors.
      patterns: the regular expressions of the request.
      products: all products and marked arrays.
      reasons: for each name, the reason why it cannot be monitored, or "".
    """
    chosen: dict[str, Product | Mark] = {}
    names = {product.name: product for product in products}
    for pattern in patterns:
        matching = [p for name, p in names.items() if re.search(pattern, name)]
        available = [p for p in matching if not reasons[p.name]]
        if not matching:
            raise ValueError(
                f"{owner}: `products`: "
                + unmatched_message(
                    pattern, "product", names, "Use jaxq.explain(fn, [])(*args) to list all."
                )
            )
        if not available:
            raise ValueError(
                f"{owner}: `products` {pattern!r} matches only {matching[0].where}, which cannot "
                f"be monitored: {reasons[matching[0].name]}. Remove the pattern."
            )
        chosen.update({p.name: p for p in available})
    return chosen


def _reason(product: Product | Mark) -> str:
    """Returns the reason why a product or a marked array cannot be monitored, or ""."""
    if isinstance(product, Product) and product.operation not in QUANTIZED:
        return "only matrix products, convolutions and marked arrays are"
    if isinstance(product, Product) and product.barred_reason:
        return product.barred_reason
    if not product.is_differentiated:
        return "its cotangent is unknown in a while loop or under a custom derivative"
    if not jnp.issubdtype(product.out.dtype, jnp.floating) or product.out.size == 0:
        return "it has no floating-point elements"
    return ""


def _row(probe: Probe, product: Product, assigned: Assigned) -> Row:
    """Returns the row of a product."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in product.eqn.invars]
    first, second = assigned.reorder_operands(shapes[:2])
    arguments: Any = tuple(shapes[2:])
    operation = operation_of(product.eqn, product.where, assigned.swapped, arguments)
    recipe = assigned.recipe or ProductRecipe()
    keys = jax.eval_shape(lambda: keys_of(jax.random.key(0))) if recipe.draws else None
    running = Running(operation, (first, second), recipe, keys, NO_SCALES)
    recipes = running.recipes
    if assigned.output_recipe is not None:
        recipes["output"] = assigned.output_recipe
    layout = layouts_of(probe, running, assigned.output_recipe)
    return _empty(product.stacks, layout, probe, tuple(recipes.items()))


def _empty(
    stacks: tuple[int, ...],
    layout: PassLayouts,
    probe: Probe,
    recipes: tuple[tuple[str, Recipe], ...] = (),
) -> Row:
    """Returns a row without statistics, or one for each layer."""
    values = jnp.zeros((*stacks, layout.size), jnp.float32)
    return Row(values, jnp.ones(stacks, jnp.float32), layout, probe, recipes)
