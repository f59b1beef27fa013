"""A small causal transformer in plain JAX that learns the text of Python's documentation.

The model has four layers with stacked parameters in a `lax.scan`, and its tokens are bytes. It
contains no quantization: products are `@` and einsum, and embeddings are indexing. All sizes are
multiples of 128, so that they are divisible by the block sizes of all recipes, in the products of
the gradient too.
"""

import pydoc_data.topics
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

__all__ = [
    "CONTEXT",
    "HEADS",
    "LAYERS",
    "VOCABULARY",
    "WIDTH",
    "attend",
    "cross_entropy",
    "init",
    "logits",
    "loss",
    "normalize",
    "text",
    "windows",
]

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 4, 128, 4, 128, 128


def init(key: jax.Array) -> Any:
    """Returns initial parameters: `embedding`, stacked `layers`, `norm` and `head`."""
    keys = iter(jax.random.split(key, 7))

    def weight(*shape: int, size: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape) * size / shape[-2] ** 0.5

    # Weights of products that add to the residual stream start smaller, by the square root of the
    # number of such products.
    hidden, residual = 4 * WIDTH, (2 * LAYERS) ** -0.5
    ones = jnp.ones((LAYERS, WIDTH))
    return {
        "embedding": weight(VOCABULARY, WIDTH),
        "layers": {
            "attention": {
                "norm": ones,
                "query": weight(LAYERS, WIDTH, WIDTH),
                "key": weight(LAYERS, WIDTH, WIDTH),
                "value": weight(LAYERS, WIDTH, WIDTH),
                "output": weight(LAYERS, WIDTH, WIDTH, size=residual),
            },
            "mlp": {
                "norm": ones,
                "up": weight(LAYERS, WIDTH, hidden),
                "down": weight(LAYERS, hidden, WIDTH, size=residual),
            },
        },
        "norm": jnp.ones(WIDTH),
        "head": jnp.zeros((WIDTH, VOCABULARY)),
    }


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """Returns logits `[batch, length, 128]` of the byte after each token `[batch, length]`."""

    def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        attention, mlp = params["attention"], params["mlp"]
        y = normalize(attention["norm"], x)
        heads = [y @ attention[name] for name in ("query", "key", "value")]
        x = x + attend(*heads) @ attention["output"]
        return x + jax.nn.gelu(normalize(mlp["norm"], x) @ mlp["up"]) @ mlp["down"], None

    x, _ = lax.scan(layer, params["embedding"][tokens], params["layers"])
    return normalize(params["norm"], x) @ params["head"]


def loss(params: Any, rows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in bits per byte of rows `[batch, length + 1]`."""
    return cross_entropy(logits(params, rows[:, :-1]), rows)


def cross_entropy(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in bits per byte for the logits of all bytes but the first."""
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, rows[:, 1:]).mean() / np.log(2)


def normalize(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Applies RMS normalization, computed in float32 for every dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * scale[None, None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes causal multi-head attention for query, key and value `[batch, length, WIDTH]`.

    Positions enter as a penalty on distance with a slope for each head (Press et al., 2022,
    "ALiBi").
    """
    shape = query.shape
    query, key, value = (x.reshape(*shape[:2], HEADS, -1) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    positions = jnp.arange(shape[1])
    distance = (positions[:, None] - positions[None])[None, None]
    slopes = 0.25 ** jnp.arange(HEADS)[None, :, None, None]
    scores = scores / query.shape[-1] ** 0.5 - slopes * distance
    weights = jax.nn.softmax(jnp.where(distance >= 0, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value).reshape(shape)


def text() -> tuple[jax.Array, jax.Array]:
    """Returns the bytes for training, and the held-out last tenth of every topic."""
    topics = [
        np.frombuffer(text.encode("ascii", "replace"), np.uint8)
        for text in pydoc_data.topics.topics.values()
    ]
    train = [topic[: len(topic) * 9 // 10] for topic in topics]
    held_out = [topic[len(topic) * 9 // 10 :] for topic in topics]
    return jnp.asarray(np.concatenate(train)), jnp.asarray(np.concatenate(held_out))


def windows(data: jax.Array, starts: jax.Array) -> jax.Array:
    """Returns rows `[starts, CONTEXT + 1]` of consecutive bytes."""
    return data[starts[:, None] + jnp.arange(CONTEXT + 1)[None]].astype(jnp.int32)
