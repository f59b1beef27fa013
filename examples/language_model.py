"""A small causal transformer in plain JAX that learns the text of Python's own documentation.

Four layers whose parameters are stacked, so that a `lax.scan` runs over them; bytes are its tokens.
Nothing here knows of quantization: products are `@` and einsum, embeddings are indexing. All
sizes are multiples of 128, so every block that a recipe may have divides them, in the products of
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
    """Parameters: `embedding`, `layers` with a leading axis of layers, `norm` and `head`."""
    keys = iter(jax.random.split(key, 7))

    def weight(*shape: int, size: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape) * size / shape[-2] ** 0.5

    wide, last = 4 * WIDTH, (2 * LAYERS) ** -0.5  # What adds to the residual stream starts small.
    ones = jnp.ones((LAYERS, WIDTH))
    return {
        "embedding": weight(VOCABULARY, WIDTH),
        "layers": {
            "attention": {
                "norm": ones,
                "query": weight(LAYERS, WIDTH, WIDTH),
                "key": weight(LAYERS, WIDTH, WIDTH),
                "value": weight(LAYERS, WIDTH, WIDTH),
                "output": weight(LAYERS, WIDTH, WIDTH, size=last),
            },
            "mlp": {
                "norm": ones,
                "up": weight(LAYERS, WIDTH, wide),
                "down": weight(LAYERS, wide, WIDTH, size=last),
            },
        },
        "norm": jnp.ones(WIDTH),
        "head": jnp.zeros((WIDTH, VOCABULARY)),
    }


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """Logits `[batch, length, 128]` of the byte that follows each of `[batch, length]`."""

    def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        own, mlp = params["attention"], params["mlp"]
        y = normalize(own["norm"], x)
        x = x + attend(*(y @ own[name] for name in ("query", "key", "value"))) @ own["output"]
        return x + jax.nn.gelu(normalize(mlp["norm"], x) @ mlp["up"]) @ mlp["down"], None

    x, _ = lax.scan(layer, params["embedding"][tokens], params["layers"])
    return normalize(params["norm"], x) @ params["head"]


def loss(params: Any, rows: jax.Array) -> jax.Array:
    """Mean cross-entropy in bits a byte of `[batch, length + 1]` bytes, each after those before."""
    return cross_entropy(logits(params, rows[:, :-1]), rows)


def cross_entropy(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """The loss for logits of every byte but the first."""
    own = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(own, rows[:, 1:]).mean() / np.log(2)


def normalize(scale: jax.Array, x: jax.Array) -> jax.Array:
    """RMS normalization, in float32 whatever the model computes in."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * scale[None, None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """What every byte gathers from itself and those before, for `[batch, length, WIDTH]` of each.

    Places are told by a penalty on distance (Press et al., 2022, "ALiBi"), steeper in some heads.
    """
    shape = query.shape
    query, key, value = (x.reshape(*shape[:2], HEADS, -1) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    places = jnp.arange(shape[1])
    distance = (places[:, None] - places[None])[None, None]
    slopes = 0.25 ** jnp.arange(HEADS)[None, :, None, None]
    scores = scores / query.shape[-1] ** 0.5 - slopes * distance
    weights = jax.nn.softmax(jnp.where(distance >= 0, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value).reshape(shape)


def text() -> tuple[jax.Array, jax.Array]:
    """Bytes for training, and the last tenth of every topic, held out."""
    topics = [
        np.frombuffer(text.encode("ascii", "replace"), np.uint8)
        for text in pydoc_data.topics.topics.values()
    ]
    train = [topic[: len(topic) * 9 // 10] for topic in topics]
    held = [topic[len(topic) * 9 // 10 :] for topic in topics]
    return jnp.asarray(np.concatenate(train)), jnp.asarray(np.concatenate(held))


def windows(data: jax.Array, starts: jax.Array) -> jax.Array:
    """Rows `[starts, CONTEXT + 1]` of bytes."""
    return data[starts[:, None] + jnp.arange(CONTEXT + 1)[None]].astype(jnp.int32)
