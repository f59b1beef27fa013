"""Parsing of the header of an untrusted NumPy file.

The file begins with a magic string, a version, the header's length, and the header, a Python
literal with the dtype, order and shape. Nothing is unpickled: arrays of objects are rejected.

References:
  NumPy, `numpy.lib.format`.
"""

import ast
import re
import warnings
from typing import IO, NoReturn

import numpy as np

from jaxq.interop._entries import Entry, FileError, checked_shape

__all__ = ["read_npy_header"]

_MAX_HEADER = 10_000  # NumPy's own limit.
_NUMBERS = "Convert it to numbers before saving it."
_DTYPE_PATTERN = re.compile(r"[<>|=]?[?a-zA-Z]\d{0,9}(\[[^\]]{1,20}\])?")


def read_npy_header(file: IO[bytes], size: int, name: str) -> Entry:
    """Returns the entry of the array in a .npy file or an archive's member.

    Args:
      file: the file, positioned at its beginning.
      size: the size of the file in bytes.
      name: the name of the array.

    Raises:
      FileError: if the file violates the format or holds Python objects.
    """
    begin = file.read(8)
    if len(begin) != 8 or begin[:6] != b"\x93NUMPY" or begin[6] not in (1, 2, 3):
        _refuse(name, "it does not begin with NumPy's magic string and a known version")
    width = 2 if begin[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    start = 8 + width + length
    if length > _MAX_HEADER or start > size:
        _refuse(name, f"its header length of {length} bytes is too large")
    text = file.read(length)
    try:
        with warnings.catch_warnings(action="ignore"):  # Damaged literals may cause one.
            header = ast.literal_eval(text.decode("latin1" if begin[6] < 3 else "utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        _refuse(name, "its header is not a Python literal")
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        _refuse(name, "its header needs descr, fortran_order and shape, and nothing else")
    fortran = header["fortran_order"]
    if not isinstance(fortran, bool) or not isinstance(header["shape"], tuple):
        _refuse(name, "its header has the wrong types")
    try:
        shape = checked_shape(list(header["shape"]))
    except ValueError as error:
        _refuse(name, f"its shape is not a tuple of nonnegative integers ({error})")
    descr, nbytes, dtype = header["descr"], size - start, None
    if isinstance(descr, str) and _DTYPE_PATTERN.fullmatch(descr):
        try:
            array_dtype = np.dtype(descr)
        except (TypeError, ValueError, OverflowError):  # A dtype of ml_dtypes, for example.
            return Entry(name, descr, shape, None, start, size)
        if array_dtype.hasobject:
            _refuse(name, "it holds Python objects, which only unpickling could read", _NUMBERS)
        count = 1
        for n in shape:
            count *= n
        if count * array_dtype.itemsize != nbytes:
            _refuse(name, f"shape {list(shape)} and {descr} cannot have {nbytes} bytes")
        if array_dtype.kind in "fiub" and array_dtype.itemsize <= 8:
            dtype = array_dtype.str
        return Entry(name, array_dtype.name, shape, dtype, start, size, fortran)
    if "O" in str(descr):
        _refuse(name, "it may hold Python objects, which only unpickling could read", _NUMBERS)
    return Entry(name, "structured", shape, None, start, size)


def _refuse(name: str, reason: str, remedy: str = "Save it again by numpy.save.") -> NoReturn:
    raise FileError(f"{name!r} is not a valid NumPy array: {reason}. {remedy}")
