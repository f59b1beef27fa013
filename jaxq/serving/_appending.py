"""Appends tokens to the keys or the values of a cache."""

from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq.serving._groups import TokenGroups

__all__ = ["TokenStore", "with_groups", "with_recent"]


class TokenStore(NamedTuple):
    """The keys or the values of a cache, with the number of tokens in a group."""

    stored: TokenGroups
    recent: jax.Array
    size: int


def with_groups(
    store: TokenStore, new: jax.Array, before: jax.Array, count: jax.Array, residual_length: int
) -> TokenGroups:
    """Adds the groups that new tokens complete to the quantized groups.

    Each call quantizes the largest number of groups that `new` can complete, and drops those that
    are incomplete. A `lax.cond` would save nothing, because `jax.vmap` runs both branches.
    """
    stored, recent, size = store
    tokens, slots = new.shape[0], stored.codes.shape[0]
    first = lax.max(before - residual_length, 0) // size
    end = lax.max(before + count - residual_length, 0) // size
    groups = first + jnp.arange(-(-tokens // size), dtype=jnp.int32)
    positions = groups[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    old = recent[positions % recent.shape[0]]
    fresh = new[lax.clamp(0, positions - before, tokens - 1)]
    x = jnp.where((positions < before)[..., None, None], old, fresh).swapaxes(1, 2)
    places = jnp.where(groups < end, groups % slots, slots)
    return stored.written(x, places)


def with_recent(
    recent: jax.Array, new: jax.Array, before: jax.Array, count: jax.Array
) -> jax.Array:
    """Appends the newest tokens to the window of unquantized tokens."""
    window, offsets = recent.shape[0], jnp.arange(new.shape[0], dtype=jnp.int32)
    is_recent = (offsets < count) & (offsets >= count - window)
    places = jnp.where(is_recent, (before + offsets) % window, window)
    return recent.at[places].set(new, mode="drop")
