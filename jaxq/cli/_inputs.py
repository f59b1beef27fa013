"""The files that a command compares: several paths, folders, patterns, or standard input."""

import contextlib
import dataclasses
import glob
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from jaxq.cli._output import UsageError
from jaxq.cli._pieces import Numbers
from jaxq.interop import Entry, FileError, TensorFile, open_tensors, quantized_parts

__all__ = ["Inputs", "opened"]

_KINDS = (".gguf", ".npz", ".npy")
_STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Open files, as one list of tensors.

    Attributes:
      title: the name of the file, or the number of files.
      entries: the tensors. If there are several files, tensor names begin with the file's name.
      sources: the file of each tensor and its entry in the file, by the tensor's name.
      parts: the names of the codes and scales of arrays that jaxq has quantized.
    """

    title: str
    entries: tuple[Entry, ...]
    sources: Mapping[str, tuple[TensorFile, Entry]]
    parts: frozenset[str]

    def read(self, entry: Entry) -> np.ndarray:
        """Returns the numbers of a tensor as float32."""
        file, file_entry = self.sources[entry.name]
        return file.read(file_entry)

    def numbers(self, entry: Entry) -> Numbers:
        """Returns the numbers of a tensor, which are read when they are used."""
        file, file_entry = self.sources[entry.name]
        return Numbers(
            file_entry.shape, partial(file.stream, file_entry), partial(file.read, file_entry)
        )


@contextlib.contextmanager
def opened(paths: Sequence[str]) -> Iterator[Inputs]:
    """Opens files and yields them as one list of tensors.

    Args:
      paths: paths of files and folders, shell patterns, and `-` for standard input.

    Raises:
      UsageError: if a pattern matches nothing, or standard input is named twice.
      FileError: if a file cannot be read.
    """
    if paths.count(_STDIN) > 1:
        raise UsageError("standard input (-) can be read only once")
    names = list(dict.fromkeys(name for path in paths for name in _expanded(path)))
    entries: list[Entry] = []
    sources: dict[str, tuple[TensorFile, Entry]] = {}
    parts: set[str] = set()
    with contextlib.ExitStack() as stack:
        for name in names:
            file = stack.enter_context(_stdin() if name == _STDIN else open_tensors(name))
            in_file = quantized_parts(file)
            shown = "stdin" if name == _STDIN else name
            for entry in file.entries:
                full = entry.name if len(names) == 1 else f"{shown}:{entry.name}"
                entries.append(dataclasses.replace(entry, name=full))
                sources[full] = file, entry
                if entry.name in in_file:
                    parts.add(full)
        only = "standard input" if names == [_STDIN] else pathlib.Path(names[0]).name
        title = only if len(names) == 1 else f"{len(names)} files"
        yield Inputs(title, tuple(entries), sources, frozenset(parts))


def _expanded(path: str) -> list[str]:
    """Returns the files that an argument names by a path or a shell pattern."""
    where = pathlib.Path(path)
    if path == _STDIN or where.is_file():
        return [path]
    if where.is_dir():
        index = where / "model.safetensors.index.json"
        if index.exists() or any(where.glob("*.safetensors")):
            return [path]
        return sorted(str(f) for f in where.iterdir() if f.suffix in _KINDS) or [path]
    if glob.has_magic(path):
        # `Path.glob` does not support absolute patterns.
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if not matches:
            raise UsageError(f"{path}: no file matches this pattern")
        return [name for match in matches for name in _expanded(match)]
    return [path]


@contextlib.contextmanager
def _stdin() -> Iterator[TensorFile]:
    """Yields the file on standard input, opened from a temporary copy."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            opened = stack.enter_context(open_tensors(path))
        except FileError as error:
            raise FileError(str(error).replace(str(path), "standard input")) from error
        yield opened
