"""Checkpoints in the format of compressed-tensors, which vLLM runs.

`write` writes a folder with safetensors files and a `config.json`, and `load_tensors` and
`open_tensors` read such folders. A weight is `[outputs, inputs]`, with blocks along the last axis.
"""

from jaxq.interop.compressed_tensors._fusing import fused_with, quantize_together
from jaxq.interop.compressed_tensors._schemes import Scheme, scheme_of
from jaxq.interop.compressed_tensors._writing import Checkpoint, write, write_streamed

__all__ = ["Scheme", "fused_with", "quantize_together", "scheme_of", "write"]
