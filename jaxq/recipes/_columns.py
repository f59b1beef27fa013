"""The blocks of a split tensor as columns, which ggml's searches take."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.cutting import Cut, axis_of_blocks
from jaxq._ggml.blocks import FloatBlocks, QuantizedBlocks, in_chunks
from jaxq._ggml.searches import product, sums
from jaxq._jax.arithmetic import divide

__all__ = ["Columns", "searched"]


@dataclasses.dataclass(frozen=True)
class Columns:
    """The order of the blocks or super-blocks of a split tensor.

    Attributes:
      counts: the number of blocks along each axis.
      axis: the axis of the blocks.
      before: the product of the lengths of the axes before it.
      runs: the number of columns along it.
      after: the product of the lengths of the axes after it.
      size: the number of elements in a column.
    """

    counts: tuple[int, ...]
    axis: int
    before: int
    runs: int
    after: int
    size: int

    @staticmethod
    def of(cut: Cut, size: int | None = None) -> "Columns":
        """Returns the order of columns of a size; None for one block each."""
        axis = axis_of_blocks(cut.block)
        size = cut.block[axis] if size is None else size
        before, after = math.prod(cut.shape[:axis]), math.prod(cut.shape[axis + 1 :])
        return Columns(cut.counts, axis, before, cut.shape[axis] // size, after, size)

    def columns(self, x: jax.Array) -> jax.Array:
        """Returns the elements of a split tensor as `[elements, columns]`."""
        x = x.reshape(self.before, self.runs, self.size, self.after)
        count = self.before * self.runs * self.after
        return x.transpose(2, 0, 1, 3).reshape(self.size, count)

    def elements(self, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns `[columns, n]` with the n numbers along the axis of the blocks."""
        rows = rows.reshape(self.before, self.runs, self.after, rows.shape[1])
        return rows.transpose(0, 1, 3, 2).reshape(shape)

    def factors(self, d: jax.Array) -> jax.Array:
        """Returns numbers of columns as an array with the axes of the tensor."""
        shape = list(self.counts)
        shape[self.axis] = self.runs
        return d.reshape(shape)

    def parts(self, rows: jax.Array) -> jax.Array:
        """Returns numbers of blocks in the layout of `Cut.align_scales`."""
        return self.elements(rows, tuple(n for count in self.counts for n in (count, 1)))

    def row_squares(self, columns: jax.Array) -> jax.Array:
        """Returns the mean square of the row that each column is part of."""
        length = self.runs * self.size
        rows = columns.reshape(self.size, self.before, self.runs, self.after)
        rows = rows.transpose(2, 0, 1, 3).reshape(length, -1)
        total = sums(lambda v: (product(v, v),), rows)[0]
        square = divide(total, jnp.full(total.shape, length, jnp.float32))
        shape = (self.before, self.runs, self.after)
        return jnp.broadcast_to(square.reshape(self.before, 1, self.after), shape).reshape(-1)


def searched(
    search: Callable[[FloatBlocks], QuantizedBlocks],
    columns: Columns,
    x: jax.Array,
    importance: jax.Array | None,
    *,
    rows: bool = False,
) -> QuantizedBlocks:
    """Returns the results of a search, with NaN as scales of columns that are not finite.

    The codes of these columns are 0. Columns whose scale overflows to NaN count as not finite.

    Args:
      search: the search.
      columns: the order of the blocks.
      x: the split tensor.
      importance: the importance of its elements; None for none.
      rows: True if the search needs the mean square of the row of each block.
    """
    elements = columns.columns(x)
    finite = jnp.isfinite(elements).all(axis=0)
    elements = jnp.where(finite, elements, np.float32(0))
    blocks = FloatBlocks(
        elements,
        None if importance is None else columns.columns(importance),
        columns.row_squares(elements) if rows else None,
    )
    result = in_chunks(search, blocks, columns.size)
    for factor in (result.d, result.m):
        if factor is not None:
            finite = finite & ~jnp.isnan(factor)

    # Sums of huge numbers may overflow to NaN, whose sign and integer value depend on the
    # processor.
    def masked(x: jax.Array | None, other: np.float32 | np.int32) -> jax.Array | None:
        if x is None:
            return None
        return jnp.where(finite if x.ndim == 1 else finite[:, None], x, other)

    nan, zero = np.float32(np.nan), np.int32(0)
    return QuantizedBlocks(
        d=jnp.where(finite, result.d, nan),
        scales=masked(result.scales, zero),
        codes=jnp.where(finite[:, None], result.codes, zero),
        m=masked(result.m, nan),
        minima=masked(result.minima, zero),
    )
