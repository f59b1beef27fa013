"""Tensors in block types of GGUF, packed and measured in pieces of few shapes."""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np

from jaxq._jax.arithmetic import rounded
from jaxq.cli._pieces import LARGE, LEAST, Errors, Numbers, energy, pieces_of
from jaxq.interop import gguf

__all__ = ["PackedPart", "pack_in_pieces"]

_ROW = 2**12  # Elements of a row of blocks.
_COMPILED: set[tuple[str, int, bool]] = set()  # Programs that have run.


class PackedPart(NamedTuple):
    """Consecutive blocks of a tensor in a block type of GGUF.

    Attributes:
      data: their bytes.
      count: the number of elements.
      signal: the sum of squares of the elements.
      errors: the errors of the quantized elements.
    """

    data: np.ndarray
    count: int
    signal: float
    errors: Errors


def pack_in_pieces(
    numbers: Numbers,
    type: str,
    measure: Callable[[np.ndarray], Errors],
    importance: np.ndarray | None = None,
) -> Iterator[PackedPart]:
    """Yields a tensor in a block type of GGUF, part by part.

    Args:
      numbers: the numbers of the tensor.
      type: a name in `jaxq.interop.gguf.TYPES`, whose blocks divide the last axis.
      measure: a function that returns the errors of a part, given the quantized elements minus the
        elements.
      importance: as in `jaxq.interop.gguf.quantize`.
    """
    pack = functools.partial(_packed_part, type, measure)
    pending: collections.deque[Future[PackedPart]] = collections.deque()
    cores = _cores()
    # XLA on CPU (JAX 0.10 and 0.12) runs a loop, such as a search for scales, in one thread.
    pool = ThreadPoolExecutor(cores)
    try:
        for piece in _pieces(numbers, gguf.TYPES[type].block, importance):
            pending.append(pool.submit(pack, piece))
            program = type, piece.elements.size, piece.importance is None
            if program not in _COMPILED:
                wait(pending)  # Threads that call a new program together would each compile it.
                _COMPILED.add(program)
            if len(pending) > cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Piece(NamedTuple):
    """Consecutive elements of a tensor.

    Attributes:
      elements: the elements, padded with zeros.
      count: the number of elements without the padding.
      importance: their importance; None without one.
    """

    elements: np.ndarray
    count: int
    importance: gguf.PartImportance | None


def _pieces(numbers: Numbers, block: int, importance: np.ndarray | None) -> Iterator[_Piece]:
    """Yields the pieces of a tensor, which share no memory."""
    length, start = numbers.shape[-1], 0
    for part in numbers.stream(LARGE if importance is None else max(LARGE // length, 1) * length):
        part_importance = None
        if importance is not None:
            # `accumulate` adds one number after another, as ggml does.
            squares = np.add.accumulate(np.square(part.reshape(-1, length)), axis=1)[:, -1]
            squares = np.repeat(squares / np.float32(length), length // block)
            part_importance = gguf.PartImportance(
                _weights(importance, numbers.shape, start, part.size), squares
            )
        at = 0
        for piece, count in pieces_of(part):
            piece_importance = None
            if part_importance is not None:
                piece_importance = _cut_importance(part_importance, at, piece.size)
            yield _Piece(piece.copy(), count, piece_importance)
            at += count
        start += part.size


def _packed_part(type: str, measure: Callable[[np.ndarray], Errors], piece: _Piece) -> PackedPart:
    """Returns a piece in a block type."""
    elements, layout = piece.elements, gguf.TYPES[type]
    data, error = (
        np.asarray(a) for a in _packed(elements.reshape(-1, _ROW), type, piece.importance)
    )
    signal = energy(elements)
    if signal < LEAST:  # XLA on CPU takes subnormal errors for 0.
        error = np.asarray(gguf.dequantize(data, type)).reshape(-1) - elements
    errors = measure(error.reshape(-1)[: piece.count])
    size = piece.count // layout.block * layout.size
    return PackedPart(data.reshape(-1)[:size], piece.count, signal, errors)


def _weights(importance: np.ndarray, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
    """Returns the importance of consecutive elements of a tensor.

    Args:
      importance: one row, or one for each index of leading axes of the tensor.
      shape: the shape of the tensor.
      start: the index of the first element.
      count: the number of elements.
    """
    length = shape[-1]
    rows = importance.reshape(-1, length).astype(np.float32, copy=False)
    per_row = math.prod(shape) // len(rows)  # Elements of the tensor per row of weights.
    index = np.arange(start, start + count)
    return rows.reshape(-1)[index // per_row * length + index % length]


def _cut_importance(importance: gguf.PartImportance, start: int, size: int) -> gguf.PartImportance:
    """Returns the importance of a piece, padded with zeros."""
    per_block = importance.weights.size // importance.squares.size
    parts = []
    for values, step in ((importance.weights, 1), (importance.squares, per_block)):
        part = values[start // step : (start + size) // step]
        parts.append(np.pad(part, (0, size // step - part.size)))
    return gguf.PartImportance(parts[0].reshape(-1, _ROW), parts[1])


@functools.partial(jax.jit, static_argnames="type")
def _packed(
    piece: jax.Array, type: str, importance: gguf.PartImportance | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the bytes of a piece in a block type, and the errors of its quantized values."""
    data, values = gguf.quantize_with_values(piece, type, importance)
    # As rows of blocks, for which XLA on CPU makes vector code.
    blocks = (-1, gguf.TYPES[type].block)
    return data, rounded(values.reshape(blocks)) - piece.reshape(blocks)
