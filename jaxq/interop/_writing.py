"""Atomic replacement of files.

A process that is killed by SIGKILL cannot remove its temporary file. A later call that writes the
same target removes it, if nobody has changed it for a while and no process holds a lock on it.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import IO, Any

from jaxq._base.arguments import path as as_path

__all__ = ["atomic", "beside", "is_temporary", "locked", "remove_abandoned"]

# The least age in seconds of a file that is removed, because locks may not reach other computers.
_ABANDONED = 600


@contextlib.contextmanager
def atomic(path: str | pathlib.Path, mode: str = "wb", *, owner: str = "save") -> Iterator[IO[Any]]:
    """Yields a file that replaces the one at `path` only when it is complete.

    It is written to a temporary file in the same folder and renamed at the end; an error removes
    the temporary file, and so does a later call if the process was killed. A symbolic link stays,
    and the file that it names is replaced. The new file has the permissions of the old one.

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
    remove_abandoned(path)
    new = beside(path)
    file = new.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    try:
        with contextlib.suppress(OSError):  # It is a new file, or its file system has no modes.
            shutil.copymode(path, new)
        with file, locked(new):
            yield file
            file.flush()
            os.fsync(file.fileno())  # The data must not reach the disk after the new name.
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def beside(target: pathlib.Path) -> pathlib.Path:
    """Returns a new name for a temporary file or folder beside its target."""
    # Containers reuse process numbers, and a killed process leaves its file.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: pathlib.Path, target: pathlib.Path) -> bool:
    """Returns whether a file may be what a killed process left of `atomic(target)`."""
    return path.name.startswith(f".{target.name}.") and path.suffix == ".tmp"


def remove_abandoned(target: pathlib.Path) -> None:
    """Removes the temporary files and folders that killed processes left beside a target."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):  # The folder cannot be listed, or a file has just gone.
        for path in [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]:
            with locked(path) as is_mine:
                changed = [p.stat().st_mtime for p in (path, *path.glob("*"))]
                if is_mine and time.time() - max(changed) > _ABANDONED:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a file or folder, which ends with the process.

    Yields:
      False if another process holds it, or the system or the file system has no locks.
    """
    descriptor, is_mine = None, False
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = True
        yield is_mine
    finally:
        if descriptor is not None:
            os.close(descriptor)
