"""The container of GGUF files: an untrusted header is checked before anything is allocated.

Only headers are parsed here; `TensorFile.raw` in `interop/_files.py` reads the bytes of tensors.

A file has a magic string, a version, the numbers of tensors and of keys, the keys with their
values, the tensors' names, shapes, types and offsets, padding, and the tensors, each padded to the
alignment. All numbers are little-endian.

References:
  ggml's docs/gguf.md.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

from jaxq._base.arguments import described, items_of
from jaxq.interop._entries import MAX_TENSORS, Entry, FileError
from jaxq.interop._writing import atomic
from jaxq.interop.gguf._layouts import LAYOUTS

__all__ = ["MAGIC", "Contents", "Tensor", "read_contents", "write"]

MAGIC = b"GGUF"
VERSION = 3

_ALIGNMENT = "general.alignment"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_DEEPEST = 4
_NUMBERS = {
    0: "uint8",
    1: "int8",
    2: "uint16",
    3: "int16",
    4: "uint32",
    5: "int32",
    6: "float32",
    _BOOL: "bool",
    10: "uint64",
    11: "int64",
    12: "float64",
}
_KINDS = {name: number for number, name in _NUMBERS.items()}
_PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64"}
_PLAIN |= {28: "float64", 30: "bfloat16"}
_SHORT = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
# Elements and bytes of a block of the types that are listed but not dequantized.
_OTHERS = {
    9: ("Q8_1", 32, 36),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    29: ("IQ1_M", 256, 56),
}
_BLOCKS = {layout.number: name for name, layout in LAYOUTS.items()}


class Contents(NamedTuple):
    """The tensors of a file in the order of its header, and its metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, Any]


class Tensor(NamedTuple):
    """A tensor to write to a GGUF file.

    Attributes:
      name: the name, of at most 63 bytes, as llama.cpp requires.
      type: a name in `jaxq.interop.gguf.TYPES`, or `"f32"`, `"f16"`, `"bf16"`, `"i8"`, `"i16"`,
        `"i32"`, `"i64"` or `"f64"`.
      shape: the shape, with the contracted axis last.
      read: a function that returns the data: the uint8 bytes of a block type, or an array of
        another type. To save memory, it may return an iterator of arrays with consecutive parts.

    Example:
      >>> import numpy as np, tempfile
      >>> from jaxq import interop
      >>> rows = [np.zeros((1, 32), np.float16), np.ones((1, 32), np.float16)]
      >>> tensor = interop.gguf.Tensor("w.weight", "f16", (2, 32), lambda: iter(rows))
      >>> path = tempfile.mkdtemp() + "/model.gguf"
      >>> interop.gguf.write(path, [tensor], {"general.architecture": "llama"})
      >>> with interop.open_tensors(path) as file:
      ...     file.read(file.entries[0])[:, 0].tolist()
      [0.0, 1.0]
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


def _refuse(reason: str, remedy: str = "Download or convert it again.") -> NoReturn:
    raise FileError(f"not a valid GGUF file: {reason}. {remedy}")


class _Reader:
    """A reader of the header that never reads more bytes than the file has."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def take(self, count: int) -> bytes:
        if count > self.left:
            _refuse(f"its header needs {count} more bytes, but only {self.left} are left")
        data = self.file.read(count)
        if len(data) != count:
            _refuse("it ends within its header")
        self.left -= count
        return data

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        data = self.take(dtype.itemsize)
        if kind == "bool" and data not in (b"\x00", b"\x01"):
            _refuse(f"a boolean is stored as {data[0]}")
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)[0]

    def count(self) -> int:
        return int(self.number("uint64"))

    def text(self, most: int) -> str:
        length = self.count()
        if length > most:
            _refuse(f"a string has {length} bytes, more than the {most} allowed")
        data = self.take(length)
        try:
            return data.decode()
        except UnicodeDecodeError:
            _refuse(f"the string {data[:40]!r} is not UTF-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(self.left)
        if kind != _ARRAY:
            _refuse(f"a value has the unknown type {kind}")
        if depth == _DEEPEST:
            _refuse(f"arrays are nested more than {_DEEPEST} deep")
        item, count = int(self.number("uint32")), self.count()
        if item in _NUMBERS:
            dtype = np.dtype(_NUMBERS[item])
            data = self.take(count * dtype.itemsize)
            if item == _BOOL and data.strip(b"\x00\x01"):
                _refuse("a boolean is stored as neither 0 nor 1")
            return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
        if count > self.left // (12 if item == _ARRAY else 8):
            _refuse(f"an array of {count} items is longer than the file")
        return [self.value(item, depth + 1) for _ in range(count)]


def read_contents(file: IO[bytes], size: int) -> Contents:
    """Returns the header of a file.

    Args:
      file: the file, positioned at its beginning.
      size: the size of the file in bytes.

    Raises:
      FileError: if the file violates the format, is big-endian, or has an unknown version.
    """
    reader = _Reader(file, size)
    if reader.take(4) != MAGIC:
        _refuse("it does not begin with GGUF")
    version = int(reader.number("uint32"))
    if version not in (2, VERSION):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, VERSION):
            _refuse("it is big-endian", "Convert it by `gguf-convert-endian FILE little`.")
        _refuse(f"version {version} is unknown; 2 and 3 are read")
    tensors, keys = reader.count(), reader.count()
    if tensors > MAX_TENSORS or keys > MAX_TENSORS or 24 * tensors + 13 * keys > reader.left:
        _refuse(f"it cannot hold {tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text(65535)
        if key in metadata:
            _refuse(f"the key {key!r:.80} occurs twice")
        metadata[key] = reader.value(int(reader.number("uint32")))
    alignment = metadata.get(_ALIGNMENT, np.uint32(32))
    if (
        getattr(alignment, "dtype", None) != np.uint32
        or np.ndim(alignment)
        or alignment < 1
        or alignment & (alignment - 1)
    ):
        _refuse(f"its alignment must be a power of two, got {alignment!r:.40}")
    relative = [_entry(reader) for _ in range(tensors)]
    begin = -(-(size - reader.left) // int(alignment)) * int(alignment)
    entries, names = [], set()
    for entry in relative:  # Offsets count from the beginning of the data.
        if entry.name in names:
            _refuse(f"the name {entry.name!r} occurs twice")
        names.add(entry.name)
        if entry.start % int(alignment):
            _refuse(f"the offset of {entry.name!r} is not a multiple of {alignment}")
        entries.append(
            dataclasses.replace(entry, start=begin + entry.start, stop=begin + entry.stop)
        )
    end = begin
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if entry.start < end or entry.stop > size:
            where = "overlap another tensor" if entry.start < end else "are beyond the end"
            _refuse(f"the bytes of {entry.name!r} {where}")
        end = entry.stop
    return Contents(tuple(entries), metadata)


def _entry(reader: _Reader) -> Entry:
    """Reads the entry of a tensor, with its offset from the beginning of the data."""
    name = reader.text(64)
    axes = int(reader.number("uint32"))
    if axes > 4:
        _refuse(f"{name!r} has {axes} axes, more than 4")
    shape = tuple(reader.count() for _ in range(axes))[::-1]
    number, start = int(reader.number("uint32")), reader.count()
    size = math.prod(shape)
    # NumPy and JAX also limit the other axes of arrays without elements.
    if math.prod(max(n, 1) for n in shape) >= 2**59 or start >= 2**62:
        _refuse(f"{name!r} has the shape {list(shape)}")
    dtype, packed = None, None
    if number in _PLAIN:
        dtype, kind, block = _PLAIN[number], _SHORT[number], 1
        taken = np.dtype(dtype).itemsize
    elif number in _BLOCKS:
        packed = _BLOCKS[number]
        kind, block, taken = packed.upper(), LAYOUTS[packed].block, LAYOUTS[packed].size
    elif number in _OTHERS:
        kind, block, taken = _OTHERS[number]
    else:
        _refuse(f"{name!r} has the unknown type {number}", "Quantize the model to another type.")
    if (shape[-1] if shape else 1) % block:
        _refuse(f"{name!r} of {kind} has rows of {shape[-1:]}, which {block} does not divide")
    return Entry(name, kind, shape, dtype, start, start + size // block * taken, packed=packed)


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _value(key: str, value: Any) -> tuple[int, bytes]:
    """Returns the type of a value and its bytes."""
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, list | tuple):
        items = [_value(key, item) for item in value]
        kinds = {kind for kind, _ in items} or {_STRING}
        if len(kinds) != 1:
            raise ValueError(
                f"gguf.write: the items of {key!r} must have one type, got {len(kinds)} types. "
                "Pass a NumPy array."
            )
        head = kinds.pop().to_bytes(4, "little") + len(items).to_bytes(8, "little")
        return _ARRAY, head + b"".join(data for _, data in items)
    if isinstance(value, bool | np.bool):
        return _BOOL, bytes([int(value)])
    if isinstance(value, int):
        value = np.uint32(value) if 0 <= value < 2**32 else np.int64(value)
    elif isinstance(value, float) and not isinstance(value, np.float64):
        value = np.float32(value)
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.name not in _KINDS:
        raise TypeError(
            f"gguf.write: metadata must be numbers, strings or arrays of them, got "
            f"{type(value).__name__} for {key!r}. Convert it, or leave it out."
        )
    kind, data = _KINDS[value.dtype.name], value.astype(value.dtype.newbyteorder("<")).tobytes()
    if value.ndim == 0:
        return kind, data
    return _ARRAY, kind.to_bytes(4, "little") + value.size.to_bytes(8, "little") + data


def _kind(tensor: Tensor) -> tuple[int, int, int]:
    """Returns the number of a tensor's type, and the elements and bytes of a block."""
    if tensor.type in LAYOUTS:
        layout = LAYOUTS[tensor.type]
        return layout.number, layout.block, layout.size
    number = next((n for n, name in _SHORT.items() if name.lower() == tensor.type), None)
    if number is None:
        raise ValueError(
            f"gguf.write: {tensor.name!r} has the type {tensor.type!r}; it must be f32, f16, bf16, "
            f"another plain type, or one of {', '.join(LAYOUTS)}."
        )
    return number, 1, np.dtype(_PLAIN[number]).itemsize


def write(path: str | pathlib.Path, tensors: Sequence[Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a GGUF file, with one tensor in memory at a time.

    The file replaces an older one only when it is complete.

    Args:
      path: the path of the file, which should end in `.gguf`.
      tensors: the tensors in their order, with distinct names.
      metadata: the metadata by key. NumPy scalars and arrays keep their types; a Python integer is
        written as uint32 (or int64), a float as float32. `general.architecture` is the only key
        that every reader requires.

    Raises:
      ValueError: if a name is too long or occurs twice, a type is unknown or does not fit a shape,
        or the size of a tensor's data does not fit its shape and type.
      TypeError: if a value of the metadata has an unsupported type.
      OSError: if the file cannot be written.

    Example:
      >>> import jax.numpy as jnp, jaxq, tempfile
      >>> w = jaxq.quantize(jnp.ones((4, 256)), "tq2_0")
      >>> tensor = Tensor("w.weight", "tq2_0", w.shape, lambda: jaxq.interop.gguf.pack(w))
      >>> path = tempfile.mkdtemp() + "/model.gguf"
      >>> write(path, [tensor], {"general.architecture": "llama"})
      >>> with jaxq.interop.open_tensors(path) as file:
      ...     file.quantized(file.entries[0])
      tq2_0[4×256] 264 B
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(
            f"gguf.write: `metadata` must be a dictionary, got {described(metadata)}. Pass, for "
            "example, {'general.architecture': 'llama'}."
        )
    tensors = items_of("gguf.write", "tensors", tensors)
    alignment = int(metadata.get(_ALIGNMENT, 32))
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(
            f"gguf.write: {_ALIGNMENT} must be a power of two, got {alignment}. Use 32."
        )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        names = [tensor.name for tensor in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"gguf.write: the names of tensors must be distinct, got {twice!r:.80} twice. Rename "
            "one of them."
        )
    head = MAGIC + VERSION.to_bytes(4, "little")
    parts = [head, len(tensors).to_bytes(8, "little"), len(metadata).to_bytes(8, "little")]
    for key, value in metadata.items():
        kind, data = _value(key, value)
        parts += [_string(key), kind.to_bytes(4, "little"), data]
    start, sizes = 0, []
    for tensor in tensors:
        number, block, taken = _kind(tensor)
        row = tensor.shape[-1] if tensor.shape else 1
        if len(tensor.name.encode()) > 63 or len(tensor.shape) > 4 or row % block:
            raise ValueError(
                f"gguf.write: {tensor.name!r:.90} of shape {tensor.shape} does not fit; names have "
                f"at most 63 bytes, shapes 4 axes, and rows of {tensor.type} blocks of {block}. "
                "Rename or reshape it, or use another type."
            )
        parts += [_string(tensor.name), len(tensor.shape).to_bytes(4, "little")]
        parts += [n.to_bytes(8, "little") for n in reversed(tensor.shape)]
        parts += [number.to_bytes(4, "little"), start.to_bytes(8, "little")]
        sizes.append(math.prod(tensor.shape) // block * taken)
        start += -(-sizes[-1] // alignment) * alignment
    header = b"".join(parts)
    with atomic(path, owner="gguf.write") as file:
        file.write(header + bytes(-len(header) % alignment))
        for tensor, size in zip(tensors, sizes, strict=True):
            value, written = tensor.read(), 0
            for part in value if isinstance(value, Iterator) else (value,):
                array = np.ascontiguousarray(part)
                # Files are little-endian, but arrays read from other files may be big-endian.
                array = array.astype(array.dtype.newbyteorder("<"), copy=False)
                written += array.nbytes
                if written <= size:
                    file.write(array.reshape(-1).view(np.uint8).data)
            if written != size:
                raise ValueError(
                    f"gguf.write: {tensor.name!r} has {written} bytes, but {tensor.type} of "
                    f"shape {tensor.shape} takes {size}. `read` must return exactly these bytes."
                )
            file.write(bytes(-size % alignment))
