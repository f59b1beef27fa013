"""Changes of the inputs of products that their weights undo: what scales and rotations share."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import Planned, Product
from jaxq.ptq._calls import Calls, Model

__all__ = ["check_same", "close", "named_inputs", "reason_of", "with_arrays"]

_CLOSE = {"float32": 1e-3}  # The largest relative change of outputs by rounding; else _LOOSE.
_LOOSE = 0.05


def reason_of(model: Model, product: Product) -> str:
    """Returns the reason why the input of a product cannot be changed, or ""."""
    number, stored = product.number, model.planned.stored
    if number in model.sought.reasons:
        return model.sought.reasons[number]
    if product.operation != "dot_general":
        return "only matrix products have input scales and rotations"
    if not product.reverse:
        return "it is in a while loop or under a custom derivative"
    if number in stored.reasons:
        return f"not stored: {stored.reasons[number]}"
    leaves = _leaves(product)
    for other in model.planned.products:
        if other.number != number and _leaves(other) & leaves:
            return f"its weight is also used by {other.name}"
    return ""


def _leaves(product: Product) -> set[int]:
    """Returns the leaves of which the operands of a product are made."""
    return {leaf for origin in product.origins if origin for leaf in origin.leaves.values()}


def named_inputs(
    owner: str, model: Model, left: Mapping[int, str], known: Collection[str]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Returns the names of the changed products with those of their inputs, and of all others.

    Args:
      owner: the name of the calling function, for errors.
      model: the model.
      left: the numbers of products that are left alone, with the reasons.
      known: the names of the changed inputs, each that of the first product that reads it.

    Raises:
      ValueError: if no product is changed.
    """
    products, sought = model.planned.products, model.sought
    names = {n: products[n].name for n in sorted({*sought.matrices, *left})}
    inputs = tuple(
        (name, products[sought.first[n]].name)
        for n, name in names.items()
        if n not in left and products[sought.first[n]].name in known
    )
    found = {name for name, _ in inputs}
    why = "its input does not depend on data"
    others = tuple((name, left.get(n, why)) for n, name in names.items() if name not in found)
    if not inputs:
        raise ValueError(
            f"{owner}: `rules` must quantize the weight of a product that can be changed, got "
            f"none: {others[0][0]!r}: {others[0][1]}. Use ptq.quantize_weights alone."
        )
    return inputs, others


def with_arrays(planned: Planned, arrays: Mapping[int, np.ndarray]) -> Any:
    """Returns the parameters with other arrays in place of some leaves."""
    tree, places = planned.traced.parameters
    (tree,) = tree  # The list of the arguments that hold parameters.
    leaves, structure = jax.tree.flatten(tree)
    new = [
        leaf if place is None or place not in arrays else jnp.asarray(arrays[place])
        for place, leaf in zip(places, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def check_same(calls: Calls, changed: Callable[..., Any], params: Any) -> None:
    """Raises a ValueError unless a changed function gives the outputs of the original."""
    error = close(calls.fn(*calls.calls[0]), changed(params, *calls.calls[0][1:]))
    if error:
        raise ValueError(
            f"{calls.owner}: the changed function must equal `fn`, but its outputs differ by "
            f"{error:.2g} relative to their size. A weight is probably used outside of its "
            "product too. Exclude it by a rule with the recipe None."
        )


def close(before: Any, after: Any) -> float:
    """Returns 0 if the floating results of two functions agree, or their relative difference."""
    pairs = zip(_floats(before), _floats(after), strict=True)
    for x, y in pairs:
        one, other = (np.asarray(value, np.float64) for value in (x, y))
        power = np.sqrt(np.sum(one**2))
        error = float(np.sqrt(np.sum((one - other) ** 2)) / (power or 1.0))
        if error > _CLOSE.get(str(jnp.asarray(x).dtype), _LOOSE):
            return error
    return 0.0


def _floats(results: Any) -> list[Any]:
    leaves = jax.tree.leaves(results)
    return [x for x in leaves if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
