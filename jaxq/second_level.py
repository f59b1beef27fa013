"""Second levels: how the scales of blocks are themselves scaled, so that few bits hold them.

A second level turns scales into numbers on the grid of their own format, and the arrays that lead
back to them; `join` goes back. To add one: a frozen dataclass with `hold`, `join` and `bits`,
listed in `SecondLevel`.
"""

import dataclasses
import math
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, where
from jaxq.casting import cast
from jaxq.formats import Format
from jaxq.scaling import divide, kept

__all__ = ["DoubleScale", "SecondLevel", "TensorScale"]

_FLOAT32 = Layout.of(np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class TensorScale:
    """Block scales relative to one float32 number for the tensor, as NVFP4 has them.

    With e = min(largest * max / tensor amax, 2^126), or 1 for a tensor of zeros, the scale of a
    block is amax * (e * fl(1 / max)) in its format, that format's 0 included, and the tensor's is
    1 / e. A block that is NaN counts for no other.

    Attributes:
      largest: what the block that holds the tensor's largest magnitude gets. 448, the largest of
        float8_e4m3fn, is NVFP4's; 256 leaves room for the larger scales that `search` may try.

    Raises:
      ValueError: `largest` is not positive.

    References:
      NVIDIA Transformer Engine's NVFP4 quantization. (It bounds e by the largest float32, whose
      inverse is subnormal.)
    """

    largest: float = 448.0

    def __post_init__(self) -> None:
        if not self.largest > 0:
            raise ValueError(f"TensorScale: `largest` must be positive, got {self.largest}.")

    def hold(
        self, scale: jax.Array, amax: jax.Array, tried: jax.Array, fmt: Format, scale_format: Format
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The block scales in their format, and the tensor's, of shape ().

        Args:
          scale: not used; the rule is made of the magnitudes.
          amax: the largest magnitude of each block.
          tried: the magnitude that each block's scale is made for: amax, or what `search` tries.
          fmt: the element format.
          scale_format: the format of the block scales.
        """
        del scale
        finite = where(amax >= 0, amax, np.float32(0))
        top = _FLOAT32.floats(jnp.max(_FLOAT32.bits(finite), initial=0))
        highest = np.float32(fmt.max * self.largest)
        enlarge = lax.min(divide(jnp.full_like(top, highest), top), np.float32(2.0**126))
        enlarge = where(top == 0, np.float32(1), enlarge)
        relative = tried * (enlarge * np.float32(1 / fmt.max))
        relative = cast(relative, scale_format, overflow="saturate")
        return kept(relative), (kept(divide(jnp.ones_like(enlarge), enlarge)),)

    def join(self, relative: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
        """The scales themselves."""
        return kept(relative * _under(arrays[0], relative))

    def take(self, arrays: tuple[jax.Array, ...], places: np.ndarray) -> tuple[jax.Array, ...]:
        """The arrays for some of the scales, by their places in the flattened order."""
        del places
        return arrays

    def bits(self, scales: int) -> int:
        """Bits that it takes beside the scales in their format."""
        del scales
        return 32


@dataclasses.dataclass(frozen=True)
class DoubleScale:
    """Double quantization: the scales less their mean, quantized by absmax in blocks of their own.

    The mean is taken to 2^-22 of the largest scale, in integers, so that it does not depend on an
    order. The blocks run over the scales in their flattened order. A scale that is NaN makes NaN of
    all in its block, as the format of the scales need not have a code for it, and counts for no
    mean.

    Attributes:
      block: how many scales share a second scale.

    Raises:
      ValueError: `block` is below 1.

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.
    """

    block: int = 256

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"DoubleScale: `block` must be at least 1, got {self.block}.")

    def hold(
        self, scale: jax.Array, amax: jax.Array, tried: jax.Array, fmt: Format, scale_format: Format
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The scales in units of the second scales, in their format; second scales and mean.

        Args:
          scale: one a block of the tensor.
          amax: not used.
          tried: not used.
          fmt: not used.
          scale_format: the format of the scales.
        """
        del amax, tried, fmt
        flat = scale.reshape(-1)
        mean = kept(_mean(flat))
        centred = flat - mean
        rows = -(-flat.size // self.block)
        padded = lax.pad(centred, np.float32(0), [(0, rows * self.block - flat.size, 0)])
        magnitude = _FLOAT32.bits(padded.reshape(rows, self.block)) & _FLOAT32.magnitude_mask
        second = jnp.max(magnitude, axis=1, initial=0)
        second = kept(divide(_FLOAT32.floats(second), jnp.float32(scale_format.max)))
        divisor = where(second == 0, np.float32(1), second)
        units = divide(centred, self._spread(divisor, flat.size))
        relative = cast(units, scale_format, overflow="saturate").reshape(scale.shape)
        return kept(relative), (second, mean)

    def join(self, relative: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
        """The scales themselves."""
        second, mean = arrays
        if mean.ndim:  # As `jax.vmap` stacks them.
            return jax.vmap(self.join)(relative, arrays)
        flat = relative.reshape(-1)
        # `kept` keeps the product and the sum from becoming one operation that rounds once.
        product = kept(flat * self._spread(second, flat.size))
        return kept(product + mean).reshape(relative.shape)

    def take(self, arrays: tuple[jax.Array, ...], places: np.ndarray) -> tuple[jax.Array, ...]:
        """The arrays for some of the scales, by their places in the flattened order.

        Raises:
          ValueError: the places do not begin blocks where new ones would.
        """
        places, block = places.reshape(-1), self.block
        firsts = places[::block]
        runs = np.arange(places.size) % block + np.repeat(firsts, block)[: places.size]
        if (firsts % block).any() or (places != runs).any():
            raise ValueError(
                f"Quantized: the rows share second scales with others, {block} scales each. "
                "Dequantize it first."
            )
        return arrays[0][firsts // block], arrays[1]

    def bits(self, scales: int) -> int:
        """Bits that it takes beside the scales in their format."""
        return 32 * (-(-scales // self.block) + 1)

    def _spread(self, second: jax.Array, size: int) -> jax.Array:
        """A second scale for each scale."""
        return jnp.repeat(second, self.block, total_repeat_length=second.size * self.block)[:size]


def _mean(scales: jax.Array) -> jax.Array:
    """The mean of the finite ones, none negative, by sums of integers."""
    finite = scales < np.float32(np.inf)
    scales = where(finite, scales, np.float32(0))
    exponent = jnp.max(_FLOAT32.bits(scales), initial=0) & _FLOAT32.inf
    exponent = lax.clamp(_FLOAT32.field(-100), exponent, _FLOAT32.field(_FLOAT32.bias))
    width = 256
    rows = -(-scales.size // width)
    digits = 22 - max(0, math.ceil(math.log2(max(rows, 1))) - 16)
    enlarge = _FLOAT32.floats(_FLOAT32.field(digits - 1) + (_FLOAT32.field(0) - exponent))
    whole = lax.round(scales * enlarge, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint32)
    whole = lax.pad(whole, np.uint32(0), [(0, rows * width - scales.size, 0)])
    sums = jnp.sum(whole.reshape(rows, width), axis=1)
    high, low = (jnp.sum(part) for part in (sums >> np.uint32(15), sums & np.uint32(2**15 - 1)))
    total = high.astype(jnp.float32) * np.float32(2.0**15) + low.astype(jnp.float32)
    count = jnp.sum(finite, dtype=jnp.int32).astype(jnp.float32)
    return divide(total, lax.max(count, np.float32(1))) / enlarge


SecondLevel: TypeAlias = TensorScale | DoubleScale


def _under(x: jax.Array, other: jax.Array) -> jax.Array:
    """An array with axes of length 1 added behind, up to another's."""
    return x.reshape(x.shape + (1,) * (other.ndim - x.ndim))
