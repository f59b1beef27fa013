"""Tracing of a model and assignment of recipes to its products: the first step of transforms."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxq.models._assigning import (
    Assigned,
    Storages,
    assign,
    prefix_errors,
    storages,
    unassigned,
    weight_of,
)
from jaxq.models._reading import Mark, Node, Product, Traced, read, trace
from jaxq.models._rules import (
    Adapted,
    Delayed,
    Frozen,
    Monitored,
    Rules,
    Switched,
    as_rules,
    refuse_states,
)
from jaxq.models._running import ProductState, StoredView
from jaxq.products import ProductRecipe, Row
from jaxq.quantizers import Quantized

__all__ = ["ModelPlan", "plan"]


@dataclasses.dataclass
class ModelPlan:
    """A traced function with its products and their assignments.

    Attributes:
      traced: the function's program and its arguments.
      node: the tree of the program's products.
      products: all products, in order.
      marks: all marked arrays, in order.
      chosen: the assignment of each product, without the recipe of a stored weight.
      stored: the storage of the weights that rules quantize, and reasons for those not stored.
      scales: the scales from calibration, by the products' names.
      product_states: histories, rows for statistics, switches and adapters, by the products' names.
    """

    traced: Traced
    node: Node
    products: list[Product]
    marks: list[Mark]
    chosen: list[Assigned | None]
    stored: Storages
    scales: Mapping[str, Any]
    product_states: Mapping[str, ProductState]

    @property
    def marked(self) -> dict[str, Assigned]:
        """The assignments of the marked arrays that have product_states, by their names."""
        return {
            mark.name: unassigned(mark) for mark in self.marks if mark.name in self.product_states
        }

    @property
    def packed(self) -> dict[int, StoredView]:
        """The stored weights, by argument index, in the dtypes that products need."""
        return {
            i: StoredView(dataclasses.replace(q, dtype=self.stored.dtype(i, q.dtype)), q.dtype)
            for i, q in _packed_arguments(self.traced).items()
        }


def plan(
    owner: str,
    fn: Callable[..., Any],
    rules: Rules,
    argnums: int | Sequence[int],
    args: tuple,
    kwargs: dict[str, Any],
) -> ModelPlan:
    """Traces a function and assigns recipes to its products.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`.
    """
    rows: Mapping[str, Row] = {}
    if isinstance(rules, Monitored):
        rows, rules = rules.rows, rules.rules if rules.scaling is None else rules.scaling
    scales = rules.scales if isinstance(rules, Frozen) else {}
    histories = rules.histories if isinstance(rules, Delayed) else {}
    switches = rules.switches if isinstance(rules, Switched) else {}
    adapters = rules.adapters if isinstance(rules, Adapted) else {}
    traced = trace(owner, fn, argnums, args, kwargs)
    refuse_states(owner, traced.parameters[0])
    node, products, marks = read(traced.jaxpr, traced.origins)
    closes_over_matrices = any(np.ndim(array) > 1 for array in traced.jaxpr.consts)
    chosen = assign(
        owner, as_rules(owner, rules), products, traced.paths, closed=closes_over_matrices
    )
    _check_state(owner, rules, chosen)
    _check_rows(owner, rows, [*products, *marks])
    chosen = [
        unassigned(product) if assigned is None and product.name in rows else assigned
        for product, assigned in zip(products, chosen, strict=True)
    ]
    product_states = {}
    for name in {**histories, **rows, **switches, **adapters}:
        lhs, rhs, cotangent = histories.get(name, (None,) * 3)
        others = (rows.get(name), switches.get(name), adapters.get(name))
        product_states[name] = ProductState(lhs, rhs, cotangent, *others)
    stored, packed = storages(products, chosen), _packed_arguments(traced)
    if packed:
        chosen = [
            _without_weight(owner, product, assigned, packed, stored)
            for product, assigned in zip(products, chosen, strict=True)
        ]
    return ModelPlan(traced, node, products, marks, chosen, stored, scales, product_states)


def _packed_arguments(traced: Traced) -> dict[int, Quantized]:
    """Returns the arguments that are stored weights, by their indices."""
    return {i: x for i, x in enumerate(traced.arrays) if isinstance(x, Quantized)}


def _check_state(owner: str, rules: Rules, chosen: Sequence[Assigned | None]) -> None:
    """Checks that a state has an entry for every product that takes scales from it."""
    if isinstance(rules, Frozen):
        required = [a for a in chosen if a is not None and any(a.observers)]
        available: Mapping[str, Any] = rules.scales
    elif isinstance(rules, Delayed):
        required = [a for a in chosen if a is not None and any(a.delayed_per_tensor)]
        available = rules.histories
    elif isinstance(rules, Adapted):
        _check_adapters(owner, rules, chosen)
        return
    else:
        return
    for assigned in required:
        if assigned.name not in available:
            raise ValueError(
                f"{owner}: the state passed as `rules` must have scales for {assigned.where}, got "
                f"{', '.join([*available][:3])}. Make the state from a function with the same "
                "products."
            )


def _check_adapters(owner: str, rules: Adapted, chosen: Sequence[Assigned | None]) -> None:
    """Checks that a function has all products that have an adapter."""
    product_names = {assigned.name for assigned in chosen if assigned is not None}
    for name in rules.adapters:
        if name not in product_names:
            raise ValueError(
                f"{owner}: the state passed as `rules` has an adapter for product {name!r}, which "
                f"the function lacks. Its products are {', '.join(sorted(product_names)[:3])}. "
                "Make the state by jaxq.lora.adapt from this function."
            )


def _check_rows(owner: str, rows: Mapping[str, Row], products: Sequence[Product | Mark]) -> None:
    """Checks that a function has all products and arrays that a state monitors."""
    known = {product.name: product for product in products}
    for name, row in rows.items():
        if name not in known:
            raise ValueError(
                f"{owner}: the state passed as `rules` monitors {name!r}, which the function "
                f"lacks. Its products and marked arrays are {', '.join(sorted(known)[:3])}. Make "
                "the state by jaxq.analysis.monitor from this function."
            )
        if row.active.shape != known[name].stacks:
            raise ValueError(
                f"{owner}: the state passed as `rules` must have layers {known[name].stacks} for "
                f"{known[name].where}, got {row.active.shape}. Make the state by "
                "jaxq.analysis.monitor from this function."
            )


def _without_weight(
    owner: str,
    product: Product,
    assigned: Assigned | None,
    packed: Mapping[int, Quantized],
    stored: Storages,
) -> Assigned | None:
    """Removes the weight's recipe from a product's assignment if the weight is stored."""
    leaves = {leaf for o in product.origins if o is not None for leaf in o.leaves.values()}
    if product.barred_reason or not leaves & set(packed):
        return assigned
    if assigned is None:
        return unassigned(product)
    weight = weight_of(product, assigned)
    if weight is None or not set(weight.origin.leaves.values()) & set(packed):
        return assigned
    recipe = assigned.recipe or ProductRecipe()  # None if only the experts' weights have recipes.
    with prefix_errors(owner, product.where):
        float_leaves = {
            piece.leaf
            for piece, piece_recipe in zip(weight.origin.pieces, weight.recipes, strict=True)
            if piece_recipe is None
        }
        for path, leaf in weight.origin.leaves.items():
            if leaf not in float_leaves:
                _check_stored(product, path, packed.get(leaf), stored, leaf)
        if recipe.execution == "native":
            raise ValueError(
                f"packed weights must be multiplied as floats, got execution='native' for "
                f"{weight.origin.name!r}. Use execution='emulated'."
            )
    remaining: ProductRecipe | None = dataclasses.replace(recipe, rhs=None)
    remaining = None if remaining.plain else remaining
    return dataclasses.replace(assigned, recipe=remaining, table_recipe=None, experts=None)


def _check_stored(
    product: Product, path: str, q: Quantized | None, stored: Storages, leaf: int
) -> None:
    """Checks that a leaf is stored in the form that a product needs."""
    remedy = "Pack the weights by jaxq.quantize_weights with these rules."
    if q is None:
        raise ValueError(
            f"weight {path!r} must be packed too, because one product uses it together with packed "
            f"weights, got an array. {remedy}"
        )
    if leaf not in stored.leaves:
        reason = stored.reasons[product.number]
        raise ValueError(
            f"weight {path!r} must be a float array, got packed: {reason}. Leave it out of the "
            "rules of jaxq.quantize_weights or jaxq.quantize_tree."
        )
    storage = stored.leaves[leaf]
    differing = storage.differing(q)
    if differing:
        raise ValueError(
            f"weight {path!r} must be packed as its rule says, {storage.recipe.element.name}, got "
            f"{q.recipe.element.name} with another {', '.join(differing)}. {remedy}"
        )
    if storage.blocks_differ(q):
        raise ValueError(
            f"weight {path!r} must be packed in blocks of {storage.block}, as its product needs, "
            f"got blocks of {q.block}. Pass the axis that products contract to jaxq.quantize_tree "
            "as `axis`, or use jaxq.quantize_weights."
        )
