"""Scalings with two levels, whose block scales are quantized so that few bits can store them."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer, number
from jaxq._base.bits import FloatLayout, where
from jaxq._base.shapes import as_number, is_symbolic
from jaxq._jax import arithmetic, reductions
from jaxq._jax.arithmetic import by_vectors, divide, hidden_broadcast, materialize
from jaxq.formats import Format, get_format
from jaxq.numerics import cast
from jaxq.recipes._arithmetic import E8M0, powers
from jaxq.recipes._ranges import Calibrator, Range
from jaxq.recipes._scaling import Scales, Scaling, StoredScales, symmetric_range

__all__ = ["DoubleQuant", "TwoLevel"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))

_NARROW = "`scale_format` must have fewer than 32 bits and not be float8_e8m0fnu"


class _Levels(NamedTuple):
    """The scales of a tensor with two levels.

    Attributes:
      tried: the amax of each block times the factor that is tried.
      relative: the scale of each block without the tensor scale.
      step: the scale of each block times the tensor scale.
      top_bits: the bits of the largest magnitude of the tensor, a scalar.
    """

    tried: jax.Array
    relative: jax.Array
    step: jax.Array
    top_bits: jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class TwoLevel(Scaling):
    """Block scales relative to one float32 scale of the tensor, as in NVFP4.

    An element q represents y = s t q, with the scale s of its block and the scale t of the tensor.
    Let max be the largest value of the element format and e = min(largest * max / tensor amax,
    2^126), or 1 for a tensor of zeros. The scale s of a block is amax * (e * (1 / max)) rounded to
    the scale format, possibly to 0; 1 / max is first rounded to float32. The tensor scale t is
    1 / e. A NaN block does not affect other blocks.

    Attributes:
      scale_format: the format of the block scales, a float format with a NaN that is narrower than
        float32; float8_e4m3fn by default.
      largest: the scale of the block that holds the tensor's largest magnitude. The default, 448,
        is that of NVFP4 and the largest value of float8_e4m3fn; 256 leaves room for the larger
        scales that `search` may try.
      range: the calibrator, as in `Symmetric`.
      reciprocal: True, the default, multiplies the elements by the rounded reciprocal of the scale,
        as TransformerEngine does; False divides them by the scale.
      search: the factors of the range that each block tries, as in `Symmetric`: `(1.0, 1.5)` with
        `largest=256.0` makes NVFP4 "four over six".

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    References:
      NVIDIA Transformer Engine's NVFP4 quantization. (Transformer Engine bounds e by the largest
      float32, whose inverse is subnormal.)

    Example:
      >>> import jaxq
      >>> nvfp4 = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(16), TwoLevel())
      >>> nvfp4 == jaxq.get_recipe("nvfp4")
      True
    """

    scale_format: str | Format = "float8_e4m3fn"
    largest: float = 448.0
    range: str | Calibrator = "absmax"
    reciprocal: bool = True
    search: tuple[float, ...] = ()

    second_level = "tensor"

    def check_scale_format(self, scale_format: Format) -> None:
        """Raises ValueError if this scaling cannot store scales in `scale_format`."""
        super().check_scale_format(scale_format)
        self.require(_is_narrow(scale_format), _NARROW, scale_format.name, "Use 'float8_e4m3fn'.")
        number(
            type(self).__name__,
            "largest",
            self.largest,
            f"a positive number up to the largest {scale_format.name}",
            lambda v: 0 < v <= scale_format.max,
            f"Use {min(scale_format.max, 448.0):g}.",
        )

    def scales(self, ends: Range, fmt: Format, factor: jax.Array | None = None) -> Scales:
        """Returns the scales for a range; see `Scaling.scales`."""
        levels = functools.partial(self._levels, fmt)
        factors = () if factor is None else (jnp.broadcast_to(factor, ends[1].shape),)
        tried, relative, step, top_bits = by_vectors(levels, _FLOAT32.bits(ends[1]), *factors)
        stored = StoredScales(relative, (arithmetic.reciprocal(self._enlarge(top_bits, fmt)),))
        return Scales(step, step, stored, *symmetric_range(tried, fmt))

    def _levels(self, fmt: Format, bits: jax.Array, *factors: jax.Array) -> _Levels:
        """Returns the scales of blocks for the bits of their amax, and factors of it."""
        amax = _FLOAT32.floats(bits)
        tried = functools.reduce(lax.mul, factors, amax)
        top_bits = reductions.largest(where(bits <= _FLOAT32.inf, bits, np.int32(0)))
        enlarge = self._enlarge(hidden_broadcast(top_bits, amax), fmt)
        relative = tried * (enlarge * np.float32(1 / fmt.scaled_max))
        relative = cast(relative, get_format(self.scale_format), overflow="saturate")
        return _Levels(
            tried, relative, materialize(relative * arithmetic.reciprocal(enlarge)), top_bits
        )

    def _enlarge(self, top_bits: jax.Array, fmt: Format) -> jax.Array:
        """Returns the inverse of the tensor scale for the bits of the largest magnitude."""
        enlarge = arithmetic.reciprocal(_FLOAT32.floats(top_bits), fmt.scaled_max * self.largest)
        enlarge = lax.min(enlarge, np.float32(2.0**126))
        return where(top_bits == 0, np.float32(1), enlarge)

    def restore(self, stored: StoredScales) -> jax.Array:
        """Reconstructs float32 block scales from the stored ones."""
        tensor_scale = stored.second[0]
        # There is one tensor scale for each tensor that `jax.vmap` stacked.
        trailing = (1,) * (stored.scale.ndim - tensor_scale.ndim)
        return materialize(stored.scale * tensor_scale.reshape(tensor_scale.shape + trailing))

    def tensor_scale(self, second: tuple[jax.Array, ...]) -> jax.Array | None:
        """Returns the tensor's second-level scale."""
        return second[0]

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that the scales of both levels take for a number of blocks."""
        return super().nbytes(blocks, fmt) + 4


@dataclasses.dataclass(frozen=True, repr=False)
class DoubleQuant(Scaling):
    """Double quantization, as in QLoRA: the scales minus their mean are quantized in blocks too.

    The mean is computed in integers to 2^-22 of the largest scale, so that it does not depend on
    the order of summation. The blocks run over the flattened scales. A NaN scale makes all scales
    of its block NaN, because the scale format need not have a code for NaN, and is excluded from
    the mean.

    Attributes:
      scale_format: the format of the scales, of any kind, narrower than float32; dynamic8 by
        default.
      block: the number of scales that share a second scale; 256 by default.
      range: the calibrator, as in `Symmetric`.
      stored: as in `Symmetric`, but False by default, as in bitsandbytes.
      reciprocal: True multiplies the elements by the rounded reciprocal of the scale; False, the
        default, divides them by the scale.
      search: the factors of the range that each block tries, as in `Symmetric`.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("nf4", jaxq.PerBlock(64), DoubleQuant()) == jaxq.get_recipe("nf4_dq")
      True
    """

    scale_format: str | Format = "dynamic8"
    block: int = 256
    range: str | Calibrator = "absmax"
    stored: bool = False
    reciprocal: bool = False
    search: tuple[float, ...] = ()

    second_level = "blocks"

    def check_scale_format(self, scale_format: Format) -> None:
        """Raises ValueError if this scaling cannot store scales in `scale_format`."""
        name, remedy = scale_format.name, "Use 'dynamic8'."
        fits = 0 < scale_format.max <= 2.0**128
        requirement = "`scale_format` needs a positive `max` within float32"
        self.require(fits, requirement, name, remedy)
        self.require(_is_narrow(scale_format), _NARROW, name, remedy)
        integer(type(self).__name__, "block", self.block, "Use 256.", least=1)

    def store(self, scale: jax.Array, amax: jax.Array) -> StoredScales:
        """Returns block scales relative to second-level scales, with these scales and the mean."""
        del amax
        scale_format = get_format(self.scale_format)
        flat = scale.reshape(-1)
        mean = materialize(_mean(flat))
        centered = flat - mean
        rows = -(-flat.size // self.block)
        padded = lax.pad(centered, np.float32(0), [(0, rows * self.block - flat.size, 0)])
        magnitude = _FLOAT32.bits(padded.reshape(rows, self.block)) & _FLOAT32.magnitude_mask
        second = jnp.max(magnitude, axis=1, initial=0)
        second = materialize(divide(_FLOAT32.floats(second), jnp.float32(scale_format.max)))
        divisor = where(second == 0, np.float32(1), second)
        units = divide(centered, self._repeat(divisor, flat.size))
        relative = cast(units, scale_format, overflow="saturate").reshape(scale.shape)
        return StoredScales(materialize(relative), (second, mean))

    def restore(self, stored: StoredScales) -> jax.Array:
        """Reconstructs float32 block scales from the stored ones."""
        second, mean = stored.second
        if mean.ndim:  # Stacked by `jax.vmap`.
            return jax.vmap(self.restore)(stored)
        flat = stored.scale.reshape(-1)
        # `materialize` prevents XLA from fusing the product and the sum, which would round only
        # once.
        product = materialize(flat * self._repeat(second, flat.size))
        return materialize(product + mean).reshape(stored.scale.shape)

    def take(self, second: tuple[jax.Array, ...], indices: np.ndarray) -> tuple[jax.Array, ...]:
        """Returns the second-level arrays for some scales, given their flattened positions.

        Raises:
          ValueError: if the selected scales do not form the same blocks as the stored ones.
        """
        indices, block = indices.reshape(-1), self.block
        firsts = indices[::block]
        runs = np.arange(indices.size) % block + np.repeat(firsts, block)[: indices.size]
        if (firsts % block).any() or (indices != runs).any():
            raise ValueError(
                f"Quantized: the selected rows share second-level scales, one per {block} scales, "
                "with other rows. Dequantize the tensor first."
            )
        return second[0][firsts // block], second[1]

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that the scales of both levels and the mean take."""
        return super().nbytes(blocks, fmt) + 4 * (-(-blocks // self.block) + 1)

    def _repeat(self, second: jax.Array, size: int) -> jax.Array:
        """Repeats the second-level scales, to one per block scale."""
        rows = jnp.broadcast_to(second[:, None], (second.size, self.block))
        return rows.reshape(-1)[:size]


def _is_narrow(scale_format: Format) -> bool:
    """Returns whether a format has fewer than 32 bits and is not E8M0, which covers float32."""
    return scale_format != E8M0 and scale_format.bits < 32


def _mean(scales: jax.Array) -> jax.Array:
    """Returns the mean of the finite scales, which are nonnegative, by sums of integers."""
    finite = scales < np.float32(np.inf)
    scales = where(finite, scales, np.float32(0))
    down, up = powers(_FLOAT32.floats(reductions.largest(_FLOAT32.bits(scales))))
    width = 256
    rows = -(-scales.size // width)
    if is_symbolic(rows):
        bits = np.int32(32) - lax.clz(as_number(rows, np.int32) - np.int32(1))
        digits = np.int32(22) - lax.max(np.int32(0), bits - np.int32(16))
    else:
        digits = np.int32(22 - max(0, math.ceil(math.log2(max(rows, 1))) - 16))
    # `down` moves the largest scale into [2, 4), so factors of 2^(digits - 2) give multiples of
    # 2^-digits of the power of two above it.
    steps, unit = (_FLOAT32.floats(_FLOAT32.field(n)) for n in (digits - 2, 2 - digits))
    whole = lax.round(scales * down * steps, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint32)
    whole = lax.pad(whole, np.uint32(0), [(0, rows * width - scales.size, 0)])
    sums = jnp.sum(whole.reshape(rows, width), axis=1, dtype=jnp.uint32)
    parts = sums >> np.uint32(15), sums & np.uint32(2**15 - 1)
    high, low = (jnp.sum(part, dtype=jnp.uint32) for part in parts)
    total = high.astype(jnp.float32) * np.float32(2.0**15) + low.astype(jnp.float32)
    count = jnp.sum(finite, dtype=jnp.int32).astype(jnp.float32)
    return divide(total, lax.max(count, np.float32(1))) * unit * up
