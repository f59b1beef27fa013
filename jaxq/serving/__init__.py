"""Serving: a quantized cache of keys and values for attention.

To add a named cache recipe, add a line to `CACHE_RECIPES` (`_cache_recipe.py`).
"""

from jaxq.serving._attention import CachedTokens
from jaxq.serving._cache import CacheScales, KVCache
from jaxq.serving._cache_recipe import CACHE_RECIPES, CacheRecipe, get_cache_recipe
from jaxq.serving._groups import TokenGroups

__all__ = [
    "CACHE_RECIPES",
    "CacheRecipe",
    "CacheScales",
    "CachedTokens",
    "KVCache",
    "TokenGroups",
    "get_cache_recipe",
]
