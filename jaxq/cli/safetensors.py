"""The header of a safetensors file, parsed as if an enemy had written it.

Eight bytes say how long the header is; the header is a JSON object that gives every tensor its
dtype, its shape and where its bytes begin and end in the rest of the file. All of it is checked
against the size of the file before anything but the header is read: the tensors must tile the rest
without holes or overlaps, and have as many bytes as their shapes need.

References:
  The safetensors project, README, section "Format".
"""

import json
import math
from typing import IO, Any, NoReturn

from jaxq.cli.files import Entry, FileError, checked_shape

__all__ = ["DTYPES", "MAX_HEADER", "read_header"]

MAX_HEADER = 100_000_000  # The limit of the format's own library.

# Bits of an element, and the NumPy or ml_dtypes dtype of what is compared.
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
    **{f"{kind}{bits}": (bits, None) for kind in "IU" for bits in (8, 16, 32, 64)},
    "C64": (64, None),
    "BOOL": (8, None),
}


def read_header(file: IO[bytes], size: int) -> list[Entry]:
    """The tensors of a file, in the order of their bytes.

    Args:
      file: at its beginning.
      size: of the file, in bytes.

    Raises:
      FileError: the file is not what the format allows.
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
    header = _parsed(text)
    header.pop("__metadata__", None)
    entries = [_entry(name, value, 8 + length, size) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            what = "overlap" if entry.start < end else "leave a hole"
            _refuse(f"the bytes of {entry.name!r} {what} where they begin")
        end = entry.stop
    if end != size:
        _refuse(f"its tensors end after {end} bytes, and the file has {size}")
    return entries


def _refuse(reason: str) -> NoReturn:
    raise FileError(f"not a valid safetensors file: {reason}.")


def _parsed(text: bytes) -> dict[str, Any]:
    """The header as a dictionary, its own keys and those within distinct."""
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
    except ValueError as error:  # Of JSON, and of integers with thousands of digits.
        _refuse(f"its header is not JSON ({error})")
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        _refuse("its __metadata__ is no map from text to text")
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            _refuse(f"its header has {name!r} twice")
        result[name] = value
    return result


def _constant(text: str) -> NoReturn:
    _refuse(f"its header has {text} for a number")


def _entry(name: str, value: Any, begin: int, size: int) -> Entry:
    """One tensor, checked by itself."""
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
        _refuse(f"{name!r}: its shape or data_offsets are no lists of whole numbers ({error})")
    if not start <= stop <= size - begin:
        _refuse(f"{name!r} has bytes {start} to {stop}, of {size - begin} that there are")
    bits, numpy_dtype = DTYPES[dtype]
    if bits * math.prod(shape) != 8 * (stop - start):
        _refuse(f"{name!r} of shape {list(shape)} and {dtype} cannot have {stop - start} bytes")
    return Entry(name, dtype, shape, numpy_dtype, begin + start, begin + stop)
