"""Parsing of the members of an untrusted .npz archive."""

import collections
import dataclasses
import zipfile
from typing import IO

from jaxq.interop._entries import MAX_TENSORS, Entry, FileError
from jaxq.interop._npy import read_npy_header

__all__ = ["DAMAGED", "open_archive", "read_members"]

_RATIO, _SMALL = 200, 2**26  # The highest compression ratio, for members above this many bytes.
_AGAIN = "Download or save the file again."


def _zlib_errors() -> tuple[type[Exception], ...]:
    import zlib

    return (zlib.error,)


# The errors of damaged members.
DAMAGED = (zipfile.BadZipFile, EOFError, *_zlib_errors())


def open_archive(file: IO[bytes]) -> zipfile.ZipFile:
    """Returns the archive in a file.

    Raises:
      FileError: if the file is not an archive.
    """
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise FileError(f"not a valid archive: {error}. {_AGAIN}") from error


def read_members(archive: zipfile.ZipFile) -> tuple[Entry, ...]:
    """Returns the arrays of an archive; only their headers are unpacked.

    Raises:
      FileError: if the archive is damaged, or has members that are not arrays.
    """
    infos, entries, end = sorted(archive.infolist(), key=lambda i: i.header_offset), [], 0
    if len(infos) > MAX_TENSORS:
        raise FileError(
            f"it has {len(infos)} members, more than the {MAX_TENSORS} allowed. Save the arrays to "
            "several files."
        )
    count_by_name = collections.Counter(info.filename for info in infos)
    if duplicates := [name for name, count in count_by_name.items() if count > 1]:
        raise FileError(
            f"not a valid archive: {count_by_name[duplicates[0]]} members are named "
            f"{duplicates[0]!r:.80}. Save the arrays again."
        )
    for info in infos:
        name = info.filename
        if not name.endswith(".npy") or name.startswith("/") or ".." in name.split("/"):
            raise FileError(
                f"not a valid archive of arrays: it has a member {name!r}. Save the arrays by "
                "numpy.savez."
            )
        if info.header_offset < end:
            raise FileError(f"not a valid archive: {name!r} overlaps another member. {_AGAIN}")
        end = info.header_offset + 30 + len(name.encode()) + info.compress_size
        supported = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.flag_bits & 1 or not supported:
            raise FileError(
                f"{name!r} is encrypted or uses an unsupported compression method. Save the arrays "
                "by numpy.savez."
            )
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise FileError(
                f"{name!r} is stored uncompressed but has two different sizes. {_AGAIN}"
            )
        if info.file_size > max(_SMALL, _RATIO * info.compress_size):
            raise FileError(
                f"{name!r} would unpack from {info.compress_size} to {info.file_size} bytes, more "
                f"than {_RATIO} times as many. If this is intended, save it with numpy.savez."
            )
        try:
            with archive.open(info) as file:
                entry = read_npy_header(file, info.file_size, name[:-4])
        except (*DAMAGED, ValueError, NotImplementedError) as error:
            raise FileError(f"{name!r} is damaged: {error}. {_AGAIN}") from error
        entries.append(dataclasses.replace(entry, member=name))
    return tuple(entries)
