"""Causal attention over the tokens of a cache, which are read in chunks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["CachedTokens", "attention"]

_NEVER = np.iinfo(np.int32).max  # The position of a value that no query sees.


class CachedTokens(NamedTuple):
    """The dequantized tokens in slots of a cache.

    Attributes:
      keys: the keys, `[*batch, slots, heads, head_dim]`.
      values: the values, of the same shape.
      positions: the number of the token in each slot, counted from 0, int32 `[*batch, slots]`; -1
        for an empty slot.

    Example:
      >>> from jaxq import serving
      >>> serving.KVCache.empty((4, 2, 8), "kv_int8").dequantize().positions.tolist()
      [-1, -1, -1, -1]
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


class _Running(NamedTuple):
    """The state of a running softmax over the tokens so far.

    `group` counts the query heads that share a head of keys and values.

    Attributes:
      largest: the largest logit, `[T, heads, group]`.
      total: the sum of `exp(logit - largest)`, of the same shape.
      values: the sum of values with the same weights, `[T, heads, group, head_dim]`.
    """

    largest: jax.Array
    total: jax.Array
    values: jax.Array


def _sum_of_nonfinite(
    values: jax.Array, positions: jax.Array, query_positions: jax.Array
) -> jax.Array:
    """Returns the sum over the NaNs and infinities among the values that each query sees.

    Args:
      values: the values of the slots, `[slots, heads, head_dim]`.
      positions: the positions of the slots; an empty slot has finite values.
      query_positions: the positions of the queries, `[T]`.

    Returns:
      Zeros, infinities and NaNs, float32 `[T, heads, head_dim]`.
    """
    queries = query_positions[:, None, None]
    result = jnp.zeros((), jnp.float32)
    for value, is_it in (
        (jnp.nan, jnp.isnan(values)),
        (jnp.inf, values == jnp.inf),
        (-jnp.inf, values == -jnp.inf),
    ):
        first = jnp.where(is_it, positions[:, None, None], _NEVER).min(0, keepdims=True)
        result = result + jnp.where(queries >= first, jnp.float32(value), jnp.float32(0))
    return result


def attention(
    query: jax.Array,
    query_positions: jax.Array,
    read: Callable[[jax.Array], CachedTokens],
    starts: range,
) -> jax.Array:
    """Returns the attention of one sequence over all chunks, by a running softmax.

    Args:
      query: the scaled queries, float32 `[T, query heads, head_dim]`.
      query_positions: the positions of the queries, `[T]`.
      read: a function from the first slot of a chunk to its tokens.
      starts: the first slots of the chunks.
    """
    tokens, query_heads, head_dim = query.shape
    heads = jax.eval_shape(read, jnp.int32(0)).keys.shape[-2]
    query = query.reshape(tokens, heads, query_heads // heads, head_dim)

    def step(running: _Running, start: jax.Array) -> tuple[_Running, None]:
        part = read(start)
        keys, values = (x.astype(jnp.float32) for x in part[:2])
        logits = jnp.einsum("thqd,shd->thqs", query, keys)
        seen = (part.positions >= 0)[None] & (part.positions[None] <= query_positions[:, None])
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        largest = lax.max(running.largest, logits.max(-1))
        base = jnp.where(jnp.isfinite(largest), largest, 0)
        weights = jnp.exp(logits - base[..., None])
        # A weight of 0 would turn a NaN or infinity in a slot that is not seen into NaN.
        values = jnp.where((part.positions >= 0)[:, None, None], values, 0)
        extra = 0.0
        if tokens > 1:  # A single query sees all slots that are not empty.
            extra = _sum_of_nonfinite(values, part.positions, query_positions)[:, :, None]
            values = jnp.where(jnp.isfinite(values), values, 0)
        rescale = jnp.exp(running.largest - base)
        total = running.total * rescale + weights.sum(-1)
        summed = jnp.einsum("thqs,shd->thqd", weights, values) + extra
        return _Running(largest, total, running.values * rescale[..., None] + summed), None

    shape = query.shape[:-1]
    initial = _Running(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(query.shape))
    if len(starts) == 1:
        running, _ = step(initial, jnp.int32(0))
    else:
        running, _ = lax.scan(step, initial, jnp.asarray(starts, jnp.int32))
    total = jnp.where(running.total > 0, running.total, 1)
    return (running.values / total[..., None]).reshape(tokens, query_heads, head_dim)
