"""Products of codes: native execution, and emulation of narrow accumulators.

Both multiply codes and apply the scales to the result, unless the scales vary along the
contraction. There is no fallback: unsupported cases raise an error.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.formats import FloatFormat, Format, IntFormat, get_format
from jaxq.numerics import decode
from jaxq.products._accumulation import Accumulation
from jaxq.products._contractions import Axes, Contraction
from jaxq.quantizers import Quantized, quantize
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe

__all__ = ["Codes", "DotOfCodes", "Operand", "check", "run"]

Codes = Callable[[jax.Array, jax.Array, Any], jax.Array]

_EXACT = 24  # Bits of the significand of float32.


class Operand(NamedTuple):
    """An operand before quantization, with its name in error messages."""

    name: str
    x: jax.Array
    recipe: Recipe | None
    key: jax.Array | None
    scales: Calibrated | None = None


@dataclasses.dataclass(frozen=True)
class DotOfCodes:
    """The `lax.dot_general` of a contraction, for operands of any dtype."""

    contraction: Contraction

    def __call__(self, lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any) -> jax.Array:
        """Returns the product, with its axes in the order of the result's labels."""
        left, right = self.contraction.axes
        numbers = ((left.contract, right.contract), (left.batch, right.batch))
        y = lax.dot_general(lhs, rhs, numbers, preferred_element_type=preferred_element_type)
        return self.ordered(y)

    def matrices(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Reshapes an operand, or its scales, to `[batch, free, contract]`."""
        sizes = [math.prod(x.shape[axis] for axis in part) for part in axes]
        return x.transpose([axis for part in axes for axis in part]).reshape(sizes)

    def ordered(self, y: jax.Array) -> jax.Array:
        """Transposes a result from (batch, free lhs, free rhs) axes to the order of the labels."""
        labels = _labels(self.contraction)
        return y.transpose([labels.index(label) for label in self.contraction.out])


def _labels(contraction: Contraction) -> list[int]:
    """Returns the labels of the batch axes, the free axes of lhs and the free axes of rhs."""
    left, right = contraction.axes
    lhs, rhs = contraction.lhs, contraction.rhs
    return [*(lhs[i] for i in (*left.batch, *left.free)), *(rhs[i] for i in right.free)]


def check(execution: Any, name: str, contraction: Contraction, codes: Codes | None) -> None:
    """Raises an error if an operation can never use an execution, whatever its operands."""
    if execution == "emulated":
        return
    execution_name = "execution='native'" if execution == "native" else "an Accumulation"
    if codes is None or (execution != "native" and not isinstance(codes, DotOfCodes)):
        raise ValueError(
            f"{name}: {execution_name} is not supported for this product. Use execution='emulated'."
        )
    shared_ndim = len(contraction.shared[0])
    if isinstance(codes, DotOfCodes) and any(
        len(a.contract) != shared_ndim for a in contraction.axes
    ):
        raise ValueError(
            f"{name}: {execution_name} cannot sum over an axis that only one operand has. Sum that "
            "operand over the axis first."
        )


def run(
    name: str,
    execution: Any,
    contraction: Contraction,
    codes: Codes | None,
    lhs: Operand,
    rhs: Operand,
) -> jax.Array:
    """Returns the float32 product of two operands, computed on their codes.

    Args:
      name: the name of the operation in error messages.
      execution: the execution, `"native"` or an `Accumulation`.
      contraction: the labels of the axes.
      codes: the product for arrays of codes.
      lhs: the first operand.
      rhs: the second operand.

    Raises:
      ValueError: if the execution does not support the operands.
    """
    assert codes is not None, "checked"
    operands = (lhs, rhs)
    if isinstance(execution, Accumulation):
        assert isinstance(codes, DotOfCodes), "checked"
        return _accumulated(name, execution, codes, operands)
    quantized = [_quantized(name, operand) for operand in operands]
    for operand, q in zip(operands, quantized, strict=True):
        if q.zero_point is not None:
            raise ValueError(
                f"{name}: {operand.name}: execution='native' multiplies codes and takes no zero "
                "point. Use a symmetric recipe."
            )
    has_inner_scales = [
        _lies_along(q, axes) for q, axes in zip(quantized, contraction.axes, strict=True)
    ]
    if all(has_inner_scales) and isinstance(codes, DotOfCodes):
        return _scaled_matmul(name, codes, operands, quantized)
    for operand, q, scaled_inside in zip(operands, quantized, has_inner_scales, strict=True):
        if scaled_inside:
            raise ValueError(
                f"{name}: {operand.name}: {q.recipe.granularity} puts scales along the "
                "contraction, which execution='native' takes only for both operands of a dot, in "
                "an MX format or NVFP4. Use PerTensor(), PerToken() or PerChannel()."
            )
    integer_flags = {isinstance(q.recipe.element, IntFormat) for q in quantized}
    if len(integer_flags) > 1:
        raise ValueError(
            f"{name}: execution='native' multiplies integers by integers and floats by floats, got "
            f"{' and '.join(q.recipe.element.name for q in quantized)}. Use formats of one kind."
        )
    lhs_codes, rhs_codes = (_narrow(name, o, q) for o, q in zip(operands, quantized, strict=True))
    preferred = jnp.int32 if integer_flags == {True} else jnp.float32
    y = codes(lhs_codes, rhs_codes, preferred).astype(jnp.float32)
    return _rescaled(y, contraction, [q.scales for q in quantized], quantized)


def _quantized(name: str, operand: Operand) -> Quantized:
    """Quantizes an operand; raises if its values are not codes times scales."""
    recipe = operand.recipe
    assert recipe is not None, "the recipe has checked it"
    if recipe.outliers is not None or recipe.scaling.zero_point == "minimum":
        feature = "outliers" if recipe.outliers is not None else "minima"
        raise ValueError(
            f"{name}: {operand.name}: only execution='emulated' multiplies a tensor with "
            f"{feature}, whose values are not codes times scales. Use it, or a recipe without them."
        )
    scales = {} if operand.scales is None else operand.scales._asdict()
    return quantize(operand.x, recipe, key=operand.key, **scales)


def _tensor_scale(q: Quantized) -> jax.Array | None:
    """Returns the tensor's second-level scale, or None."""
    return q.recipe.scaling.tensor_scale(q.second)


def _lies_along(q: Quantized, axes: Axes) -> bool:
    """Returns whether a quantized operand has more than one scale along the contraction."""
    return any(q.cut.counts[axis] != 1 for axis in axes.contract)


def _narrow(name: str, operand: Operand, q: Quantized) -> jax.Array:
    """Converts codes to the int8 or float8 dtype that backends multiply."""
    fmt = q.recipe.element
    if isinstance(fmt, IntFormat) and not fmt.fraction_bits and -128 <= fmt.min and fmt.max <= 127:
        codes = lax.bitcast_convert_type(q.unpack(), jnp.int8)
        unused = np.int8(8 - fmt.bits if fmt.signed else 0)
        return (codes << unused) >> unused  # Moves the sign to the top bit to extend it.
    if isinstance(fmt, FloatFormat) and fmt.dtype is not None and fmt.bits == 8 and fmt.signed:
        return lax.bitcast_convert_type(q.unpack(), fmt.dtype)
    raise ValueError(
        f"{name}: {operand.name}: execution='native' multiplies integers of at most 8 bits, or "
        f"float8 types that JAX has, got {fmt.name!r}. Use execution='emulated'."
    )


def _rescaled(
    y: jax.Array, contraction: Contraction, scales: list[Any], quantized: list[Any]
) -> jax.Array:
    """Multiplies a result by the scales of lhs and then by those of rhs."""
    labels = (contraction.lhs, contraction.rhs)
    for operand_labels, axes, scale, q in zip(
        labels, contraction.axes, scales, quantized, strict=True
    ):
        if scale is None:
            continue
        if scale.ndim:
            scale = _repeat(scale, q, (*axes.batch, *axes.free))
            scale = lax.squeeze(scale, axes.contract)
            result_axes = sorted((*axes.batch, *axes.free))
            order = [
                label
                for label in contraction.out
                if label in {operand_labels[i] for i in result_axes}
            ]
            scale = scale.transpose(
                [result_axes.index(operand_labels.index(label)) for label in order]
            )
            missing = [i for i, label in enumerate(contraction.out) if label not in order]
            scale = jnp.expand_dims(scale, missing)
        y = y * scale
    return y


def _repeat(scale: jax.Array, q: Quantized, axes: tuple[int, ...]) -> jax.Array:
    """Repeats scales along the given axes, to one scale per index or one for the whole axis."""
    for axis in axes:
        if scale.shape[axis] not in (1, q.shape[axis]):
            scale = jnp.repeat(scale, q.cut.block[axis], axis=axis)
            scale = lax.slice_in_dim(scale, 0, q.shape[axis], axis=axis)
    return scale


def _scaled_matmul(
    name: str, dot: DotOfCodes, operands: tuple[Operand, Operand], quantized: list[Quantized]
) -> jax.Array:
    """Multiplies operands with blocks along the contraction by `jax.nn.scaled_matmul`."""
    arguments = []
    for operand, q, axes in zip(operands, quantized, dot.contraction.axes, strict=True):
        element, scales = q.recipe.element, q.recipe.scale_format
        plain = q.recipe.scaling.second_level != "blocks"
        if element.dtype is None or scales.dtype is None or scales.bits != 8 or not plain:
            raise ValueError(
                f"{name}: {operand.name}: execution='native' takes blocks of an MX format or "
                f"NVFP4, got {element.name!r} with scales in {scales.name!r}. Use a recipe "
                "such as 'mxfp4'."
            )
        codes = q.unpack()
        if element.bits == 8:
            values = lax.bitcast_convert_type(codes, element.dtype)
        else:
            values = decode(codes, element).astype(element.dtype)
        scale = lax.bitcast_convert_type(q.scale, scales.dtype)
        for axis in (*axes.batch, *axes.free):
            scale = _repeat(scale, q, (axis,))
            scale = jnp.broadcast_to(
                scale, (*scale.shape[:axis], q.shape[axis], *scale.shape[axis + 1 :])
            )
        arguments.append((dot.matrices(values, axes), dot.matrices(scale, axes)))
    (lhs, lhs_scales), (rhs, rhs_scales) = arguments
    y = jax.nn.scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type=jnp.float32)
    y = dot.ordered(y.reshape(_shape(dot.contraction, operands)))
    return _rescaled(y, dot.contraction, [_tensor_scale(q) for q in quantized], quantized)


def _shape(contraction: Contraction, operands: tuple[Operand, Operand]) -> list[int]:
    """Returns the lengths of the batch axes, the free axes of lhs and the free axes of rhs."""
    left, right = contraction.axes
    lhs, rhs = (operand.x.shape for operand in operands)
    return [*(lhs[i] for i in (*left.batch, *left.free)), *(rhs[i] for i in right.free)]


def _accumulated(
    name: str, accumulation: Accumulation, dot: DotOfCodes, operands: tuple[Operand, Operand]
) -> jax.Array:
    """Returns the product summed by a narrow accumulator, without scales where possible."""
    arrays, scales, quantized, digits = [], [], [], []
    for operand, axes in zip(operands, dot.contraction.axes, strict=True):
        values, scale, q, precision = _terms(name, operand, axes)
        arrays.append(dot.matrices(values, axes))
        scales.append(scale)
        quantized.append(q)
        digits.append(precision)
    if sum(digits) > _EXACT:
        raise ValueError(
            f"{name}: an Accumulation needs operands whose products are exact in float32, got "
            f"{digits[0]} and {digits[1]} significant bits for {operands[0].name} and "
            f"{operands[1].name}, more than {_EXACT} together. Quantize both, for instance to "
            "'int8_token', or convert them to bfloat16."
        )
    y = accumulation.matmul(*arrays)
    y = dot.ordered(y.reshape(_shape(dot.contraction, operands)))
    return _rescaled(y, dot.contraction, scales, quantized)


def _terms(name: str, operand: Operand, axes: Axes) -> tuple[jax.Array, Any, Any, int]:
    """Returns the values to sum, the scale of the result, the codes, and the values' precision."""
    if operand.recipe is None:
        precision = _precision(get_format(operand.x.dtype))
        return operand.x.astype(jnp.float32), None, None, precision
    q = _quantized(name, operand)
    values, precision = decode(q.unpack(), q.recipe.element), _precision(q.recipe.element)
    if q.zero_point is not None:
        split = q.cut.split(values) - q.cut.align_scales(q.zero_point).astype(jnp.float32)
        values, precision = q.cut.merge(split), precision + 1
    if not _lies_along(q, axes):
        return values, q.scales, q, precision
    scale, tensor_scale, digits = q.scales, _tensor_scale(q), _EXACT
    scale_format, plain = q.recipe.scale_format, q.recipe.scaling.second_level != "blocks"
    if scale_format.bits < 32 and plain:
        scale, digits = decode(q.scale, scale_format), _precision(scale_format)
    digits = 0 if digits == 1 else digits  # Powers of two add no significant bits.
    values = q.cut.merge(q.cut.split(values) * q.cut.align_scales(scale))
    return values, tensor_scale, q, precision + digits


def _precision(fmt: Format) -> int:
    """Returns the number of significant bits of a format's values."""
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa_bits + 1
    significands = np.abs(np.frexp(fmt.values.astype(np.float32))[0]) * 2.0**_EXACT
    return max(_EXACT + 1 - (int(s) & -int(s)).bit_length() for s in significands if s)
