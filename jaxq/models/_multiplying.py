"""Execution of one product by its assignment, with its keys, scales and histories."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq._jax.arithmetic import barrier
from jaxq._jax.draws import fold_in, one_of
from jaxq.models._adapting import adapter_product
from jaxq.models._assigning import TENSORS, Assigned, naming
from jaxq.models._looking_up import look_up
from jaxq.models._marks import MARK
from jaxq.models._operations import LOOK_UP, contraction_of, operation_of
from jaxq.models._programs import Extra, Records, States
from jaxq.models._stored_views import unpacked
from jaxq.models._streaming import streamed
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
    extra: Extra, eqns: Sequence[Any], products: Mapping[int, Assigned]
) -> dict[int, Keys]:
    """Returns the keys of products by equation, split together to save compile time."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, assigned in products.items():
        if extra.key is not None and assigned.draws:
            groups.setdefault(extra.differing_axes(eqns[i]), []).append(i)
    keys = dict.fromkeys(products, Keys())
    for axes, members in groups.items():
        product_keys = extra.folded(np.array([products[i].number for i in members]))
        for axis in axes:
            product_keys = fold_in(product_keys, extra.places[axis])
        split_keys: Any = keys_of(product_keys)
        for position, i in enumerate(members):
            assigned, product_key = products[i], one_of(product_keys, position)
            recipe_draws = assigned.recipe is not None and bool(assigned.recipe.draws)
            keys[i] = Keys(
                one_of(split_keys, position) if recipe_draws and assigned.table is None else None,
                product_key if recipe_draws and assigned.table is not None else None,
                fold_in(product_key, 0) if assigned.output_draws else None,
            )
    return keys


def multiply(
    eqn: Any,
    assigned: Assigned,
    extra: Extra,
    keys: Keys,
    operands: list[Any],
    observing: bool,
) -> tuple[jax.Array, States]:
    """Computes one product and its calibration states, or returns a marked array.

    Args:
      eqn: the product's equation.
      assigned: the product's assignment.
      extra: scales and records.
      keys: the product's keys.
      operands: arrays, with `StoredView`s for stored weights.
      observing: True to collect calibration states.
    """
    records = extra.records.get(assigned.name, Records())
    if eqn.primitive.name == MARK:
        (y,) = compat.bind(eqn, list(map(unpacked, operands)))
        assert records.row is not None
        with compat.within(eqn), naming(assigned.where):
            return record_array(y, records.row), {}
    adapter = records.adapter
    if adapter is None:
        return _multiplied(eqn, assigned, extra, keys, operands, observing)

    def base(operands: list[Any]) -> tuple[jax.Array, States]:
        # XLA must not dequantize a weight before the other operand is known.
        operands = list(barrier(tuple(operands)))
        return _multiplied(eqn, assigned, extra, keys, operands, observing)

    # Stored weights stay packed until the backward pass, which dequantizes them again.
    y, seen = jax.checkpoint(base)(operands)
    operation = operation_of(eqn, assigned.where, assigned.swapped)
    x, weight = assigned.order([unpacked(operand) for operand in operands[:2]])
    with compat.within(eqn):
        shape, arguments = jax.typeof(weight), [unpacked(operand) for operand in operands[2:]]
        adapter_output = adapter_product(operation.contraction, adapter, x, shape, arguments)
    return y + adapter_output.astype(y.dtype), seen


def _multiplied(
    eqn: Any,
    assigned: Assigned,
    extra: Extra,
    keys: Keys,
    operands: list[Any],
    observing: bool,
) -> tuple[jax.Array, States]:
    """Returns one product without its adapter, and its calibration states."""
    records = extra.records.get(assigned.name, Records())
    if not observing and records._replace(adapter=None) == Records():
        scales = _scales(assigned, extra.scales.get(assigned.name), records.histories)
        y = streamed(eqn, assigned, keys.product, scales, operands)
        if y is not None:
            return y, {}
    arrays = [unpacked(operand) for operand in operands]
    if assigned.factor is not None:
        arrays = _scaled(eqn, assigned, extra, arrays)
    seen: States = {}
    with compat.within(eqn):
        if observing and any(assigned.calibrated):
            seen[assigned.name] = extra.everywhere(
                tuple(
                    None if observer is None else observer.measure(x, arrays[2:], extra.mask)
                    for x, observer in zip(
                        assigned.order(arrays[:2]), assigned.calibrated, strict=True
                    )
                )
            )

        def plain() -> jax.Array:
            return compat.bind(eqn, arrays)[0]

        def quantized() -> jax.Array:
            return _quantized(eqn, assigned, extra, keys, arrays)

        is_on = None if records.switch is None else records.switch.on > 0
        y = quantized() if is_on is None else lax.cond(is_on, quantized, plain)
        if assigned.scored:
            y = _scored(eqn, assigned, extra, arrays, y)
    return y, seen


def _scored(
    eqn: Any, assigned: Assigned, extra: Extra, arrays: Sequence[jax.Array], y: jax.Array
) -> jax.Array:
    """Returns a result whose cotangent gives scores to the recipes in `Assigned.scored`."""
    assert extra.vectors is not None
    constants = [lax.stop_gradient(array) for array in arrays]
    errors = []
    for recipe in assigned.scored:
        candidate = dataclasses.replace(assigned, recipe=recipe, scored=())
        error = _quantized(eqn, candidate, extra, Keys(), constants) - lax.stop_gradient(y)
        errors.append(error.astype(jnp.float32))
    return _with_scores(y, extra.vectors[assigned.name], errors)


@jax.custom_vjp
def _with_scores(y: jax.Array, scores: jax.Array, errors: list[jax.Array]) -> jax.Array:
    """Returns y; the gradient of `scores` is the sum of (cotangent * error)^2 for each error."""
    del scores, errors
    return y


def _scores_forward(y: jax.Array, scores: jax.Array, errors: list[jax.Array]) -> Any:
    del scores
    return y, errors


def _scores_backward(errors: list[jax.Array], cotangent: jax.Array) -> Any:
    wide = cotangent.astype(jnp.float32)
    scores = jnp.stack([jnp.sum(jnp.square(wide * error)) for error in errors])
    return cotangent, scores, [jnp.zeros_like(error) for error in errors]


_with_scores.defvjp(_scores_forward, _scores_backward)


def _scaled(eqn: Any, assigned: Assigned, extra: Extra, arrays: list[jax.Array]) -> list[jax.Array]:
    """Returns the operands of a product with the input of its weight scaled and rotated."""
    assert extra.vectors is not None
    assert assigned.factor is not None
    input_index = int(assigned.swapped)
    x, axes = arrays[input_index], contraction_of(eqn).axes[input_index]
    order = (*axes.batch, *axes.contract)
    factor = extra.vectors[assigned.factor].reshape([x.shape[axis] for axis in order])
    factor = factor.transpose(tuple(np.argsort(order).tolist()))
    factor = jnp.expand_dims(factor, axes.free)
    with compat.within(eqn):
        scaled = x.astype(jnp.float32) * factor
        if assigned.rotated is not None:
            scaled = _rotated(scaled, axes.contract, assigned.rotated)
        scaled = scaled.astype(x.dtype)
    return [scaled if i == input_index else array for i, array in enumerate(arrays)]


def _rotated(x: jax.Array, axes: tuple[int, ...], length: int) -> jax.Array:
    """Returns the Hadamard transform of blocks along several axes, merged into one."""
    other_axes = tuple(axis for axis in range(x.ndim) if axis not in axes)
    order = (*other_axes, *axes)
    transposed = x.transpose(order)
    flat = transposed.reshape((*transposed.shape[: len(other_axes)], -1))
    signs = jnp.ones((length,), jnp.float32)
    flat = Hadamard(length).apply(flat, {flat.ndim - 1: length}, signs)
    return flat.reshape(transposed.shape).transpose(tuple(np.argsort(order).tolist()))


def _quantized(
    eqn: Any, assigned: Assigned, extra: Extra, keys: Keys, arrays: list[jax.Array]
) -> jax.Array:
    """Returns the result of a product or look-up, with its recipes applied."""
    if assigned.experts is not None:
        stack_index = assigned.experts.operand
        with naming(assigned.where):
            stack = assigned.experts.quantized(eqn, arrays[stack_index])
        arrays = [stack if i == stack_index else x for i, x in enumerate(arrays)]
    records = extra.records.get(assigned.name, Records())
    if assigned.table is not None:
        table, *indices = arrays

        def gather(table: jax.Array) -> jax.Array:
            return compat.bind(eqn, [table, *indices])[0]

        with naming(assigned.where):
            y = look_up(eqn, gather, table, assigned.table, keys.table)
    elif eqn.primitive.name == LOOK_UP or (assigned.recipe is None and records.row is None):
        y = compat.bind(eqn, arrays)[0]
    else:
        running = _running(eqn, assigned, extra, keys, arrays)
        first, second = running.operands
        if running.recipe.plain:
            y = compat.bind(eqn, arrays)[0]
        else:
            recipe, scales = running.recipe, running.scales
            y = product(running.operation, first, second, recipe, running.keys, scales)
        for history, recipe, x in zip(
            records.histories, assigned.delayed, (first, second, None), strict=True
        ):
            if history is not None and recipe is not None:
                y = record(y, history, recipe, x)
        if records.row is not None:
            with naming(assigned.where):
                y = record_row(y, records.row, running, assigned.output)
    if assigned.output is not None:
        with naming(assigned.where):
            y = fake_quant(y, assigned.output, key=keys.output)
    return y


def _running(
    eqn: Any, assigned: Assigned, extra: Extra, keys: Keys, arrays: Sequence[jax.Array]
) -> Running:
    """Returns a product with its operands in the order of its recipe."""
    first, second = assigned.order(arrays[:2])
    histories = extra.records.get(assigned.name, Records()).histories
    scales = _scales(assigned, extra.scales.get(assigned.name), histories)
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

    return PerProduct(*map(pair, assigned.delayable, TENSORS))
