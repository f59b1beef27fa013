"""A cache of quantized keys and values: a ring buffer that is a pytree.

Token number p, counted from 0, belongs to group p // size. A group is quantized by itself, once,
when it is complete and older than the window of unquantized tokens, and is stored in slot
group % slots. The codes of a token therefore depend only on its own group.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import described, integer, shape_of
from jaxq._jax.serialization import pytree
from jaxq.products import Hadamard
from jaxq.recipes import Recipe
from jaxq.serving._appending import TokenStore, with_groups, with_recent
from jaxq.serving._attention import CachedTokens, attention
from jaxq.serving._cache_recipe import CacheRecipe, cache_records, get_cache_recipe, needs_scale
from jaxq.serving._groups import TokenGroups

__all__ = ["CacheScales", "KVCache"]


class CacheScales(NamedTuple):
    """Static scales of a cache, as `KVCache.empty` takes them.

    Attributes:
      keys: float32 scales of the keys, broadcastable to one per block of `[heads, 1, head_dim]`,
        such as a scalar or `[heads, 1, 1]`; None if the recipe computes them.
      values: the same for the values.

    Example:
      >>> from jaxq import serving
      >>> scales = CacheScales(keys=8 / 448, values=4 / 448)  # amax / the FP8 max.
      >>> serving.KVCache.empty((64, 2, 8), "kv_fp8", scales=scales).nbytes
      2188
    """

    keys: jax.typing.ArrayLike | None = None
    values: jax.typing.ArrayLike | None = None


@pytree(static=("recipe", "capacity"), kinds=cache_records)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A ring buffer of the quantized keys and values of one attention layer. A pytree.

    All methods are pure and can be jitted, vmapped, and used in a `jax.lax.scan`. A full cache
    overwrites its oldest tokens, so attention slides over the last `capacity` tokens. Caches of
    several layers can be stacked by `jax.vmap` or `jax.tree.map`.

    Every sequence of a batch has its own length. The codes of a token are computed once, from its
    own group of tokens, and are not changed by tokens that are appended later.

    Attributes:
      keys: the quantized groups of keys, with a leading axis of slots after the batch axes.
      values: the quantized groups of values, with the same axes.
      recent_keys: the newest keys, unquantized, `[*batch, tokens, heads, head_dim]`; rotated if
        `recipe.rotate`.
      recent_values: the newest values, of the same shape.
      length: the number of tokens appended so far, int32 `[*batch]`.
      recipe: the cache recipe.
      capacity: the largest number of tokens that attention sees.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import serving
      >>> cache = serving.KVCache.empty((64, 2, 8), "kv_int8")  # 64 tokens, 2 heads of 8 channels.
      >>> k = v = jnp.ones((3, 2, 8))
      >>> cache = cache.append(k, v)
      >>> cache.attend(jnp.ones((1, 4, 8))).shape  # 4 query heads share 2 heads of keys.
      (1, 4, 8)
      >>> int(cache.length), cache.nbytes  # Two codes of 1 byte and 2 scales of 4 bytes per head.
      (3, 3204)
    """

    keys: TokenGroups
    values: TokenGroups
    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    recipe: CacheRecipe
    capacity: int

    @staticmethod
    def empty(
        shape: tuple[int, ...],
        recipe: str | CacheRecipe,
        *,
        dtype: Any = jnp.float32,
        scales: CacheScales | None = None,
    ) -> "KVCache":
        """Returns an empty cache.

        Args:
          shape: `(*batch, capacity, heads, head_dim)`, where the heads are those of the keys.
          recipe: a `CacheRecipe`, or a name in `jaxq.serving.CACHE_RECIPES`.
          dtype: the dtype of unquantized tokens: float16, bfloat16 or float32 (the default).
          scales: static scales for recipes whose scales span all tokens, such as `"kv_fp8"`.

        Raises:
          ValueError: if the shape has no heads or channels; the dtype is not supported; the
            capacity is not a whole number of groups or does not exceed `residual_length`; a block
            does not divide its axis; or scales are missing or not needed.
        """
        recipe, shape = get_cache_recipe(recipe), shape_of("KVCache.empty", shape)
        if len(shape) < 3:
            raise ValueError(
                "KVCache.empty: `shape` must be (*batch, capacity, heads, head_dim), got "
                f"{tuple(shape)}. Pass at least three lengths."
            )
        *batch, capacity, heads, head_dim = shape
        if heads < 1 or head_dim < 1:
            raise ValueError(
                "KVCache.empty: `shape` must have at least one head and one channel, got "
                f"{tuple(shape)}. Pass (*batch, capacity, heads, head_dim)."
            )
        try:
            supported = np.dtype(dtype).name in ("float16", "bfloat16", "float32")
        except TypeError:
            supported = False
        if dtype is None or not supported:
            raise ValueError(
                "KVCache.empty: `dtype` must be float16, bfloat16 or float32, got "
                f"{dtype!r:.40}. Use float32, to which `append` converts."
            )
        if capacity % recipe.step or capacity <= recipe.residual_length:
            least = recipe.residual_length + recipe.step
            raise ValueError(
                f"KVCache.empty: the capacity must be a multiple of {recipe.step} tokens above "
                f"`residual_length` = {recipe.residual_length}, got {capacity}. Use, for example, "
                f"{-(-max(least, capacity) // recipe.step) * recipe.step}."
            )
        if recipe.rotate and head_dim & (head_dim - 1):
            raise ValueError(
                "KVCache.empty: `head_dim` must be a power of two for a recipe that rotates, got "
                f"{head_dim}. Use rotate=False."
            )
        arrays, names = [], ("keys", "values")
        static_scales = CacheScales() if scales is None else scales
        if not isinstance(static_scales, CacheScales):
            raise TypeError(
                f"KVCache.empty: `scales` must be a CacheScales or None, got {described(scales)}. "
                "Write CacheScales(keys, values)."
            )
        for name, array_recipe, size, scale in zip(
            names, recipe.recipes, recipe.group_sizes, static_scales, strict=True
        ):
            _check_scale(name, array_recipe, scale)
            group = jnp.zeros((heads, size, head_dim), dtype)
            stored = TokenGroups.empty(tuple(batch), capacity // size, group, array_recipe, scale)
            window = max(recipe.residual_length + size - 1, 1)
            arrays.append((stored, jnp.zeros((*batch, window, heads, head_dim), dtype)))
        (keys, recent_keys), (values, recent_values) = arrays
        length = jnp.zeros(tuple(batch), jnp.int32)
        return KVCache(keys, values, recent_keys, recent_values, length, recipe, capacity)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays: codes, scales, unquantized tokens and lengths."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def append(
        self,
        keys: jax.Array,
        values: jax.Array,
        *,
        count: jax.typing.ArrayLike | None = None,
    ) -> "KVCache":
        """Returns the cache with tokens appended. Several calls and one call give the same bits.

        Args:
          keys: the keys of new tokens, `[*batch, tokens, heads, head_dim]`; usually after rotary
            position embedding.
          values: the values, of the same shape.
          count: int32 numbers of tokens to append, one per sequence, `[*batch]`: the first `count`
            tokens of a padded sequence. None (the default) appends all.

        Raises:
          ValueError: if the shapes do not fit the cache, or there are more tokens than its
            capacity.
        """
        expected = self.recent_keys.shape
        fits = (
            keys.shape == values.shape
            and keys.ndim == len(expected)
            and (*keys.shape[:-3], *keys.shape[-2:]) == (*expected[:-3], *expected[-2:])
            and keys.shape[-3] <= self.capacity
        )
        if not fits:
            required = (*expected[:-3], "tokens", *expected[-2:])
            raise ValueError(
                f"KVCache.append: `keys` and `values` must have the shape {required} with at most "
                f"{self.capacity} tokens, got {keys.shape} and {values.shape}. Append longer "
                "sequences in several calls."
            )
        if self.recipe.rotate:
            keys, values = _rotated(keys), _rotated(values)
        tokens = keys.shape[-3]
        added = jnp.asarray(tokens if count is None else count, jnp.int32)
        added = jnp.broadcast_to(lax.clamp(0, added, tokens), self.length.shape)
        return self._batched(_append)(self, keys, values, added)

    def attend(
        self,
        query: jax.Array,
        *,
        scale: float | None = None,
        chunk: int | None = None,
    ) -> jax.Array:
        """Returns the attention of the newest tokens over the cache.

        Query i of T belongs to token `length - T + i` and sees all stored tokens up to its own:
        append the keys and values of a token before its query attends. Logits, softmax and sums
        are float32.

        Args:
          query: the queries, `[*batch, T, query_heads, head_dim]`. The number of query heads must
            be a multiple of the heads of the cache; consecutive query heads share a head.
          scale: the factor of the logits; None (the default) means `1 / sqrt(head_dim)`.
          chunk: the number of tokens that are dequantized at a time, in a loop with a running
            softmax; a divisor of the capacity and a whole number of groups. None (the default)
            dequantizes all tokens at once.

        Returns:
          An array of the query's shape and dtype; 0 for a query that sees no tokens.

        Raises:
          ValueError: if the shape does not fit the cache, or `chunk` does not divide the capacity.
        """
        expected = self.recent_keys.shape
        heads = expected[-2]
        fits = (
            query.ndim == len(expected)
            and (*query.shape[:-3], query.shape[-1]) == (*expected[:-3], expected[-1])
            and query.shape[-2] % heads == 0
        )
        if not fits:
            raise ValueError(
                "KVCache.attend: `query` must have the shape "
                f"{(*expected[:-3], 'tokens', 'query_heads', expected[-1])} with a multiple of "
                f"{heads} query heads, got {query.shape}. Reshape the queries."
            )
        remedy = "Use None for all tokens at once."
        chunk = (
            self.capacity if chunk is None else integer("KVCache.attend", "chunk", chunk, remedy)
        )
        if chunk < 1 or self.capacity % chunk or chunk % self.recipe.step:
            raise ValueError(
                f"KVCache.attend: `chunk` must divide the capacity {self.capacity} and be a "
                f"multiple of {self.recipe.step}, got {chunk}. {remedy}"
            )
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

        def attended(cache: "KVCache", query: jax.Array) -> jax.Array:
            return _attend(cache, query, factor, chunk)

        result = self._batched(attended)(self, query)
        return (_rotated(result) if self.recipe.rotate else result).astype(query.dtype)

    def dequantize(self) -> CachedTokens:
        """Returns all stored tokens as attention sees them, by the slots of the ring buffer.

        Keys and values of a recipe that rotates are rotated back.
        """

        def tokens(cache: "KVCache") -> CachedTokens:
            return tokens_of(cache, 0, cache.capacity)

        stored = self._batched(tokens)(self)
        if not self.recipe.rotate:
            return stored
        return CachedTokens(_rotated(stored.keys), _rotated(stored.values), stored.positions)

    def _batched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of one sequence over the batch axes."""
        for _ in range(self.length.ndim):
            function = jax.vmap(function)
        return function


def _check_scale(name: str, recipe: Recipe, scale: jax.typing.ArrayLike | None) -> None:
    """Raises a ValueError if static scales are missing or not needed."""
    if needs_scale(recipe) and scale is None:
        raise ValueError(
            f"KVCache.empty: `scales` must have scales for the {name}, because their recipe has "
            "one scale for all tokens, got none. For FP8, pass CacheScales(amax / 448, amax / 448)."
        )
    if not needs_scale(recipe) and scale is not None:
        raise ValueError(
            f"KVCache.empty: `scales` must have None for the {name}, because their recipe computes "
            "scales from each group of tokens. Omit them, or use PerTensor()."
        )


def _rotated(x: jax.Array) -> jax.Array:
    """Multiplies the last axis by the normalized Hadamard matrix, which is its own inverse."""
    n = x.shape[-1]
    if n == 1:
        return x
    signs = jnp.ones(n, jnp.float32)
    return Hadamard(n).apply(x.astype(jnp.float32), {x.ndim - 1: n}, signs).astype(x.dtype)


def _stores(cache: KVCache) -> tuple[TokenStore, TokenStore]:
    """Returns the keys and the values, each with the number of tokens in a group."""
    first, second = cache.recipe.group_sizes
    return (
        TokenStore(cache.keys, cache.recent_keys, first),
        TokenStore(cache.values, cache.recent_values, second),
    )


def _append(cache: KVCache, keys: jax.Array, values: jax.Array, count: jax.Array) -> KVCache:
    """Appends tokens to the cache of one sequence."""
    before = cache.length
    parts = []
    for store, new in zip(_stores(cache), (keys, values), strict=True):
        new = new.astype(store.recent.dtype)
        stored = with_groups(store, new, before, count, cache.recipe.residual_length)
        parts.append((stored, with_recent(store.recent, new, before, count)))
    (keys_, recent_keys), (values_, recent_values) = parts
    return dataclasses.replace(
        cache,
        keys=keys_,
        values=values_,
        recent_keys=recent_keys,
        recent_values=recent_values,
        length=before + count,
    )


def tokens_of(cache: KVCache, start: Any, chunk: int) -> CachedTokens:
    """Returns `chunk` slots of one sequence from slot `start` on, the first slot of a group."""
    slots = start + jnp.arange(chunk, dtype=jnp.int32)
    last = cache.length - 1
    positions = last - (last - slots) % cache.capacity
    positions = jnp.where(positions < 0, -1, positions)
    tokens = []
    for stored, recent, size in _stores(cache):
        values = stored.dequantize(start // size, chunk // size)
        end = lax.max(cache.length - cache.recipe.residual_length, 0) // size * size
        recent_tokens = recent[positions % recent.shape[0]]
        is_stored = (positions < end)[:, None, None]
        tokens.append(jnp.where(is_stored, values.astype(recent.dtype), recent_tokens))
    return CachedTokens(tokens[0], tokens[1], positions)


def _attend(cache: KVCache, query: jax.Array, factor: float, chunk: int) -> jax.Array:
    """Returns the attention of one sequence, before the rotation is undone."""
    query = query.astype(jnp.float32) * jnp.float32(factor)
    if cache.recipe.rotate:
        query = _rotated(query)
    positions = cache.length - query.shape[0] + jnp.arange(query.shape[0], dtype=jnp.int32)

    def read(start: jax.Array) -> CachedTokens:
        return tokens_of(cache, start, chunk)

    return attention(query, positions, read, range(0, cache.capacity, chunk))
