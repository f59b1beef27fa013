"""Runs the programs of other platforms on this machine, by StableHLO's reference interpreter.

JAX lowers a function for any platform on any machine. The interpreter, which is part of jaxlib,
evaluates the lowered program one operation at a time with IEEE semantics: nothing is fused,
reordered or rewritten, and subnormals are not flushed. It shares no code with XLA.

Processors are less exact. A program can also be run with *weak* arithmetic, which does to float32
what some processor or compiler does:

- subnormals count as zero;
- quotients and square roots are off by two ulps, in either direction;
- a maximum or minimum of which one operand is NaN is the other operand, and of zeros of both signs
  the wrong one;
- a product that is added to something is not rounded before the addition;
- sums of several numbers, also those of a matrix product, are added in the reverse order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

__all__ = ["Program"]

# Operations that may count subnormals as zero. Others, such as `select`, `negate` and
# `bitcast_convert`, only move or change bits.
_ARITHMETIC = {
    f"stablehlo.{name}"
    for name in (
        *("add", "subtract", "multiply", "divide", "remainder", "dot_general", "sqrt"),
        *("floor", "ceil", "round_nearest_afz", "round_nearest_even", "convert"),
        *("clamp", "compare", "maximum", "minimum", "sign"),
    )
}

# Operations that only move elements, which compilers compute in the same loop as their operand.
_MOVES = {
    f"stablehlo.{name}" for name in ("broadcast_in_dim", "negate", "reshape", "slice", "transpose")
}

_LEGALIZE = "builtin.module(func.func(chlo-legalize-to-stablehlo))"
stablehlo.register_stablehlo_passes()


class Program:
    """A function traced for given arguments, to be lowered and run for several platforms.

    Args:
      function: a function of trees of arrays that returns a tree of arrays.
      arguments: trees of arrays.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        leaves, tree = jax.tree.flatten(arguments)
        dtypes = [np.asarray(leaf).dtype for leaf in leaves]
        self._inputs = [np.asarray(_plain(leaf)) for leaf in leaves]

        def call(*plain: jax.Array) -> Any:
            given = [_restored(a, dtype) for a, dtype in zip(plain, dtypes, strict=True)]
            return function(*jax.tree.unflatten(tree, given))

        def flat(*plain: jax.Array) -> list[jax.Array]:
            return [_plain(leaf) for leaf in jax.tree.leaves(call(*plain))]

        self._result = jax.eval_shape(call, *self._inputs)
        self._traced = jax.jit(_used(flat, *self._inputs), keep_unused=True).trace(*self._inputs)

        self._modules: dict[str, ir.Module] = {}

    def lowered(self, platform: str) -> ir.Module:
        """Returns the StableHLO program that is given to XLA on a platform."""
        if platform not in self._modules:
            lowered = self._traced.lower(lowering_platforms=(platform,))
            module = lowered.compiler_ir("stablehlo")
            with module.context:  # Expands `square`, `top_k` and other composed operations.
                PassManager.parse(_LEGALIZE).run(module.operation)
            self._modules[platform] = module
        return self._modules[platform]

    def text(self, platform: str) -> str:
        """Returns the program for a platform as text, without source lines."""
        return str(self.lowered(platform).body)

    def operations(self, platform: str) -> Iterator[Any]:
        """Yields all operations of the program for a platform, those of nested regions included."""
        yield from _operations(self.lowered(platform).operation)

    def run(self, platform: str, *, weak: bool = False) -> Any:
        """Returns the results of the program for a platform, computed by the interpreter.

        Args:
          platform: the platform for which the program is lowered.
          weak: True for weak arithmetic, False for that of IEEE 754.
        """
        module = self.lowered(platform)
        with module.context, ir.Location.unknown():
            if weak:
                _inline(self._modules.pop(platform))
                _weaken(module)
            outputs = stablehlo.eval_module(module, [_attribute(a) for a in self._inputs])
        leaves, tree = jax.tree.flatten(self._result)
        results = [_typed(np.array(a), like) for a, like in zip(outputs, leaves, strict=True)]
        return jax.tree.unflatten(tree, results)


def _plain(x: Any) -> Any:
    """Returns an array of a dtype that NumPy and MLIR share: bfloat16 and booleans as integers."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _restored(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the array of which `_plain` returned x, while a function is traced."""
    if dtype == jnp.bool_:
        return x != np.uint8(0)
    return lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x


def _typed(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns the array of which `_plain` returned x, as a NumPy array."""
    return x.view(like.dtype).reshape(like.shape)


def _attribute(x: np.ndarray) -> ir.Attribute:
    """Returns an array as a constant of MLIR."""
    width = 8 * x.dtype.itemsize
    if x.dtype.kind == "f":
        kind = {16: ir.F16Type, 32: ir.F32Type, 64: ir.F64Type}[width].get()
    elif x.dtype.kind == "u":
        kind = ir.IntegerType.get_unsigned(width)
    else:
        kind = ir.IntegerType.get_signless(width)
    tensor = ir.RankedTensorType.get(x.shape, kind)
    return ir.DenseElementsAttr.get(np.ascontiguousarray(x), type=tensor)


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _used(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns a function without the operations whose results are not used, as XLA removes them."""
    program: Any = jax.make_jaxpr(function)(*arguments)
    count = len(program.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * count, instantiate=True)
    return jaxpr_as_fun(program.replace(jaxpr=jaxpr))


def _inline(module: ir.Module) -> None:
    """Replaces all calls by the operations of the called functions, as compilers do."""
    functions = {f.operation.attributes["sym_name"].value: f for f in module.body.operations}
    main = functions.pop("main").operation
    while calls := [o for o in _operations(main) if o.name == "func.call"]:
        for call in calls:
            called = functions[call.attributes["callee"].value].regions[0].blocks[0]
            known = dict(zip(called.arguments, call.operands, strict=True))
            *operations, end = called.operations
            with ir.InsertionPoint(call):
                for operation in operations:
                    copy = operation.operation.clone()
                    for inner in (copy, *_operations(copy)):
                        for i, operand in enumerate(inner.operands):
                            if operand in known:
                                inner.operands[i] = known[operand]
                    known.update(zip(operation.operation.results, copy.results, strict=True))
            for result, value in zip(call.results, end.operation.operands, strict=True):
                result.replace_all_uses_with(known[value])
            call.erase()
    for function in functions.values():
        function.operation.erase()


def _weaken(module: ir.Module) -> None:
    """Replaces the float32 arithmetic of a program by weak arithmetic."""
    for operation in list(_operations(module.operation)):
        with ir.InsertionPoint(operation):
            if operation.name in ("stablehlo.add", "stablehlo.subtract"):
                _fuse(operation)
            elif operation.name in ("stablehlo.reduce", "stablehlo.dot_general"):
                _reverse(operation)
    for operation in list(_operations(module.operation)):
        if operation.name not in _ARITHMETIC:
            continue
        with ir.InsertionPoint(operation):
            for i, operand in enumerate(operation.operands):
                if _is_float32(operand):
                    operation.operands[i] = _flushed(operand)
        if _is_float32(operation.result):
            users = list(operation.result.uses)
            with ir.InsertionPoint.after(operation):
                result = _flushed(_weakened(operation))
            for use in users:
                use.owner.operands[use.operand_number] = result


def _fuse(operation: Any) -> None:
    """Makes an addition or subtraction take its first product unrounded, as a fused one does."""
    if not _is_float32(operation.result):
        return
    exact = [_unrounded(operand) for operand in operation.operands]
    fused = next((i for i, value in enumerate(exact) if value is not None), None)
    if fused is None:
        return
    operands = [_double(operand) for operand in operation.operands]
    operands[fused] = exact[fused]
    function = stablehlo.add if operation.name == "stablehlo.add" else stablehlo.subtract
    result = stablehlo.convert(operation.result.type, function(*operands))
    operation.result.replace_all_uses_with(result)


def _double(value: ir.Value) -> ir.Value:
    """Adds a conversion to float64."""
    return stablehlo.convert(_with_element(value.type, ir.F64Type.get()), value)


def _unrounded(value: ir.Value) -> ir.Value | None:
    """Adds operations that compute a float32 product in float64; returns None for other values."""
    operation = value.owner
    name = getattr(operation, "name", None)  # Arguments are owned by a block.
    if name == "stablehlo.multiply":
        return stablehlo.multiply(*map(_double, operation.operands))
    inner = _unrounded(operation.operands[0]) if name in _MOVES else None
    if inner is None:
        return None
    attributes = {key: operation.attributes[key] for key in operation.attributes}
    double = _with_element(value.type, ir.F64Type.get())
    return ir.Operation.create(name, [double], [inner], attributes).result


def _reverse(operation: Any) -> None:
    """Reverses the elements that a reduction or a matrix product of float32 numbers adds."""
    if operation.name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
        axes = [numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions]
    else:
        count = len(operation.operands) // 2
        axes = [list(ir.DenseI64ArrayAttr(operation.attributes["dimensions"]))] * count
    if any(map(_is_float32, operation.results)):
        for i, reversed_axes in enumerate(axes):
            attribute = ir.DenseI64ArrayAttr.get(reversed_axes)
            operation.operands[i] = stablehlo.reverse(operation.operands[i], attribute)


def _weakened(operation: Any) -> ir.Value:
    """Adds operations that make the result of an operation weak, if it is not just flushed."""
    result, name = operation.result, operation.name.removeprefix("stablehlo.")
    if name in ("divide", "sqrt"):
        # Up or down, as the last bit of the first operand says.
        operand = stablehlo.bitcast_convert(_integers(result), operation.operands[0])
        last = stablehlo.and_(operand, _constant(result, 1))
        error = stablehlo.multiply(last, _constant(result, 4))
        error = stablehlo.subtract(error, _constant(result, 2))
        bits = stablehlo.bitcast_convert(_integers(result), result)
        weak = stablehlo.bitcast_convert(result.type, stablehlo.add(bits, error))
        zero = stablehlo.and_(bits, _constant(result, 2**31 - 1))
        return stablehlo.select(_compared("EQ", zero, _constant(result, 0)), result, weak)
    if name in ("maximum", "minimum"):
        a, b = operation.operands
        opposite = stablehlo.minimum if name == "maximum" else stablehlo.maximum
        result = stablehlo.select(_compared("EQ", a, b), opposite(a, b), result)
        for one, other in ((a, b), (b, a)):
            result = stablehlo.select(_compared("NE", one, one), other, result)
    return result


def _flushed(value: ir.Value) -> ir.Value:
    """Adds operations that replace subnormals by zeros of the same sign."""
    bits = stablehlo.bitcast_convert(_integers(value), value)
    exponent = stablehlo.and_(bits, _constant(value, 255 << 23))
    zero = stablehlo.and_(bits, _constant(value, -(1 << 31)))
    bits = stablehlo.select(_compared("EQ", exponent, _constant(value, 0)), zero, bits)
    return stablehlo.bitcast_convert(value.type, bits)


def _compared(direction: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return stablehlo.compare(a, b, stablehlo.ComparisonDirectionAttr.get(direction))


def _constant(like: ir.Value, bits: int) -> ir.Value:
    """Adds an int32 constant with the shape of a value."""
    kind = _integers(like)
    number = ir.IntegerAttr.get(kind.element_type, bits)
    return stablehlo.constant(ir.DenseElementsAttr.get_splat(kind, number))


def _integers(like: ir.Value) -> ir.RankedTensorType:
    """Returns the type of int32 tensors with the shape of a value."""
    return _with_element(like.type, ir.IntegerType.get_signless(32))


def _with_element(kind: ir.Type, element: ir.Type) -> ir.RankedTensorType:
    """Returns a type of tensors with another type of elements."""
    return ir.RankedTensorType.get(ir.RankedTensorType(kind).shape, element)


def _is_float32(value: ir.Value) -> bool:
    kind = value.type
    return isinstance(kind, ir.RankedTensorType) and isinstance(kind.element_type, ir.F32Type)
