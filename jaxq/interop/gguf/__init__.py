"""GGUF, the file format of llama.cpp and other programs that use ggml.

Each block type has a recipe (`recipe_of`), with which `jaxq.quantize` gives the codes and scales of
ggml. `pack` and `unpack` convert a `jaxq.Quantized` of such a recipe to and from the bytes of a
file. `quantize` and `dequantize` convert tensors to and from these bytes directly.

`write` writes files; `jaxq.interop.load_tensors` and `jaxq.interop.open_tensors` read them.
`conversion` gives the names and the metadata that a model of Hugging Face has in GGUF.
"""

from jaxq.interop.gguf._container import Tensor, write
from jaxq.interop.gguf._names import ARCHITECTURES, Architecture, Conversion, conversion
from jaxq.interop.gguf._recipes import TYPES, pack, recipe_of, unpack
from jaxq.interop.gguf._tensors import (
    PartImportance,
    dequantize,
    fallback,
    quantize,
    quantize_with_values,
)

__all__ = [
    "ARCHITECTURES",
    "TYPES",
    "Architecture",
    "Conversion",
    "Tensor",
    "conversion",
    "dequantize",
    "fallback",
    "pack",
    "quantize",
    "recipe_of",
    "unpack",
    "write",
]
