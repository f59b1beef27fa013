"""Functions that stay a single equation of a traced program under all transformations.

JAX splits a function that is differentiated, and hoists loop-invariant parts out of loops: in the
gradient of a scan, every `where` with a constant becomes an array of the tensor's size that is read
from memory in each iteration. Code without a derivative does not need this: as a single equation it
is traced once, and neither copied nor split.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

# At the top: `jax.extend` imports Pallas, and an import of Pallas while a function is traced makes
# JAX 0.12 compile that function again at its next call. See `test_first_program_compiles_once`.
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval

__all__ = ["by_platform", "checked_inside", "opaque"]

Function = Callable[..., jax.Array]


def opaque(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function as a single equation without a derivative.

    Args:
      function: a function of trees of arrays that returns a tree of arrays, and does not close over
        traced arrays.
      arguments: the arguments of the function, with `jax.lax.stop_gradient` applied to those that
        are differentiated.
    """
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _opaque().bind(*jax.tree.leaves(arguments), call_jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def by_platform(cpu: Function, default: Function, *operands: jax.Array) -> jax.Array:
    """Calls one function on CPU and another elsewhere.

    The choice is made when a program is lowered. `jax.lax.platform_dependent` would trace both
    functions at every call and emit a conditional.

    Args:
      cpu: an elementwise function of arrays of the same shape and dtype that returns that dtype,
        used on CPU.
      default: a function with the same results, used on other platforms.
      operands: the arrays.
    """
    return _by_platform().bind(*operands, cpu=cpu, default=default)


def checked_inside(primitive: Any, function: Callable[..., Callable[..., Any]]) -> None:
    """Makes `jax.experimental.checkify` check the computation of a primitive as it does for `jit`.

    Args:
      primitive: the primitive.
      function: maps the parameters of an equation to a function of its operands.
    """
    from jax._src.checkify import error_checks  # The rules are not public.

    def rule(*arguments: Any, **params: Any) -> Any:
        # A context (JAX 0.12 only), the error so far, the enabled errors and the operands.
        first = next(i for i, a in enumerate(arguments) if isinstance(a, frozenset)) + 1
        leading, operands = arguments[:first], arguments[first:]
        closed: Any = jax.make_jaxpr(jax.jit(function(**params)))(*operands)
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(closed.jaxpr.invars, operands, strict=True))
        (eqn,) = closed.jaxpr.eqns
        inputs = [v.val if hasattr(v, "val") else values[v] for v in eqn.invars]
        error, results = error_checks[eqn.primitive](*leading, *inputs, **eqn.params)
        values.update(zip(eqn.outvars, results, strict=True))
        results = [values[v] for v in closed.jaxpr.outvars]
        return error, results if primitive.multiple_results else results[0]

    error_checks[primitive] = rule


@functools.cache
def _opaque() -> Any:
    """Returns the primitive with its rules."""
    primitive = Primitive("jaxq_opaque")
    primitive.multiple_results = True
    primitive.def_impl(_apply)
    primitive.def_abstract_eval(lambda *_, call_jaxpr: call_jaxpr.out_avals)
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, _lower)
    # Results that no one uses are not lowered.
    partial_eval.dce_rules[primitive] = partial_eval.dce_jaxpr_closed_call_rule
    checked_inside(primitive, lambda **params: functools.partial(_apply, **params))
    return primitive


def _apply(*operands: Any, call_jaxpr: Any) -> list[Any]:
    return jaxpr_as_fun(call_jaxpr)(*operands)


def _lower(context: Any, *operands: Any, call_jaxpr: Any) -> Any:
    # `mlir.lower_fun` would trace the jaxpr once more.
    return mlir.core_call_lowering(context, *operands, name="opaque", call_jaxpr=call_jaxpr)


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, call_jaxpr: Any
) -> tuple[Any, list[int]]:
    function = jax.vmap(functools.partial(_apply, call_jaxpr=call_jaxpr), in_axes=tuple(axes))
    results = opaque(function, *operands)
    return results, [0] * len(results)


@functools.cache
def _by_platform() -> Any:
    """Returns the primitive with its rules."""
    primitive = Primitive("jaxq_by_platform")
    primitive.def_impl(_either)
    primitive.def_abstract_eval(lambda x, *_, **__: x.update(weak_type=False))
    batching.primitive_batchers[primitive] = _batch_each
    ad.primitive_jvps[primitive] = _jvp
    for platform in (None, "cpu"):
        rule = mlir.lower_fun(functools.partial(_only, platform or "default"), False)
        mlir.register_lowering(primitive, rule, platform=platform)
    checked_inside(primitive, lambda **functions: functools.partial(_either, **functions))
    return primitive


def _batch_each(
    operands: Sequence[Any], axes: Sequence[Any], **functions: Function
) -> tuple[jax.Array, int]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batched = (batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True))
    return _by_platform().bind(*batched, **functions), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **functions: Function) -> Any:
    moved = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(_either, **functions), tuple(primals), moved)


def _either(*operands: jax.Array, cpu: Function, default: Function) -> jax.Array:
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def _only(platform: str, *operands: jax.Array, **functions: Function) -> jax.Array:
    return functions[platform](*operands)
