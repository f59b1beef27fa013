"""GGUF, the file format of llama.cpp and other programs that use ggml.

`quantize` and `dequantize` convert tensors to and from the block types of ggml, such as `q4_k`,
with the same bytes as ggml. `pack` and `unpack` convert a `jaxq.Quantized` of the recipes `q8_0`,
`q4_0`, `q4_1`, `q5_0`, `q5_1`, `q2_k` to `q6_k`, `iq4_nl` and `iq4_xs`, which are the types of the
same names, to and from those bytes. `tq1_0` and `tq2_0` are not recipes of `jaxq.quantize`, and
the recipes `mxfp4` and `nvfp4` have other rules for scales and ties than the types of these names.

`write` writes files, and `jaxq.interop.open_tensors` reads them. `conversion` gives the names and
the metadata that a model of Hugging Face has in GGUF.
"""

from jaxq.interop.gguf._container import Tensor, write
from jaxq.interop.gguf._names import ARCHITECTURES, Architecture, Conversion, conversion
from jaxq.interop.gguf._recipes import pack, unpack
from jaxq.interop.gguf._tensors import (
    TYPES,
    Packed,
    PartImportance,
    dequantize,
    fake_quant,
    fallback,
    quantize,
    quantize_with_values,
)

__all__ = [
    "ARCHITECTURES",
    "TYPES",
    "Architecture",
    "Conversion",
    "Packed",
    "Tensor",
    "conversion",
    "dequantize",
    "fake_quant",
    "fallback",
    "pack",
    "quantize",
    "unpack",
    "write",
]
