"""Checkpoints: quantized trees in files, and the layouts of other libraries and programs.

To read the quantized weights of another program, list a function in `METHODS` of `_layouts/`; for
another kind of file, extend `open_tensors` (`_files.py`).
"""

from jaxq.interop import compressed_tensors, gguf
from jaxq.interop._checkpoints import load, save, save_streamed
from jaxq.interop._entries import Entry, FileError
from jaxq.interop._files import TensorFile, open_tensors
from jaxq.interop._layouts import read_json
from jaxq.interop._loading import load_tensors
from jaxq.interop._quantized_parts import quantized_parts
from jaxq.interop._writing import atomic, is_temporary

__all__ = [
    "Entry",
    "FileError",
    "TensorFile",
    "gguf",
    "load",
    "load_tensors",
    "open_tensors",
    "save",
]
