"""The shape arithmetic of tensors that are divided into equal blocks."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.shapes import as_number, is_symbolic

__all__ = ["Cut", "axis_of_blocks"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The division of a tensor into blocks: its shape and the block length along each axis."""

    shape: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks along each axis, which is the shape of the scales."""
        return tuple(
            1 if n == b else -(-n // b) for n, b in zip(self.shape, self.block, strict=True)
        )

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a split tensor that run within a block."""
        return tuple(range(1, 2 * len(self.shape), 2))

    @property
    def sizes(self) -> np.ndarray | jax.Array:
        """The number of the tensor's elements in each block, in the shape returned by `spread`."""
        sizes: Any = np.ones((), np.float32)
        for n, b, count in zip(self.shape, self.block, self.counts, strict=True):
            if is_symbolic(n):  # All blocks of a symbolic axis have the same length.
                lengths = jnp.broadcast_to(as_number(b, np.float32), (count,))
            else:
                lengths = np.minimum(b, n - b * np.arange(count, dtype=np.float32))
            lengths = lengths.reshape((1,) * sizes.ndim + (count, 1))
            sizes = sizes[..., None, None] * lengths
        return sizes

    @property
    def inside(self) -> np.ndarray | None:
        """A broadcastable mask, False at the padding of a split tensor; None without padding."""
        inside, unpadded = np.ones((), bool), True
        for n, b, count in zip(self.shape, self.block, self.counts, strict=True):
            inside_axis = np.ones((1, 1), bool)
            if not is_symbolic(n) and count * b > n:
                inside_axis, unpadded = (np.arange(count * b) < n).reshape(count, b), False
            inside = inside[..., None, None] & inside_axis
        return None if unpadded else inside

    def split(self, x: jax.Array) -> jax.Array:
        """Reshapes a tensor to `[n0 / b0, b0, n1 / b1, b1, …]`, zero-padding the last blocks."""
        pairs = list(zip(self.counts, self.block, strict=True))
        padding = [(0, c * b - n, 0) for n, (c, b) in zip(self.shape, pairs, strict=True)]
        if any(high for _, high, _ in padding):
            x = lax.pad(x, np.zeros((), x.dtype), padding)
        return x.reshape(tuple(itertools.chain(*pairs)))

    def merge(self, y: jax.Array) -> jax.Array:
        """Reshapes a split tensor back to its original shape, without the padding."""
        padded = tuple(c * b for c, b in zip(self.counts, self.block, strict=True))
        y = y.reshape(padded)
        return y if padded == self.shape else lax.slice(y, [0] * len(padded), self.shape)

    def align_scales(self, scale: jax.Array) -> jax.Array:
        """Reshapes scales of shape `counts` so that they broadcast against a split tensor."""
        return scale.reshape(tuple(itertools.chain(*((c, 1) for c in self.counts))))


def axis_of_blocks(block: tuple[int | None, ...]) -> int:
    """Returns the first axis along which a block has several elements, or else the last axis."""
    return next((axis for axis, n in enumerate(block) if n != 1), len(block) - 1)
