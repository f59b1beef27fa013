"""Quantized tensors, which are pytrees of packed codes and scales, and dequantization."""

import dataclasses
import operator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.cutting import Cut, axis_of_blocks
from jaxq._base.records import size_text
from jaxq._jax.meshes import automatic, fitting, spec_of
from jaxq._jax.serialization import pytree
from jaxq.formats import get_format
from jaxq.numerics import as_dtype, decode, encode, pack, unpack
from jaxq.quantizers._snapping import restored
from jaxq.recipes import Recipe, StoredScales, records, title_of

__all__ = ["WHOLE_BYTES", "Quantized", "QuantizedArrays", "decoded", "dequantize", "encoded"]

WHOLE_BYTES = (8, 16)  # Code widths, in bits, that need no packing.

_FLOAT32 = get_format("float32")


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArrays:
    """The fields of `Quantized`: a base class of records that are not stored weights."""

    codes: jax.Array
    scale: jax.Array
    second: tuple[jax.Array, ...]
    zero_point: jax.Array | None
    outliers: tuple[jax.Array, ...]
    recipe: Recipe
    dtype: np.dtype
    block: tuple[int | None, ...]
    length: int | None


@pytree(static=("recipe", "dtype", "block", "length"), kinds=records)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(QuantizedArrays):
    """A quantized tensor: a pytree of packed codes and scales.

    Its arrays may have more leading axes than the tensor that was quantized, as `jax.vmap` adds
    them, or fewer, as `jax.lax.scan` removes them.

    Attributes:
      codes: the codes of the elements, packed along the last axis by
        `jaxq.numerics.pack`; uint8, or uint16 for 16-bit formats.
      scale: the stored scales, one per block, in the shape of the blocks: float32, or codes of the
        recipe's `scale_format` if that is another format. With `SuperBlocks`, codes of less than 8
        bits are packed along the axis of the blocks. `scales` has their values.
      second: the arrays of the scaling's second level, from which it restores the scales; () if it
        has none.
      zero_point: the zero points, one per block: integers, or minima stored as the scales are; None
        for a symmetric recipe. `minima` has the values of minima.
      outliers: the codes of the outliers and their positions in the flattened tensor; () if the
        recipe has none.
      recipe: the recipe.
      dtype: the dtype of the tensor that was quantized.
      block: the length of a block on each axis; None for the whole of an axis whose length was
        symbolic.
      length: the length of the last axis; None for a scalar.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> q = jaxq.quantize(jnp.ones((8, 64)), "int4_g32")
      >>> q, q.nbytes, q[2].shape
      (int4_g32[8×64] 320 B, 320, (64,))
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        leading = self.codes.shape[:-1]
        return leading if self.length is None else (*leading, self.length)

    @property
    def ndim(self) -> int:
        """The number of axes of the tensor."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays: codes, scales, zero points and the others."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def scales(self) -> jax.Array:
        """The float32 values of the scales, by which the elements are multiplied."""
        return _scales(self)

    @property
    def minima(self) -> jax.Array | None:
        """The float32 values of the minima, in the shape of `scales`; None without minima."""
        return _minima(self)

    @property
    def cut(self) -> Cut:
        """The division of the tensor into blocks."""
        extra_ndim = self.ndim - len(self.block)
        block = (1,) * extra_ndim + self.block[max(-extra_ndim, 0) :]
        whole = (n if b is None else b for n, b in zip(self.shape, block, strict=True))
        return Cut(self.shape, tuple(whole))

    def unpack(self) -> jax.Array:
        """Returns the codes, one per element, in the tensor's shape."""
        bits = self.recipe.element.bits
        if bits in WHOLE_BYTES:
            return self.codes.reshape(self.shape)
        length = 1 if self.length is None else self.length
        return unpack(self.codes, bits, length).reshape(self.shape)

    def dequantize(self) -> jax.Array:
        """Returns the dequantized tensor; see `jaxq.dequantize`."""
        return dequantize(self)

    def __repr__(self) -> str:
        size = size_text(self)
        if not size:
            return f"<Quantized of {self.codes!r}>"
        return f"{title_of(self.recipe)}[{'×'.join(map(str, self.shape))}] {size}"

    def __pdoc__(self, **options: Any) -> Any:
        """Returns the same text for wadler_lindig, by which Equinox shows its modules."""
        del options
        from wadler_lindig import TextDoc  # Only wadler_lindig calls this method.

        return TextDoc(repr(self))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("Quantized: len() needs at least one axis, got a scalar. Use `shape`.")
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> "Quantized":
        """Returns the rows at an index or slice of the leading axis, still quantized.

        Raises:
          IndexError: if the index is out of range.
          TypeError: if the index is neither an integer nor a slice, or the tensor has no leading
            axis besides the one along which it is packed.
          ValueError: if the slice cuts through blocks, or the rows share second scales or outliers
            with other rows.
        """
        if self.ndim < 2:
            raise TypeError(
                f"Quantized: indexing needs at least two axes, got shape {self.shape}. Dequantize "
                "the tensor first."
            )
        n, block, rest = self.shape[0], self.cut.block[0], self.cut.block[1:]
        if not isinstance(index, slice):
            try:
                at = operator.index(index)
            except TypeError as error:
                raise TypeError(
                    "Quantized: an index must be an integer or a slice of the leading axis, got "
                    f"{type(index).__name__}. Dequantize the tensor first to select other elements."
                ) from error
            if not -n <= at < n:
                raise IndexError(f"Quantized: index {at} is out of range for {n} rows.")
            return self._rows(at % n, at % n // block, rest)
        start, stop, step = index.indices(n)
        if block == n:
            return self._rows(index, slice(None), (len(range(start, stop, step)), *rest))
        if block > 1 and (step != 1 or start % block or (stop % block and stop != n)):
            raise ValueError(
                f"Quantized: a slice must consist of whole blocks of {block} rows, got {index}. "
                "Dequantize the tensor first to select other rows."
            )
        blocks = index if block == 1 else slice(start // block, -(-stop // block))
        return self._rows(index, blocks, (block, *rest))

    def _rows(self, index: int | slice, blocks: int | slice, block: tuple[int, ...]) -> "Quantized":
        zero_point = None if self.zero_point is None else self.zero_point[blocks]
        codes, scale, outliers = self.codes[index], self.scale[blocks], self.outliers
        if outliers and outliers[0].ndim == 1:
            raise ValueError(
                "Quantized: outliers are stored with their positions in the whole tensor, so rows "
                "cannot be selected. Dequantize the tensor first."
            )
        outliers = tuple(array[index] for array in outliers)
        second = self.second
        if (
            self.recipe.scaling.blocks_per_run > 1
            and self.ndim <= len(self.block)
            and self.cut.block[0] > 1
        ):
            raise ValueError(
                "Quantized: selected rows must share no scales with other rows, got blocks of "
                f"{self.cut.block[0]} rows whose scales are packed. Dequantize the tensor first."
            )
        if second and second[-1].ndim:  # One per row, or per tensor that `jax.vmap` stacked.
            second = tuple(array[index] for array in second)
        else:
            positions = np.arange(self.scale.size).reshape(self.scale.shape)[blocks]
            second = self.recipe.scaling.take(second, positions)
        arrays = (codes, scale, second, zero_point, outliers)
        return Quantized(*arrays, self.recipe, self.dtype, block, self.length)


def _of_scales(mesh: Any, result: jax.Array, q: Quantized) -> Any:
    """Returns the sharding of the scales, that of the stored ones, on a mesh with explicit axes."""
    return fitting(mesh, spec_of(q.scale), result.shape)


@jax.jit
@automatic(_of_scales)
def _scales(q: Quantized) -> jax.Array:
    return q.recipe.scaling.restore(StoredScales(decoded(q.scale, q), q.second))


@jax.jit
@automatic(_of_scales)
def _minima(q: Quantized) -> jax.Array | None:
    if q.zero_point is None or q.recipe.scaling.zero_point == "integer":
        return None
    minimum, scale = decoded(q.zero_point, q), jnp.zeros((), jnp.float32)
    return q.recipe.scaling.restore_minimum(StoredScales(scale, q.second, minimum))


def _of_codes(mesh: Any, result: jax.Array, q: Quantized) -> Any:
    """Returns the sharding of `dequantize`'s result on a mesh with explicit axes."""
    return fitting(mesh, spec_of(q.codes), result.shape)


@jax.jit
@automatic(_of_codes)
def dequantize(q: Quantized) -> jax.Array:
    """Returns the tensor that a `Quantized` represents.

    Args:
      q: the quantized tensor, from `quantize`.

    Returns:
      An array of the original tensor's shape and dtype.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> jaxq.dequantize(jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor"))
      Array([ 0.5 , -1.  ,  2.54], dtype=float32)
    """
    recipe, cut = q.recipe, q.cut
    values = cut.split(decode(q.unpack(), recipe.element))
    if q.zero_point is not None and recipe.scaling.zero_point == "integer":
        values = values - cut.align_scales(q.zero_point).astype(jnp.float32)
    minimum = q.minima
    minimum = None if minimum is None else cut.align_scales(minimum)
    y = cut.merge(restored(values, cut.align_scales(q.scales), minimum, recipe))
    if recipe.outliers is not None:
        y = recipe.outliers.put(y, q.outliers)
    return as_dtype(y, q.dtype, overflow="propagate")


def encoded(scales: jax.Array, cut: Cut, recipe: Recipe) -> jax.Array:
    """Returns scales or minima as stored: float32 unchanged, other formats as codes.

    Codes of runs of blocks are packed into bytes along the axis of the blocks.
    """
    fmt = recipe.scale_format
    codes = scales if fmt == _FLOAT32 else encode(scales, fmt)
    if recipe.scaling.blocks_per_run == 1 or fmt.bits in WHOLE_BYTES:
        return codes
    axis = axis_of_blocks(cut.block)
    return jnp.moveaxis(pack(jnp.moveaxis(codes, axis, -1), fmt.bits), -1, axis)


def decoded(scales: jax.Array, q: QuantizedArrays) -> jax.Array:
    """Returns the values of stored scales or minima of a quantized tensor."""
    fmt = q.recipe.scale_format
    if q.recipe.scaling.blocks_per_run > 1 and fmt.bits not in WHOLE_BYTES:
        axis = axis_of_blocks(q.block) - len(q.block) + scales.ndim
        packed = jnp.moveaxis(scales, axis, -1)
        codes = unpack(packed, fmt.bits, packed.shape[-1] * 8 // fmt.bits)
        scales = jnp.moveaxis(codes, -1, axis)
    return scales if fmt == _FLOAT32 else decode(scales, fmt)
