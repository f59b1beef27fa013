"""Barriers that keep XLA from fusing or repeating computations.

`jaxq._jax` lists the places that need one, each with the check that tells when it can go.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir.dialects import stablehlo

from jaxq._jax.opaque import checked_inside

__all__ = ["barrier", "barrier_on_cpu", "computed_once"]

# True if XLA on CPU removes barriers before it fuses kernels.
_REMOVES_BARRIERS = jax.__version_info__ < (0, 11)


def barrier(tree: Any) -> Any:
    """Returns a tree of arrays unchanged, which XLA neither computes again nor folds into its uses.

    With JAX 0.10, XLA on CPU removes barriers before it fuses kernels.
    """
    return lax.optimization_barrier(tree)


def barrier_on_cpu(tree: Any) -> Any:
    """Returns a tree of arrays unchanged, on CPU behind a `barrier`. Tangents have no barrier."""
    leaves, structure = jax.tree.flatten(tree)
    results = _barrier_on_cpu().bind(*leaves, lower=_lower_barrier)
    return jax.tree.unflatten(structure, results)


def computed_once(x: jax.Array) -> jax.Array:
    """Returns an array unchanged, which XLA on CPU computes once, in a kernel of its own.

    This is `barrier_on_cpu` where barriers suffice. With JAX 0.10, a kernel copies an array that is
    not computed. One NaN may become another one.
    """
    lower = _lower_division if _REMOVES_BARRIERS else _lower_barrier
    return _barrier_on_cpu().bind(x, lower=lower)[0]


@functools.cache
def _barrier_on_cpu() -> Any:
    """Returns the primitive with its rules."""
    primitive = Primitive("jaxq_barrier_on_cpu")
    primitive.multiple_results = True
    primitive.def_impl(_unchanged)
    primitive.def_abstract_eval(_unchanged)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, lambda _, *arrays, **__: arrays)
    mlir.register_lowering(primitive, lambda *args, lower: lower(*args), platform="cpu")
    checked_inside(primitive, lambda **_: _unchanged)
    return primitive


def _unchanged(*arrays: Any, **params: Any) -> list[Any]:
    del params
    return list(arrays)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return _barrier_on_cpu().bind(*primals, **params), list(tangents)


def _batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return _barrier_on_cpu().bind(*operands, **params), axes


def _lower_barrier(context: Any, *arrays: Any) -> Any:
    del context
    return stablehlo.OptimizationBarrierOp(arrays).results


def _lower_division(context: Any, x: Any) -> Any:
    return mlir.lower_fun(_divided, multiple_results=False)(context, x)


def _divided(x: jax.Array) -> jax.Array:
    """Returns floats of 16 or 32 bits, or bytes, unchanged by a division.

    XLA on CPU fuses no division or remainder into several uses, because it considers it expensive.
    For LLVM, bytes are divided by 1, and the remainder of bits by a larger number is a comparison.
    """
    if x.dtype == jnp.uint8:
        one = ((x & np.uint8(15)) >> np.uint8(4)) + np.uint8(1)
        return lax.div(x, one)
    dtype = np.uint32 if x.dtype == jnp.float32 else np.uint16
    largest = dtype(np.iinfo(dtype).max)
    bits = lax.min(lax.bitcast_convert_type(x, dtype), largest - dtype(1))
    return lax.bitcast_convert_type(lax.rem(bits, largest), x.dtype)
