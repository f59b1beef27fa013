"""Evaluation of a traced function with its products computed by their recipes.

Every equation is run unchanged, except for products with a recipe and equations that contain them.
`jit`, `checkpoint`, `scan`, `while`, `cond` and `shard_map` are preserved: a scan over layers is
one scan, and its body is read once.

A function with a custom derivative (`jax.custom_jvp`, `jax.custom_vjp`) is quantized inside and
keeps its rule: its value is that of the quantized products, and its derivative is that of the rule
for the original operands.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxq._jax import compat
from jaxq.models._assigning import widest
from jaxq.models._reading import CONVERSIONS, JOINS, VIEWS
from jaxq.models._running._multiply import keys_for, multiply
from jaxq.models._running._programs import (
    ProductInputs,
    Program,
    States,
    empty_states,
    merge_iterations,
    merge_states,
)
from jaxq.models._running._stored_views import StoredView, as_array
from jaxq.quantizers import Quantized, quantized_sharding

__all__ = ["run_program"]


@dataclasses.dataclass(frozen=True)
class _InnerProgram:
    """A program as a hashable function, so that `jit` compiles it only once."""

    program: Program
    depth: int
    observing: bool

    def __call__(self, inputs: ProductInputs, *operands: Any) -> tuple[list[Any], States]:
        return run_program(self.program, inputs, operands, self.depth, self.observing)

    def of(self, jaxpr: Any) -> "_InnerProgram":
        """Returns the function with another jaxpr in its program."""
        return dataclasses.replace(self, program=dataclasses.replace(self.program, jaxpr=jaxpr))


def run_program(
    program: Program,
    inputs: ProductInputs,
    arguments: Sequence[Any],
    depth: int = 0,
    observing: bool = False,
) -> tuple[list[Any], States]:
    """Runs a program.

    Args:
      program: the program to run.
      inputs: the key, the scales and the product states.
      arguments: arrays, with `StoredView`s for stored weights.
      depth: the number of scans around the program.
      observing: True to collect calibration states.

    Returns:
      The results, which may include views of stored weights, and the states by product name.
    """
    body = compat.body(program.jaxpr)
    products, inner = dict(program.products), dict(program.inner)
    values: dict[Any, Any] = dict(zip(body.constvars, body.consts, strict=True))
    values.update(zip(body.invars, arguments, strict=True))
    states: States = {}

    def value(variable: Any) -> Any:
        return variable.val if compat.is_literal(variable) else values[variable]

    keys = keys_for(inputs, body.eqns, products)
    for i, eqn in enumerate(body.eqns):
        operands = [value(variable) for variable in eqn.invars]
        if i in products:
            result, new_states = multiply(eqn, products[i], inputs, keys[i], operands, observing)
            results = [result]
            states |= new_states
        elif i in inner:
            handler = _RUNNERS[eqn.primitive.name]
            with compat.within(eqn):
                inner_inputs = inputs.within(inner[i])
                results, new_states = handler(
                    _InnerCall(eqn, inner[i], inner_inputs, operands, depth, observing)
                )
            states |= new_states
        elif any(isinstance(operand, StoredView) for operand in operands):
            results = _run_with_views(eqn, operands)
        else:
            results = compat.bind(eqn, operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [value(variable) for variable in body.outvars], states


def _run_with_views(eqn: Any, operands: list[Any]) -> list[Any]:
    """Returns the results of an equation with views of stored weights among its operands."""
    name, first = eqn.primitive.name, operands[0]
    if name == "optimization_barrier":
        return list(lax.optimization_barrier(tuple(operands)))
    if name in JOINS and all(isinstance(operand, StoredView) for operand in operands):
        arrays = [operand.array for operand in operands]
        dtype = widest([array.dtype for array in arrays])
        joined = compat.bind(eqn, [array.astype(dtype) for array in arrays])[0]
        return [StoredView(joined, first.dtype)]
    if name not in VIEWS or name in JOINS or not isinstance(first, StoredView):
        return compat.bind(eqn, [as_array(operand) for operand in operands])
    if name in CONVERSIONS:
        dtype = eqn.outvars[0].aval.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            return [dataclasses.replace(first, dtype=dtype)]
        return compat.bind(eqn, [as_array(first)])
    if name == "transpose":
        return [first.transpose(tuple(eqn.params["permutation"]))]
    in_order = first.permutation is None
    if name in compat.LAYOUTS and in_order and isinstance(first.data, Quantized):
        return [StoredView(_lay_out(eqn, first.data, first.array), first.dtype)]
    results = compat.bind(eqn, [first.array, *map(as_array, operands[1:])])
    return [StoredView(result, first.dtype) for result in results]


def _lay_out(eqn: Any, q: Quantized, array: jax.Array) -> Any:
    """Lays a stored weight out over devices: packed if its bytes divide, otherwise as an array.

    A weight that is sharded and gathered for its product therefore moves in few bytes.
    """
    function, sharding = compat.layout_of(eqn)
    with contextlib.suppress(ValueError), compat.within(eqn):
        return function(q, quantized_sharding(q, sharding))
    return compat.bind(eqn, [array])[0]


class _InnerCall(NamedTuple):
    """An equation with inner programs, and the inputs of its evaluation."""

    eqn: Any
    programs: tuple[Program, ...]
    inputs: ProductInputs
    operands: list[Any]
    depth: int
    observing: bool


def _run_wrapped_call(call: _InnerCall) -> tuple[list[Any], States]:
    """Runs a `jit` or `checkpoint`."""
    eqn, programs, inputs, operands, depth, observing = call
    inside = _WithArrays(programs[0], depth, observing)
    return compat.call_inside(eqn, inside)(inputs, *operands)


@dataclasses.dataclass(frozen=True)
class _WithArrays(_InnerProgram):
    """A program whose results are arrays or views of stored weights that hold arrays."""

    def __call__(self, inputs: ProductInputs, *operands: Any) -> tuple[list[Any], States]:
        results, seen = super().__call__(inputs, *operands)
        return [
            StoredView(x.array, x.dtype) if isinstance(x, StoredView) else x for x in results
        ], seen


@dataclasses.dataclass(frozen=True)
class _OnDevice(_InnerProgram):
    """A program on one of the devices of a `shard_map`, over the axes of its mesh."""

    axes: tuple[str, ...]

    def __call__(self, inputs: ProductInputs, *operands: Any) -> tuple[list[Any], States]:
        device_indices = {
            **inputs.device_indices,
            **{axis: lax.axis_index(axis) for axis in self.axes},
        }
        product_states = jax.tree.map(lambda x: x[0], inputs.product_states)
        device_inputs = inputs._replace(
            product_states=product_states, device_indices=device_indices
        )
        results, seen = super().__call__(device_inputs, *operands)
        return results, merge_iterations(
            self.program, self.depth, jax.tree.map(self._stack_devices, seen)
        )

    def _stack_devices(self, x: jax.Array) -> jax.Array:
        """Stacks the values of all devices along a leading axis, by a sum that all receive."""
        index, count = lax.axis_index(self.axes), lax.axis_size(self.axes)
        return lax.psum(jnp.zeros((count, *x.shape), x.dtype).at[index].set(x), self.axes)


def _run_shard_map(call: _InnerCall) -> tuple[list[Any], States]:
    eqn, programs, inputs, operands, depth, observing = call
    devices = compat.devices_of(eqn)
    count = math.prod(devices.values())
    product_states = {
        name: each.copies_for_loop(count) for name, each in inputs.product_states.items()
    }
    everywhere, one_each = cast("Any", (PartitionSpec(), PartitionSpec(tuple(devices))))
    specs = ProductInputs(
        key=everywhere,
        scales=everywhere,
        product_states=one_each,
        device_indices=everywhere,
        mask=everywhere,
        vectors=everywhere,
    )
    on_device = _OnDevice(programs[0], depth, observing, tuple(devices))
    inside = compat.call_inside(eqn, on_device, specs)
    return inside(inputs._replace(product_states=product_states), *map(as_array, operands))


def _run_scan(call: _InnerCall) -> tuple[list[Any], States]:
    eqn, programs, inputs, operands, depth, observing = call
    inside, params = programs[0], eqn.params
    consts, count = compat.loop_counts(eqn)
    constants, carried = operands[:consts], operands[consts : consts + count]
    slices = [x if _has_rows(x) else as_array(x) for x in operands[consts + count :]]
    keeps = _unchanged_carries(inside, consts, count)
    per_iteration = {a.name for a in inside.all() if depth in a.stacked}
    scales = {name: s for name, s in inputs.scales.items() if name not in per_iteration}
    iteration_scales = {name: s for name, s in inputs.scales.items() if name in per_iteration}
    product_states = {
        name: each if name in per_iteration else each.copies_for_loop(params["length"])
        for name, each in inputs.product_states.items()
    }
    stacked = {name for a in inside.all() if depth in a.stacked for name in a.vectors}
    vectors = inputs.vectors or {}
    stacked_vectors = {name: x for name, x in vectors.items() if name in stacked}
    numbers = jnp.arange(params["length"]) if inside.draws and inputs.key is not None else None

    def step(carry: list[Any], xs: Any) -> Any:
        number, rows, scales_now, product_states, own_vectors = xs
        key = None if number is None else inputs.folded_key(number)
        results, seen = run_program(
            inside,
            inputs._replace(
                key=key,
                scales={**scales, **scales_now},
                product_states=product_states,
                vectors={**vectors, **own_vectors},
            ),
            [*constants, *carry, *rows],
            depth + 1,
            observing,
        )
        return _unpack_carried(results[:count], keeps), (list(map(as_array, results[count:])), seen)

    carry, (rows, seen) = lax.scan(
        step,
        _unpack_carried(carried, keeps),
        (numbers, slices, iteration_scales, product_states, stacked_vectors),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    shared = {name: states for name, states in seen.items() if name not in per_iteration}
    return [*carry, *rows], {**seen, **merge_iterations(inside, depth + 1, shared)}


def _has_rows(x: Any) -> bool:
    """Returns whether a stored weight can be sliced along its leading axis."""
    if not isinstance(x, StoredView):
        return False
    if not isinstance(x.data, Quantized):
        return True
    return x.permutation is None and x.data.ndim > len(x.data.block)


def _unchanged_carries(inside: Program, consts: int, count: int) -> list[bool]:
    """Returns, for each carried value of a loop, whether the body leaves it unchanged."""
    body = compat.body(inside.jaxpr)
    pairs = zip(body.invars[consts : consts + count], body.outvars[:count], strict=True)
    return [before is after for before, after in pairs]


def _unpack_carried(values: Sequence[Any], keeps: Sequence[bool]) -> list[Any]:
    """Unpacks the carried values of a loop, except those that the loop leaves unchanged."""
    return [x if keep else as_array(x) for x, keep in zip(values, keeps, strict=True)]


def _run_while(call: _InnerCall) -> tuple[list[Any], States]:
    eqn, programs, inputs, operands, depth, observing = call
    test, inside = programs
    conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_step = operands[:conds], operands[conds : conds + bodies]
    inputs = inputs.without_training_records()

    def condition(state: Any) -> jax.Array:
        return as_array(run_program(test, inputs, [*of_test, *state[1]], depth, False)[0][0])

    def step(state: Any) -> Any:
        number, carry, earlier = state
        key = None if inputs.key is None else inputs.folded_key(number)
        arguments = [*of_step, *carry]
        results, seen = run_program(inside, inputs._replace(key=key), arguments, depth, observing)
        return (
            number + 1,
            _unpack_carried(results, keeps),
            merge_states(inside, depth, earlier, seen),
        )

    carried = operands[conds + bodies :]
    keeps = _unchanged_carries(inside, bodies, len(carried))
    start = _unpack_carried(carried, keeps)
    state = (jnp.int32(0), start, empty_states([inside], inputs, depth) if observing else {})
    _, results, seen = lax.while_loop(condition, step, state)
    return results, seen


def _run_cond(call: _InnerCall) -> tuple[list[Any], States]:
    _, programs, inputs, operands, depth, observing = call

    def branch(inside: Program) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            results, seen = run_program(inside, inputs, operands, depth, observing)
            others = empty_states(programs, inputs, depth) if observing else {}
            return list(map(as_array, results)), {**others, **seen}

        return call

    index, *rest = operands
    return lax.switch(index, [branch(inside) for inside in programs], *rest)


def _run_custom_call(call: _InnerCall) -> tuple[list[Any], States]:
    """Runs a function with a custom derivative: quantizes the value and keeps the derivative."""
    eqn, programs, inputs, operands, depth, observing = call
    inputs = inputs.without_training_records()
    arrays = [as_array(operand) for operand in operands]
    # Stored weights have no derivative.
    views = [operand if isinstance(operand, StoredView) else None for operand in operands]
    seen: States = {}
    if observing:
        constants = [lax.stop_gradient(x) for x in arrays]
        seen = run_program(programs[0], inputs, _replace_views(views, constants), depth, True)[1]

    def original(*arrays: Any) -> list[Any]:
        return compat.bind(eqn, arrays)

    def quantized(given: tuple[ProductInputs, list[Any]], *arrays: Any) -> list[Any]:
        results, _ = run_program(programs[0], given[0], _replace_views(given[1], arrays), depth)
        return list(map(as_array, results))

    if eqn.primitive.name == "custom_jvp_call":
        function: Any = jax.custom_jvp(quantized)

        @function.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            return function(*primals), jax.jvp(original, primals[1:], tangents[1:])[1]
    else:
        function = jax.custom_vjp(quantized)

        def forward(given: Any, *arrays: Any) -> Any:
            return quantized(given, *arrays), jax.vjp(original, *arrays)[1]

        function.defvjp(forward, lambda pull, cotangents: (None, *pull(cotangents)))
    return function((inputs, views), *arrays), seen


def _replace_views(views: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Returns the arrays, with the view of a stored weight in place of its array."""
    return [x if view is None else view for view, x in zip(views, arrays, strict=True)]


_RUNNERS: MappingProxyType[str, Callable[..., tuple[list[Any], States]]] = MappingProxyType(
    {
        **dict.fromkeys(compat.WRAPPED_CALLS, _run_wrapped_call),
        "shard_map": _run_shard_map,
        "scan": _run_scan,
        "while": _run_while,
        "cond": _run_cond,
        "custom_jvp_call": _run_custom_call,
        "custom_vjp_call": _run_custom_call,
    }
)
