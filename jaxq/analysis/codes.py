"""Errors in units in the last place, and which codes a quantizer uses."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.analysis.specs import Spec, checked, spacing_exponent
from jaxq.analysis.sums import blocks_of, power_of_two
from jaxq.bits import Layout, where
from jaxq.blocks import Granularity
from jaxq.casting import encode, widen
from jaxq.catalog import get_format
from jaxq.formats import Format
from jaxq.quantized import Quantized
from jaxq.quantizers import quantize
from jaxq.recipes import Quantizer

__all__ = ["CodeUsage", "code_usage", "ulp_error"]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ZERO = np.float32(0)


def ulp_error(
    x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, fmt: "str | Format" = "float32"
) -> jax.Array:
    """The distance |y - x| in units in the last place of a format, where x lies.

    The unit is the spacing of the format's values in the binade of x, that of the subnormals below
    it and that of the last binade beyond the largest value. For codebooks, posits and takums it is
    the power of two at or below the distance of the two values around x.

    Args:
      x: float16, bfloat16 or float32, any shape.
      y: of the same shape.
      fmt: the format, as `jaxq.get_format` takes it.

    Returns:
      float32, of x's shape. 0 where both are equal, infinities included, or both NaN; infinite
      where one is NaN or infinite and the other is not.

    Raises:
      TypeError: another dtype.
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> ulp_error(jnp.array([1.25, 2.5]), jnp.array([1.0, 2.0]), "float8_e4m3fn").tolist()
      [2.0, 2.0]
    """
    x, y = (widen(checked("ulp_error", a, "float32")[0]) for a in (x, y))
    if x.shape != y.shape:
        raise ValueError(f"ulp_error: `y` must have the shape of `x`, {x.shape}, got {y.shape}.")
    return _ulp_error(lax.stop_gradient(x), lax.stop_gradient(y), get_format(fmt))


@functools.partial(jax.jit, static_argnames="fmt")
def _ulp_error(x: jax.Array, y: jax.Array, fmt: Format) -> jax.Array:
    up = -spacing_exponent(x, fmt)
    distance = jnp.abs(power_of_two(y, up, _FLOAT32) - power_of_two(x, up, _FLOAT32))
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    same = (x == y) | (jnp.isnan(x) & jnp.isnan(y))
    return where(finite, distance, where(same, _ZERO, np.float32(np.inf)))


class CodeUsage(NamedTuple):
    """How often each code occurs.

    Attributes:
      counts: int32, one a code in the last axis, in the order of `jaxq.encode`'s codes.
      used: how many codes occur.
      entropy: of the codes, in bits: what they could be compressed to, one by one.
      efficiency: the entropy over the format's bits; 1 if all codes occur equally often.
    """

    counts: jax.Array
    used: jax.Array
    entropy: jax.Array
    efficiency: jax.Array


def code_usage(
    x: jax.typing.ArrayLike | Quantized,
    spec: Spec | None = None,
    *,
    per: Granularity | None = None,
    key: jax.Array | None = None,
) -> CodeUsage:
    """Which codes a quantizer uses, and how evenly.

    Args:
      x: a tensor as in `quantization_error`; or a `jaxq.Quantized`, then without `spec`.
      spec: as in `quantization_error`.
      per: as in `compare`.
      key: as in `quantization_error`.

    Returns:
      A `CodeUsage`; arrays with the shape of the blocks (none for all), `counts` with the codes
      behind. Of an empty tensor all are 0. A NaN counts as the code that it gets.

    Raises:
      TypeError: as in `quantization_error`; or a format of more than 16 bits.
      ValueError: as in `quantization_error`; `spec` is missing or not wanted.

    Example:
      >>> import jax.numpy as jnp
      >>> usage = code_usage(jnp.array([0.0, 1.0, 1.0, 3.0]), "uint2")
      >>> usage.counts.tolist(), float(usage.entropy)
      ([1, 2, 0, 1], 1.5)
    """
    if isinstance(x, Quantized) != (spec is None):
        raise ValueError(
            "code_usage: a tensor needs `spec`, a format or a recipe, and a Quantized has its own, "
            f"got {type(x).__name__} and {spec!r}."
        )
    if isinstance(x, Quantized):
        codes, bits = x.unpack(), x.recipe.element.bits
    else:
        assert spec is not None
        array, kind = checked("code_usage", x, spec)
        if isinstance(kind, Quantizer):
            codes, bits = quantize(array, kind, key=key).unpack(), kind.element.bits
        else:
            if kind.bits > 16:
                raise TypeError(f"code_usage: at most 16 bits, got {kind.name} of {kind.bits}.")
            codes, bits = encode(array, kind), kind.bits
    return _usage(codes, bits, per)


@functools.partial(jax.jit, static_argnames=("bits", "per"))
def _usage(codes: jax.Array, bits: int, per: Granularity | None) -> CodeUsage:
    cut = blocks_of(codes.shape, per)
    blocks, size = math.prod(cut.counts), 2**bits
    split = cut.split(codes.reshape(cut.shape)).astype(jnp.int32)
    block = cut.spread(jnp.arange(blocks, dtype=jnp.int32).reshape(cut.counts))
    index = split + jnp.broadcast_to(block, split.shape) * np.int32(size)
    if cut.inside is not None:
        inside = jnp.broadcast_to(cut.inside, split.shape)
        index = where(inside, index, np.int32(blocks * size))
    counts = jnp.zeros(blocks * size, jnp.int32).at[index.reshape(-1)].add(1, mode="drop")
    counts = counts.reshape(*(() if per is None else cut.counts), size)
    total = lax.max(jnp.sum(counts, -1, keepdims=True, dtype=jnp.int32), np.int32(1))
    share = counts.astype(jnp.float32) / total.astype(jnp.float32)
    logs = jnp.log2(where(counts > 0, share, np.float32(1)))
    entropy = jnp.sum(-share * logs, -1)
    used = jnp.sum(counts > 0, -1, dtype=jnp.int32)
    return CodeUsage(counts, used, entropy, entropy / np.float32(bits))
