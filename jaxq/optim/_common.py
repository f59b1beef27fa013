"""Random keys in the state of the transformations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq._jax.draws import checked_key
from jaxq.numerics import ROUNDINGS, Rounding, Stochastic, get_rounding
from jaxq.recipes import Recipe

__all__ = ["RandomState", "may_draw", "own_key"]


class RandomState(NamedTuple):
    """The initial key of a transformation as an integer array, and the key's implementation.

    The state holds integers instead of typed keys because every checkpoint format can store them.
    """

    data: jax.Array | None
    impl: Any

    @classmethod
    def of(
        cls, owner: str, rules: Sequence[tuple[str, Recipe | None]], key: jax.Array | None
    ) -> "RandomState":
        """Wraps a key; raises ValueError if a key is missing or not needed."""
        modes = [get_rounding(recipe.rounding) for _, recipe in rules if recipe is not None]
        if key is None and any(isinstance(mode, Stochastic) for mode in modes):
            raise ValueError(
                f"{owner}: a recipe rounds stochastically and needs `key`, got None. "
                "Pass key=jax.random.key(seed)."
            )
        if key is not None and not any(map(may_draw, modes)):
            raise ValueError(
                f"{owner}: no recipe draws random bits, got a key. Omit it, or use recipes "
                "with rounding='stochastic'."
            )
        key = checked_key(owner, key)
        if key is None:
            return cls(None, None)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return cls(jax.random.key_data(key), jax.random.key_impl(key))
        return cls(jnp.asarray(key), None)

    def split(self, data: jax.Array | None) -> tuple[jax.Array | None, Any]:
        """Returns the key data for the next step and a key for the current one."""
        if data is None:
            return None, None
        now, later = jax.random.split(jax.random.wrap_key_data(data, impl=self.impl))
        return jax.random.key_data(later), now


def may_draw(rounding: str | Rounding) -> bool:
    """Returns whether a rounding mode may draw random bits; custom functions may."""
    mode = get_rounding(rounding)
    return isinstance(mode, Stochastic) or mode not in ROUNDINGS.values()


def own_key(recipe: Recipe, key: jax.Array | None, i: int) -> jax.Array | None:
    """Returns the key of leaf i, or None if its recipe draws no random bits."""
    return jax.random.fold_in(key, i) if key is not None and may_draw(recipe.rounding) else None
