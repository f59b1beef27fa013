"""Barriers that keep XLA from fusing or repeating computations.

`jaxq._jax` lists the places that need one, each with the check that tells when it can go.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir.dialects import stablehlo

from jaxq._jax.opaque import checked_inside

__all__ = ["barrier", "barrier_on_cpu"]


def barrier(tree: Any) -> Any:
    """Returns a tree of arrays unchanged, which XLA neither computes again nor folds into its uses.

    XLA on CPU removes barriers before it fuses kernels with JAX 0.10, and afterwards with JAX 0.12.
    """
    return lax.optimization_barrier(tree)


def barrier_on_cpu(x: jax.Array) -> jax.Array:
    """Returns an array unchanged, on CPU behind a `barrier`. Its tangent has no barrier."""
    return _barrier_on_cpu().bind(x)


@functools.cache
def _barrier_on_cpu() -> Any:
    """Returns the primitive with its rules."""
    primitive = Primitive("jaxq_barrier_on_cpu")
    primitive.def_impl(_unchanged)
    primitive.def_abstract_eval(_unchanged)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, lambda _, x: [x])
    mlir.register_lowering(primitive, _lower, platform="cpu")
    checked_inside(primitive, lambda: _unchanged)
    return primitive


def _unchanged(x: Any) -> Any:
    return x


def _jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    return barrier_on_cpu(primals[0]), tangents[0]


def _batch(operands: Sequence[Any], axes: Sequence[Any]) -> tuple[Any, Any]:
    return barrier_on_cpu(operands[0]), axes[0]


def _lower(context: Any, x: Any) -> Any:
    del context
    return stablehlo.OptimizationBarrierOp([x]).results
