"""The description of a tensor in a file of any format."""

import dataclasses
import math
from typing import Any

import numpy as np

__all__ = ["MAX_TENSORS", "Entry", "FileError", "checked_shape"]

MAX_TENSORS = 200_000  # About twice as many as the largest checkpoints have.

_MAX_AXES = 32


class FileError(ValueError):
    """An error about a file that cannot be read or violates its format."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
      name: the tensor's name.
      dtype: the name of its dtype in the file.
      shape: the tensor's shape.
      numpy_dtype: the NumPy or ml_dtypes dtype with the same bytes; None if there is none.
      start: the offset of the first byte, in the file or in the archive's member.
      stop: the offset after the last byte.
      fortran: True if the elements are in Fortran (column-major) order.
      member: the name of the archive's member, or None.
      packed: the name of the tensor's block type in `jaxq.interop.gguf.TYPES`, or None.
      layout: the layout of a weight that is stored as several tensors, or None. `dtype` names it.

    Example:
      >>> from jaxq import interop
      >>> entry = interop.Entry("w", "BF16", (4, 32), numpy_dtype="bfloat16", start=8, stop=264)
      >>> entry.size, entry.nbytes, entry.is_float
      (128, 256, True)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numpy_dtype: str | None
    start: int
    stop: int
    fortran: bool = False
    member: str | None = None
    packed: str | None = None
    layout: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """True if the elements are floating-point numbers, packed or not, that can be read."""
        if self.numpy_dtype is None:
            return self.packed is not None or self.layout is not None
        kind = np.dtype(self.numpy_dtype)
        # ml_dtypes has the kind V; of its types, only floats are read from files.
        return (kind.kind == "f" and kind.itemsize <= 8) or kind.kind == "V"

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file, summed over the parts of a weight."""
        return self.stop - self.start


def checked_shape(value: Any) -> tuple[int, ...]:
    """Returns a list of nonnegative integers as a tuple.

    Raises:
      ValueError: if the value is not such a list, or has too many items.
    """
    if not isinstance(value, list) or len(value) > _MAX_AXES:
        raise ValueError(f"it must be a list of at most {_MAX_AXES} items")
    for n in value:
        if type(n) is not int or not 0 <= n < 2**63:
            raise ValueError(f"got {n!r:.40}")
    return tuple(value)
