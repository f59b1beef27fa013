"""Atomic replacement of files."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import IO, Any

from jaxq._base.arguments import path as as_path

__all__ = ["atomic", "is_temporary"]


@contextlib.contextmanager
def atomic(path: str | pathlib.Path, mode: str = "wb", *, owner: str = "save") -> Iterator[IO[Any]]:
    """Yields a file that replaces the one at `path` only when it is complete.

    It is written to a temporary file in the same folder and renamed at the end; an error removes
    the temporary file. A symbolic link stays, and the file that it names is replaced. The new file
    has the permissions of the old one.

    Args:
      path: the path of the file.
      mode: `"w"` or `"wb"`. Default: `"wb"`.
      owner: the function that writes, for errors about the path.

    Raises:
      OSError: if the path is not a regular file, or its folder is missing or not writable.
    """
    named = pathlib.Path() if isinstance(path, str) and not path else as_path(owner, "path", path)
    path = pathlib.Path(os.path.realpath(named))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # Do not replace a device or pipe.
        raise OSError("it is not a regular file; name another file")
    # Containers reuse process numbers, and a killed process leaves its file.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = beside.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    try:
        with contextlib.suppress(OSError):  # It is a new file, or its file system has no modes.
            shutil.copymode(path, beside)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # The data must not reach the disk after the new name.
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def is_temporary(path: pathlib.Path, target: pathlib.Path) -> bool:
    """Returns whether a file may be what a killed process left of `atomic(target)`."""
    return path.name.startswith(f".{target.name}.") and path.suffix == ".tmp"
