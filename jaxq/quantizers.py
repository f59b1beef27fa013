"""Quantizers: a frozen recipe, the tensor it stores, and the same arithmetic without storing.

    x -> blocks -> range -> scale -> x / scale -> snap to the grid -> (codes ->) value * scale

`quantize` keeps codes and scales; `fake_quant` goes through without codes, bit for bit the same.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq import gradients
from jaxq.blocks import Cut
from jaxq.casting import as_dtype, cast, encode, floats, widen
from jaxq.catalog import get_format
from jaxq.codecs import decode, pack, unpack
from jaxq.formats import Format, IntFormat
from jaxq.gradients import get_gradient
from jaxq.grids import BinaryGrid
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer
from jaxq.scaling import (
    RANGES,
    SCALES,
    affine_scale,
    extrema,
    in_units,
    kept,
    times,
    two_level,
)

__all__ = ["Quantized", "dequantize", "fake_quant", "quantize"]

_FLOAT32 = get_format("float32")
_WHOLE_BYTES = (8, 16)  # Widths of codes that need no packing.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "tensor_scale", "zero_point"],
    meta_fields=["recipe", "dtype", "block", "length"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor: a pytree of packed codes and scales.

    Its arrays may have more leading axes than what was quantized, as `jax.vmap` gives them, or
    fewer of those, as `jax.lax.scan` takes them off again.

    Attributes:
      codes: the elements' codes, packed along the last axis as `jaxq.pack` does it; uint8, or
        uint16 for formats of 16 bits.
      scale: one a block, in the shape of the blocks: float32, or codes of the recipe's
        `scale_format` where that is another. `scales` has the values.
      tensor_scale: the float32 number that the scales are relative to, or None.
      zero_point: integers of the scale's shape, or None for a symmetric recipe.
      recipe: the recipe.
      dtype: the dtype of the tensor that was quantized.
      block: the length of a block on each axis.
      length: the length of the last axis; None for a scalar.
    """

    codes: jax.Array
    scale: jax.Array
    tensor_scale: jax.Array | None
    zero_point: jax.Array | None
    recipe: Quantizer
    dtype: np.dtype
    block: tuple[int, ...]
    length: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        leading = self.codes.shape[:-1]
        return leading if self.length is None else (*leading, self.length)

    @property
    def ndim(self) -> int:
        """Number of the tensor's axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, as held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def scales(self) -> jax.Array:
        """What the elements are multiplied by: the scales' values, float32."""
        held = self.recipe.held
        scales = self.scale if held == _FLOAT32 else decode(self.scale, held)
        if self.tensor_scale is None:
            return scales
        more = scales.ndim - self.tensor_scale.ndim
        return scales * self.tensor_scale.reshape(self.tensor_scale.shape + (1,) * more)

    @property
    def cut(self) -> Cut:
        """The blocks of the tensor."""
        more = self.ndim - len(self.block)
        return Cut(self.shape, (1,) * more + self.block[max(-more, 0) :])

    def unpack(self) -> jax.Array:
        """The codes, one an element, in the tensor's shape."""
        bits = self.recipe.element.bits
        if bits in _WHOLE_BYTES:
            return self.codes.reshape(self.shape)
        length = 1 if self.length is None else self.length
        return unpack(self.codes, bits, length).reshape(self.shape)

    def dequantize(self) -> jax.Array:
        """The tensor that the codes stand for: see `jaxq.dequantize`."""
        return dequantize(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a Quantized scalar.")
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Quantized":
        """The rows of an index or slice of the leading axis, still quantized.

        Raises:
          IndexError: the index is out of range.
          TypeError: the tensor has no leading axis beside the one along which it is packed.
          ValueError: a slice that cuts through blocks.
        """
        if self.ndim < 2:
            raise TypeError("Quantized: indexing needs at least two axes. Dequantize it first.")
        n, block, rest = self.shape[0], self.cut.block[0], self.cut.block[1:]
        if not isinstance(index, slice):
            at = operator.index(index)
            if not -n <= at < n:
                raise IndexError(f"Quantized: index {at} is out of range for {n} rows.")
            return self._rows(at % n, at % n // block, rest)
        start, stop, step = index.indices(n)
        if block == n:
            return self._rows(index, slice(None), (len(range(start, stop, step)), *rest))
        if block > 1 and (step != 1 or start % block or (stop % block and stop != n)):
            raise ValueError(
                f"Quantized: a slice must take whole blocks of {block} rows, got {index}."
            )
        blocks = index if block == 1 else slice(start // block, -(-stop // block))
        return self._rows(index, blocks, (block, *rest))

    def _rows(self, index: int | slice, blocks: int | slice, block: tuple[int, ...]) -> "Quantized":
        zero_point = None if self.zero_point is None else self.zero_point[blocks]
        tensor_scale = self.tensor_scale
        if tensor_scale is not None and tensor_scale.ndim:  # One for each of what vmap stacked.
            tensor_scale = tensor_scale[index]
        codes, scale = self.codes[index], self.scale[blocks]
        return Quantized(
            codes, scale, tensor_scale, zero_point, self.recipe, self.dtype, block, self.length
        )


def fake_quant(
    x: jax.typing.ArrayLike, recipe: "str | Format | Quantizer", *, key: jax.Array | None = None
) -> jax.Array:
    """Quantizes and dequantizes, differentiably: what `dequantize(quantize(x))` gives, to the bit.

    Args:
      x: float16, bfloat16 or float32 of any shape. Scales are computed in float32 from each.
      recipe: a `Quantizer`, a preset's name, or a format or its name, which means absmax scaling
        per tensor.
      key: a key of `jax.random` for a stochastic recipe, and only then.

    Returns:
      An array of x's shape and dtype. A block (the elements of one scale) that holds a NaN or an
      infinity is all NaN, and no other is; an all-zero block is zeros; an empty tensor is empty.

    Raises:
      TypeError: x is of another dtype.
      ValueError: an unknown recipe, an axis that x lacks, a block's length that does not divide
        one, or a key missing or not needed.

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
    return _fake_quant(array, key, recipe)


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
    fmt, cut = q.recipe.element, q.cut
    values = cut.split(decode(q.unpack(), fmt))
    if q.zero_point is not None:
        values = values - cut.spread(q.zero_point).astype(jnp.float32)
    y = times(values, cut.spread(q.scales), q.recipe.held)
    return cut.merge(as_dtype(y, q.dtype))


@functools.partial(jax.jit, static_argnames="recipe")
def _fake_quant(x: jax.Array, key: jax.Array | None, recipe: Quantizer) -> jax.Array:
    cut = recipe.cut(x.shape)
    split = cut.split(x)
    snapped = _snapped(lax.stop_gradient(split), key, recipe, cut)
    y = as_dtype(times(snapped.values, snapped.step, recipe.held), x.dtype)
    low, high = (as_dtype(end, x.dtype) for end in (snapped.low, snapped.high))
    return cut.merge(gradients.attach(get_gradient(recipe.gradient), y, split, low, high))


@functools.partial(jax.jit, static_argnames="recipe")
def _quantize(x: jax.Array, key: jax.Array | None, recipe: Quantizer) -> Quantized:
    cut, fmt = recipe.cut(x.shape), recipe.element
    values, scale, tensor_scale, zero_point, *_ = _snapped(cut.split(x), key, recipe, cut)
    codes = cut.merge(encode(values if zero_point is None else values + zero_point, fmt))
    codes = codes if x.ndim else codes[None]
    if fmt.bits not in _WHOLE_BYTES:
        codes = pack(codes, fmt.bits)
    scale = scale.reshape(cut.counts)
    if recipe.held != _FLOAT32:
        scale = encode(scale, recipe.held)
    if zero_point is not None:
        zero_point = zero_point.reshape(cut.counts).astype(_integer_dtype(fmt))
    length = x.shape[-1] if x.ndim else None
    return Quantized(codes, scale, tensor_scale, zero_point, recipe, x.dtype, cut.block, length)


class _Snapped(NamedTuple):
    """A split tensor in units of its scales, on the grid: what both ways share."""

    values: jax.Array  # The zero point is taken away.
    scale: jax.Array
    tensor_scale: jax.Array | None
    zero_point: jax.Array | None
    low: jax.Array  # The range that the scales cover.
    high: jax.Array

    @property
    def step(self) -> jax.Array:
        """What the values are multiplied by."""
        return self.scale if self.tensor_scale is None else kept(self.scale * self.tensor_scale)


def _snapped(x: jax.Array, key: jax.Array | None, recipe: Quantizer, cut: Cut) -> _Snapped:
    wide, fmt, held = widen(x), recipe.element, recipe.held
    units = functools.partial(in_units, scale_format=held, reciprocal=recipe.reciprocal)
    if recipe.symmetric:
        high = RANGES[recipe.range](wide, cut)
        low = -high if fmt.min < 0 else jnp.zeros_like(high)
        if recipe.tensor_scale:
            scale, tensor_scale = two_level(high, fmt, held)
        else:
            scale, tensor_scale = kept(SCALES[recipe.scale](high, fmt, held)), None
        snapped = _Snapped(wide, scale, tensor_scale, None, low, high)
        values = units(wide, snapped.step)
        values = cast(values, fmt, rounding=recipe.rounding, overflow="saturate", key=key)
        return snapped._replace(values=values)
    assert isinstance(fmt, IntFormat)  # The recipe has checked it.
    low, high = extrema(wide, cut)
    scale, zero_point = affine_scale(low, high, fmt, held)
    # Rounded first and the zero point added after: the other order rounds half to another side.
    lowest, highest = (np.float32(end) - zero_point for end in (fmt.min_int, fmt.max_int))
    inside = lax.max(units(wide, scale), jnp.broadcast_to(lowest, wide.shape))
    inside = lax.min(inside, jnp.broadcast_to(highest, wide.shape))
    values = cast(inside, _WHOLE, rounding=recipe.rounding, key=key)
    return _Snapped(values, scale, None, zero_point, low, high)


def _integer_dtype(fmt: Format) -> np.dtype:
    """The smallest integer dtype that holds the integers of a format."""
    return np.dtype(f"{'int' if fmt.min < 0 else 'uint'}{8 if fmt.bits <= 8 else 16}")


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
