"""Products of packed weights that are dequantized part by part."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models._assigning import Assigned
from jaxq.models._reading import LOOK_UP, operation_of
from jaxq.models._running._stored_views import StoredView, as_array
from jaxq.numerics import as_dtype
from jaxq.products import Pair, PerProduct, ProductRecipe, in_parts, product
from jaxq.quantizers import Quantized, Slices, slices

__all__ = ["stream_product"]


def stream_product(
    eqn: Any,
    assigned: Assigned,
    keys: jax.Array | None,
    scales: PerProduct[Pair],
    operands: list[Any],
) -> jax.Array | None:
    """Returns a product of a packed weight, dequantized in parts of `assigned.chunk` elements.

    Returns None if the product cannot be computed in parts: its weight is not packed or cannot be
    sliced, or its recipe has a Hadamard transform, another execution or quantized gradients.
    """
    recipe, output = assigned.recipe or ProductRecipe(), assigned.output_recipe
    packed = [i for i, x in enumerate(operands[:2]) if _is_packed(x)]
    is_emulated = recipe.hadamard is None and recipe.execution == "emulated"
    has_plain_gradient = recipe.dlhs.plain and recipe.drhs.plain and recipe.residuals == "quantized"
    name = eqn.primitive.name
    if assigned.chunk is None or name in (LOOK_UP, "conv_general_dilated") or output is not None:
        return None
    if (
        len(packed) != 1
        or not is_emulated
        or not has_plain_gradient
        or assigned.factor_name
        or assigned.scored_recipes
    ):
        return None
    swapped = packed == [0]
    weight = _slices(operands[packed[0]])
    if weight is None or (not recipe.plain and swapped != assigned.swapped):
        return None
    operation = operation_of(eqn, assigned.where, swapped, tuple(as_array(x) for x in operands[2:]))
    chunk, function = assigned.chunk, operation.function

    def multiply(x: jax.Array, _: Any, *arguments: jax.Array) -> jax.Array:
        def whole(x: jax.Array, w: jax.Array) -> jax.Array:
            return function(x, w, *arguments)

        return in_parts(whole, operation.contraction, x, weight, chunk)

    x = as_array(operands[1 - packed[0]])
    with compat.within(eqn):
        shape: Any = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        streaming = dataclasses.replace(operation, function=multiply)
        return product(streaming, x, shape, recipe, keys, scales)


def _is_packed(x: Any) -> bool:
    return isinstance(x, StoredView) and isinstance(x.data, Quantized)


def _slices(view: StoredView) -> Slices | None:
    """Returns a view of a packed weight as slices, in the view's dtype and axis order."""
    assert isinstance(view.data, Quantized)
    sliced = slices(view.data)
    if sliced is None:
        return None
    order = view.permutation or tuple(range(len(sliced.shape)))

    def take(axis: int, start: Any, size: int) -> jax.Array:
        array = sliced.take(order[axis], start, size).transpose(order)
        if array.dtype == view.dtype:
            return array
        return as_dtype(array.astype(jnp.float32), view.dtype)

    shape, units = (tuple(x[axis] for axis in order) for x in (sliced.shape, sliced.units))
    return Slices(shape, jnp.dtype(view.dtype), units, take)
