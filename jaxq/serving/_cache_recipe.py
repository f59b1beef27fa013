"""The frozen record that describes how a cache of keys and values is quantized."""

import dataclasses
import math

from jaxq._base.arguments import flags, integer
from jaxq._base.registry import Registry
from jaxq.products import is_stochastic
from jaxq.recipes import Affine, PerBlock, PerToken, Recipe, ScaleAndMin, get_recipe, records

__all__ = ["CACHE_RECIPES", "CacheRecipe", "cache_records", "get_cache_recipe"]


@dataclasses.dataclass(frozen=True)
class CacheRecipe:
    """A description of how `KVCache` stores keys and values: frozen, hashable, static in jit.

    Keys and values are quantized in groups of consecutive tokens. A group is a tensor
    `[heads, tokens, head_dim]`, and a granularity refers to its axes:

    - `PerToken()`: one scale per token and head. `PerBlock(32)`: blocks along `head_dim`.
    - `PerBlock(32, axes=-2)`: one scale per head and channel for 32 tokens, as KIVI quantizes
      keys, whose outliers lie in a few channels. The size is the number of tokens in a group;
      without blocks along the tokens, a group is one token.
    - `PerTensor()`, or `PerChannel` with axes other than the tokens: the scales span all tokens, so
      they must be known in advance and are passed to `KVCache.empty`.

    Attributes:
      keys: the recipe of the keys or its name.
      values: the recipe of the values or its name.
      residual_length: the number of newest tokens that are always unquantized; 0 by default. A
        group is quantized as soon as all of its tokens are older, so up to `group size - 1`
        further tokens may be unquantized.
      rotate: True multiplies keys, values and queries by the Hadamard matrix of `head_dim`, divided
        by its square root, and the result by its inverse. This spreads the outliers of a few
        channels over all channels, and leaves attention unchanged except for rounding. `head_dim`
        must be a power of two.

    Raises:
      TypeError: if a recipe is neither a name nor a `Recipe`.
      ValueError: if a name is unknown, a recipe rounds stochastically, or `residual_length` is
        negative.

    References:
      Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024), which
      quantizes all keys of the window at once instead. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit
      Inference in Rotated LLMs" (2024), which folds the rotation of the values into weights.

    Example:
      >>> import jaxq
      >>> CacheRecipe(jaxq.Recipe("int4", jaxq.PerBlock(32, axes=-2)), "int4_token").group_sizes
      (32, 1)
    """

    keys: str | Recipe
    values: str | Recipe
    residual_length: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            recipe = get_recipe(getattr(self, name))
            object.__setattr__(self, name, recipe)
            if is_stochastic(recipe):
                raise ValueError(
                    f"CacheRecipe: `{name}` must round deterministically, got "
                    f"{recipe.rounding!r:.60}. Use rounding='nearest_even'."
                )
        flags("CacheRecipe", "Omit it for the default.", rotate=self.rotate)
        remedy = "Use 0 to quantize every complete group."
        integer("CacheRecipe", "residual_length", self.residual_length, remedy, least=0)

    @property
    def recipes(self) -> tuple[Recipe, Recipe]:
        """The recipes of keys and values."""
        return get_recipe(self.keys), get_recipe(self.values)

    @property
    def group_sizes(self) -> tuple[int, int]:
        """The numbers of tokens in a group of keys and in a group of values."""
        first, second = (_tokens(recipe) or 1 for recipe in self.recipes)
        return first, second

    @property
    def step(self) -> int:
        """The smallest number of tokens that is a multiple of both group sizes."""
        return math.lcm(*self.group_sizes)


def needs_scale(recipe: Recipe) -> bool:
    """Returns whether scales are shared by all tokens, so that they must be known in advance."""
    return _tokens(recipe) is None


def _tokens(recipe: Recipe) -> int | None:
    """Returns the number of tokens that share scales, or None if all do."""
    granularity = recipe.granularity
    if isinstance(granularity, PerBlock):
        sizes, axes = granularity.sizes, granularity.axes
        assert isinstance(sizes, tuple)
        assert isinstance(axes, tuple)
        by_axis = {axis % 3: size for axis, size in zip(axes, sizes, strict=True)}
        return by_axis.get(1, 1)
    return 1 if granularity.block((2, 3, 5))[1] == 1 else None


def cache_records() -> dict[str, type]:
    """Returns the frozen records that a cache recipe may hold, by name."""
    return {**records(), "CacheRecipe": CacheRecipe}


# KIVI computes codes from scales and minima in the model's 16-bit dtype.
_KIVI = ScaleAndMin(stored=True, reciprocal=False)
_QUAROT = Recipe("uint4", PerToken(), Affine(scale_format="float16", search=(0.95,)))


def _kivi(fmt: str) -> CacheRecipe:
    keys, values = (Recipe(fmt, PerBlock(32, axes=axis), _KIVI) for axis in (-2, -1))
    return CacheRecipe(keys, values, residual_length=128)


CACHE_RECIPES: Registry[CacheRecipe] = Registry(
    "cache recipe",
    {
        "kv_fp8": CacheRecipe("fp8_e4m3_tensor", "fp8_e4m3_tensor"),
        "kv_int8": CacheRecipe("int8_token", "int8_token"),
        "kivi4": _kivi("uint4"),
        "kivi2": _kivi("uint2"),
        "quarot4": CacheRecipe(_QUAROT, _QUAROT, rotate=True),
    },
    {"fp8": "kv_fp8", "fp8_e4m3": "kv_fp8", "int8": "kv_int8", "int4": "kivi4", "int2": "kivi2"},
)


def get_cache_recipe(recipe: str | CacheRecipe) -> CacheRecipe:
    """Returns the cache recipe with a name.

    Args:
      recipe: a name in `jaxq.serving.CACHE_RECIPES`; a `CacheRecipe` is returned unchanged.

    Returns:
      The cache recipe.

    Raises:
      ValueError: if no cache recipe has that name; the message suggests the nearest names.
      TypeError: if the argument is neither a name nor a `CacheRecipe`.

    Example:
      >>> get_cache_recipe("kivi2").residual_length
      128
    """
    if isinstance(recipe, CacheRecipe):
        return recipe
    if isinstance(recipe, str):
        return CACHE_RECIPES.find(recipe)
    raise TypeError(
        "A cache recipe must be a name or a jaxq.serving.CacheRecipe, got "
        f"{type(recipe).__name__}. Write CacheRecipe(keys, values)."
    )
