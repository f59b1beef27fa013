"""The random Hadamard transform, which spreads outliers over a block before quantization."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import described, integer, numbers_of
from jaxq._base.bits import where
from jaxq._base.cutting import Cut
from jaxq._jax.barriers import barrier_on_cpu
from jaxq._jax.draws import bits
from jaxq._jax.meshes import as_first, automatic

__all__ = ["Hadamard"]


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """An orthogonal transform of blocks of vectors: x -> H D x / sqrt(size).

    H is the Hadamard matrix in Sylvester's order and D a diagonal of random signs, the same for
    every block. Both operands of a product are transformed along the contraction. As
    (H D x) . (H D y) = size (x . y), the product is unchanged except for rounding.

    Attributes:
      size: the length of a block, a power of two; 16 by default.
      signs: the diagonal of D, `size` numbers 1 or -1; None (the default) draws them from the key.

    Raises:
      ValueError: if the size is not a power of two, or the signs are not `size` numbers 1 or -1.
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> Hadamard(2, signs=(1, -1)).apply(jnp.array([3.0, 1.0]), {0: 2}, jnp.array([1.0, -1.0]))
      Array([1.4142135, 2.828427 ], dtype=float32)

    References:
      Tseng, Yu, Park (2025), "Training LLMs with MXFP4"; NVIDIA (2025), "Pretraining Large Language
      Models with NVFP4".
    """

    size: int = 16
    signs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        size, example = self.size, "Use, for example, 16."
        if integer("Hadamard", "size", size, example) < 2 or size & (size - 1):
            raise ValueError(
                "Hadamard: `size` must be a power of two, at least 2, got "
                f"{described(size)}. {example}"
            )
        if self.signs is not None:
            requirement = f"{size} numbers 1 or -1"
            remedy = "Leave them out to draw them from the key."
            signs = numbers_of(
                "Hadamard", "signs", self.signs, requirement, lambda s: s in (1, -1), remedy
            )
            object.__setattr__(self, "signs", signs)
            if len(signs) != size:
                raise ValueError(
                    f"Hadamard: `signs` must be {requirement}, got {len(signs)}. {remedy}"
                )

    def draw(self, key: jax.Array | None) -> jax.Array:
        """Returns the signs, float32 `[size]`, drawn from the key unless they are fixed."""
        if self.signs is not None:
            return jnp.asarray(self.signs, jnp.float32)
        assert key is not None, "the caller has checked it"
        # Matches `jax.random.rademacher` without x64; with x64 enabled, that draws other signs.
        drawn = bits(key, (self.size,), jnp.uint32)
        return where(drawn < np.uint32(2**31), np.float32(1), np.float32(-1))

    def apply(self, x: jax.Array, sizes: dict[int, int], signs: jax.Array) -> jax.Array:
        """Transforms the blocks of a float32 tensor.

        Sums are computed in the order of the fast transform, neighbors first, so that all
        ways of running it agree to the last bit. A NaN or an infinity makes its whole block NaN.

        Args:
          x: a float32 tensor of any shape.
          sizes: the block's length on each of its axes, whose product is `size`; the last axis
            varies fastest in the order of the signs.
          signs: the signs, float32 `[size]`.

        Returns:
          The transformed tensor, of x's shape.
        """
        return _transformed(x, signs, tuple(sizes.items()))


@functools.partial(jax.jit, static_argnames="lengths")
@automatic(as_first)
def _transformed(x: jax.Array, signs: jax.Array, lengths: tuple[tuple[int, int], ...]) -> jax.Array:
    # Without the barrier, XLA on CPU compiles the transform again for each way to compute x, and
    # for each order in which it visits x and the constants that all transforms share.
    pair = jnp.array([1, -1], jnp.float32)
    x, signs, pair = barrier_on_cpu((x, signs, pair))
    sizes = dict(lengths)
    cut = Cut(x.shape, tuple(sizes.get(axis, 1) for axis in range(x.ndim)))
    by_axis = signs.reshape(tuple(sizes.values())).transpose(np.argsort([*sizes]))
    within = [n for axis in range(x.ndim) for n in (1, sizes.get(axis, 1))]
    y, factors = cut.split(x), by_axis.reshape(within)
    if x.ndim - 1 in sizes:  # XLA on CPU would not vectorize the whole transform in one kernel.
        y, factors = y * factors, None
    for axis, length in reversed(lengths):
        y, factors = _butterflies(y, 2 * axis + 1, length, pair, factors), None
    return cut.merge(y * np.float32(1 / math.sqrt(signs.size)))


def _butterflies(
    y: jax.Array, axis: int, length: int, pair: jax.Array, factors: jax.Array | None
) -> jax.Array:
    """Applies the unscaled transform along a whole axis to y times factors.

    Each pass adds pairs of neighbors and puts their sums and differences far apart, so that all
    passes are the same program.

    Args:
      y: the array.
      axis: the axis.
      length: its length.
      pair: the array [1, -1].
      factors: the factors, which can be broadcast to y's shape, or None.
    """
    signs = pair.reshape((1,) * axis + (2,) + (1,) * (y.ndim - axis))
    for _ in range(length.bit_length() - 1):
        pairs = [_every_second(y, axis, i) for i in range(2)]
        if factors is not None:
            pairs = [x * _every_second(factors, axis, i) for i, x in enumerate(pairs)]
        y, factors = (pairs[0] + pairs[1] * signs).reshape(y.shape), None
    return y


def _every_second(x: jax.Array, axis: int, start: int) -> jax.Array:
    """Returns every second element along an axis, with a new axis of length 1 in front of it."""
    return lax.expand_dims(lax.slice_in_dim(x, start, None, 2, axis), (axis,))
