"""A traced function run once more, its products by their recipes.

Every equation is run as it is, but for products with a recipe and for what contains them. `jit`,
`checkpoint`, `scan`, `while`, `cond` and `shard_map` stay what they are: a scan over layers is one
scan, and its body is read once.

A function with derivatives of its own (`jax.custom_jvp`, `jax.custom_vjp`) is quantized within and
keeps its rule: its value is that of the quantized products, its derivative what the rule gives for
the operands as they were.
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

from jaxq.histories import History
from jaxq.quantized import Quantized
from jaxq.sharding import quantized_sharding
from jaxq.transforms import compat
from jaxq.transforms.multiplying import keys_for, multiply, unpacked
from jaxq.transforms.programs import Extra, Program, States, merged, of_all, unseen

__all__ = ["run"]


@dataclasses.dataclass(frozen=True)
class _Inside:
    """A program as a function; equal ones are compiled once."""

    program: Program
    depth: int
    observing: bool

    def __call__(self, extra: Extra, *operands: Any) -> tuple[list[Any], States]:
        return run(self.program, extra, operands, self.depth, self.observing)


def run(
    program: Program,
    extra: Extra,
    arguments: Sequence[Any],
    depth: int = 0,
    observing: bool = False,
) -> tuple[list[Any], States]:
    """Runs a program.

    Args:
      program: what to run.
      extra: key and scales.
      arguments: arrays, and `Quantized` in the place of stored weights.
      depth: how many scans it stands in.
      observing: whether states of calibration are gathered.

    Returns:
      The results, and the states by the products' names.
    """
    body = compat.body(program.jaxpr)
    products, inner = dict(program.products), dict(program.inner)
    values: dict[Any, Any] = dict(zip(body.constvars, body.consts, strict=True))
    values.update(zip(body.invars, arguments, strict=True))
    seen: States = {}

    def value(variable: Any) -> Any:
        return variable.val if compat.is_literal(variable) else values[variable]

    keys = keys_for(extra, body.eqns, products)
    for i, eqn in enumerate(body.eqns):
        operands = [value(variable) for variable in eqn.invars]
        if i in products:
            result, more = multiply(eqn, products[i], extra, keys[i], operands, observing)
            results = [result]
            seen |= more
        elif i in inner:
            handler = _INSIDE[eqn.primitive.name]
            with compat.within(eqn):
                own = extra.within(inner[i])
                results, more = handler(_Call(eqn, inner[i], own, operands, depth, observing))
            seen |= more
        elif eqn.primitive.name in compat.LAYOUTS and isinstance(operands[0], Quantized):
            results = [_laid_out(eqn, operands[0])]
        else:
            results = compat.bind(eqn, [unpacked(operand) for operand in operands])
        values.update(zip(eqn.outvars, results, strict=True))
    return [unpacked(value(variable)) for variable in body.outvars], seen


def _laid_out(eqn: Any, q: Quantized) -> Any:
    """A stored weight laid out over devices: packed, if its bytes divide, else as an array.

    So a weight that lies in parts and is gathered for its product moves in few bytes.
    """
    function, sharding = compat.layout_of(eqn)
    with contextlib.suppress(ValueError), compat.within(eqn):
        return function(q, quantized_sharding(q, sharding))
    return compat.bind(eqn, [unpacked(q)])[0]


class _Call(NamedTuple):
    """An equation with programs of its own, and what it is run on."""

    eqn: Any
    programs: tuple[Program, ...]
    extra: Extra
    operands: list[Any]
    depth: int
    observing: bool


def _around(call: _Call) -> tuple[list[Any], States]:
    """A `jit` or `checkpoint`."""
    eqn, programs, extra, operands, depth, observing = call
    return compat.call_inside(eqn, _Inside(programs[0], depth, observing))(extra, *operands)


@dataclasses.dataclass(frozen=True)
class _OnDevice(_Inside):
    """A program on one of the devices of a `shard_map`, over the axes of its mesh."""

    axes: tuple[str, ...]

    def __call__(self, extra: Extra, *operands: Any) -> tuple[list[Any], States]:
        places = {**extra.places, **{axis: lax.axis_index(axis) for axis in self.axes}}
        histories = jax.tree.map(lambda x: x[0], extra.histories)
        own = extra._replace(histories=histories, places=places)
        results, seen = super().__call__(own, *operands)
        return results, of_all(self.program, self.depth, jax.tree.map(self._gathered, seen))

    def _gathered(self, x: jax.Array) -> jax.Array:
        """What all devices have, along a leading axis: a sum, which all of them know."""
        place, count = lax.axis_index(self.axes), lax.axis_size(self.axes)
        return lax.psum(jnp.zeros((count, *x.shape), x.dtype).at[place].set(x), self.axes)


def _shard_map(call: _Call) -> tuple[list[Any], States]:
    eqn, programs, extra, operands, depth, observing = call
    devices = compat.devices_of(eqn)
    count = math.prod(devices.values())
    histories = {name: _spread(each, count) for name, each in extra.histories.items()}
    everywhere, one_each = cast("Any", (PartitionSpec(), PartitionSpec(tuple(devices))))
    specs = Extra(everywhere, everywhere, one_each, everywhere)
    on_device = _OnDevice(programs[0], depth, observing, tuple(devices))
    inside = compat.call_inside(eqn, on_device, specs)
    return inside(extra._replace(histories=histories), *map(unpacked, operands))


def _scan(call: _Call) -> tuple[list[Any], States]:
    eqn, programs, extra, operands, depth, observing = call
    inside, params = programs[0], eqn.params
    consts, count = compat.loop_counts(eqn)
    fixed, carried = operands[:consts], operands[consts : consts + count]
    slices = [x if _has_rows(x) else unpacked(x) for x in operands[consts + count :]]
    by_turn = {a.name for a in inside.all() if depth in a.stacked}
    scales = {name: s for name, s in extra.scales.items() if name not in by_turn}
    own = {name: s for name, s in extra.scales.items() if name in by_turn}
    histories = {
        name: each if name in by_turn else _spread(each, params["length"])
        for name, each in extra.histories.items()
    }
    numbers = jnp.arange(params["length"]) if inside.draws and extra.key is not None else None

    def turn(carry: list[Any], xs: Any) -> Any:
        number, rows, given, histories = xs
        key = None if number is None else extra.folded(number)
        results, seen = run(
            inside,
            Extra(key, {**scales, **given}, histories, extra.places),
            [*fixed, *carry, *rows],
            depth + 1,
            observing,
        )
        return results[:count], (results[count:], seen)

    carry, (rows, seen) = lax.scan(
        turn,
        [unpacked(x) for x in carried],
        (numbers, slices, own, histories),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    shared = {name: states for name, states in seen.items() if name not in by_turn}
    return [*carry, *rows], {**seen, **of_all(inside, depth + 1, shared)}


def _spread(histories: Sequence[History | None], count: int) -> tuple[History | None, ...]:
    return tuple(None if history is None else history.spread(count) for history in histories)


def _has_rows(x: Any) -> bool:
    """Whether a stored weight can be taken apart along its leading axis."""
    return isinstance(x, Quantized) and x.ndim > len(x.block)


def _while(call: _Call) -> tuple[list[Any], States]:
    eqn, programs, extra, operands, depth, observing = call
    test, inside = programs
    conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_turn = operands[:conds], operands[conds : conds + bodies]
    extra = extra._replace(histories={})  # They would see nothing.

    def going(state: Any) -> jax.Array:
        return run(test, extra, [*of_test, *state[1]], depth, False)[0][0]

    def turn(state: Any) -> Any:
        number, carry, before = state
        key = None if extra.key is None else extra.folded(number)
        arguments = [*of_turn, *carry]
        results, seen = run(inside, extra._replace(key=key), arguments, depth, observing)
        return number + 1, results, merged(inside, depth, before, seen)

    start = [unpacked(x) for x in operands[conds + bodies :]]
    state = (jnp.int32(0), start, unseen([inside], extra, depth) if observing else {})
    _, results, seen = lax.while_loop(going, turn, state)
    return results, seen


def _cond(call: _Call) -> tuple[list[Any], States]:
    _, programs, extra, operands, depth, observing = call

    def branch(inside: Program) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            results, seen = run(inside, extra, operands, depth, observing)
            others = unseen(programs, extra, depth) if observing else {}
            return results, {**others, **seen}

        return call

    index, *rest = operands
    return lax.switch(index, [branch(inside) for inside in programs], *rest)


def _custom(call: _Call) -> tuple[list[Any], States]:
    """A function with a derivative of its own: the value is quantized, the derivative its own."""
    eqn, programs, extra, operands, depth, observing = call
    extra = extra._replace(histories={})  # They would see nothing.
    arrays = [unpacked(operand) for operand in operands]
    seen: States = {}
    if observing:
        seen = run(programs[0], extra, [lax.stop_gradient(x) for x in arrays], depth, True)[1]

    def original(*arrays: Any) -> list[Any]:
        return compat.bind(eqn, arrays)

    def quantized(extra: Extra, *arrays: Any) -> list[Any]:
        return run(programs[0], extra, arrays, depth)[0]

    if eqn.primitive.name == "custom_jvp_call":
        function: Any = jax.custom_jvp(quantized)

        @function.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            return function(*primals), jax.jvp(original, primals[1:], tangents[1:])[1]
    else:
        function = jax.custom_vjp(quantized)

        def forward(extra: Extra, *arrays: Any) -> Any:
            return quantized(extra, *arrays), jax.vjp(original, *arrays)[1]

        function.defvjp(forward, lambda pull, cotangents: (None, *pull(cotangents)))
    return function(extra, *arrays), seen


_INSIDE: MappingProxyType[str, Callable[..., tuple[list[Any], States]]] = MappingProxyType(
    {
        **dict.fromkeys(compat.AROUND, _around),
        "shard_map": _shard_map,
        "scan": _scan,
        "while": _while,
        "cond": _cond,
        "custom_jvp_call": _custom,
        "custom_vjp_call": _custom,
    }
)
