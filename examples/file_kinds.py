"""The file classifier Magika in plain JAX: a convolutional network that is published as ONNX.

The network reads the first and the last 1,024 bytes of a file and gives probabilities of 214 kinds
of content (Fratantonio et al., 2025, "Magika: AI-Powered Content-Type Detection"). Its file comes
from the package `magika` (Apache 2.0), and `onnx` reads its weights. The code contains no
quantization: products are `@`, and parameters are a nested dictionary with paths such as
`layers/convolution/kernel`.

Run as a program, it says what files are:

    pip install onnx && pip install --no-deps magika
    python examples/file_kinds.py FILE...
"""

import importlib
import importlib.util
import json
import pathlib
import sys
import sysconfig
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import sklearn
from jax import lax
from jax import numpy as jnp

__all__ = ["KINDS", "Model", "content", "files", "load", "logits"]

SIDE = 1024  # The number of bytes from each end of a file.
PADDING = 256  # The token that pads short files.
BLOCK = 4096  # The number of bytes at each end whose spaces are removed.
KINDS = {  # The name of a kind, by the end of a file's name.
    ".c": "c",
    ".css": "css",
    ".csv": "csv",
    ".gif": "gif",
    ".gz": "gzip",
    ".html": "html",
    ".js": "javascript",
    ".json": "json",
    ".npz": "npz",
    ".pdf": "pdf",
    ".pem": "pem",
    ".png": "png",
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".rst": "rst",
    ".so": "elf",
    ".svg": "svg",
    ".toml": "toml",
    ".ttf": "ttf",
    ".txt": "txt",
    ".wav": "wav",
    ".xml": "xml",
}

_ARRAYS = {  # The parameters, by the ends of the names of the graph's constants.
    ("embedding", "kernel"): "get_logits_/Const:0",
    ("embedding", "bias"): "Dense_0/Reshape:0",
    ("norm", "scale"): "LayerNorm_0/Reshape_2:0",
    ("norm", "bias"): "LayerNorm_0/Reshape_3:0",
    ("layers", "convolution", "kernel"): "Conv_0/transpose_3:0",
    ("layers", "convolution", "bias"): "const_fold_opt__209",
    ("last", "scale"): "LayerNorm_1/Reshape_2:0",
    ("last", "bias"): "LayerNorm_1/Reshape_3:0",
    ("layers", "output", "kernel"): "get_logits_/Const_24:0",
    ("layers", "output", "bias"): "Dense_1/Reshape:0",
}


class Model(NamedTuple):
    """A model.

    Attributes:
      params: the parameters.
      kinds: the names of the kinds, one per output.
    """

    params: dict[str, Any]
    kinds: list[str]


def _normalize(params: Any, x: jax.Array) -> jax.Array:
    y = jax.nn.standardize(x, axis=1, epsilon=1e-6)
    return y * params["scale"] + params["bias"]


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the logits of the kinds, `[batch, 214]`, for tokens `[batch, 2048]`."""
    embedding_params, layers = params["embedding"], params["layers"]
    x = jax.nn.gelu(embedding_params["kernel"][tokens] + embedding_params["bias"])
    x = _normalize(params["norm"], x.reshape(len(x), 512, 256))  # Four bytes at each place.
    x = lax.conv_general_dilated(
        x, layers["convolution"]["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = jax.nn.gelu(x + layers["convolution"]["bias"]).max(1)
    return _normalize(params["last"], x) @ layers["output"]["kernel"] + layers["output"]["bias"]


def content(data: bytes) -> np.ndarray:
    """Returns the tokens of a file: its first and last 1,024 bytes without spaces at its ends."""
    first, last = data[:BLOCK].lstrip(), data[-BLOCK:].rstrip()
    if len(data) <= BLOCK:
        first = last = data.strip()
    tokens = np.full(2 * SIDE, PADDING, np.int32)
    for part, start in ((first[:SIDE], 0), (last[-SIDE:], 2 * SIDE - len(last[-SIDE:]))):
        tokens[start : start + len(part)] = np.frombuffer(part, np.uint8)
    return tokens


def files(most: int) -> list[tuple[pathlib.Path, str]]:
    """Returns at most `most` files of each kind with their kinds.

    They are files of Python, Matplotlib and scikit-learn.
    """
    roots = [pathlib.Path(sysconfig.get_path("stdlib"))]
    roots += [pathlib.Path(str(module.__file__)).parent for module in (matplotlib, sklearn)]
    by_end: dict[str, list[pathlib.Path]] = {end: [] for end in KINDS}
    for root in roots:
        for path in sorted(root.rglob("*")):
            is_own = "site-packages" not in path.relative_to(root).parts
            if is_own and path.suffix in by_end and path.is_file() and path.stat().st_size > 200:
                by_end[path.suffix].append(path)
    chosen = []
    for end, paths in by_end.items():
        places = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
        chosen += [(paths[i], KINDS[end]) for i in places]
    return chosen


def load() -> Model:
    """Returns the published model."""
    spec = importlib.util.find_spec("magika")
    if not (spec and spec.origin and importlib.util.find_spec("onnx")):
        sys.exit(
            "This example needs a package with weights and a reader of its format: "
            "pip install onnx, and pip install --no-deps magika"
        )
    onnx = importlib.import_module("onnx")
    (folder,) = (pathlib.Path(spec.origin).parent / "models").iterdir()
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    params: dict[str, Any] = {}
    for (*parents, leaf), end in _ARRAYS.items():
        (array,) = (value for name, value in arrays.items() if name.endswith(end))
        array = array.squeeze()
        if end.startswith("Conv"):
            array = array.transpose(2, 1, 0)  # From [outputs, inputs, width].
        if parents == ["norm"]:
            array = array[:, None]  # This norm is over places.
        place = params
        for name in parents:
            place = place.setdefault(name, {})
        place[leaf] = jnp.asarray(array)
    kinds = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    return Model(params, kinds)


def main() -> None:
    """Prints the kinds of files."""
    model = load()
    names = sys.argv[1:] or [__file__]
    tokens = np.stack([content(pathlib.Path(name).read_bytes()) for name in names])
    shares = np.asarray(jax.nn.softmax(jax.jit(logits)(model.params, tokens)))
    for name, share in zip(names, shares, strict=True):
        print(f"{name}: {model.kinds[share.argmax()]} ({share.max():.3f})")


if __name__ == "__main__":
    main()
