"""The tensor that `quantize` stores: a pytree of packed codes and scales, and the way back."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.blocks import Cut
from jaxq.casting import as_dtype
from jaxq.catalog import get_format
from jaxq.codecs import decode, unpack
from jaxq.meshes import automatic, fitting, spec_of
from jaxq.recipes import Quantizer
from jaxq.snapping import restored

__all__ = ["WHOLE_BYTES", "Quantized", "dequantize"]

WHOLE_BYTES = (8, 16)  # Widths of codes that need no packing.

_FLOAT32 = get_format("float32")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "second", "zero_point", "outliers"],
    meta_fields=["recipe", "dtype", "block", "length"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor: a pytree of packed codes and scales.

    Its arrays may have more leading axes than what was quantized, as `jax.vmap` gives them, or
    fewer of those, as `jax.lax.scan` takes them off again.

    Attributes:
      codes: the elements' codes, packed along the last axis as `jaxq.pack` does it; uint8, or
        uint16 for formats of 16 bits.
      scale: one a block, in the shape of the blocks: float32, or codes of the recipe's
        `scale_format` where that is another. `scales` has the values.
      second: what leads back to the scales, the arrays of the recipe's second level; () without.
      zero_point: one a block: integers, or minima held as the scales are; None for a symmetric
        recipe.
      outliers: codes of the numbers that are kept apart, and their places in the flattened
        tensor; () without.
      recipe: the recipe.
      dtype: the dtype of the tensor that was quantized.
      block: the length of a block on each axis.
      length: the length of the last axis; None for a scalar.
    """

    codes: jax.Array
    scale: jax.Array
    second: tuple[jax.Array, ...]
    zero_point: jax.Array | None
    outliers: tuple[jax.Array, ...]
    recipe: Quantizer
    dtype: np.dtype
    block: tuple[int, ...]
    length: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        leading = self.codes.shape[:-1]
        return leading if self.length is None else (*leading, self.length)

    @property
    def ndim(self) -> int:
        """Number of the tensor's axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, as held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def scales(self) -> jax.Array:
        """The values of the scales, by which the elements are multiplied; float32."""
        return _scales(self)

    @property
    def cut(self) -> Cut:
        """The blocks of the tensor."""
        more = self.ndim - len(self.block)
        return Cut(self.shape, (1,) * more + self.block[max(-more, 0) :])

    def unpack(self) -> jax.Array:
        """The codes, one an element, in the tensor's shape."""
        bits = self.recipe.element.bits
        if bits in WHOLE_BYTES:
            return self.codes.reshape(self.shape)
        length = 1 if self.length is None else self.length
        return unpack(self.codes, bits, length).reshape(self.shape)

    def dequantize(self) -> jax.Array:
        """The tensor that the codes stand for: see `jaxq.dequantize`."""
        return dequantize(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a Quantized scalar.")
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Quantized":
        """The rows of an index or slice of the leading axis, still quantized.

        Raises:
          IndexError: the index is out of range.
          TypeError: the tensor has no leading axis beside the one along which it is packed.
          ValueError: a slice that cuts through blocks.
        """
        if self.ndim < 2:
            raise TypeError("Quantized: indexing needs at least two axes. Dequantize it first.")
        n, block, rest = self.shape[0], self.cut.block[0], self.cut.block[1:]
        if not isinstance(index, slice):
            at = operator.index(index)
            if not -n <= at < n:
                raise IndexError(f"Quantized: index {at} is out of range for {n} rows.")
            return self._rows(at % n, at % n // block, rest)
        start, stop, step = index.indices(n)
        if block == n:
            return self._rows(index, slice(None), (len(range(start, stop, step)), *rest))
        if block > 1 and (step != 1 or start % block or (stop % block and stop != n)):
            raise ValueError(
                f"Quantized: a slice must take whole blocks of {block} rows, got {index}."
            )
        blocks = index if block == 1 else slice(start // block, -(-stop // block))
        return self._rows(index, blocks, (block, *rest))

    def _rows(self, index: int | slice, blocks: int | slice, block: tuple[int, ...]) -> "Quantized":
        zero_point = None if self.zero_point is None else self.zero_point[blocks]
        codes, scale, outliers = self.codes[index], self.scale[blocks], self.outliers
        if outliers and outliers[0].ndim == 1:
            raise ValueError(
                "Quantized: numbers that are kept apart have their places in the whole tensor, so "
                "rows cannot be taken. Dequantize it first."
            )
        outliers = tuple(array[index] for array in outliers)
        level, second = self.recipe.second_level, self.second
        if level is not None:
            if second[-1].ndim:  # One for each of what vmap stacked.
                second = tuple(array[index] for array in second)
            else:
                second = level.take(
                    second, np.arange(self.scale.size).reshape(self.scale.shape)[blocks]
                )
        arrays = (codes, scale, second, zero_point, outliers)
        return Quantized(*arrays, self.recipe, self.dtype, block, self.length)


def _of_scales(mesh: Any, result: jax.Array, q: Quantized) -> Any:
    """The layout of the scales on a mesh with explicit axes: that of what is stored of them."""
    return fitting(mesh, spec_of(q.scale), result.shape)


@jax.jit
@automatic(_of_scales)
def _scales(q: Quantized) -> jax.Array:
    scales, level = _decoded(q.scale, q.recipe), q.recipe.second_level
    return scales if level is None else level.join(scales, q.second)


def _of_codes(mesh: Any, result: jax.Array, q: Quantized) -> Any:
    """The layout of what `dequantize` gives on a mesh with explicit axes."""
    return fitting(mesh, spec_of(q.codes), result.shape)


@jax.jit
@automatic(_of_codes)
def dequantize(q: Quantized) -> jax.Array:
    """The tensor that a `Quantized` stands for.

    Args:
      q: what `quantize` gave.

    Returns:
      An array of the original's shape and dtype.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> jaxq.dequantize(jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor"))
      Array([ 0.5 , -1.  ,  2.54], dtype=float32)
    """
    recipe, cut = q.recipe, q.cut
    values = cut.split(decode(q.unpack(), recipe.element))
    zero_point = None if q.zero_point is None else cut.spread(q.zero_point)
    if recipe.zero_point == "integer":
        assert zero_point is not None
        values = values - zero_point.astype(jnp.float32)
    elif zero_point is not None:
        zero_point = _decoded(zero_point, recipe)
    y = cut.merge(restored(values, cut.spread(q.scales), zero_point, recipe))
    if recipe.outliers is not None:
        y = recipe.outliers.put(y, q.outliers)
    return as_dtype(y, q.dtype)


def _decoded(scales: jax.Array, recipe: Quantizer) -> jax.Array:
    """What `_encoded` was given."""
    return scales if recipe.held == _FLOAT32 else decode(scales, recipe.held)
