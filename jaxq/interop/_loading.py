"""Loading of a whole checkpoint of any readable kind as a dictionary."""

import pathlib
from typing import Any

import jax
import numpy as np

from jaxq.interop._entries import FileError
from jaxq.interop._files import open_tensors

__all__ = ["load_tensors"]


def load_tensors(path: str | pathlib.Path, *, sharding: Any = None) -> dict[str, Any]:
    """Returns the tensors of a file or folder by name, with quantized weights as they are stored.

    Args:
      path: a path that `open_tensors` accepts: a GGUF, safetensors, .npz or .npy file, or a folder
        of safetensors files with its `config.json`, such as a model of Hugging Face.
      sharding: a `jax.sharding.Sharding` or device for all arrays. Default: None, the default
        device.

    Returns:
      A dictionary from names to `jaxq.Quantized` or arrays. A quantized weight is
      `[outputs, inputs]`, and its `dequantize` returns the exact float32 values, except for results
      below 2^-126. Weights in block types of GGUF have the recipe that
      `jaxq.interop.gguf.recipe_of` returns for the type; the scale of an NVFP4 tensor remains a
      tensor of its own, with the name `NAME.scale`. A weight that no recipe can represent, such as
      a GPTQ weight in activation order, is a float32 array. Arrays whose dtypes JAX supports only
      with x64 are NumPy arrays.

    Raises:
      FileError: if the file is damaged, or its layout is not supported.

    Example:
      >>> import jax.numpy as jnp, jaxq, tempfile
      >>> from jaxq.interop import gguf
      >>> w = jaxq.quantize(jnp.ones((4, 32)), "q8_0")
      >>> tensor = gguf.Tensor("w.weight", "q8_0", w.shape, lambda: gguf.pack(w))
      >>> path = tempfile.mkdtemp() + "/model.gguf"
      >>> gguf.write(path, [tensor], {"general.architecture": "llama"})
      >>> jaxq.interop.load_tensors(path)["w.weight"]
      q8_0[4×32] 136 B
    """
    result = {}
    with open_tensors(path) as file:
        for entry in file.entries:
            if entry.numpy_dtype is None and entry.packed is None and entry.layout is None:
                raise FileError(
                    f"{path}: {entry.name!r:.80} must have a dtype that NumPy can hold, got "
                    f"{entry.dtype}. Read the other tensors with jaxq.interop.open_tensors."
                )
            value = file.quantized(entry)
            if isinstance(value, np.ndarray):
                value = value.astype(value.dtype.newbyteorder("="), copy=False)
                if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
                    result[entry.name] = value
                    continue
            result[entry.name] = jax.device_put(value, sharding)
    return result
