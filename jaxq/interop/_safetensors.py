"""Reading of the header of an untrusted safetensors file, and writing of such files.

The first eight bytes are the length of the header. The header is a JSON object with the dtype, the
shape and the start and end offsets of every tensor in the rest of the file. Before any tensor is
read, all of this is checked against the size of the file: the tensors must tile the rest without
holes or overlaps, and have as many bytes as their shapes need.

References:
  The safetensors project, README, section "Format".
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

from jaxq.interop._entries import MAX_TENSORS, Entry, FileError, checked_shape

__all__ = ["DTYPES", "Header", "Tensor", "read_header", "shards_of", "write_tensors"]

MAX_HEADER = 2**25  # A third of the limit of the format's own library, to bound the parsing time.

# Bits per element, and the NumPy or ml_dtypes dtype with the same bytes.
DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    **{f"I{bits}": (bits, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (bits, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "C64": (64, "complex64"),
    "BOOL": (8, "bool"),
}


class Header(NamedTuple):
    """The tensors of a file, in the order of their bytes, and its metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]


class Tensor(NamedTuple):
    """A tensor to write: its name, dtype in the file, shape, and a function that returns it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_header(file: IO[bytes], size: int) -> Header:
    """Returns the header of a file.

    Args:
      file: the file, positioned at its beginning.
      size: the size of the file in bytes.

    Raises:
      FileError: if the file violates the format.
    """
    if size < 8:
        _refuse(f"{size} bytes are too few for the header's length")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        _refuse(f"its header would have {length} bytes, more than the {MAX_HEADER} allowed")
    if length > size - 8:
        _refuse(f"its header would have {length} bytes, and {size - 8} follow")
    text = file.read(length)
    if len(text) != length:
        _refuse("it ends within its header")
    # Counted before parsing, because the parsed header takes 20 times the memory of the text.
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        _refuse(f"it has {count} tensors, more than the {MAX_TENSORS} allowed", "Split it.")
    header = _parsed(text)
    metadata = header.pop("__metadata__", {})
    entries = [_entry(name, value, 8 + length, size) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            relation = "overlap" if entry.start < end else "leave a gap after"
            _refuse(f"the bytes of {entry.name!r} {relation} those before them")
        end = entry.stop
    if end != size:
        _refuse(f"its tensors end after {end} bytes, but the file has {size}")
    return Header(tuple(entries), metadata)


def write_tensors(file: IO[bytes], tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, with one tensor in memory at a time.

    Args:
      file: a binary file at its beginning.
      tensors: the tensors, with distinct names.
      metadata: text to store in the header, by key.

    Raises:
      ValueError: if the header is longer than `MAX_HEADER`, or a tensor does not have the stated
        shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    # Wide elements first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][0])
    for tensor in order:
        stop = start + DTYPES[tensor.dtype][0] * math.prod(tensor.shape) // 8
        value = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        header[tensor.name], start = value, stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"A safetensors header must have at most {MAX_HEADER} bytes, got {len(text)} "
            f"for {len(tensors)} tensors. Save parts of the tree to separate files."
        )
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        file.seek(8 + len(text) + header[tensor.name]["data_offsets"][0])
        array = np.ascontiguousarray(tensor.read())
        # Files are little-endian, but arrays read from other files may be big-endian.
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if 8 * array.nbytes != DTYPES[tensor.dtype][0] * math.prod(tensor.shape):
            raise ValueError(
                f"{tensor.name!r:.80} must have the bytes of {tensor.dtype} of shape "
                f"{tensor.shape}, got {array.nbytes}. Return such an array from `read`."
            )
        file.write(array.reshape(-1).view(np.uint8).data)


def shards_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the safetensors files of a folder or of an index."""
    index = path / "model.safetensors.index.json" if path.is_dir() else path
    folder = index.parent
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileError(
                f"{path}: it must be a regular file, or a folder with safetensors files. Check the "
                "path."
            )
        return files
    try:
        if index.stat().st_size > MAX_HEADER:
            raise ValueError("it is too large")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(pathlib.PurePath(name).name != name for name in names):
            raise ValueError("it names files of other folders")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise FileError(
            f"{index}: not a valid index: {error}. Download it again, or remove it to read all "
            "safetensors files of its folder."
        ) from error
    return [folder / name for name in names]


def _refuse(reason: str, remedy: str = "Download or save it again.") -> NoReturn:
    raise FileError(f"not a valid safetensors file: {reason}. {remedy}")


def _parsed(text: bytes) -> dict[str, Any]:
    """Parses the header to a dictionary; rejects duplicate keys at every level."""
    if not text.startswith(b"{"):
        _refuse("its header does not begin with a brace")
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_constant
        )
    except UnicodeDecodeError:
        _refuse("its header is not UTF-8")
    except RecursionError:
        _refuse("its header is nested too deeply")
    except ValueError as error:  # Invalid JSON, or integers with thousands of digits.
        _refuse(f"its header is not JSON ({error})")
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        _refuse("its __metadata__ is not a map from strings to strings")
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            _refuse(f"its header has the duplicate key {name!r}")
        result[name] = value
    return result


def _constant(text: str) -> NoReturn:
    _refuse(f"its header contains the number {text}")


def _entry(name: str, value: Any, begin: int, size: int) -> Entry:
    """Checks the description of one tensor and returns its entry."""
    try:
        name.encode()
    except UnicodeEncodeError:
        _refuse(f"the name {name!a} is not Unicode")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, offsets = value["dtype"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(f"{name!r} has the dtype {dtype!r:.60}, which is unknown")
    try:
        shape = checked_shape(value["shape"])
        start, stop = checked_shape(offsets)
    except ValueError as error:
        _refuse(
            f"{name!r}: its shape and data_offsets must be lists of nonnegative integers ({error})"
        )
    if not start <= stop <= size - begin:
        _refuse(f"{name!r} has bytes {start} to {stop}, but there are only {size - begin}")
    bits, numpy_dtype = DTYPES[dtype]
    if bits * math.prod(shape) != 8 * (stop - start):
        _refuse(f"{name!r} of shape {list(shape)} and {dtype} cannot have {stop - start} bytes")
    return Entry(name, dtype, shape, numpy_dtype, begin + start, begin + stop)
