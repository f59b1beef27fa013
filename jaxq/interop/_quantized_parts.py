"""Recognition of codes and scales in files of `jaxq.save`, which must not be quantized again."""

import json
from collections.abc import Iterator
from typing import Any

from jaxq.interop._entries import FileError
from jaxq.interop._files import TensorFile

__all__ = ["quantized_parts"]


def quantized_parts(file: TensorFile) -> frozenset[str]:
    """Returns the names of the tensors that are parts of quantized arrays and of states of jaxq.

    Args:
      file: an open file or folder.

    Raises:
      FileError: if the description of the tree in a file is damaged.
    """
    files = {id(each): each for each in (file, *file.parts.values())}
    return frozenset(name for each in files.values() for name in _parts(each))


def _parts(file: TensorFile) -> list[str]:
    text = file.metadata.get("jaxq") if file.kind == ".safetensors" else None
    if text is None:
        return []
    try:
        return [*_names(json.loads(text)["tree"], False)]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"{file.path}: its jaxq metadata are damaged ({error}). Save the tree again."
        ) from error


def _names(node: Any, inside: bool) -> Iterator[str]:
    """Yields the names of the arrays in nodes of jaxq's own classes."""
    if node is None:
        return
    if inside and "array" in node:
        yield str(node["array"])
    for _, child in node.get("children", ()):
        yield from _names(child, inside or "static" in node)
