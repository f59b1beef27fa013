"""Tensors as the bytes of ggml's block types: quantization and dequantization."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq._ggml.blocks import FloatBlocks, in_chunks
from jaxq._ggml.searches import product, sums
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq._jax.arithmetic import divide
from jaxq.interop.gguf._float_types import FLOAT_TYPES
from jaxq.interop.gguf._k_types import SEARCHED
from jaxq.interop.gguf._recipes import TYPES, checked_bytes, pack, recipe_of
from jaxq.interop.gguf._small_types import SMALL, of_recipe
from jaxq.numerics import floats
from jaxq.quantizers import fake_quant
from jaxq.quantizers import quantize as quantize_by_recipe

__all__ = ["dequantize", "fallback", "quantize", "quantize_with_values"]

_QUANTIZERS = {**SMALL, **FLOAT_TYPES, **SEARCHED}


def quantize(
    x: jax.typing.ArrayLike, type: str, *, importance: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Quantizes a tensor to the bytes of a block type that ggml writes.

    Blocks lie along the last axis, which products must contract: a weight is `[outputs, inputs]`.
    Transpose kernels `[inputs, outputs]`. `jaxq.quantize` with the recipe of the type returns the
    same codes and scales as a `jaxq.Quantized`, which `pack` packs to these bytes.

    The bytes equal those of ggml's C code compiled without fused multiplication and addition;
    compilers that fuse them change up to 2 % of the bytes of K-quants. In types with a search,
    blocks of magnitudes below about 1e-5 may get other codes, because products of their squares
    are subnormal, which XLA treats as 0. Elements that are not finite, or so large that products of
    their squares are not (above about 1e9), give unspecified codes in their block.

    Args:
      x: a float array `[..., n]`.
      type: a name in `jaxq.interop.gguf.TYPES`, such as `"q4_k"`.
      importance: the mean square of the input of each column, float32 `[n]`, or one such row for
        each index of the leading axes, as in an importance matrix of llama.cpp. Types without a
        search (`q8_0`, `mxfp4`, `nvfp4`, `tq1_0`, `tq2_0`) ignore it, as in ggml. Default: None.

    Returns:
      uint8 `[..., n / block · bytes per block]`.

    Raises:
      ValueError: if the type is unknown, or its block does not divide the last axis. `fallback`
        returns the type that llama.cpp then uses.
      TypeError: if `x` is not a float16, bfloat16 or float32 array.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> jaxq.interop.gguf.quantize(jnp.linspace(-1, 1, 512).reshape(2, 256), "q4_k").shape
      (2, 144)

    References:
      ggml's ggml-quants.c.
    """
    x, layout = floats("gguf.quantize", x, float64=False), TYPES.find(type)
    if not x.ndim or x.shape[-1] % layout.block:
        raise ValueError(
            f"gguf.quantize: blocks of {layout.block} must divide the last axis for {type!r}, got "
            f"shape {x.shape}. jaxq.interop.gguf.fallback({type!r}, n) names a type that fits."
        )
    if importance is not None:
        importance = floats("gguf.quantize", importance, argument="importance").astype(jnp.float32)
        try:
            fits = np.broadcast_shapes(importance.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits or importance.shape[-1:] != x.shape[-1:]:
            raise ValueError(
                f"gguf.quantize: `importance` must have the shape of a row, ({x.shape[-1]},), or "
                f"of rows that broadcast to {x.shape}, got {importance.shape}. Sum it over the "
                "rows first."
            )
        importance = jnp.broadcast_to(
            importance.reshape(_with_leading_ones(x.ndim, importance.shape)), x.shape
        )
    return _quantize(x, importance, type).data


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
) -> tuple[jax.Array, jax.Array]:
    """Returns the bytes of a tensor and their values, with fewer operations than `dequantize`."""
    weights, squares = (None, None) if importance is None else importance
    result = _quantize(x, weights, type, squares, values=True)
    assert result.values is not None
    return result.data, result.values


@functools.partial(jax.jit, static_argnames=("type", "values"))
def _quantize(
    x: jax.Array,
    importance: jax.typing.ArrayLike | None,
    type: str,
    squares: jax.typing.ArrayLike | None = None,
    values: bool = False,
) -> _Result:
    layout, shape = TYPES[type], x.shape
    packed_shape = (*shape[:-1], shape[-1] // layout.block * layout.size)
    if 0 in shape:
        data = jnp.zeros(packed_shape, jnp.uint8)
        return _Result(data, jnp.zeros(shape, jnp.float32) if values else None)
    x = lax.stop_gradient(x).astype(jnp.float32)
    if type not in _QUANTIZERS:
        recipe = recipe_of(type)
        data = pack(quantize_by_recipe(x, recipe), type)
        return _Result(data, fake_quant(x, recipe) if values else None)
    if type in SMALL and importance is None:
        fields = of_recipe(x, type)
        data = layout.write(fields).reshape(packed_shape)
        return _Result(data, layout.values_of(fields).reshape(shape) if values else None)
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
    data = result.data.reshape(packed_shape)
    return _Result(data, None if result.values is None else result.values.reshape(shape))


def dequantize(
    data: jax.typing.ArrayLike, type: str, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Returns the values that the bytes of a block type represent, exactly as ggml computes them.

    Only values of MXFP4 below 2^-126 become 0.

    Args:
      data: uint8 `[..., blocks · bytes per block]`.
      type: a name in `jaxq.interop.gguf.TYPES`.
      dtype: the dtype of the result. Default: float32.

    Returns:
      An array `[..., blocks · elements per block]`. The scale of an NVFP4 tensor, which a file
      stores as another tensor, is not applied.

    Raises:
      ValueError: if the type is unknown, or the last axis does not hold whole blocks.
      TypeError: if the data are not uint8.

    Example:
      >>> import numpy as np
      >>> from jaxq.interop import gguf
      >>> block = np.array([0x00, 0x38, *range(32)], np.uint8)  # The float16 scale 0.5, 32 codes.
      >>> gguf.dequantize(block, "q8_0").tolist()[:4]
      [0.0, 0.5, 1.0, 1.5]
    """
    data = checked_bytes("dequantize", data, type)
    return _dequantize(data, type).astype(dtype)


@functools.partial(jax.jit, static_argnames="type")
def _dequantize(data: jax.Array, type: str) -> jax.Array:
    layout = TYPES[type]
    values = layout.values(layout.read(data.reshape(-1, layout.size)))
    return values.reshape(*data.shape[:-1], data.shape[-1] // layout.size * layout.block)


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
    integer("gguf.fallback", "length", length, "Pass the number of elements in a row.", least=0)
    for name in (type, _FALLBACKS.get(type)):
        if name is not None and length % TYPES.find(name).block == 0:
            return name
    return "f16"
