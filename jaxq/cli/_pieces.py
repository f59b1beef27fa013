"""Errors of large tensors, measured in pieces of one shape that fit into the processor's cache.

One program is compiled per recipe, whatever the shapes of the tensors. The rows of a piece are
blocks, padded with rows of zeros. Blocks that are long, or whose length depends on the tensor, are
cut into segments; the lowest and the largest number of the whole block are appended to each of its
segments, so that all of them get the block's scale.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxq.analysis import Energies
from jaxq.formats import Format
from jaxq.interop import gguf
from jaxq.numerics import cast
from jaxq.quantizers import fake_quant
from jaxq.recipes import Affine, PerBlock, PerToken, Recipe, Symmetric

__all__ = ["Errors", "energy", "errors_in_pieces", "errors_of", "packed_in_pieces"]

# Numbers of elements.
_SIZE = 2**18  # A piece.
_SEGMENT = 128  # A segment of a long block.
_ROW = 2**12  # A row of blocks of GGUF.
_LONGEST = 1024  # The longest block that is not cut into segments.
_SUMMED = 2**13  # A partial sum; OpenBLAS starts threads for more than 10,000 elements.


class Errors(NamedTuple):
    """The sum of squared errors and the largest absolute error; infinite if any error is."""

    noise: float
    max_error: float

    def energies(self, signal: float, count: int) -> Energies:
        """Returns the energies of a tensor, given the sum of its squares and its size."""
        values: Any = (self.noise, 0, signal, 0, count)
        return Energies(*values)


def errors_in_pieces(x: np.ndarray, kind: Format | Recipe, axis: int) -> Errors | None:
    """Returns the errors of a tensor; None if they cannot be computed in pieces.

    Args:
      x: a finite float32 tensor.
      kind: a recipe, or a format for a cast.
      axis: the contracted axis, as in `jaxq.fake_quant`.
    """
    if not isinstance(kind, Recipe):
        return _errors(_Rows(x.reshape(1, -1), _SEGMENT), kind)
    scaling = kind.scaling
    if kind.outliers is not None or scaling.second_level == "blocks":
        return None
    block = kind.along(axis, x.ndim).cut(x.shape).block
    sizes = kind.granularity.sizes if isinstance(kind.granularity, PerBlock) else None
    length, fixed = math.prod(block), sizes is not None and math.prod(np.ravel(sizes))
    kind = dataclasses.replace(kind, granularity=PerToken())
    if fixed == length <= _LONGEST:
        top = np.abs(x).max() if scaling.second_level == "tensor" else None
        return _errors(_Rows(_blocks(x, block), length, top=top), kind)
    plain = scaling.range == "absmax" and not scaling.search and scaling.second_level is None
    if not plain or not isinstance(scaling, Symmetric | Affine):
        return None
    blocks = _blocks(x, block)
    ends = np.stack([blocks.min(axis=1), blocks.max(axis=1)], axis=1)
    return _errors(_Rows(blocks, _SEGMENT, ends), kind)


def _blocks(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """Returns the blocks of a tensor as rows; a view if they are contiguous."""
    counts = [n // b for n, b in zip(x.shape, block, strict=True)]
    split = x.reshape([n for pair in zip(counts, block, strict=True) for n in pair])
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return split.transpose(order).reshape(math.prod(counts), math.prod(block))


class _Rows(NamedTuple):
    """The rows of a tensor, and the extreme values that its pieces need for their scales.

    Attributes:
      blocks: the blocks, float32 `[blocks, elements]`.
      length: the length of the rows of a piece; each block occupies a whole number of rows.
      ends: the lowest and the largest value of each block, `[blocks, 2]`, which are appended to its
        rows; None if nothing is appended.
      top: the amax of the tensor, which is appended as a row; None if nothing is appended.
    """

    blocks: np.ndarray
    length: int
    ends: np.ndarray | None = None
    top: float | None = None

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yields pieces of one shape, each with the values appended to it or None."""
        count, size = self.blocks.shape
        each = -(-size // self.length)  # Rows per block.
        blocks = self.blocks
        if each * self.length != size:
            blocks = np.pad(blocks, [(0, 0), (0, each * self.length - size)])
        rows, height = blocks.reshape(-1, self.length), _SIZE // self.length
        more = None
        if self.top is not None:
            more = np.zeros((1, self.length), np.float32)
            more[0, 0] = self.top
        for start in range(0, count * each, height):
            piece = _padded(rows[start : start + height], height)
            if self.ends is not None:
                at = np.arange(start, min(start + height, count * each)) // each
                more = _padded(self.ends[at], height)
            yield piece, more


def _padded(rows: np.ndarray, height: int) -> np.ndarray:
    """Pads rows with rows of zeros to `height` rows."""
    if len(rows) == height:
        return rows
    return np.pad(rows, [(0, height - len(rows)), (0, 0)])


@functools.partial(jax.jit, static_argnames="kind")
def _quantized(rows: jax.Array, more: jax.Array | None, kind: Format | Recipe) -> jax.Array:
    """Returns the quantized rows of a piece."""
    if not isinstance(kind, Recipe):
        return cast(rows, kind, overflow="saturate")
    if more is None:
        return fake_quant(rows, kind)
    whole = lax.concatenate([rows, more], int(len(more) == len(rows)))
    return fake_quant(whole, kind)[: rows.shape[0], : rows.shape[1]]


def _errors(rows: _Rows, kind: Format | Recipe) -> Errors:
    noise, largest, buffer = 0.0, 0.0, None
    for piece, more in rows.pieces():
        # One buffer for all pieces, because fresh memory costs as much as the quantization.
        buffer = np.empty_like(piece) if buffer is None else buffer
        part = errors_of(piece, np.asarray(_quantized(piece, more, kind)), buffer)
        noise, largest = noise + part.noise, max(largest, part.max_error)
    return Errors(noise, largest)


def packed_in_pieces(x: np.ndarray, type: str) -> tuple[np.ndarray, Errors]:
    """Quantizes a tensor to a GGUF block type on all cores; returns its bytes and its errors.

    Args:
      x: a float32 tensor.
      type: a name in `jaxq.interop.gguf.TYPES`, whose blocks divide the last axis.
    """
    layout = gguf.TYPES[type]
    size = x.size // layout.block * layout.size
    rows, width = _Rows(x.reshape(1, -1), _ROW), _ROW // layout.block * layout.size
    data = np.empty(size, np.uint8)

    def quantized(numbered: tuple[int, tuple[np.ndarray, np.ndarray | None]]) -> Errors:
        number, (piece, _) = numbered
        packed, y = _packed(piece, type)
        start = number * len(piece) * width
        own = data[start : start + len(piece) * width]
        own[:] = np.asarray(packed).reshape(-1)[: own.size]
        return errors_of(piece, np.asarray(y))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(quantized, enumerate(rows.pieces())))
    errors = Errors(
        math.fsum(part.noise for part in parts), max((part.max_error for part in parts), default=0)
    )
    shape = (*x.shape[:-1], x.shape[-1] // layout.block * layout.size)
    return data.reshape(shape), errors


@functools.partial(jax.jit, static_argnames="type")
def _packed(piece: jax.Array, type: str) -> tuple[jax.Array, jax.Array]:
    """Returns the bytes of a piece in a block type, and its quantized values."""
    packed = gguf.quantize(piece, type)
    return packed.data, packed.dequantize()


def errors_of(x: np.ndarray, y: np.ndarray, buffer: np.ndarray | None = None) -> Errors:
    """Returns the errors y - x of a finite float32 tensor.

    Args:
      x: the tensor.
      y: its quantized values.
      buffer: an array of the same shape to overwrite; None (the default) allocates one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.subtract(y, x, out=buffer).reshape(-1)
        noise = energy(error)
    if not math.isfinite(noise):
        return Errors(math.inf, math.inf)
    return Errors(noise, max(-float(error.min()), float(error.max()), 0.0) if error.size else 0.0)


def energy(x: np.ndarray) -> float:
    """Returns the sum of squares of float32 numbers, in float64, where it cannot overflow."""
    total, buffer = 0.0, np.empty(_SUMMED)
    for start in range(0, x.size, _SUMMED):
        part = x[start : start + _SUMMED]
        wide = buffer[: part.size]
        wide[:] = part
        total += float(wide @ wide)
    return total
