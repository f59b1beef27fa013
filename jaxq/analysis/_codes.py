"""Errors in units in the last place, and code usage of quantizers."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._jax.serialization import named_tuple
from jaxq.analysis._arguments import FormatOrRecipe, check_arguments, spacing_exponent
from jaxq.analysis._sums import blocks_of, power_of_two
from jaxq.formats import Format, get_format
from jaxq.numerics import encode, floats, widen
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import Granularity, Recipe

__all__ = ["CodeUsage", "code_usage", "ulp_error"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_ZERO = np.float32(0)


def ulp_error(
    x: jax.typing.ArrayLike, y: jax.typing.ArrayLike, fmt: "str | Format" = "float32"
) -> jax.Array:
    """Returns |y - x| in units in the last place of a format at x.

    The unit is the spacing of the format's values in the binade of x. Below the normal values it is
    the spacing of the subnormals, and beyond the largest value the spacing of the last binade. For
    codebooks, posits and takums it is the largest power of two that does not exceed the distance
    between the two values around x.

    Args:
      x: a float16, bfloat16 or float32 tensor of any shape.
      y: a tensor of the same shape.
      fmt: the format or its name, as in `jaxq.get_format`. Default: `"float32"`.

    Returns:
      A float32 array of x's shape: 0 where x and y are equal (including infinities) or both NaN;
      infinity where they differ and one is NaN or infinite.

    Raises:
      TypeError: if x or y has another dtype.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> ulp_error(jnp.array([1.25, 2.5]), jnp.array([1.0, 2.0]), "float8_e4m3fn").tolist()
      [2.0, 2.0]
    """
    x, y = (
        widen(floats("ulp_error", value, argument=argument, float64=False))
        for argument, value in (("x", x), ("y", y))
    )
    if x.shape != y.shape:
        raise ValueError(
            f"ulp_error: `y` must have the shape of `x`, {x.shape}, got {y.shape}. Broadcast or "
            "reshape it first."
        )
    return _ulp_error(lax.stop_gradient(x), lax.stop_gradient(y), get_format(fmt))


@functools.partial(jax.jit, static_argnames="fmt")
def _ulp_error(x: jax.Array, y: jax.Array, fmt: Format) -> jax.Array:
    up = -spacing_exponent(x, fmt)
    distance = jnp.abs(power_of_two(y, up, _FLOAT32) - power_of_two(x, up, _FLOAT32))
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    same = (x == y) | (jnp.isnan(x) & jnp.isnan(y))
    return where(finite, distance, where(same, _ZERO, np.float32(np.inf)))


@named_tuple
class CodeUsage(NamedTuple):
    """The usage of a format's codes, one value per block, or scalars for a whole tensor.

    Attributes:
      counts: int32 counts; `counts[..., i]` is the number of elements with the code i, as
        `jaxq.encode` returns it.
      used: the number of distinct codes that occur.
      entropy: the entropy of the codes in bits: the lowest average size to which an entropy coder
        can compress them if it encodes each code on its own.
      efficiency: the entropy divided by the format's bits; 1 if all codes occur equally often.

    Example:
      >>> import jax.numpy as jnp
      >>> usage = code_usage(jnp.array([0.0, 1.0, 1.0, 3.0]), "uint2")
      >>> int(usage.used), float(usage.efficiency)  # 3 of 4 codes, 1.5 of 2 bits.
      (3, 0.75)
    """

    counts: jax.Array
    used: jax.Array
    entropy: jax.Array
    efficiency: jax.Array


def code_usage(
    x: jax.typing.ArrayLike | Quantized,
    recipe: FormatOrRecipe | None = None,
    *,
    per: Granularity | None = None,
    key: jax.Array | None = None,
) -> CodeUsage:
    """Returns the counts and the entropy of the codes that a quantizer uses.

    Args:
      x: a tensor, as in `quantization_error`; or a `jaxq.Quantized`, without `recipe`.
      recipe: the recipe or format, as in `quantization_error`.
      per: the granularity of the result, as in `compare`.
      key: a key of `jax.random`, as in `quantization_error`.

    Returns:
      A `CodeUsage` with one value per block, or scalars for a whole tensor; `counts` has the codes
      as an additional last axis. All fields are 0 for an empty tensor. A NaN counts as the code
      that it is encoded as.

    Raises:
      TypeError: as in `quantization_error`; or if the format has more than 16 bits.
      ValueError: as in `quantization_error`; or if `recipe` is missing for a tensor, or given for a
        `jaxq.Quantized`.

    Example:
      >>> import jax.numpy as jnp
      >>> usage = code_usage(jnp.array([0.0, 1.0, 1.0, 3.0]), "uint2")
      >>> usage.counts.tolist(), float(usage.entropy)
      ([1, 2, 0, 1], 1.5)
    """
    if isinstance(x, Quantized) != (recipe is None):
        raise ValueError(
            "code_usage: `recipe` must be given for a tensor and left out for a Quantized, got "
            f"{type(x).__name__} and {recipe!r:.60}. Pass (tensor, recipe), or a Quantized alone."
        )
    if isinstance(x, Quantized):
        codes, bits = x.unpack(), x.recipe.element.bits
    else:
        assert recipe is not None
        array, target = check_arguments("code_usage", x, recipe)
        if isinstance(target, Recipe):
            codes, bits = quantize(array, target, key=key).unpack(), target.element.bits
        else:
            if target.bits > 16:
                raise ValueError(
                    f"code_usage: format {target.name} must have at most 16 bits, got "
                    f"{target.bits}. Use a format of at most 16 bits."
                )
            codes, bits = encode(array, target), target.bits
    return _usage(codes, bits, per)


@functools.partial(jax.jit, static_argnames=("bits", "per"))
def _usage(codes: jax.Array, bits: int, per: Granularity | None) -> CodeUsage:
    cut = blocks_of(codes.shape, per)
    blocks, size = math.prod(cut.counts), 2**bits
    split = cut.split(codes.reshape(cut.shape)).astype(jnp.int32)
    block = cut.align_scales(jnp.arange(blocks, dtype=jnp.int32).reshape(cut.counts))
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
