"""A model's function read, and what each of its products gets: what all transforms start from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxq.dot_recipes import DotRecipe
from jaxq.quantized import Quantized
from jaxq.transforms.assigning import Assigned, assign, naming, unassigned
from jaxq.transforms.reading import Node, Product, read
from jaxq.transforms.rules import Delayed, Frozen, Rules, as_rules
from jaxq.transforms.storing import Storage, storages, weight_of
from jaxq.transforms.tracing import Traced, trace

__all__ = ["Planned", "plan"]


@dataclasses.dataclass
class Planned:
    """A function read, and what each of its products gets.

    Attributes:
      traced: the function's program and its arguments.
      node: where in the program the products are.
      products: all of them, in order.
      chosen: what each gets; a stored weight's quantizer is left out.
      storages: how the weights that rules quantize are stored, by their places.
      scales: from calibration, by the products' names.
      histories: of delayed scaling, likewise.
    """

    traced: Traced
    node: Node
    products: list[Product]
    chosen: list[Assigned | None]
    storages: Mapping[int, Storage]
    scales: Mapping[str, Any]
    histories: Mapping[str, Any]


def plan(
    owner: str,
    fn: Callable[..., Any],
    rules: Rules,
    argnums: int | Sequence[int],
    args: tuple,
    kwargs: dict[str, Any],
) -> Planned:
    """Traces a function, and assigns recipes to its products.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`.
    """
    scales = rules.scales if isinstance(rules, Frozen) else {}
    histories = rules.histories if isinstance(rules, Delayed) else {}
    traced = trace(owner, fn, argnums, args, kwargs)
    node, products = read(traced.jaxpr, traced.origins)
    chosen = assign(owner, as_rules(owner, rules), products, traced.paths)
    _check_state(owner, rules, chosen)
    stored = {i: x for i, x in enumerate(traced.arrays) if isinstance(x, Quantized)}
    storing = owner == "quantize_weights"
    wanted = {}
    if storing or stored:
        which = None if storing else stored
        wanted = storages(owner, products, chosen, which)
    if stored:
        chosen = [
            _stored(owner, product, assigned, stored, wanted)
            for product, assigned in zip(products, chosen, strict=True)
        ]
    return Planned(traced, node, products, chosen, wanted, scales, histories)


def _check_state(owner: str, rules: Rules, chosen: Sequence[Assigned | None]) -> None:
    """A state has something for every product that takes scales from it; it may have more."""
    if isinstance(rules, Frozen):
        wanted, known = [a for a in chosen if a is not None and any(a.calibrated)], rules.scales
    elif isinstance(rules, Delayed):
        wanted, known = [a for a in chosen if a is not None and any(a.delayed)], rules.histories
    else:
        return
    for assigned in wanted:
        if assigned.name not in known:
            raise ValueError(
                f"{owner}: {assigned.where} has no scales in the state, which is for "
                f"{', '.join(known)}. Make the state from this function, or from one that has the "
                "same products."
            )


def _stored(
    owner: str,
    product: Product,
    assigned: Assigned | None,
    stored: Mapping[int, Quantized],
    wanted: Mapping[int, Storage],
) -> Assigned | None:
    """What a product gets if its weight is stored: the weight is not quantized again."""
    leaves = {origin.leaf for origin in product.origins if origin is not None}
    if product.barred or not leaves & set(stored):
        return assigned
    if assigned is None:
        return unassigned(product)
    found = weight_of(product, assigned)
    if found is None or found[0].leaf not in stored:
        return assigned
    origin, recipe = found[0], assigned.recipe
    assert recipe is not None, "it has a quantizer for the weight"
    q, storage = stored[origin.leaf], wanted[origin.leaf]
    with naming(owner, product.where):
        if (q.recipe, q.ndim - len(q.block)) != (storage.recipe, storage.leading):
            raise ValueError(
                f"weight {origin.path!r} is stored as {q.recipe}, and the rule wants "
                f"{storage.recipe} behind {storage.leading} stacked axes. Store it by "
                "jaxq.quantize_weights with these rules, or leave it out of them."
            )
        if recipe.execution == "native":
            raise ValueError(
                f"weight {origin.path!r} is stored, and stored weights are multiplied as floats. "
                "Use execution='emulated'."
            )
    left: DotRecipe | None = dataclasses.replace(recipe, rhs=None)
    left = None if left.plain else left
    return dataclasses.replace(assigned, recipe=left, table=None)
