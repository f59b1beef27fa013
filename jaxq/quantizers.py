"""Quantizers: a frozen recipe, the tensor it stores, and the same arithmetic without storing.

    x -> range -> scale -> x / scale -> snap to the grid -> (codes ->) value * scale

`quantize` keeps codes and scales; `fake_quant` goes through without codes, bit for bit the same.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq import gradients
from jaxq.casting import as_dtype, cast, encode, floats, widen
from jaxq.codecs import decode
from jaxq.formats import Format, IntFormat
from jaxq.gradients import get_gradient
from jaxq.grids import BinaryGrid
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer
from jaxq.scaling import absmax, affine_scale, divide, extrema, symmetric_scale

__all__ = ["Quantized", "dequantize", "fake_quant", "quantize"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point"],
    meta_fields=["recipe", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized tensor: a pytree of codes and scales.

    Attributes:
      codes: the elements' codes, uint8 or uint16, in the tensor's shape.
      scale: float32, the tensor's shape with 1 in the place of every reduced axis.
      zero_point: float32 whole numbers of the scale's shape, or None for a symmetric recipe.
      recipe: the recipe.
      dtype: the dtype of the tensor that was quantized.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    recipe: Quantizer
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points as held here (codes are not packed)."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self) -> jax.Array:
        """The tensor that the codes stand for: see `jaxq.dequantize`."""
        return dequantize(self)


def fake_quant(
    x: jax.typing.ArrayLike, recipe: "str | Format | Quantizer", *, key: jax.Array | None = None
) -> jax.Array:
    """Quantizes and dequantizes, differentiably: what `dequantize(quantize(x))` gives, to the bit.

    Args:
      x: float16, bfloat16 or float32 of any shape. Scales are float32 whatever the dtype.
      recipe: a `Quantizer`, a preset's name, or a format or its name, which means absmax scaling
        per tensor.
      key: a key of `jax.random` for a stochastic recipe, and only then.

    Returns:
      An array of x's shape and dtype. A group (the elements of one scale) that holds a NaN or an
      infinity is all NaN, and no other is; an all-zero group is zeros; an empty tensor is empty.

    Raises:
      TypeError: x is of another dtype.
      ValueError: an unknown recipe, an axis that x lacks, or a key missing or not needed.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> w = jnp.array([[0.11, -0.52], [0.7, 0.25]])
      >>> jaxq.fake_quant(w, "int4_channel")
      Array([[ 0.1       , -0.52      ],
             [ 0.7       ,  0.22285712]], dtype=float32)
      >>> jax.grad(lambda w: jaxq.fake_quant(w, "int4_channel").sum())(w)
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    array, recipe = _checked("fake_quant", x, recipe)
    y, low, high = _fake_quant(lax.stop_gradient(array), key, recipe)
    return gradients.attach(get_gradient(recipe.gradient), y, array, low, high)


def quantize(
    x: jax.typing.ArrayLike, recipe: "str | Format | Quantizer", *, key: jax.Array | None = None
) -> Quantized:
    """Quantizes a tensor to codes and scales.

    Args:
      x: as in `fake_quant`.
      recipe: as in `fake_quant`.
      key: as in `fake_quant`.

    Returns:
      A `Quantized`. It has no gradient; train through `fake_quant`.

    Raises:
      TypeError: as in `fake_quant`.
      ValueError: as in `fake_quant`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> q = jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor")
      >>> q.codes, float(q.scale[0])
      (Array([ 25, 206, 127], dtype=uint8), 0.019999999552965164)
    """
    array, recipe = _checked("quantize", x, recipe)
    return _quantize(lax.stop_gradient(array), key, recipe)


@jax.jit
def dequantize(q: Quantized) -> jax.Array:
    """The tensor that a `Quantized` stands for.

    Args:
      q: what `quantize` gave.

    Returns:
      An array of the original's shape and dtype.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> jaxq.dequantize(jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor"))
      Array([ 0.5 , -1.  ,  2.54], dtype=float32)
    """
    values = decode(q.codes, q.recipe.element)
    if q.zero_point is not None:
        values = values - q.zero_point
    return as_dtype(values * q.scale, q.dtype)


@functools.partial(jax.jit, static_argnames="recipe")
def _fake_quant(
    x: jax.Array, key: jax.Array | None, recipe: Quantizer
) -> tuple[jax.Array, jax.Array, jax.Array]:
    snapped = _snapped(x, key, recipe)
    y = as_dtype(snapped.values * snapped.scale, x.dtype)
    return y, as_dtype(snapped.low, x.dtype), as_dtype(snapped.high, x.dtype)


@functools.partial(jax.jit, static_argnames="recipe")
def _quantize(x: jax.Array, key: jax.Array | None, recipe: Quantizer) -> Quantized:
    values, scale, zero_point, *_ = _snapped(x, key, recipe)
    codes = encode(values if zero_point is None else values + zero_point, recipe.element)
    return Quantized(codes, scale, zero_point, recipe, x.dtype)


class _Snapped(NamedTuple):
    """A tensor in units of its scales, on the grid: what both ways share."""

    values: jax.Array  # The zero point is taken away.
    scale: jax.Array
    zero_point: jax.Array | None
    low: jax.Array  # The range that the scales cover.
    high: jax.Array


def _snapped(x: jax.Array, key: jax.Array | None, recipe: Quantizer) -> _Snapped:
    wide, fmt = widen(x), recipe.element
    if recipe.symmetric:
        amax = absmax(wide, recipe.granularity)
        scale = symmetric_scale(amax, fmt)
        values = cast(
            divide(wide, scale), fmt, rounding=recipe.rounding, overflow="saturate", key=key
        )
        low = -amax if fmt.min < 0 else jnp.zeros_like(amax)
        return _Snapped(values, scale, None, low, amax)
    assert isinstance(fmt, IntFormat)  # The recipe has checked it.
    low, high = extrema(wide, recipe.granularity)
    scale, zero_point = affine_scale(low, high, fmt)
    # Rounded first and the zero point added after: the other order rounds half to another side.
    inside = lax.max(
        divide(wide, scale), jnp.broadcast_to(np.float32(fmt.min_int) - zero_point, x.shape)
    )
    inside = lax.min(inside, jnp.broadcast_to(np.float32(fmt.max_int) - zero_point, x.shape))
    values = cast(inside, _WHOLE, rounding=recipe.rounding, key=key)
    return _Snapped(values, scale, zero_point, low, high)


# All whole numbers that float32 has without gaps.
_WHOLE = BinaryGrid(24, 24, 24, 2.0**24, 2.0**24, inf=False, nan=False, negative_zero=False)


def _checked(
    name: str, x: jax.typing.ArrayLike, recipe: str | Format | Quantizer
) -> tuple[jax.Array, Quantizer]:
    recipe = get_quantizer(recipe)
    array = floats(name, x)
    if array.dtype == jnp.float64:
        raise TypeError(
            f"{name}: `x` must be float16, bfloat16 or float32, as scales are float32, got "
            "float64. Convert it first: x.astype(jnp.float32)."
        )
    return array, recipe
