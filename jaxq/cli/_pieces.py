"""Errors of large tensors, measured in pieces of few shapes that stay in the processor's cache.

Two programs are compiled per recipe, one for large pieces and one for small ones, whatever the
shapes of the tensors. The rows of a piece are blocks. Blocks that are long, or whose length depends
on the tensor, are cut into segments. The lowest and the largest number of the whole block are
appended to each segment, so that all segments get the block's scale.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxq._jax.arithmetic import rounded
from jaxq.analysis import Energies
from jaxq.formats import Format
from jaxq.numerics import cast
from jaxq.quantizers import fake_quant, simulate
from jaxq.recipes import Affine, PerBlock, PerToken, Recipe, Symmetric

__all__ = [
    "LARGE",
    "LEAST",
    "Errors",
    "Numbers",
    "Sums",
    "energy",
    "errors_in",
    "errors_in_pieces",
    "errors_of",
    "pieces_of",
    "sums_of",
]

# Elements of the two kinds of pieces. XLA on CPU (JAX 0.10 to 0.12) passes the kernels of a program
# to its threads, which takes 0.1 ms per piece, or 0.1 ns per element of a large one.
LARGE, _SMALL = 2**20, 2**17
_SEGMENT = 128  # Elements of a segment of a long block.
_LONGEST = 1024  # Elements of the longest blocks that are not cut.
# Elements that are added in float32 before their sum is added in float64. OpenBLAS starts threads
# for more than 10,000.
_SUMMED = 2**11
LEAST = 1e-18  # Larger sums of squares are accurate, although subnormal squares are lost.


class Errors(NamedTuple):
    """The sum of squared errors and the largest absolute error; infinite if any error is."""

    noise: float
    max_error: float

    def energies(self, signal: float, count: int) -> Energies:
        """Returns the energies of a tensor, given the sum of its squares and its size."""
        values: Any = (self.noise, 0, signal, 0, count)
        return Energies(*values)

    def __add__(self, other: Any) -> "Errors":
        """Returns the errors of two parts of a tensor together."""
        return Errors(self.noise + other.noise, max(self.max_error, other.max_error))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers of a tensor.

    Attributes:
      shape: the shape of the tensor.
      stream: a function that yields flat float32 parts of a size. It may overwrite a part when it
        makes the second one after it.
      read: a function that returns the whole tensor in float32.
    """

    shape: tuple[int, ...]
    stream: Callable[[int], Iterator[np.ndarray]]
    read: Callable[[], np.ndarray]

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """The tensor in memory, for recipes that need it at once."""
        return self.read()

    @staticmethod
    def of(x: np.ndarray) -> "Numbers":
        """Returns the numbers of a float32 array."""
        flat = x.reshape(-1)

        def stream(size: int) -> Iterator[np.ndarray]:
            return (flat[start : start + size] for start in range(0, flat.size, size))

        return Numbers(x.shape, stream, lambda: x)


class Sums(NamedTuple):
    """Sums over a tensor that all recipes share.

    Attributes:
      signal: the sum of squares; not finite if a number is not.
      ends: the lowest and the largest number of each row along the last axis, `[rows, 2]`.
    """

    signal: float
    ends: np.ndarray


def sums_of(numbers: Numbers) -> Sums:
    """Returns sums over a tensor that is not empty, in one pass."""
    length = numbers.shape[-1] if numbers.shape else 1
    rows = math.prod(numbers.shape) // length
    ends = np.empty((rows, 2), np.float32)
    ends[:] = np.inf, -np.inf
    signal, start = 0.0, 0
    for part in numbers.stream(LARGE):
        first, last = start // length, -(-(start + part.size) // length)
        low, high = ends[first:last, 0], ends[first:last, 1]
        if start % length == 0 and part.size % length == 0:
            whole = part.reshape(-1, length)
            low[:], high[:] = whole.min(axis=1), whole.max(axis=1)
        else:
            cuts = np.maximum(np.arange(first, last) * length - start, 0)
            np.minimum(low, np.minimum.reduceat(part, cuts), out=low)
            np.maximum(high, np.maximum.reduceat(part, cuts), out=high)
        signal += energy(part)
        start += part.size
    return Sums(signal, ends)


def errors_in_pieces(
    numbers: Numbers, sums: Sums, kinds: Sequence[Format | Recipe], axis: int
) -> list[Errors | None]:
    """Returns the errors of a tensor by several recipes; None if they have no pieces.

    Args:
      numbers: the numbers of the tensor, which are finite.
      sums: the sums over them.
      kinds: recipes, or formats for a cast.
      axis: the contracted axis, as in `jaxq.fake_quant`.
    """
    if 0 < sums.signal < LEAST:  # XLA on CPU takes subnormal errors for 0.
        return [None] * len(kinds)
    cuts = [_cut_of(numbers, sums, kind, axis) for kind in kinds]
    errors = {i: Errors(0.0, 0.0) for i, cut in enumerate(cuts) if cut is not None}
    shared = [(i, cut) for i, cut in enumerate(cuts) if cut is not None and cut.blocks is None]
    separate = [
        (i, cut) for i, cut in enumerate(cuts) if cut is not None and cut.blocks is not None
    ]
    passes = [(numbers.stream(LARGE), _SEGMENT, shared)] if shared else []
    passes += [(_parts_of(cut), cut.length, [(i, cut)]) for i, cut in separate]
    for parts, length, group in passes:
        start = 0
        for part in parts:
            for piece, used in pieces_of(part, length):
                for i, cut in group:
                    error = _errors(*cut.arguments(piece, start))
                    piece_errors = errors_in(np.asarray(error).reshape(-1)[:used])
                    del error  # So that the next piece uses its memory.
                    errors[i] = errors[i] + piece_errors
                start += used
    return [errors.get(i) for i in range(len(kinds))]


class _Cut(NamedTuple):
    """The way in which a recipe is applied to pieces of a tensor.

    Attributes:
      kind: the recipe for rows of a piece, or the format.
      length: the length of these rows.
      size: the number of consecutive elements of a block, if it has several rows.
      ends: the lowest and the largest number of each block, `[blocks, 2]`, appended to its rows;
        None to append nothing.
      top: the largest magnitude of the tensor, to append as a row; None to append nothing.
      blocks: the blocks, `[blocks, elements]`, if they are not consecutive in the tensor.
    """

    kind: Format | Recipe
    length: int
    size: int = 1
    ends: np.ndarray | None = None
    top: float | None = None
    blocks: np.ndarray | None = None

    def arguments(self, piece: np.ndarray, start: int) -> tuple:
        """Returns the arguments of the program for a piece that begins at an element."""
        rows, extra = piece.reshape(-1, self.length), None
        if self.top is not None:
            extra = np.zeros((1, self.length), np.float32)
            extra[0, 0] = self.top
        if self.ends is not None:
            at = (start + self.length * np.arange(len(rows))) // self.size
            extra = self.ends[np.minimum(at, len(self.ends) - 1)]
        return rows, extra, self.kind


def _cut_of(numbers: Numbers, sums: Sums, kind: Format | Recipe, axis: int) -> _Cut | None:
    """Returns the way to cut a tensor for a recipe; None if there is none."""
    if not isinstance(kind, Recipe):
        return _Cut(kind, _SEGMENT)
    scaling, shape = kind.scaling, numbers.shape
    if kind.outliers is not None or scaling.second_level == "blocks":
        return None
    block = kind.along(axis, len(shape)).cut(shape).block
    sizes = kind.granularity.sizes if isinstance(kind.granularity, PerBlock) else None
    length, size = math.prod(block), 0 if sizes is None else math.prod(np.ravel(sizes))
    kind = dataclasses.replace(kind, granularity=PerToken())
    consecutive = _is_consecutive(block, shape)
    if size == length <= _LONGEST:
        top = float(np.abs(sums.ends).max()) if scaling.second_level == "tensor" else None
        if consecutive and _SMALL % length == 0:
            return _Cut(kind, length, top=top)
        return _Cut(kind, length, top=top, blocks=_blocks(numbers.whole, block))
    by_ends = scaling.range == "absmax" and not scaling.search and scaling.second_level is None
    if not by_ends or not isinstance(scaling, Symmetric | Affine):
        return None
    count = math.prod(shape) // length
    if consecutive and length % shape[-1] == 0 and (count == 1 or length % _SEGMENT == 0):
        ends = sums.ends.reshape(count, -1, 2)
        ends = np.stack([ends[..., 0].min(axis=1), ends[..., 1].max(axis=1)], axis=1)
        return _Cut(kind, _SEGMENT, length, ends)
    blocks = _blocks(numbers.whole, block)
    ends = np.stack([blocks.min(axis=1), blocks.max(axis=1)], axis=1)
    return _Cut(kind, _SEGMENT, -(-length // _SEGMENT) * _SEGMENT, ends, blocks=blocks)


def _is_consecutive(block: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Returns whether the elements of each block are consecutive in the tensor."""
    full = next((i for i in reversed(range(len(shape))) if block[i] != shape[i]), -1)
    return all(n == 1 for n in block[: max(full, 0)])


def _blocks(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """Returns the blocks of a tensor as rows; a view if they are contiguous."""
    counts = [n // b for n, b in zip(x.shape, block, strict=True)]
    split = x.reshape([n for pair in zip(counts, block, strict=True) for n in pair])
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return split.transpose(order).reshape(math.prod(counts), math.prod(block))


def _parts_of(cut: _Cut) -> Iterator[np.ndarray]:
    """Yields the blocks of a cut in flat parts, each block padded with zeros to whole rows."""
    assert cut.blocks is not None
    blocks = cut.blocks
    if cut.ends is not None and blocks.shape[1] != cut.size:
        blocks = np.pad(blocks, [(0, 0), (0, cut.size - blocks.shape[1])])
    return Numbers.of(blocks).stream(LARGE // cut.length * cut.length)


def pieces_of(part: np.ndarray, length: int = 1) -> Iterator[tuple[np.ndarray, int]]:
    """Yields a part in pieces padded with zeros, and the number of elements of each.

    Args:
      part: at most `LARGE` elements.
      length: the length of rows, of which each piece has a whole number.
    """
    large, small = (size // length * length for size in (LARGE, _SMALL))
    size = large if part.size > large // 2 else small
    for start in range(0, part.size, size):
        piece = part[start : start + size]
        yield (piece if piece.size == size else np.pad(piece, (0, size - piece.size))), piece.size


@functools.partial(jax.jit, static_argnames="kind")
def _errors(rows: jax.Array, extra: jax.Array | None, kind: Format | Recipe) -> jax.Array:
    """Returns the quantized rows of a piece minus the rows.

    Args:
      rows: the rows.
      extra: the lowest and the largest number of the block of each row, `[rows, 2]`; or a row to
        append; or None.
      kind: a recipe with one block per row, or a format.
    """
    if not isinstance(kind, Recipe):
        y = cast(rows, kind, overflow="saturate")
    elif extra is None:
        y = fake_quant(rows, kind)
    elif len(extra) != len(rows):
        y = fake_quant(lax.concatenate([rows, extra], 0), kind)[: len(rows)]
    elif isinstance(kind.scaling, Symmetric) and kind.scaling.takes_scales:
        y = fake_quant(rows, kind, scale=simulate(extra, kind).scales.step.reshape(-1, 1))
    else:
        y = fake_quant(lax.concatenate([rows, extra], 1), kind)[:, : rows.shape[1]]
    return rounded(y) - rows


def errors_of(x: np.ndarray, y: np.ndarray) -> Errors:
    """Returns the errors y - x of a finite float32 tensor.

    Args:
      x: the tensor.
      y: its quantized values.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return errors_in(np.subtract(y, x, out=_buffer(x.size).reshape(x.shape)))


def errors_in(error: np.ndarray) -> Errors:
    """Returns the sum of squares and the largest magnitude of errors."""
    noise = energy(error)
    if not math.isfinite(noise):
        return Errors(math.inf, math.inf)
    return Errors(noise, max(-float(error.min()), float(error.max()), 0.0) if error.size else 0.0)


def _buffer(size: int) -> np.ndarray:
    """Returns memory that is used again, because fresh memory costs more than a subtraction."""
    return _shared_buffer()[:size] if size <= LARGE else np.empty(size, np.float32)


@functools.cache
def _shared_buffer() -> np.ndarray:
    return np.empty(LARGE, np.float32)


def energy(x: np.ndarray) -> float:
    """Returns the sum of squares of float32 numbers, which is not finite only if one of them is.

    Short runs are added in float32 and their sums in float64, or everything in float64 if squares
    are close to the limits of float32.
    """
    x = x.reshape(-1)
    full = x.size // _SUMMED * _SUMMED
    with np.errstate(over="ignore", invalid="ignore"):
        runs = x[:full].reshape(-1, _SUMMED)
        total = float(np.vecdot(runs, runs).sum(dtype=np.float64))
        total += float(np.vecdot(x[full:], x[full:]))
    if LEAST < total < math.inf or not x.size:
        return total
    wide = x.astype(np.float64)
    return float(np.vecdot(wide, wide))
