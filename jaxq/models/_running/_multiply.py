"""Execution of one product by its assignment, with its keys, scales and histories."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq._jax.barriers import barrier, barrier_on_cpu
from jaxq._jax.draws import fold_in, one_of
from jaxq.models._assigning import OPERANDS_OF_PRODUCT, Assigned, prefix_errors
from jaxq.models._reading import LOOK_UP, MARK, contraction_of, operation_of
from jaxq.models._rules import adapter_product
from jaxq.models._running._look_up import look_up
from jaxq.models._running._programs import ProductInputs, ProductState, States
from jaxq.models._running._stored_views import as_array
from jaxq.models._running._streaming import stream_product
from jaxq.products import (
    NO_SCALES,
    Hadamard,
    History,
    Pair,
    PerProduct,
    ProductRecipe,
    Running,
    keys_of,
    product,
    record,
    record_array,
    record_row,
)
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe

__all__ = ["Keys", "keys_for", "multiply"]


class Keys(NamedTuple):
    """The keys of one product: for its recipe, its look-up table and its result."""

    product: jax.Array | None = None
    table: jax.Array | None = None
    output: jax.Array | None = None


def keys_for(
    inputs: ProductInputs, eqns: Sequence[Any], products: Mapping[int, Assigned]
) -> dict[int, Keys]:
    """Returns the keys of products by equation, split together to save compile time."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, assigned in products.items():
        if inputs.key is not None and assigned.draws_random_bits:
            groups.setdefault(inputs.differing_axes(eqns[i]), []).append(i)
    keys = dict.fromkeys(products, Keys())
    for axes, members in groups.items():
        product_keys = inputs.folded_key(np.array([products[i].number for i in members]))
        for axis in axes:
            product_keys = fold_in(product_keys, inputs.device_indices[axis])
        split_keys: Any = keys_of(product_keys)
        for position, i in enumerate(members):
            assigned, product_key = products[i], one_of(product_keys, position)
            recipe_draws = assigned.recipe is not None and bool(assigned.recipe.draws)
            # XLA on CPU compiles one kernel for all positions, because it does not know them.
            hidden_position = barrier_on_cpu(jnp.uint32(position))
            keys[i] = Keys(
                one_of(split_keys, hidden_position)
                if recipe_draws and assigned.table_recipe is None
                else None,
                product_key if recipe_draws and assigned.table_recipe is not None else None,
                fold_in(product_key, 0) if assigned.output_draws else None,
            )
    return keys


def multiply(
    eqn: Any,
    assigned: Assigned,
    inputs: ProductInputs,
    keys: Keys,
    operands: list[Any],
    observing: bool,
) -> tuple[jax.Array, States]:
    """Computes one product and its calibration states, or returns a marked array.

    Args:
      eqn: the product's equation.
      assigned: the product's assignment.
      inputs: the scales and the product states.
      keys: the product's keys.
      operands: arrays, with `StoredView`s for stored weights.
      observing: True to collect calibration states.
    """
    state = inputs.product_states.get(assigned.name, ProductState())
    if eqn.primitive.name == MARK:
        (y,) = compat.bind(eqn, list(map(as_array, operands)))
        assert state.row is not None
        with compat.within(eqn), prefix_errors(assigned.where):
            return record_array(y, state.row), {}
    adapter = state.adapter
    if adapter is None:
        return _run_product(eqn, assigned, inputs, keys, operands, observing)

    def base(operands: list[Any]) -> tuple[jax.Array, States]:
        # XLA must not dequantize a weight before the other operand is known.
        operands = list(barrier(tuple(operands)))
        return _run_product(eqn, assigned, inputs, keys, operands, observing)

    # Stored weights stay packed until the backward pass, which dequantizes them again.
    y, seen = jax.checkpoint(base)(operands)
    operation = operation_of(eqn, assigned.where, assigned.swapped)
    x, weight = assigned.reorder_operands([as_array(operand) for operand in operands[:2]])
    with compat.within(eqn):
        shape, arguments = jax.typeof(weight), [as_array(operand) for operand in operands[2:]]
        adapter_output = adapter_product(operation.contraction, adapter, x, shape, arguments)
    return y + adapter_output.astype(y.dtype), seen


def _run_product(
    eqn: Any,
    assigned: Assigned,
    inputs: ProductInputs,
    keys: Keys,
    operands: list[Any],
    observing: bool,
) -> tuple[jax.Array, States]:
    """Returns one product without its adapter, and its calibration states."""
    state = inputs.product_states.get(assigned.name, ProductState())
    if not observing and state._replace(adapter=None) == ProductState():
        scales = _scales(assigned, inputs.scales.get(assigned.name), state.histories)
        y = stream_product(eqn, assigned, keys.product, scales, operands)
        if y is not None:
            return y, {}
    arrays = [as_array(operand) for operand in operands]
    if assigned.factor_name is not None:
        arrays = _scale_input(eqn, assigned, inputs, arrays)
    seen: States = {}
    with compat.within(eqn):
        if observing and any(assigned.observers):
            seen[assigned.name] = inputs.as_device_varying(
                tuple(
                    None if observer is None else observer.measure(x, arrays[2:], inputs.mask)
                    for x, observer in zip(
                        assigned.reorder_operands(arrays[:2]), assigned.observers, strict=True
                    )
                )
            )

        def plain() -> jax.Array:
            return compat.bind(eqn, arrays)[0]

        def quantized() -> jax.Array:
            return _apply_recipes(eqn, assigned, inputs, keys, arrays)

        is_on = None if state.switch is None else state.switch.on > 0
        y = quantized() if is_on is None else lax.cond(is_on, quantized, plain)
        if assigned.scored_recipes:
            y = _attach_scores(eqn, assigned, inputs, arrays, y)
    return y, seen


def _attach_scores(
    eqn: Any, assigned: Assigned, inputs: ProductInputs, arrays: Sequence[jax.Array], y: jax.Array
) -> jax.Array:
    """Returns a result whose cotangent gives scores to the recipes in `Assigned.scored_recipes`."""
    assert inputs.vectors is not None
    constants = [lax.stop_gradient(array) for array in arrays]
    errors = []
    for recipe in assigned.scored_recipes:
        candidate = dataclasses.replace(assigned, recipe=recipe, scored_recipes=())
        error = _apply_recipes(eqn, candidate, inputs, Keys(), constants) - lax.stop_gradient(y)
        errors.append(_without_padding(eqn, assigned, inputs, error.astype(jnp.float32)))
    return _with_scores(y, inputs.vectors[assigned.name], errors)


def _without_padding(
    eqn: Any, assigned: Assigned, inputs: ProductInputs, error: jax.Array
) -> jax.Array:
    """Returns the error of a result, with zeros for the tokens that the mask excludes.

    `ptq` checks the mask for all products that it solves. No score is shown for others.
    """
    input_index = int(assigned.swapped)
    free = contraction_of(eqn).axes[input_index].free
    lengths = tuple(eqn.invars[input_index].aval.shape[axis] for axis in free)
    if inputs.mask is None or inputs.mask.size != math.prod(lengths):
        return error
    outputs = (1,) * (error.ndim - len(lengths))
    shape = (*outputs, *lengths) if assigned.swapped else (*lengths, *outputs)
    return jnp.where(inputs.mask.reshape(shape), error, np.float32(0))


@jax.custom_vjp
def _with_scores(y: jax.Array, scores: jax.Array, errors: list[jax.Array]) -> jax.Array:
    """Returns y; the gradient of `scores` is the sum of (cotangent * error)^2 for each error.

    Where an error is 0, as for padding, the cotangent may be a NaN.
    """
    del scores, errors
    return y


def _scores_forward(y: jax.Array, scores: jax.Array, errors: list[jax.Array]) -> Any:
    del scores
    return y, errors


def _scores_backward(errors: list[jax.Array], cotangent: jax.Array) -> Any:
    wide = cotangent.astype(jnp.float32)
    products = [jnp.where(error == 0, error, wide * error) for error in errors]
    scores = jnp.stack([jnp.sum(jnp.square(product)) for product in products])
    return cotangent, scores, [jnp.zeros_like(error) for error in errors]


_with_scores.defvjp(_scores_forward, _scores_backward)


def _scale_input(
    eqn: Any, assigned: Assigned, inputs: ProductInputs, arrays: list[jax.Array]
) -> list[jax.Array]:
    """Returns the operands of a product with the input of its weight scaled and rotated."""
    assert inputs.vectors is not None
    assert assigned.factor_name is not None
    input_index = int(assigned.swapped)
    x, axes = arrays[input_index], contraction_of(eqn).axes[input_index]
    order = (*axes.batch, *axes.contract)
    factor = inputs.vectors[assigned.factor_name].reshape([x.shape[axis] for axis in order])
    factor = factor.transpose(tuple(np.argsort(order).tolist()))
    factor = jnp.expand_dims(factor, axes.free)
    with compat.within(eqn):
        scaled = x.astype(jnp.float32) * factor
        if assigned.rotation_block is not None:
            scaled = _rotate_blocks(scaled, axes.contract, assigned.rotation_block)
        scaled = scaled.astype(x.dtype)
    return [scaled if i == input_index else array for i, array in enumerate(arrays)]


def _rotate_blocks(x: jax.Array, axes: tuple[int, ...], length: int) -> jax.Array:
    """Returns the Hadamard transform of blocks along several axes, merged into one."""
    other_axes = tuple(axis for axis in range(x.ndim) if axis not in axes)
    order = (*other_axes, *axes)
    transposed = x.transpose(order)
    flat = transposed.reshape((*transposed.shape[: len(other_axes)], -1))
    signs = jnp.ones((length,), jnp.float32)
    flat = Hadamard(length).apply(flat, {flat.ndim - 1: length}, signs)
    return flat.reshape(transposed.shape).transpose(tuple(np.argsort(order).tolist()))


def _apply_recipes(
    eqn: Any, assigned: Assigned, inputs: ProductInputs, keys: Keys, arrays: list[jax.Array]
) -> jax.Array:
    """Returns the result of a product or look-up, with its recipes applied."""
    if assigned.experts is not None:
        stack_index = assigned.experts.operand
        with prefix_errors(assigned.where):
            stack = assigned.experts.quantized(eqn, arrays[stack_index])
        arrays = [stack if i == stack_index else x for i, x in enumerate(arrays)]
    state = inputs.product_states.get(assigned.name, ProductState())
    if assigned.table_recipe is not None:
        table, *indices = arrays

        def gather(table: jax.Array) -> jax.Array:
            return compat.bind(eqn, [table, *indices])[0]

        with prefix_errors(assigned.where):
            y = look_up(eqn, gather, table, assigned.table_recipe, keys.table)
    elif eqn.primitive.name == LOOK_UP or (assigned.recipe is None and state.row is None):
        y = compat.bind(eqn, arrays)[0]
    else:
        running = _bind_recipe(eqn, assigned, inputs, keys, arrays)
        first, second = running.operands
        if running.recipe.plain:
            y = compat.bind(eqn, arrays)[0]
        else:
            recipe, scales = running.recipe, running.scales
            y = product(running.operation, first, second, recipe, running.keys, scales)
        for history, recipe, x in zip(
            state.histories, assigned.delayed_per_tensor, (first, second, None), strict=True
        ):
            if history is not None and recipe is not None:
                y = record(y, history, recipe, x)
        if state.row is not None:
            with prefix_errors(assigned.where):
                y = record_row(y, state.row, running, assigned.output_recipe)
    if assigned.output_recipe is not None:
        with prefix_errors(assigned.where):
            y = fake_quant(y, assigned.output_recipe, key=keys.output)
    return y


def _bind_recipe(
    eqn: Any, assigned: Assigned, inputs: ProductInputs, keys: Keys, arrays: Sequence[jax.Array]
) -> Running:
    """Returns a product with its operands in the order of its recipe."""
    first, second = assigned.reorder_operands(arrays[:2])
    histories = inputs.product_states.get(assigned.name, ProductState()).histories
    scales = _scales(assigned, inputs.scales.get(assigned.name), histories)
    operation = operation_of(eqn, assigned.where, assigned.swapped, tuple(arrays[2:]))
    recipe = assigned.recipe or ProductRecipe()
    return Running(operation, (first, second), recipe, keys.product, scales)


def _scales(
    assigned: Assigned, calibrated: Any, histories: Sequence[History | None]
) -> PerProduct[Pair]:
    """Returns the scales of a product's operands from calibration or histories."""
    if calibrated is not None:
        return NO_SCALES._replace(forward=(calibrated[0], calibrated[1]))
    amaxes = [None if history is None else history.largest() for history in histories]

    def pair(recipes: Sequence[Recipe | None], tensors: Sequence[int]) -> Pair:
        first, second = (
            None if recipe is None else amaxes[tensor]
            for recipe, tensor in zip(recipes, tensors, strict=True)
        )
        return first, second

    return PerProduct(*map(pair, assigned.delayed_per_product, OPERANDS_OF_PRODUCT))
