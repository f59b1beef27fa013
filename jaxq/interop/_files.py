"""Reading of tensor files: headers are checked against the file's size, tensors read on demand.

The bytes are read, not memory-mapped: if another program truncates a mapped file, this process is
killed by a signal, whereas a read reports the error. To add a kind of file, parse its entries in
`open_tensors`.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import ml_dtypes  # noqa: F401  Registers its dtypes with NumPy by name.
import numpy as np

from jaxq._base.arguments import path as as_path
from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts import combine_weights, config_beside
from jaxq.interop._npy import read_npy_header
from jaxq.interop._npz import DAMAGED, open_archive, read_members
from jaxq.interop._safetensors import read_header, shards_of
from jaxq.interop.gguf import TYPES, dequantize, unpack
from jaxq.interop.gguf._container import MAGIC, read_contents
from jaxq.quantizers import Quantized

__all__ = ["TensorFile", "open_tensors"]

_BINARY = getattr(os, "O_BINARY", 0)  # Only Windows has and needs it.
_STREAMED = ("float32", "float16", "bfloat16")  # The dtypes that are read in parts.
_REOPEN = "Open it again when it is complete."
_unpacked = jax.jit(unpack, static_argnames="type")


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file of tensors.

    Attributes:
      path: the path of the file.
      entries: the tensors in the file.
      metadata: the metadata of a GGUF file, or text in the header of a safetensors file, by key.
      source: the open file or archive; None for a folder.
      parts: the file of each tensor of a folder, by name.
      kind: the kind of the file, as an ending such as `".gguf"`; empty for a folder.

    Example:
      >>> import numpy as np, tempfile
      >>> from jaxq import interop
      >>> path = tempfile.mkdtemp() + "/model.npz"
      >>> np.savez(path, w=np.ones((2, 4), np.float16))
      >>> with interop.open_tensors(path) as file:  # `read` converts to float32, `raw` does not.
      ...     file.read(file.entries[0]).dtype, file.raw(file.entries[0]).dtype
      (dtype('float32'), dtype('float16'))
    """

    path: pathlib.Path
    entries: tuple[Entry, ...]
    metadata: dict[str, Any]
    source: IO[bytes] | zipfile.ZipFile | None
    parts: Mapping[str, "TensorFile"] = dataclasses.field(default_factory=dict)
    kind: str = ""

    def read(self, entry: Entry) -> np.ndarray:
        """Returns the numbers of an entry as float32, rounded where float32 cannot represent them.

        The values of an NVFP4 tensor in GGUF are multiplied by its tensor scale (see `scale_of`).

        Raises:
          FileError: if the file has changed, or an archive's member is damaged.
        """
        if entry.packed is not None:
            array = np.asarray(dequantize(self.raw(entry), entry.packed))
            scale = self.scale_of(entry)
            if scale is None:
                return array
            return array * self.read(scale).reshape(-1, *(1,) * (array.ndim - 1))
        if entry.layout is not None:
            value = self.quantized(entry)
            return value if isinstance(value, np.ndarray) else np.asarray(value.dequantize())
        array = self.raw(entry)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, np.float32).reshape(entry.shape)

    def stream(self, entry: Entry, size: int) -> Iterator[np.ndarray]:
        """Yields the numbers of an entry as `read` returns them, in flat float32 parts.

        A plain float tensor is read into two buffers in turn, because allocating memory for every
        part takes longer than reading it. A part is therefore overwritten two parts later.

        Args:
          entry: one of `entries`.
          size: the number of elements in each part except the last.
        """
        if self.parts and entry.layout is None:
            yield from self.parts[entry.name].stream(entry, size)
            return
        if not self._is_streamed(entry):
            x = self.read(entry).reshape(-1)
            yield from (x[start : start + size] for start in range(0, x.size, size))
            return
        assert self.source is not None
        assert not isinstance(self.source, zipfile.ZipFile)
        dtype = np.dtype(entry.numpy_dtype)
        size = max(min(size, entry.size), 1)
        raw, wide = np.empty(size, dtype), [_aligned(size) for _ in range(2)]
        for number, start in enumerate(range(0, entry.size, size)):
            part = wide[number % 2][: entry.size - start]
            stored = part if dtype == np.float32 else raw[: part.size]
            self.source.seek(entry.start + start * dtype.itemsize)
            if not _fill(self.source, stored.view(np.uint8)):
                raise FileError(f"{self.path}: it became shorter after it was opened. {_REOPEN}")
            if dtype.name == "bfloat16":  # Faster than the conversion of ml_dtypes.
                bits = part.view(np.uint32)
                bits[:] = stored.view(np.uint16)
                np.left_shift(bits, 16, out=bits)
            elif stored is not part:
                part[:] = stored
            yield part

    def _is_streamed(self, entry: Entry) -> bool:
        """Returns whether `stream` reads an entry part by part."""
        plain = entry.layout is None and entry.packed is None and entry.member is None
        native = np.dtype(entry.numpy_dtype).isnative if plain else False
        return native and not entry.fortran and np.dtype(entry.numpy_dtype).name in _STREAMED

    def quantized(self, entry: Entry) -> Quantized | np.ndarray:
        """Returns an entry without dequantizing it, if that is possible.

        Args:
          entry: one of `entries`.

        Returns:
          A `Quantized` for a block type of GGUF, with the recipe `gguf.recipe_of` of the type, or
          for a weight in a layout of another program. Its `dequantize` gives the exact float32
          values, except for results below 2^-126, and without the scale of an NVFP4 tensor (see
          `scale_of`). A float32 array if no recipe can represent a weight; and any other tensor as
          an array in the dtype of the file.

        Raises:
          FileError: as in `read`; or if the parts of a weight do not fit together.
        """
        if entry.packed is not None:
            return _unpacked(self.raw(entry), entry.packed)
        if entry.layout is None:
            return self.raw(entry)
        arrays = {role: self.raw(part) for role, part in entry.layout.parts.items()}
        try:
            return entry.layout.build(arrays)
        except FileError as error:
            raise FileError(f"{self.path}: {entry.name!r}: {error}") from error

    def scale_of(self, entry: Entry) -> Entry | None:
        """Returns the float32 tensor by which the values of an NVFP4 tensor are multiplied.

        Files that were converted from ModelOpt store it beside the weight, as `NAME.scale` for
        `NAME.weight`: one number, or one per index of the first axis. Returns None if there is no
        such tensor.

        Raises:
          FileError: if the tensor has another dtype or another number of elements.
        """
        if entry.packed != "nvfp4":
            return None
        name = entry.name.removesuffix(".weight") + ".scale"
        for other in self.entries:
            if other.name == name:
                if other.dtype != "F32" or other.size not in (1, entry.shape[0]):
                    raise FileError(
                        f"{self.path}: {name!r:.80} must hold 1 or {entry.shape[0]} float32 "
                        f"numbers, got {other.dtype} of shape {other.shape}. Convert the model "
                        "again."
                    )
                return other
        return None

    def raw(self, entry: Entry) -> np.ndarray:
        """Returns an entry in the dtype of the file; block types as uint8, one row of bytes each.

        Raises:
          FileError: if the file has changed, or an archive's member is damaged.
          ValueError: if the entry is a weight that is stored as several tensors.
        """
        if entry.layout is not None:
            raise ValueError(
                f"TensorFile.raw: {entry.name!r:.120} is stored as several tensors. Call "
                "`quantized` or `read`, or open the file with raw=True."
            )
        if self.parts:
            return self.parts[entry.name].raw(entry)
        assert entry.numpy_dtype is not None or entry.packed is not None
        assert self.source is not None
        data = np.empty(entry.nbytes, np.uint8)
        try:
            if isinstance(self.source, zipfile.ZipFile):
                assert entry.member is not None
                with self.source.open(entry.member) as file:
                    file.read(entry.start)
                    full = _fill(file, data) and not file.read(1)  # Reading the end checks the CRC.
            else:
                self.source.seek(entry.start)
                full = _fill(self.source, data)
        except DAMAGED as error:
            raise FileError(
                f"{self.path}: {entry.name!r} is damaged: {error}. Download or save the file again."
            ) from error
        if not full:
            raise FileError(f"{self.path}: it became shorter after it was opened. {_REOPEN}")
        if entry.packed is not None:
            layout = TYPES[entry.packed]
            row = entry.shape[-1] // layout.block * layout.size
            return data.reshape(*entry.shape[:-1], row)
        array = data.view(np.dtype(entry.numpy_dtype))
        try:
            return array.reshape(entry.shape, order="F" if entry.fortran else "C")
        except ValueError as error:  # An empty shape whose other axes have a product beyond int64.
            raise FileError(
                f"{self.path}: {entry.name!r} has a shape that NumPy does not support. Leave out "
                "arrays without elements."
            ) from error


def _aligned(size: int) -> np.ndarray:
    """Returns float32 memory at a multiple of 64 bytes, which JAX uses without a copy."""
    data = np.empty(4 * size + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + 4 * size].view(np.float32)


def _fill(file: IO[bytes], data: np.ndarray) -> bool:
    """Fills an array with bytes from a file, in chunks; returns False if the file ends early."""
    view, done = data.data, 0
    while done < len(view):
        # Every binary file has `readinto`, but their common type does not declare it.
        got = file.readinto(view[done : done + 2**24])  # pyright: ignore[reportAttributeAccessIssue]
        if not got:
            return False
        done += got
    return True


@contextlib.contextmanager
def open_tensors(path: str | pathlib.Path, *, raw: bool = False) -> Iterator[TensorFile]:
    """Opens a file of tensors, or a folder of such files, and checks the headers.

    The kind of a file is recognized by its first bytes, or else by its ending. A quantized weight
    that another program stores as several tensors becomes one entry with the name and the shape of
    the weight. The quantization method is read from `config.json`, `quantize_config.json` or
    `hf_quant_config.json` in the folder of the file. It may be AWQ, bitsandbytes,
    compressed-tensors, block FP8 (DeepSeek), GPTQ, MLX, ModelOpt or MXFP4 (gpt-oss).

    Args:
      path: the path of a GGUF, safetensors, .npz or .npy file; of an index of safetensors files
        (`model.safetensors.index.json`); or of a folder with an index or safetensors files.
      raw: True lists the tensors of quantized weights one by one, as they are stored. Default:
        False.

    Yields:
      The open file.

    Raises:
      FileError: if the file cannot be opened or violates its format, or the method of its
        quantization is not supported.

    Example:
      >>> import numpy as np, tempfile
      >>> from jaxq import interop
      >>> path = tempfile.mkdtemp() + "/model.npz"
      >>> np.savez(path, w=np.ones((2, 4), np.float32), ids=np.arange(3))
      >>> with interop.open_tensors(path) as file:  # Reads the headers only.
      ...     {entry.name: entry.shape for entry in file.entries}
      {'w': (2, 4), 'ids': (3,)}
    """
    try:
        path = as_path("open_tensors", "path", path)
    except ValueError as error:
        raise FileError(str(error)) from None
    with contextlib.ExitStack() as stack:
        if path.is_dir() or path.name.endswith(".index.json"):
            shards = [stack.enter_context(_opened(shard)) for shard in shards_of(path)]
            parts = {entry.name: shard for shard in shards for entry in shard.entries}
            entries = tuple(entry for shard in shards for entry in shard.entries)
            if len(parts) != len(entries):
                raise FileError(
                    f"{path}: a tensor occurs in two of its files. Remove the files of other "
                    "checkpoints."
                )
            file = TensorFile(path, entries, {}, None, parts)
        else:
            file = stack.enter_context(_opened(path))
        yield file if raw else _combined(file)


def _combined(file: TensorFile) -> TensorFile:
    """Returns a file with one entry for all tensors of a quantized weight."""
    kinds = {part.kind for part in file.parts.values()} or {file.kind}
    if kinds != {".safetensors"} or "jaxq" in file.metadata:
        return file
    folder = file.path if file.path.is_dir() else file.path.parent
    try:
        entries = combine_weights(file.entries, config_beside(folder), file.raw)
    except FileError as error:
        text = str(error)
        if text.endswith(_REOPEN):
            raise
        where = "" if text.startswith(str(folder)) else f"{file.path}: "
        # Whatever the layout is, its tensors can be read.
        raise FileError(f"{where}{text} raw=True (--raw) reads the tensors as stored.") from error
    return dataclasses.replace(file, entries=entries)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[TensorFile]:
    """Opens one file."""
    try:
        # Without O_NONBLOCK, opening a pipe would block until there is a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileError(
            f"{path}: it must be a regular file, not a folder, pipe or device. Write its data to a "
            "file first."
        )
    file = os.fdopen(descriptor, "rb")
    with contextlib.ExitStack() as stack:
        source: IO[bytes] | zipfile.ZipFile = stack.enter_context(file)
        size, metadata = status.st_size, {}
        kind = _kind(file.read(16), path.suffix)
        file.seek(0)
        try:
            if kind == ".npz":
                source = stack.enter_context(open_archive(file))
                entries = read_members(source)
            elif kind == ".npy":
                entries = (read_npy_header(file, size, path.stem),)
            elif kind == ".gguf":
                entries, metadata = read_contents(file, size)
            elif kind == ".safetensors":
                entries, metadata = read_header(file, size)
            else:
                raise FileError(
                    "the file must be GGUF, safetensors, .npz or .npy. Convert it, for example by "
                    "safetensors.torch.save_file."
                )
        except FileError as error:
            raise FileError(f"{path}: {error}") from error
        yield TensorFile(path, entries, metadata, source, kind=kind)


def _kind(begin: bytes, suffix: str) -> str:
    """Returns the kind of a file by its first bytes, or its ending if they are unknown."""
    for magic, kind in ((MAGIC, ".gguf"), (b"\x93NUMPY", ".npy"), (b"PK\x03\x04", ".npz")):
        if begin.startswith(magic):
            return kind
    return ".safetensors" if begin[8:9] == b"{" else suffix
