"""The JAX primitives that multiply tensors: those that are quantized and those that are not.

`QUANTIZED` and `LEFT_ALONE` together name every primitive that contracts axes, solves a system,
decomposes a matrix or hides a kernel. `jaxq.explain` lists those in `LEFT_ALONE` with a reason.
Elementwise multiplications (`mul`, `cumprod`) are in neither. To add a primitive, add a line to one
of the two.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxq._jax import compat
from jaxq.products import Codes, Contraction, DotOfCodes, Operation, of_conv, of_dot, of_ragged_dot

__all__ = ["LEFT_ALONE", "LOOK_UP", "OPERATIONS", "QUANTIZED", "contraction_of", "operation_of"]

LOOK_UP = "gather"


class _OperationParts(NamedTuple):
    """The parts of an `Operation` that are derived from a primitive's parameters.

    Attributes:
      contraction: the labels of the operands' axes.
      codes: the product for arrays of codes, or None.
      grouped: True if the contraction is split into groups.
    """

    contraction: Contraction
    codes: Codes | None = None
    grouped: bool = False


def _dot(params: Mapping[str, Any], ndims: Sequence[int]) -> _OperationParts:
    contraction = of_dot(params["dimension_numbers"], *ndims)
    return _OperationParts(contraction, DotOfCodes(contraction))


def _conv(params: Mapping[str, Any], ndims: Sequence[int]) -> _OperationParts:
    del ndims
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1

    def codes(lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any) -> jax.Array:
        options = {**params, "preferred_element_type": preferred_element_type}
        return lax.conv_general_dilated(lhs, rhs, **options)

    return _OperationParts(
        of_conv(params["dimension_numbers"]), None if grouped else codes, grouped
    )


def _ragged_dot(params: Mapping[str, Any], ndims: Sequence[int]) -> _OperationParts:
    return _OperationParts(of_ragged_dot(params["ragged_dot_dimension_numbers"], *ndims))


QUANTIZED: MappingProxyType[str, Callable[[Mapping[str, Any], Sequence[int]], _OperationParts]] = (
    MappingProxyType(
        {"dot_general": _dot, "conv_general_dilated": _conv, "ragged_dot_general": _ragged_dot}
    )
)
OPERATIONS = (*QUANTIZED, LOOK_UP)

_SPARSE = "a sparse product, which is not quantized"
_SCALED = "a product whose operands have scales already"
_KERNEL = "a kernel that hides its products"
_SOLVE = "the solution of a linear system, which is not quantized"
_DECOMPOSITION = "a matrix decomposition, which is not quantized"
LEFT_ALONE: MappingProxyType[str, str] = MappingProxyType(
    {
        "bcoo_dot_general": _SPARSE,
        "bcoo_dot_general_sampled": _SPARSE,
        "bcoo_spdot_general": _SPARSE,
        "bcsr_dot_general": _SPARSE,
        "coo_matmat": _SPARSE,
        "coo_matvec": _SPARSE,
        "coo_spmm": _SPARSE,
        "coo_spmv": _SPARSE,
        "csr_matmat": _SPARSE,
        "csr_matvec": _SPARSE,
        "csr_spmm": _SPARSE,
        "csr_spmv": _SPARSE,
        "scaled_dot": _SCALED,
        "scaled_matmul": _SCALED,
        "scaled_matmul_wrapper": _SCALED,
        "call_exported": "an exported program, which cannot be changed",
        "dot_product_attention_bwd": _KERNEL,
        "dot_product_attention_bwd_wrapper": _KERNEL,
        "dot_product_attention_fp8_bwd": _KERNEL,
        "dot_product_attention_fp8_bwd_wrapper": _KERNEL,
        "dot_product_attention_fp8_fwd": _KERNEL,
        "dot_product_attention_fp8_fwd_wrapper": _KERNEL,
        "dot_product_attention_fwd": _KERNEL,
        "dot_product_attention_fwd_wrapper": _KERNEL,
        "ffi_call": _KERNEL,
        "io_callback": _KERNEL,
        "pallas_call": _KERNEL,
        "pure_callback": _KERNEL,
        "spsolve": _SOLVE,
        "triangular_solve": _SOLVE,
        "tridiagonal_solve": _SOLVE,
        "cholesky": _DECOMPOSITION,
        "cholesky_update": _DECOMPOSITION,
        "eig": _DECOMPOSITION,
        "eigh": _DECOMPOSITION,
        "geqp3": _DECOMPOSITION,
        "geqrf": _DECOMPOSITION,
        "hessenberg": _DECOMPOSITION,
        "lu": _DECOMPOSITION,
        "qr": _DECOMPOSITION,
        "schur": _DECOMPOSITION,
        "svd": _DECOMPOSITION,
        "tridiagonal": _DECOMPOSITION,
        "householder_product": "a product of reflections, which is not quantized",
        "ormqr": "a product of reflections, which is not quantized",
        "symmetric_product": "a product of a matrix with itself, which is not quantized",
        "fft": "a Fourier transform, which is not quantized",
    }
)


def contraction_of(eqn: Any) -> Contraction:
    """Returns the axis labels of an equation whose primitive is in `QUANTIZED`."""
    return _operation_parts(eqn).contraction


def _operation_parts(eqn: Any) -> _OperationParts:
    ndims = [len(variable.aval.shape) for variable in eqn.invars[:2]]
    return QUANTIZED[eqn.primitive.name](eqn.params, ndims)


def operation_of(
    eqn: Any, name: str, swapped: bool, arguments: tuple[jax.Array, ...] = ()
) -> Operation:
    """Returns the bilinear function of an equation, with its operands in the recipe's order.

    Args:
      eqn: an equation whose primitive is in `QUANTIZED`.
      name: the product's name in errors.
      swapped: True if the recipe's `rhs` is the equation's first operand.
      arguments: the equation's operands after the first two.
    """
    contraction, codes, grouped = _operation_parts(eqn)

    def function(first: jax.Array, second: jax.Array, *arguments: jax.Array) -> jax.Array:
        operands = (second, first) if swapped else (first, second)
        return compat.bind(eqn, [*operands, *arguments])[0]

    names = ("lhs", "rhs")
    if swapped:
        names, contraction = ("rhs", "lhs"), contraction.swapped
        codes = _swapped(codes, contraction)
    return Operation(name, names, function, contraction, codes, grouped, arguments)


def _swapped(codes: Codes | None, contraction: Contraction) -> Codes | None:
    """Returns the product for arrays of codes, with its operands swapped."""
    if codes is None or isinstance(codes, DotOfCodes):
        return codes and DotOfCodes(contraction)
    return lambda lhs, rhs, preferred_element_type: codes(rhs, lhs, preferred_element_type)
