"""Functions that stay one equation of a traced program, whatever it is transformed to.

JAX takes a function apart that is differentiated, and moves what depends on no input of a loop out
of it: in the gradient of a scan every `where` with a constant becomes an array of the tensor's size
that is read from memory in each turn. What no derivative goes through need not be looked into: it
is traced once, and neither copied nor split.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.interpreters import ad, batching, mlir

__all__ = ["by_platform", "sealed"]

Function = Callable[..., jax.Array]


def sealed(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, as one equation without a derivative.

    Args:
      function: takes and returns trees of arrays, and closes over none that is traced.
      arguments: its arguments, `jax.lax.stop_gradient` around those that are differentiated.
    """
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _sealed().bind(*jax.tree.leaves(arguments), jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def by_platform(cpu: Function, default: Function, *operands: jax.Array) -> jax.Array:
    """One function on CPU and another elsewhere, as `jax.lax.platform_dependent` has it.

    That one traces both functions wherever it is met, and leaves XLA two branches to choose from.

    Args:
      cpu: one of arrays of one shape, number by number.
      default: its equal.
      operands: the arrays.
    """
    return _by_platform().bind(*operands, cpu=cpu, default=default)


@functools.cache
def _sealed() -> Any:
    """The primitive and its rules. Made at its first use: `jax.extend` brings Pallas with it."""
    from jax.extend.core import Primitive

    primitive = Primitive("jaxq_sealed")
    primitive.multiple_results = True
    primitive.def_impl(_apply)
    primitive.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_apply, multiple_results=True))
    return primitive


def _apply(*operands: Any, jaxpr: Any) -> list[Any]:
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(jaxpr)(*operands)


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: Any) -> tuple[Any, list[int]]:
    function = jax.vmap(functools.partial(_apply, jaxpr=jaxpr), in_axes=tuple(axes))
    results = sealed(function, *operands)
    return results, [0] * len(results)


@functools.cache
def _by_platform() -> Any:
    """The primitive and its rules."""
    from jax.extend.core import Primitive

    primitive = Primitive("jaxq_by_platform")
    primitive.def_impl(_either)
    primitive.def_abstract_eval(lambda *x, cpu, **_: jax.make_jaxpr(cpu)(*x).out_avals[0])
    batching.primitive_batchers[primitive] = _batch_each
    ad.primitive_jvps[primitive] = _jvp
    for platform in (None, "cpu"):
        rule = mlir.lower_fun(functools.partial(_only, platform or "default"), False)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _batch_each(
    operands: Sequence[Any], axes: Sequence[Any], **functions: Function
) -> tuple[jax.Array, int]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    spread = (batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True))
    return _by_platform().bind(*spread, **functions), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **functions: Function) -> Any:
    moved = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(_either, **functions), tuple(primals), moved)


def _either(*operands: jax.Array, cpu: Function, default: Function) -> jax.Array:
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def _only(platform: str, *operands: jax.Array, **functions: Function) -> jax.Array:
    return functions[platform](*operands)
