"""Products of a program by what they were assigned: keys, scales and histories to each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxq import calibration
from jaxq.contractions import Contraction, of_conv, of_dot
from jaxq.draws import fold_in, one_of
from jaxq.execution import DotOfCodes
from jaxq.histories import History, record
from jaxq.products import Operation, Scales, keys_of, product
from jaxq.quantized import Quantized, dequantize
from jaxq.quantizers import fake_quant
from jaxq.transforms import compat
from jaxq.transforms.assigning import TENSORS, Assigned, naming
from jaxq.transforms.looking_up import look_up
from jaxq.transforms.programs import Extra, States
from jaxq.transforms.reading import LOOK_UP

__all__ = ["Keys", "keys_for", "multiply", "unpacked"]


def unpacked(x: Any) -> Any:
    """A stored weight as an array, each of its stacked layers by itself."""
    if not isinstance(x, Quantized):
        return x
    function = dequantize
    for _ in range(x.ndim - len(x.block)):
        function = jax.vmap(function)
    return function(x)


class Keys(NamedTuple):
    """The keys of one product: of its recipe, of the table that it looks up, of its result."""

    product: jax.Array | None = None
    table: jax.Array | None = None
    output: jax.Array | None = None


def keys_for(
    extra: Extra, eqns: Sequence[Any], products: Mapping[int, Assigned]
) -> dict[int, Keys]:
    """The keys of products by their equations, many made at once: to draw is much to compile."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, assigned in products.items():
        if extra.key is not None and assigned.draws:
            groups.setdefault(extra.apart(eqns[i]), []).append(i)
    found = dict.fromkeys(products, Keys())
    for axes, members in groups.items():
        own = extra.folded(np.array([products[i].number for i in members]))
        for axis in axes:
            own = fold_in(own, extra.places[axis])
        nine: Any = keys_of(own)
        for at, i in enumerate(members):
            assigned, first = products[i], one_of(own, at)
            recipe_draws = assigned.recipe is not None and bool(assigned.recipe.draws)
            found[i] = Keys(
                one_of(nine, at) if recipe_draws and assigned.table is None else None,
                first if recipe_draws and assigned.table is not None else None,
                fold_in(first, 0) if assigned.output_draws else None,
            )
    return found


def multiply(
    eqn: Any,
    assigned: Assigned,
    extra: Extra,
    keys: Keys,
    operands: list[Any],
    observing: bool,
) -> tuple[jax.Array, States]:
    """One product, and what calibration sees of it.

    Args:
      eqn: its equation.
      assigned: what it gets.
      extra: scales and histories.
      keys: its keys.
      operands: arrays, and `Quantized` in the place of stored weights.
      observing: whether states of calibration are gathered.
    """
    arrays = [unpacked(operand) for operand in operands]
    seen: States = {}
    with compat.within(eqn):
        if assigned.table is not None:
            table, *places = arrays

            def gather(table: jax.Array) -> jax.Array:
                return compat.bind(eqn, [table, *places])[0]

            with naming(assigned.where):
                y = look_up(eqn, gather, table, assigned.table, keys.table)
        elif eqn.primitive.name == LOOK_UP or assigned.recipe is None:
            y = compat.bind(eqn, arrays)[0]
        else:
            ordered = assigned.order(arrays)
            if observing and any(assigned.calibrated):
                seen[assigned.name] = extra.everywhere(
                    tuple(
                        None
                        if known is None
                        else calibration.update(calibration.init(*known), x, known[1])
                        for x, known in zip(ordered, assigned.calibrated, strict=True)
                    )
                )
            first, second = ordered
            histories = extra.histories.get(assigned.name, (None, None, None))
            scales = _scales(assigned, extra.scales.get(assigned.name), histories)
            y = product(
                _operation(eqn, assigned), first, second, assigned.recipe, keys.product, scales
            )
            for history, quantizer, x in zip(
                histories, assigned.delayed, (first, second, None), strict=True
            ):
                if history is not None and quantizer is not None:
                    y = record(y, history, quantizer, x)
        if assigned.output is not None:
            with naming(assigned.where):
                y = fake_quant(y, assigned.output, key=keys.output)
    return y, seen


def _scales(assigned: Assigned, given: Any, histories: Sequence[History | None]) -> Scales:
    """The scales of a product's operands that calibration or histories give."""
    if given is not None:
        return Scales((given[0], given[1]))
    amaxes = [None if history is None else history.largest() for history in histories]
    pairs = []
    for quantizers, tensors in zip(assigned.delayable, TENSORS, strict=True):
        first, second = (
            None if quantizer is None else amaxes[tensor]
            for quantizer, tensor in zip(quantizers, tensors, strict=True)
        )
        pairs.append((first, second))
    return Scales(*pairs)


def _operation(eqn: Any, assigned: Assigned) -> Operation:
    """A product's bilinear function, its operands in the recipe's order."""
    params, name = eqn.params, assigned.where
    names = ("lhs", "rhs")

    def function(*operands: jax.Array) -> jax.Array:
        return compat.bind(eqn, assigned.order(operands))[0]

    if eqn.primitive.name == "dot_general":
        ndims = (len(variable.aval.shape) for variable in eqn.invars)
        labels = of_dot(params["dimension_numbers"], *ndims)
        lhs, rhs = assigned.order((labels.lhs, labels.rhs))
        contraction = Contraction(lhs, rhs, labels.out)
        plain: Any = DotOfCodes(contraction)
        return Operation(name, assigned.order(names), function, contraction, plain)
    labels = of_conv(params["dimension_numbers"])
    lhs, rhs = assigned.order((labels.lhs, labels.rhs))
    contraction = Contraction(lhs, rhs, labels.out)
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1

    def codes(lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any) -> jax.Array:
        options = {**params, "preferred_element_type": preferred_element_type}
        first, second = assigned.order((lhs, rhs))
        return lax.conv_general_dilated(first, second, **options)

    plain = None if grouped else codes
    return Operation(name, assigned.order(names), function, contraction, plain, grouped)
