"""Named product recipes, and the lookup by name.

To add a named product recipe, add a line to `PRODUCT_RECIPES`. The contract tests then include it.
"""

import dataclasses

from jaxq._base.registry import Registry
from jaxq.formats import FORMATS
from jaxq.products._hadamard import Hadamard
from jaxq.products._recipe import ProductRecipe, SingleProduct
from jaxq.recipes import MX, RECIPES, Recipe, get_recipe

__all__ = ["PRODUCT_RECIPES", "get_product_recipe"]


def _stochastic(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, rounding="stochastic")


def _everywhere(recipe: Recipe) -> ProductRecipe:
    """Returns a product recipe with one recipe for all operands of the three products."""
    both = SingleProduct(recipe, recipe)
    return ProductRecipe(recipe, recipe, dlhs=both, drhs=both, residuals="original")


_INT8 = get_recipe("int8_token")
_E4M3_BLOCK = get_recipe("fp8_e4m3_g128")
_E5M2 = get_recipe("fp8_e5m2_tensor")
# TransformerEngine rounds the scales of MXFP8 up, so that nothing is clipped.
_MXFP8 = dataclasses.replace(get_recipe("mxfp8_e4m3"), scaling=MX("rceil"))
_NVFP4 = get_recipe("nvfp4")
_NVFP4_TILE = get_recipe("nvfp4_tile16")
_NVFP4_GRADIENT = _stochastic(_NVFP4)
# The sign vector of TransformerEngine, which is fixed throughout training.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)

PRODUCT_RECIPES: Registry[ProductRecipe] = Registry(
    "product recipe",
    {
        # Quantization-aware training with straight-through gradients.
        "w8a8": ProductRecipe(_INT8, "int8_channel"),
        "w8a16": ProductRecipe(None, "int8_channel"),
        "w4a16": ProductRecipe(None, "int4_channel"),
        "w4a16_g128": ProductRecipe(None, "int4_g128"),
        # AQT's int8 training: the input's gradient is quantized too, with its cotangent rounded
        # stochastically; the weight's gradient stays in float.
        "int8_training": ProductRecipe(
            _INT8, _INT8, dlhs=SingleProduct(_stochastic(_INT8), _INT8), residuals="original"
        ),
        # Micikevicius et al. (2022); TransformerEngine's Float8CurrentScaling, hybrid.
        "fp8_training": ProductRecipe(
            "fp8_e4m3_tensor",
            "fp8_e4m3_tensor",
            dlhs=SingleProduct(_E5M2),
            drhs=SingleProduct(_E5M2),
        ),
        # DeepSeek-AI (2024), "DeepSeek-V3 Technical Report", section 3.3.1: E4M3 in all products,
        # in blocks of 128 and, for weights, tiles of 128 by 128.
        "fp8_block128_training": ProductRecipe(
            _E4M3_BLOCK,
            "fp8_e4m3_tile128",
            dlhs=SingleProduct(_E4M3_BLOCK, "fp8_e4m3_tile128"),
            drhs=SingleProduct(_E4M3_BLOCK, _E4M3_BLOCK),
            residuals="original",
        ),
        # TransformerEngine's MXFP8BlockScaling: E4M3 in all products.
        "mxfp8_training": _everywhere(_MXFP8),
        # Rouhani et al. (2023), "Microscaling Data Formats for Deep Learning": all operands in
        # MXFP6 or, with `mxfp4_mxfp6_training`, weights in MXFP4.
        "mxfp6_training": _everywhere(get_recipe("mxfp6_e3m2")),
        "mxfp4_mxfp6_training": ProductRecipe(
            "mxfp6_e3m2",
            "mxfp4",
            dlhs=SingleProduct("mxfp6_e3m2", "mxfp4"),
            drhs=SingleProduct("mxfp6_e3m2", "mxfp6_e3m2"),
            residuals="original",
        ),
        "mxfp4_training": _everywhere(get_recipe("mxfp4")),
        # NVIDIA (2025), "Pretraining Large Language Models with NVFP4",
        # https://arxiv.org/abs/2509.25149; TransformerEngine's NVFP4BlockScaling: tiles for
        # weights, cotangents rounded stochastically, and a Hadamard transform on the inputs of the
        # weight's gradient.
        "nvfp4_training": ProductRecipe(
            _NVFP4,
            _NVFP4_TILE,
            dlhs=SingleProduct(_NVFP4_GRADIENT, _NVFP4_TILE),
            drhs=SingleProduct(_NVFP4_GRADIENT, _NVFP4, hadamard=Hadamard(16, _SIGNS)),
            residuals="original",
        ),
    },
    {
        "fp8": "fp8_training",
        "float8": "fp8_training",
        "fp8_e4m3": "fp8_training",
        "e4m3": "fp8_training",
        "e5m2": "fp8_training",
        "fp6": "mxfp6_training",
        "fp4": "nvfp4_training",
        "int4": "w4a16",
    },
)


def get_product_recipe(recipe: str | ProductRecipe) -> ProductRecipe:
    """Returns the product recipe with a name.

    Args:
      recipe: a name in `jaxq.products.PRODUCT_RECIPES`; a `ProductRecipe` is returned unchanged.

    Returns:
      The product recipe.

    Raises:
      ValueError: if no product recipe has that name; the message suggests the nearest names.
      TypeError: if the argument is neither a name nor a `ProductRecipe`.

    Example:
      >>> get_product_recipe("w8a8").rhs.granularity
      PerChannel()
    """
    if isinstance(recipe, ProductRecipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            "A product recipe must be a name or a jaxq.ProductRecipe, got "
            f"{type(recipe).__name__}. Use a name in jaxq.products.PRODUCT_RECIPES."
        )
    if recipe in RECIPES or recipe in FORMATS:
        category = "recipe for one tensor" if recipe in RECIPES else "number format"
        suggestions = PRODUCT_RECIPES.near(recipe)
        advice = f"Use a product recipe such as {suggestions[0]!r}, or" if suggestions else "Write"
        raise ValueError(
            f"{recipe!r} is a {category}, not a product recipe. {advice} "
            "jaxq.ProductRecipe(lhs, rhs) with a recipe for each operand."
        )
    return PRODUCT_RECIPES.find(recipe)
