"""Checks of models and changes of them: which products can change, and equal outputs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._jax.processes import host_array
from jaxq.models import Product
from jaxq.ptq._calibration_runs import Calls, Model

__all__ = [
    "check_equal_outputs",
    "check_function",
    "named_inputs",
    "reason_of",
    "relative_difference",
]

# The largest relative change of outputs that rounding may cause, by dtype.
_TOLERANCES = {"float32": 1e-3}
_DEFAULT_TOLERANCE = 0.05


def check_function(owner: str, fn: Any) -> None:
    """Raises a TypeError if a model is a pytree, such as a module, and not a function."""
    if not jax.tree_util.all_leaves([fn]):
        raise TypeError(
            f"{owner}: `fn` must be a function of the parameters, got a pytree, "
            f"{type(fn).__name__}. Pass lambda module, x: module(x)."
        )


def reason_of(model: Model, product: Product) -> str:
    """Returns the reason why the input of a product cannot be scaled or rotated, or ""."""
    number, stored = product.number, model.planned.stored
    if number in model.targets.reasons:
        return model.targets.reasons[number]
    if product.operation != "dot_general":
        return "only matrix products have input scales and rotations"
    if not product.is_differentiated:
        return "it is in a while loop or under a custom derivative"
    if number in stored.reasons:
        return f"not stored: {stored.reasons[number]}"
    leaves = _leaves(product)
    for other in model.planned.products:
        if other.number != number and _leaves(other) & leaves:
            return f"its weight is also used by {other.name}"
    return ""


def _leaves(product: Product) -> set[int]:
    """Returns the indices of the leaves from which the operands of a product are computed."""
    return {leaf for origin in product.origins if origin for leaf in origin.leaves.values()}


def named_inputs(
    owner: str, model: Model, skipped: Mapping[int, str], changed: Collection[str]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Returns pairs (product, input) of the changed products and (product, reason) of all others.

    Args:
      owner: the name of the public function that was called, for errors.
      model: the model.
      skipped: the reasons why products are skipped, by their numbers.
      changed: the names of the changed inputs. An input has the name of the first product that
        reads it.

    Raises:
      ValueError: if no product is changed.
    """
    products, targets = model.planned.products, model.targets
    names = {n: products[n].name for n in sorted({*targets.matrices, *skipped})}
    inputs = tuple(
        (name, products[targets.first[n]].name)
        for n, name in names.items()
        if n not in skipped and products[targets.first[n]].name in changed
    )
    changed_products = {name for name, _ in inputs}
    others = tuple(
        (name, skipped.get(n, "its input does not depend on data"))
        for n, name in names.items()
        if name not in changed_products
    )
    if not inputs:
        raise ValueError(
            f"{owner}: `rules` must quantize the weight of a product that can be changed, got no "
            f"such product; for example, {others[0][0]!r} cannot be changed because "
            f"{others[0][1]}. Use ptq.quantize_weights alone."
        )
    return inputs, others


def check_equal_outputs(calls: Calls, changed: Callable[..., Any], params: Any) -> None:
    """Raises a ValueError unless a changed function has the outputs of the original function.

    Args:
      calls: the calls of the original function, of which the first is compared.
      changed: the changed function.
      params: the parameters of the changed function.
    """
    error = relative_difference(calls.fn(*calls.calls[0]), changed(params, *calls.calls[0][1:]))
    if error:
        raise ValueError(
            f"{calls.owner}: the changed function must equal `fn`, but its outputs differ by "
            f"{error:.2g} relative to their norm. A weight is probably also used outside its "
            "product; exclude it with a rule whose recipe is None."
        )


def relative_difference(before: Any, after: Any) -> float:
    """Returns the first relative difference of floating results beyond the tolerance, or 0."""
    pairs = zip(_floats(before), _floats(after), strict=True)
    for x, y in pairs:
        expected, actual = (host_array(value).astype(np.float64) for value in (x, y))
        norm = np.sqrt(np.sum(expected**2))
        error = float(np.sqrt(np.sum((expected - actual) ** 2)) / (norm or 1.0))
        if error > _TOLERANCES.get(str(jnp.asarray(x).dtype), _DEFAULT_TOLERANCE):
            return error
    return 0.0


def _floats(results: Any) -> list[Any]:
    leaves = jax.tree.leaves(results)
    return [x for x in leaves if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
