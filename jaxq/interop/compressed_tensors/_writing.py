"""Writing of a folder: safetensors files of a limited size, their index, and `config.json`."""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxq.interop._safetensors import DTYPES, Tensor, write_tensors
from jaxq.interop._writing import beside, is_temporary, locked, remove_abandoned
from jaxq.interop.compressed_tensors._fusing import fused_with
from jaxq.interop.compressed_tensors._schemes import Scheme, scheme_of, weight_tensors
from jaxq.quantizers import Quantized

__all__ = ["Checkpoint", "write", "write_streamed"]

_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}
_MAX_SHARD_BYTES = 5_000_000_000  # The largest size of a file in bytes, as in transformers.


class Checkpoint(NamedTuple):
    """A checkpoint to write.

    Attributes:
      shapes: the weights by name, with `jax.ShapeDtypeStruct` in place of arrays.
      read: a function that returns the weight with a name.
      config: the content of the model's own `config.json`.
      dynamic_activations: as in `write`.
      files: other files to copy to the folder.
      max_shard_bytes: the largest size of a safetensors file in bytes.
    """

    shapes: Mapping[str, Any]
    read: Callable[[str], Any]
    config: Mapping[str, Any]
    dynamic_activations: bool = False
    files: Sequence[pathlib.Path] = ()
    max_shard_bytes: int = _MAX_SHARD_BYTES


def write(
    folder: str | pathlib.Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    dynamic_activations: bool = False,
) -> None:
    """Writes a checkpoint of compressed-tensors, which vLLM runs.

    The codes and scales are those of the quantized arrays. vLLM converts the scales of integers to
    the dtype of the model, so a recipe with another `scale_format` changes values there. NVFP4
    stores the inverse of the tensor scale, so scales may differ in the last bit of float32.

    Args:
      folder: the path of a folder that does not exist or is empty. It appears only when it is
        complete; the files in an existing one are moved there at the end, `config.json` last.
      params: the arrays and `jaxq.Quantized` by their names in Hugging Face's format. A quantized
        weight is `[outputs, inputs]`, its name ends in `.weight`, and its recipe has a scheme
        (see `scheme_of`).
      config: the content of the model's `config.json`, which vLLM needs to build the model. The
        key `quantization_config` is added. Default: None, no other keys.
      dynamic_activations: True if vLLM should also quantize the inputs of all quantized weights, to
        int8 or float8_e4m3fn with one scale per token. Default: False, weights only.

    Raises:
      ValueError: if a recipe has no scheme, a weight is not a matrix, or weights that vLLM fuses
        have different recipes or NVFP4 tensor scales (see `quantize_together`).
      FileExistsError: if the folder exists and is not empty.
      OSError: if a file cannot be written.

    Example:
      >>> import jax.numpy as jnp, jaxq, tempfile
      >>> from jaxq.recipes import PerBlock, Symmetric
      >>> recipe = jaxq.Recipe("int4", PerBlock(32), Symmetric("absmax", "half", "bfloat16"))
      >>> w = jaxq.quantize(jnp.ones((4, 64)), recipe)
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> jaxq.interop.compressed_tensors.write(folder, {"layers.0.up_proj.weight": w})
      >>> jaxq.interop.load_tensors(folder)["layers.0.up_proj.weight"].recipe == recipe
      True

    References:
      The compressed-tensors package, version 0.20.
    """
    checkpoint = Checkpoint(params, params.__getitem__, config or {}, dynamic_activations)
    write_streamed(folder, checkpoint)


def write_streamed(folder: str | pathlib.Path, checkpoint: Checkpoint) -> None:
    """Writes the folder that `write` would write, with one weight in memory at a time."""
    schemes = {
        name: _find_scheme(name, value, checkpoint.dynamic_activations)
        for name, value in checkpoint.shapes.items()
        if isinstance(value, Quantized)
    }
    _check_fused(schemes, checkpoint.shapes)
    tensor_scales: dict[tuple[str, ...], float] = {}
    weights = [_tensors_of(name, checkpoint, schemes, tensor_scales) for name in checkpoint.shapes]
    shards = _shards(weights, checkpoint.max_shard_bytes)
    total = sum(_size(tensor) for shard in shards for tensor in shard)
    config = {**checkpoint.config, "quantization_config": _config(schemes, checkpoint.shapes)}
    with _new_folder(pathlib.Path(folder)) as new:
        file_by_tensor = {}
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            name = "model.safetensors" if len(shards) == 1 else name
            file_by_tensor.update({tensor.name: name for tensor in shard})
            with (new / name).open("xb") as file:
                write_tensors(file, shard, {"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": file_by_tensor}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for path in checkpoint.files:
            shutil.copyfile(path, new / path.name)
        (new / "config.json").write_text(json.dumps(config, indent=2))


def _find_scheme(name: str, q: Quantized, dynamic: bool) -> Scheme:
    if not name.endswith(".weight") or q.ndim != 2:
        remedy = "Rename it, or leave it unquantized."
        if q.ndim == 3:
            remedy = "Split a stack of experts into matrices, such as experts.0.up_proj.weight."
        raise ValueError(
            f"compressed_tensors.write: quantized weights must be matrices with names that end in "
            f".weight, got {name!r:.80} of shape {q.shape}. {remedy}"
        )
    try:
        scheme = scheme_of(q.recipe, dynamic_activations=dynamic)
    except ValueError as error:
        raise ValueError(f"compressed_tensors.write: weight {name!r:.80}: {error}") from error
    # A part of a stack that was quantized per channel may have one scale for all rows.
    if scheme.weights["strategy"] == "channel" and q.scale.shape != (q.shape[0], 1):
        raise ValueError(
            f"compressed_tensors.write: weight {name!r:.80} must have one scale per row, got "
            f"scales of shape {q.scale.shape}. Quantize it as a matrix."
        )
    return scheme


def _check_fused(schemes: Mapping[str, Scheme], shapes: Mapping[str, Any]) -> None:
    for name in schemes:
        for other in fused_with(name):
            if other in shapes and schemes.get(other) != schemes[name]:
                raise ValueError(
                    f"compressed_tensors.write: vLLM fuses {name!r:.80} with {other!r:.80}, so "
                    "both need the same recipe. Quantize them by one rule."
                )


def _tensors_of(
    name: str,
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    tensor_scales: dict[tuple[str, ...], float],
) -> list[Tensor]:
    """Returns the tensors of a weight, which is read once for all of them.

    Args:
      name: the name of the weight.
      checkpoint: the checkpoint.
      schemes: the schemes of the quantized weights.
      tensor_scales: the tensor scale of each group of fused weights, filled in as they are read.
    """
    value = checkpoint.shapes[name]
    if name not in schemes:
        dtype = _NAMES.get(np.dtype(value.dtype).name)
        if dtype is None:
            raise ValueError(
                f"compressed_tensors.write: {name!r:.80} must have a dtype of safetensors, got "
                f"{value.dtype}. Convert it, or quantize it."
            )
        read = functools.partial(_array, checkpoint.read, name)
        return [Tensor(name, dtype, tuple(value.shape), read)]
    cache: list[Quantized] = []

    def read_once() -> Quantized:
        if not cache:
            cache.append(checkpoint.read(name))
            _check_tensor_scale(name, cache[0], tensor_scales)
        return cache[0]

    def read_tensor(tensor: Tensor, last: bool) -> np.ndarray:
        result = tensor.read()
        if last:
            cache.clear()
        return result

    # `write_tensors` reads them in this order, so the weight is dropped after the last one.
    tensors = weight_tensors(name, value, schemes[name], read_once)
    return [
        tensor._replace(read=functools.partial(read_tensor, tensor, tensor is tensors[-1]))
        for tensor in tensors
    ]


def _check_tensor_scale(
    name: str, q: Quantized, tensor_scales: dict[tuple[str, ...], float]
) -> None:
    """Raises ValueError if fused weights have different tensor scales."""
    if not q.second:
        return
    scale = float(q.second[0])
    if tensor_scales.setdefault(fused_with(name), scale) != scale:
        raise ValueError(
            f"compressed_tensors.write: vLLM fuses {name!r:.80} with other weights, so they need "
            "the same tensor scale. Quantize them with quantize_together."
        )


def _array(read: Callable[[str], Any], name: str) -> np.ndarray:
    return np.asarray(read(name))


def _size(tensor: Tensor) -> int:
    return DTYPES[tensor.dtype][0] * math.prod(tensor.shape) // 8


def _shards(weights: Sequence[Sequence[Tensor]], max_shard_bytes: int) -> list[list[Tensor]]:
    """Returns the tensors of each file; those of a weight are in the same one."""
    shards: list[list[Tensor]] = [[]]
    taken = 0
    for tensors in weights:
        size = sum(map(_size, tensors))
        if shards[-1] and taken + size > max_shard_bytes:
            shards.append([])
            taken = 0
        shards[-1] += tensors
        taken += size
    return shards


def _config(schemes: Mapping[str, Scheme], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `quantization_config`."""
    distinct_schemes: list[Scheme] = []
    for scheme in schemes.values():
        if scheme not in distinct_schemes:
            distinct_schemes.append(scheme)
    groups = {}
    for i, scheme in enumerate(distinct_schemes):
        modules = [name.removesuffix(".weight") for name, s in schemes.items() if s == scheme]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(distinct_schemes) == 1 else modules,
            "weights": scheme.weights,
            "input_activations": scheme.activations,
            "output_activations": None,
            "format": scheme.format,
        }
    formats = {scheme.format for scheme in distinct_schemes}
    ignore = [
        name.removesuffix(".weight")
        for name, value in shapes.items()
        if name not in schemes and name.endswith(".weight") and len(value.shape) == 2
    ]
    if "lm_head.weight" not in schemes and "lm_head" not in ignore:
        ignore.append("lm_head")  # Tied to the embedding, so that it has no tensor of its own.
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that becomes `folder` when complete and is removed after an error.

    An empty folder stays the same folder, because it may be a mount, a link or the current folder.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    exists = folder.exists()
    target = folder / folder.name if exists else folder
    if exists and (
        not folder.is_dir() or not all(is_temporary(path, target) for path in folder.iterdir())
    ):
        raise FileExistsError(
            f"compressed_tensors.write: {folder} exists. Remove it, or name another folder."
        )
    remove_abandoned(target)
    new = beside(target)
    new.mkdir()
    try:
        with locked(new):
            yield new
        if exists:
            # The last file is the one that programs open first.
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(folder / path.name)
            new.rmdir()
        else:
            new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
