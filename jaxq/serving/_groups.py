"""Quantized groups of tokens: the arrays of stacked `Quantized`s that a cache updates."""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._jax.serialization import pytree
from jaxq.quantizers import Quantized, QuantizedArrays, dequantize, quantize
from jaxq.recipes import Recipe, records
from jaxq.serving._cache_recipe import needs_scale

__all__ = ["TokenGroups"]


@pytree(static=("recipe", "dtype", "block", "length"), kinds=records)
@dataclasses.dataclass(frozen=True, eq=False)
class TokenGroups(QuantizedArrays):
    """Quantized groups of tokens, stacked along slots: a pytree with the arrays of a `Quantized`.

    Its arrays have the axes `[*batch, slots, heads, tokens, ...]`. Scales that span all tokens are
    stored once, so `scale` then has one slot.

    Attributes:
      codes: the codes, as in `jaxq.Quantized`, like the next four.
      scale: the stored scales.
      second: the arrays of a second level of scales.
      zero_point: the zero points or minima, or None.
      outliers: the codes and positions of outliers.
      recipe: the recipe.
      dtype: the dtype of the tokens.
      block: the length of a block on each axis of a group, `[heads, tokens, head_dim]`.
      length: the length of the last axis, `head_dim`.

    Example:
      >>> from jaxq import serving
      >>> serving.KVCache.empty((64, 2, 8), "kv_int8").keys.codes.shape
      (64, 2, 1, 8)
    """

    @staticmethod
    def empty(
        batch: tuple[int, ...], slots: int, group: jax.Array, recipe: Recipe, scale: Any
    ) -> "TokenGroups":
        """Returns groups of zeros.

        Args:
          batch: the batch axes.
          slots: the number of groups.
          group: zeros in the shape and dtype of a group, `[heads, tokens, head_dim]`.
          recipe: the recipe.
          scale: the static scales, or None.
        """
        quantized = quantize(group, recipe, scale=scale)
        fields = {
            field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)
        }

        def repeated(count: int) -> "TokenGroups":
            shape = (*batch, count)
            return jax.tree.map(
                lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), TokenGroups(**fields)
            )

        stacked = repeated(slots)
        return dataclasses.replace(stacked, scale=repeated(1).scale) if stacked.static else stacked

    @property
    def static(self) -> bool:
        """True if the scales span all tokens."""
        return needs_scale(self.recipe)

    def written(self, groups: jax.Array, places: jax.Array) -> "TokenGroups":
        """Returns the groups of one sequence with some of them replaced.

        Args:
          groups: new groups, `[count, heads, tokens, head_dim]`.
          places: the slot of each group; groups with a slot out of range are dropped.
        """
        scale = self._quantized(0, 1).scales[0] if self.static else None
        new = jax.vmap(lambda x: quantize(x, self.recipe, scale=scale))(groups)

        def write(buffer: jax.Array, rows: jax.Array) -> jax.Array:
            return buffer.at[places].set(rows, mode="drop")

        new_arrays = {name: getattr(new, name) for name in _ARRAYS}
        old_arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.static:
            new_arrays["scale"], old_arrays["scale"] = None, None
        changed = jax.tree.map(write, old_arrays, new_arrays)
        if self.static:
            changed["scale"] = self.scale
        return dataclasses.replace(self, **changed)

    def dequantize(self, start: Any, count: int) -> jax.Array:
        """Returns the tokens of some groups of one sequence, `[tokens, heads, head_dim]`."""
        x = jax.vmap(dequantize)(self._quantized(start, count)).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def _quantized(self, start: Any, count: int) -> Quantized:
        """Returns some groups, each with its scales."""

        def rows(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, count)

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.static:
            scale = jnp.broadcast_to(self.scale, (count, *self.scale.shape[1:]))
        else:
            scale = rows(self.scale)
        sliced = {name: jax.tree.map(rows, fields[name]) for name in _ARRAYS if name != "scale"}
        return Quantized(**{**fields, **sliced, "scale": scale})


_ARRAYS = ("codes", "scale", "second", "zero_point", "outliers")
