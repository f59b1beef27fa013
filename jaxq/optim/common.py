"""What the transformations share: recipes as rules, and a key that the state carries."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import numpy as jnp

from jaxq.formats import Format
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer
from jaxq.rounding import ALL as ROUNDINGS
from jaxq.rounding import Rounding, Stochastic, get_rounding
from jaxq.trees import Rules

__all__ = ["RandomState", "Recipe", "as_rules", "may_draw", "own_key"]

Recipe: TypeAlias = "str | Format | Quantizer"


def as_rules(recipe: "Recipe | Rules", *, strict: bool = True) -> tuple[Rules, bool]:
    """Rules, and whether each must hold for some leaf: that of a single recipe need not."""
    if isinstance(recipe, str) or not isinstance(recipe, Sequence):
        return [("", get_quantizer(recipe))], False
    rules = [(pattern, None if r is None else get_quantizer(r)) for pattern, r in recipe]
    return rules, strict


class RandomState(NamedTuple):
    """The key that a transformation begins with, as numbers, and how to make keys of such.

    Numbers are what every checkpoint can hold.
    """

    data: jax.Array | None
    impl: Any

    @classmethod
    def of(cls, owner: str, rules: Rules, key: jax.Array | None) -> "RandomState":
        """Checks that there is a key where a recipe draws, and only there."""
        modes = [get_rounding(r.rounding) for _, r in rules if isinstance(r, Quantizer)]
        if key is None and any(isinstance(mode, Stochastic) for mode in modes):
            raise ValueError(
                f"{owner}: a recipe rounds stochastically and needs `key`, got None. "
                "Pass key=jax.random.key(seed)."
            )
        if key is not None and not any(map(may_draw, modes)):
            raise ValueError(
                f"{owner}: no recipe draws random bits, got a key. Leave it out, or use recipes "
                "with rounding='stochastic'."
            )
        if key is None:
            return cls(None, None)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return cls(jax.random.key_data(key), jax.random.key_impl(key))
        return cls(jnp.asarray(key), None)

    def split(self, data: jax.Array | None) -> tuple[jax.Array | None, Any]:
        """The numbers to go on with, and a key for now."""
        if data is None:
            return None, None
        now, later = jax.random.split(jax.random.wrap_key_data(data, impl=self.impl))
        return jax.random.key_data(later), now


def may_draw(rounding: str | Rounding) -> bool:
    """Whether a mode draws random bits from a key; a user's own function may."""
    mode = get_rounding(rounding)
    return isinstance(mode, Stochastic) or mode not in ROUNDINGS.values()


def own_key(recipe: Quantizer, key: jax.Array | None, i: int) -> jax.Array | None:
    """The key of leaf i, if its recipe draws."""
    return jax.random.fold_in(key, i) if key is not None and may_draw(recipe.rounding) else None
