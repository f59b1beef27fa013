"""Tensors in ggml's block types: quantization, dequantization, and a pytree of packed bytes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.registry import Registry
from jaxq._ggml.blocks import FloatBlocks, in_chunks
from jaxq._ggml.searches import product, sums
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq._jax.arithmetic import divide
from jaxq._jax.serialization import pytree
from jaxq.gradients import passed
from jaxq.interop.gguf._k_types import SEARCHED
from jaxq.interop.gguf._layouts import LAYOUTS, Layout
from jaxq.interop.gguf._recipes import PACKED_RECIPES, pack
from jaxq.interop.gguf._small_types import SMALL, of_recipe
from jaxq.quantizers import Slices
from jaxq.quantizers import fake_quant as fake_quant_by_recipe
from jaxq.quantizers import quantize as quantize_by_recipe

__all__ = ["TYPES", "Packed", "dequantize", "fake_quant", "fallback", "quantize"]

TYPES: Registry[Layout] = Registry(
    "GGUF type",
    LAYOUTS,
    {"q2_k_s": "q2_k", "q3_k_m": "q3_k", "q4_k_m": "q4_k", "q4_k_s": "q4_k", "q5_k_m": "q5_k"},
)

_QUANTIZERS = {**SMALL, **SEARCHED}


@pytree(static=("type", "dtype"))
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in a block type of ggml, as the bytes of a GGUF file. A pytree with one array.

    Attributes:
      data: uint8 `[..., n / block · bytes per block]`.
      type: the name of the block type, in `jaxq.interop.gguf.TYPES`.
      dtype: the dtype of the dequantized tensor.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jaxq.interop import gguf
      >>> w = gguf.Packed(jnp.zeros((4, 144), jnp.uint8), "q4_k", np.dtype("float32"))
      >>> w.shape, 8 * w.nbytes / (4 * 256)  # 4.5 bits per element
      ((4, 256), 4.5)
    """

    data: jax.Array
    type: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        layout = TYPES.find(self.type)
        return (*self.data.shape[:-1], self.data.shape[-1] // layout.size * layout.block)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.data.nbytes

    @property
    def slices(self) -> Slices:
        """The tensor in slices of whole blocks, for `jaxq.products.stored_dot_general`."""
        layout, last = TYPES.find(self.type), self.data.ndim - 1

        def take(axis: int, start: Any, size: int) -> jax.Array:
            if axis == last:
                start = start // layout.block * layout.size
                size = size // layout.block * layout.size
            part = lax.dynamic_slice_in_dim(self.data, start, size, axis)
            return dequantize(part, self.type, self.dtype)

        return Slices(self.shape, self.dtype, (*(1,) * last, layout.block), take)

    def dequantize(self) -> jax.Array:
        """Returns the dequantized tensor; see `jaxq.interop.gguf.dequantize`."""
        return dequantize(self.data, self.type, self.dtype)


def quantize(
    x: jax.typing.ArrayLike, type: str, *, importance: jax.typing.ArrayLike | None = None
) -> Packed:
    """Quantizes a tensor to a block type of ggml, with the bytes that ggml writes.

    Blocks lie along the last axis, which products must contract: a weight is `[outputs, inputs]`.
    Transpose kernels `[inputs, outputs]`.

    The bytes equal those of ggml's C code compiled without fused multiplication and addition;
    compilers that fuse them change up to 2 % of the bytes of K-quants. In types with a search,
    blocks of magnitudes below about 1e-5 may get other codes, because products of their squares
    are subnormal, which XLA treats as 0. Elements that are not finite give unspecified codes in
    their block.

    Args:
      x: a float array `[..., n]`.
      type: a name in `jaxq.interop.gguf.TYPES`, such as `"q4_k"`.
      importance: the mean square of the input of each column, float32 `[n]`, or one such row for
        each index of the leading axes, as in an importance matrix of llama.cpp. Types without a
        search (`q8_0`, `mxfp4`, `nvfp4`, `tq1_0`, `tq2_0`) ignore it, as in ggml. Default: None.

    Returns:
      The packed tensor.

    Raises:
      ValueError: the type is unknown, or its block does not divide the last axis. `fallback`
        returns the type that llama.cpp then uses.
      TypeError: `x` is not a float16, bfloat16 or float32 array.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> q = jaxq.interop.gguf.quantize(jnp.linspace(-1, 1, 512).reshape(2, 256), "q4_k")
      >>> q.data.shape, q.shape
      ((2, 144), (2, 256))

    References:
      ggml's ggml-quants.c.
    """
    x = jnp.asarray(x)
    layout = TYPES.find(type)
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise TypeError(
            f"gguf.quantize: `x` must be float16, bfloat16 or float32, got {x.dtype}. Convert it."
        )
    if not x.ndim or x.shape[-1] % layout.block:
        raise ValueError(
            f"gguf.quantize: blocks of {layout.block} must divide the last axis for {type!r}, got "
            f"shape {x.shape}. jaxq.interop.gguf.fallback({type!r}, n) names a type that fits."
        )
    if importance is not None:
        importance = jnp.asarray(importance, jnp.float32)
        try:
            fits = np.broadcast_shapes(importance.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits or importance.shape[-1:] != x.shape[-1:]:
            raise ValueError(
                f"gguf.quantize: `importance` must have the shape of a row, ({x.shape[-1]},), or "
                f"of rows that broadcast to {x.shape}, got {importance.shape}."
            )
        importance = jnp.broadcast_to(
            importance.reshape(_with_leading_ones(x.ndim, importance.shape)), x.shape
        )
    return Packed(_quantize(x, importance, type).data, type, np.dtype(x.dtype))


def _with_leading_ones(ndim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + shape


class _Result(NamedTuple):
    """The bytes of a tensor, and its quantized values or None."""

    data: jax.Array
    values: jax.Array | None


class PartImportance(NamedTuple):
    """The importance of the elements in a part of a tensor.

    Attributes:
      weights: the importance of each element.
      squares: the mean square of the row of each block, in ggml's order of summation.
    """

    weights: jax.Array | np.ndarray
    squares: jax.Array | np.ndarray


def quantize_with_values(
    x: jax.Array, type: str, importance: PartImportance | None = None
) -> tuple[Packed, jax.Array]:
    """Returns a packed tensor and its values, faster than `dequantize` would compute them."""
    weights, squares = (None, None) if importance is None else importance
    result = _quantize(x, weights, type, squares, values=True)
    assert result.values is not None
    return Packed(result.data, type, np.dtype(x.dtype)), result.values


@functools.partial(jax.jit, static_argnames=("type", "values"))
def _quantize(
    x: jax.Array,
    importance: jax.typing.ArrayLike | None,
    type: str,
    squares: jax.typing.ArrayLike | None = None,
    values: bool = False,
) -> _Result:
    layout, shape = TYPES[type], x.shape
    x = lax.stop_gradient(x).astype(jnp.float32)
    if type in PACKED_RECIPES and (importance is None or type not in _QUANTIZERS):
        x = _without_minus_zero(x, type)
        if type != "q8_0":
            fields = of_recipe(x, type)
            data = layout.write(fields).reshape(*shape[:-1], -1)
            return _Result(data, layout.values_of(fields).reshape(shape) if values else None)
        data = pack(quantize_by_recipe(x, type))
        return _Result(data, fake_quant_by_recipe(x, type) if values else None)
    columns = x.reshape(-1, layout.block).T
    blocks = FloatBlocks(columns, None, None)
    if importance is not None:
        if squares is None:
            rows = x.reshape(-1, shape[-1])
            total = sums(lambda v: (product(v, v),), rows.T)[0]
            square = divide(total, jnp.full(total.shape, shape[-1], jnp.float32))
            squares = jnp.repeat(square, shape[-1] // layout.block)
        weights = jnp.asarray(importance).reshape(-1, layout.block).T
        blocks = FloatBlocks(columns, weights, jnp.asarray(squares))

    def quantized(part: FloatBlocks) -> _Result:
        fields = _QUANTIZERS[type](part)
        return _Result(layout.write(fields), layout.values_of(fields) if values else None)

    result = in_chunks(quantized, blocks, layout.block)
    data = result.data.reshape(*shape[:-1], shape[-1] // layout.block * layout.size)
    return _Result(data, None if result.values is None else result.values.reshape(shape))


def _without_minus_zero(x: jax.Array, type: str) -> jax.Array:
    """Returns x with 0 in place of -0 for Q4_0 and Q5_0, where ggml's code has the same effect."""
    if type not in ("q4_0", "q5_0"):
        return x
    bits, minus_zero = lax.bitcast_convert_type(x, jnp.uint32), np.uint32(1 << 31)
    bits = jnp.where(bits == minus_zero, np.uint32(0), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def dequantize(
    data: jax.typing.ArrayLike, type: str, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Returns the values that the bytes of a block type represent, exactly as ggml computes them.

    Args:
      data: uint8 `[..., blocks · bytes per block]`.
      type: a name in `jaxq.interop.gguf.TYPES`.
      dtype: the dtype of the result. Default: float32.

    Returns:
      An array `[..., blocks · elements per block]`. The scale of an NVFP4 tensor, which a file
      stores as another tensor, is not applied.

    Raises:
      ValueError: the type is unknown, or the last axis does not hold whole blocks.
      TypeError: the data are not uint8.

    Example:
      >>> import numpy as np
      >>> from jaxq.interop import gguf
      >>> block = np.array([0x00, 0x38, *range(32)], np.uint8)  # The float16 scale 0.5, 32 codes.
      >>> gguf.dequantize(block, "q8_0").tolist()[:4]
      [0.0, 0.5, 1.0, 1.5]
    """
    layout = TYPES.find(type)
    data = jnp.asarray(data)
    if data.dtype != jnp.uint8:
        raise TypeError(f"gguf.dequantize: `data` must be uint8, got {data.dtype}.")
    if not data.ndim or data.shape[-1] % layout.size:
        raise ValueError(
            f"gguf.dequantize: a block of {type!r} has {layout.size} bytes, which must divide the "
            f"last axis, got shape {data.shape}."
        )
    return _dequantize(data, type).astype(dtype)


@functools.partial(jax.jit, static_argnames="type")
def _dequantize(data: jax.Array, type: str) -> jax.Array:
    layout = TYPES[type]
    values = layout.values(layout.read(data.reshape(-1, layout.size)))
    return values.reshape(*data.shape[:-1], data.shape[-1] // layout.size * layout.block)


def fake_quant(
    x: jax.typing.ArrayLike,
    type: str,
    *,
    axis: int = -1,
    importance: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns a tensor rounded to a block type, with a straight-through gradient.

    The result equals `quantize(x, type).dequantize()` bit for bit.

    Args:
      x: a float array.
      type: a name in `jaxq.interop.gguf.TYPES`.
      axis: the axis that products contract, along which blocks lie. Default: -1.
      importance: as in `quantize`, with `axis` last. Default: None.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> w = jnp.linspace(-1, 1, 64).reshape(32, 2)
      >>> jax.grad(lambda w: jaxq.interop.gguf.fake_quant(w, "q4_0", axis=0).sum())(w).sum()
      Array(64., dtype=float32)
    """
    x = jnp.asarray(x)
    rows = jnp.moveaxis(x, axis, -1)
    y = quantize(lax.stop_gradient(rows), type, importance=importance).dequantize()
    return passed(jnp.moveaxis(y, -1, axis), x)


_FALLBACKS = {
    **{name: rule.fallback for name, rule in SUPER_BLOCK_RULES.items()},
    **dict.fromkeys(("tq1_0", "tq2_0"), "q4_0"),
}


def fallback(type: str, length: int) -> str:
    """Returns the type that llama.cpp's quantizer uses for rows of a length.

    Args:
      type: the wanted type, a name in `jaxq.interop.gguf.TYPES`.
      length: the number of elements in a row.

    Returns:
      The type itself if its blocks divide the row; otherwise the type with blocks of 32 that
      llama.cpp uses instead, or `"f16"` if 32 does not divide the row either.

    Example:
      >>> fallback("q4_k", 4096), fallback("q4_k", 576), fallback("q4_k", 100)
      ('q4_k', 'q5_0', 'f16')
    """
    for name in (type, _FALLBACKS.get(type)):
        if name is not None and length % TYPES.find(name).block == 0:
            return name
    return "f16"
