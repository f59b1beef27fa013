"""Tensors in files: what is there, checked against the file's size, and one at a time in memory.

The bytes are read, not mapped: a file that another program cuts short while it is mapped would end
this one with a signal, and a read says so. To add a kind of file: its entries, in `opened`.
"""

import contextlib
import dataclasses
import math
import pathlib
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import ml_dtypes  # noqa: F401  It gives NumPy the names of its dtypes.
import numpy as np

from jaxq.cli.output import UsageError

__all__ = ["Entry", "FileError", "TensorFile", "checked_shape", "opened"]

_MAX_AXES = 32
_RATIO, _SMALL = 200, 2**26  # What an archive may unpack to, and from how many bytes this counts.


class FileError(UsageError):
    """A file that is not what its kind allows."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
      name: its name.
      dtype: what the file calls its dtype.
      shape: its shape.
      numpy_dtype: the dtype that its bytes are read as; None: no tensor of floats, not compared.
      start: where its bytes begin, in the file or in the archive's member.
      stop: where they end.
      fortran: whether the first axis runs fastest.
      member: the archive's member, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numpy_dtype: str | None
    start: int
    stop: int
    fortran: bool = False
    member: str | None = None

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.stop - self.start


def checked_shape(value: Any) -> tuple[int, ...]:
    """A list of whole numbers, none negative.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, list) or len(value) > _MAX_AXES:
        raise ValueError(f"a list of at most {_MAX_AXES} is needed")
    for n in value:
        if type(n) is not int or not 0 <= n < 2**63:
            raise ValueError(f"got {n!r:.40}")
    return tuple(value)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file: its `entries`, and `read` for the numbers of one."""

    path: pathlib.Path
    entries: tuple[Entry, ...]
    source: IO[bytes] | zipfile.ZipFile

    def read(self, entry: Entry) -> np.ndarray:
        """The numbers of an entry as float32: exact for all but float64, which are rounded.

        Raises:
          FileError: the file has changed, or an archive's member is damaged.
        """
        assert entry.numpy_dtype is not None
        data = np.empty(entry.nbytes, np.uint8)
        try:
            if isinstance(self.source, zipfile.ZipFile):
                assert entry.member is not None
                with self.source.open(entry.member) as file:
                    file.read(entry.start)
                    full = _fill(file, data) and not file.read(1)  # At the end the sum is checked.
            else:
                self.source.seek(entry.start)
                full = _fill(self.source, data)
        except (zipfile.BadZipFile, EOFError, *_ZLIB) as error:
            raise FileError(f"{self.path}: {entry.name!r} is damaged: {error}.") from error
        if not full:
            raise FileError(f"{self.path}: it is shorter now than it was when it was opened.")
        array = data.view(np.dtype(entry.numpy_dtype))
        array = array.reshape(entry.shape, order="F" if entry.fortran else "C")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, np.float32).reshape(entry.shape)


def _zlib_errors() -> tuple[type[Exception], ...]:
    import zlib

    return (zlib.error,)


_ZLIB = _zlib_errors()


def _fill(file: IO[bytes], data: np.ndarray) -> bool:
    """Reads as many bytes as an array has, in pieces; whether there were as many."""
    view, done = data.data, 0
    while done < len(view):
        # Every binary file has it, but not their common type.
        got = file.readinto(view[done : done + 2**24])  # pyright: ignore[reportAttributeAccessIssue]
        if not got:
            return False
        done += got
    return True


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[TensorFile]:
    """A file of tensors, its header checked.

    Args:
      path: ends in .safetensors, .npz or .npy.

    Raises:
      FileError: it cannot be opened, or is not what its kind allows.
    """
    from jaxq.cli.npy import read_npy_header
    from jaxq.cli.safetensors import read_header

    path = pathlib.Path(path)
    kind = path.suffix
    if kind not in (".safetensors", ".npz", ".npy"):
        raise FileError(f"{path}: the file must be a .safetensors, .npz or .npy, got {kind!r}.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from error
    with contextlib.ExitStack() as stack:
        source: IO[bytes] | zipfile.ZipFile = stack.enter_context(file)
        size = path.stat().st_size
        try:
            if kind == ".npz":
                source = stack.enter_context(_archive(file))
                entries = _members(source)
            elif kind == ".npy":
                entries = (read_npy_header(file, size, path.stem),)
            else:
                entries = tuple(read_header(file, size))
        except FileError as error:
            raise FileError(f"{path}: {error}") from error
        yield TensorFile(path, entries, source)


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise FileError(f"not a valid archive: {error}.") from error


def _members(archive: zipfile.ZipFile) -> tuple[Entry, ...]:
    """The arrays of an archive; only their headers are unpacked."""
    from jaxq.cli.npy import read_npy_header

    infos, entries, end = sorted(archive.infolist(), key=lambda i: i.header_offset), [], 0
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise FileError("not a valid archive: it has a name twice.")
    for info in infos:
        name = info.filename
        if not name.endswith(".npy") or name.startswith("/") or ".." in name.split("/"):
            raise FileError(f"not a valid archive of arrays: it has a member {name!r}.")
        if info.header_offset < end:
            raise FileError(f"not a valid archive: {name!r} overlaps another member.")
        end = info.header_offset + 30 + len(name.encode()) + info.compress_size
        known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.flag_bits & 1 or not known:
            raise FileError(f"{name!r} is encrypted or packed in an unusual way.")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise FileError(f"{name!r} is stored and has two sizes.")
        if info.file_size > max(_SMALL, _RATIO * info.compress_size):
            raise FileError(
                f"{name!r} would unpack from {info.compress_size} to {info.file_size} bytes, more "
                f"than {_RATIO} times as many. If it is meant so, save it with numpy.savez."
            )
        try:
            with archive.open(info) as file:
                entry = read_npy_header(file, info.file_size, name[:-4])
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, *_ZLIB) as error:
            raise FileError(f"{name!r} is damaged: {error}.") from error
        entries.append(dataclasses.replace(entry, member=name))
    return tuple(entries)
