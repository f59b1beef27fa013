"""Emulation of narrow accumulators: their format, chunk length and order of summation."""

import dataclasses
import functools
from typing import Literal

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import choice, integer
from jaxq.formats import Format, get_format
from jaxq.numerics import cast

__all__ = ["Accumulation"]


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """The format and the order in which the terms of a product are summed.

    The contraction is cut into chunks. Within a chunk, the terms are added one after the other,
    starting from 0: s <- cast(s + a_k b_k, format). The chunks' sums are then added one after the
    other or in pairs: s <- cast(s + sum, outer_format). Every sum is rounded to float32 first and
    then to the format.

    Attributes:
      format: the accumulator's format, as accepted by `jaxq.get_format`; float32 by default. Sums
        overflow as in `jaxq.cast`.
      chunk: the number of terms in a chunk; None (the default) uses one chunk for the whole
        contraction.
      order: the order in which the chunks' sums are added. `"sequential"` (the default): one after
        the other, from 0. `"pairwise"`: the first to the second, the third to the fourth, an odd
        last one left as it is, and so on with the results.
      outer_format: the format in which the chunks' sums are added; None (the default) means
        `format`.

    Raises:
      ValueError: if the format or the order is unknown, or the chunk is below 1.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> ones, numbers = jnp.ones((1, 4096), jnp.bfloat16), (((1,), (1,)), ((), ()))
      >>> narrow = jaxq.ProductRecipe(execution=jaxq.Accumulation("bfloat16"))
      >>> chunks = jaxq.ProductRecipe(execution=jaxq.Accumulation("bfloat16", 64, "pairwise"))
      >>> [jaxq.dot_general(ones, ones, numbers, recipe=r).item() for r in (narrow, chunks)]
      [256.0, 4096.0]

    References:
      DeepSeek-AI (2024), "DeepSeek-V3 Technical Report", section 3.3.2: sums of 128 terms in about
      14 bits, added up in float32.
    """

    format: str | Format = "float32"
    chunk: int | None = None
    order: Literal["sequential", "pairwise"] = "sequential"
    outer_format: str | Format | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        outer = self.format if self.outer_format is None else self.outer_format
        object.__setattr__(self, "outer_format", get_format(outer))
        if self.chunk is not None:
            integer("Accumulation", "chunk", self.chunk, "Use None for one chunk.", least=1)
        orders = ("sequential", "pairwise")
        choice("Accumulation", "order", self.order, orders, "Use 'sequential'.")

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiplies two batches of matrices, contracted along their last axes.

        Args:
          a: float32 `[B, M, K]`.
          b: float32 `[B, N, K]`. Products of elements of a and b must be exact in float32, because
            a fused multiply-add would not round them.

        Returns:
          float32 `[B, M, N]`. One buffer of that shape is live at a time, or one per chunk with
          `order="pairwise"`.

        Raises:
          ValueError: if the chunk does not divide K.
        """
        length = a.shape[-1]
        chunk = max(length, 1) if self.chunk is None else self.chunk
        if length % chunk:
            raise ValueError(
                f"Accumulation: chunks of {chunk} must divide the contraction, which has "
                f"{length} terms. Choose a length that does, or pad the operands with zeros."
            )
        terms = tuple(
            jnp.moveaxis(x, -1, 0).reshape(length // chunk, chunk, *x.shape[:-1]) for x in (a, b)
        )
        start = jnp.zeros((*a.shape[:-1], b.shape[-2]), jnp.float32)

        def add(fmt: Format, total: jax.Array, term_value: jax.Array) -> jax.Array:
            return cast(total + term_value, fmt)

        inner, outer = (functools.partial(add, get_format(f)) for f in (self.format, self._outer))

        def term(total: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
            return inner(total, pair[0][..., :, None] * pair[1][..., None, :]), None

        def sum_of(pairs: tuple) -> jax.Array:
            return lax.scan(term, start, pairs)[0]

        if self.order == "sequential":
            return lax.scan(lambda s, pairs: (outer(s, sum_of(pairs)), None), start, terms)[0]
        sums = lax.map(sum_of, terms)
        while len(sums) > 1:
            odd = len(sums) % 2
            pairs = outer(sums[: len(sums) - odd : 2], sums[1::2])
            sums = jnp.concatenate([pairs, sums[len(sums) - odd :]]) if odd else pairs
        return sums[0] if len(sums) else start

    @property
    def _outer(self) -> Format:
        assert self.outer_format is not None
        return get_format(self.outer_format)
