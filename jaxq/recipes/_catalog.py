"""Named recipes, and the lookup that every function with a recipe argument uses.

To add a recipe, add a line to `RECIPES`. The contract tests then include it.
"""

import dataclasses

from jaxq._base.registry import Registry
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.formats import FORMATS, Format
from jaxq.numerics import BinaryGrid, HalfUp
from jaxq.recipes._affine import Affine, ScaleAndMin
from jaxq.recipes._granularity import PerBlock, PerChannel, PerToken
from jaxq.recipes._recipe import Recipe
from jaxq.recipes._super_block_scaling import SuperBlocks
from jaxq.recipes._symmetric import MX, SignedScale, Symmetric
from jaxq.recipes._texts import field_text
from jaxq.recipes._two_level import DoubleQuant, TwoLevel

__all__ = ["RECIPES", "get_recipe", "title_of"]

_CHANNEL = PerChannel((-1,))


RECIPES: Registry[Recipe] = Registry(
    "recipe",
    {
        "int8_tensor": Recipe("int8"),
        "int8_channel": Recipe("int8", _CHANNEL),
        "int8_token": Recipe("int8", PerToken()),
        "uint8_tensor": Recipe("uint8", scaling=Affine()),
        "uint8_channel": Recipe("uint8", _CHANNEL, Affine()),
        "uint8_token": Recipe("uint8", PerToken(), Affine()),
        "int4_tensor": Recipe("int4"),
        "int4_channel": Recipe("int4", _CHANNEL),
        "int4_token": Recipe("int4", PerToken()),
        "int4_g32": Recipe("int4", PerBlock(32)),
        "int4_g64": Recipe("int4", PerBlock(64)),
        "int4_g128": Recipe("int4", PerBlock(128)),
        "uint4_tensor": Recipe("uint4", scaling=Affine()),
        "uint4_channel": Recipe("uint4", _CHANNEL, Affine()),
        "uint4_g128": Recipe("uint4", PerBlock(128), Affine()),
        "int3_g128": Recipe("int3", PerBlock(128)),
        "int2_g64": Recipe("int2", PerBlock(64)),
        "fp8_e4m3_tensor": Recipe("float8_e4m3fn"),
        "fp8_e4m3_channel": Recipe("float8_e4m3fn", _CHANNEL),
        "fp8_e4m3_token": Recipe("float8_e4m3fn", PerToken()),
        "fp8_e4m3_g128": Recipe("float8_e4m3fn", PerBlock(128)),
        "fp8_e4m3_tile128": Recipe("float8_e4m3fn", PerBlock((128, 128))),
        "fp8_e5m2_tensor": Recipe("float8_e5m2"),
        # bitsandbytes forms blocks of the flattened tensor: the same blocks if 64 divides a row.
        "nf4_g64": Recipe("nf4", PerBlock(64)),
        "nf4_dq": Recipe("nf4", PerBlock(64), DoubleQuant()),
        "fp4_bnb_g64": Recipe("fp4_bnb", PerBlock(64)),
        # OCP's Microscaling Formats (MX) 1.0.
        "mxfp8_e4m3": Recipe("float8_e4m3fn", PerBlock(32), MX()),
        "mxfp8_e5m2": Recipe("float8_e5m2", PerBlock(32), MX()),
        "mxfp6_e2m3": Recipe("float6_e2m3fn", PerBlock(32), MX()),
        "mxfp6_e3m2": Recipe("float6_e3m2fn", PerBlock(32), MX()),
        "mxfp4": Recipe("float4_e2m1fn", PerBlock(32), MX()),
        "mxint8": Recipe("ocp_int8", PerBlock(32), MX()),
        # As in TransformerEngine, which uses tiles for the weights in training.
        "nvfp4": Recipe("float4_e2m1fn", PerBlock(16), TwoLevel()),
        "nvfp4_tile16": Recipe("float4_e2m1fn", PerBlock((16, 16)), TwoLevel()),
        # Four over six: the amax of a block becomes 6 or 4. For 4 its scale is 1.5 times as large,
        # so `largest` is below 448 / 1.5.
        "nvfp4_4over6": Recipe(
            "float4_e2m1fn", PerBlock(16), TwoLevel(largest=256.0, search=(1.0, 1.5))
        ),
        # GGUF.
        "q8_0": Recipe(
            "int8",
            PerBlock(32),
            Symmetric(scale_format="float16", stored=False, reciprocal=True),
            rounding="nearest_away",
        ),
        # GGUF's TQ1_0 stores the same numbers.
        "tq2_0": Recipe(
            "ternary",
            PerBlock(256),
            Symmetric(scale_format="float16", stored=False, reciprocal=True),
            rounding="nearest_away",
        ),
        "q4_0": Recipe("int4", PerBlock(32), SignedScale(), rounding=HalfUp(8)),
        "q5_0": Recipe("int5", PerBlock(32), SignedScale(), rounding=HalfUp(16)),
        "q4_1": Recipe("uint4", PerBlock(32), ScaleAndMin(), rounding=HalfUp()),
        "q5_1": Recipe("uint5", PerBlock(32), ScaleAndMin(), rounding=HalfUp()),
        **{
            name: Recipe(rule.element, PerBlock(rule.length), SuperBlocks(name))
            for name, rule in SUPER_BLOCK_RULES.items()
        },
        # BitNet b1.58 (2024), XNOR-Net (2016).
        "ternary_absmean": Recipe("ternary", scaling=Symmetric(range="absmean")),
        "binary_absmean": Recipe("binary", scaling=Symmetric(range="absmean")),
    },
    {
        "fp8": "fp8_e4m3_tensor",
        "float8": "fp8_e4m3_tensor",
        "e4m3": "fp8_e4m3_tensor",
        "e4m3fn": "fp8_e4m3_tensor",
        "fp8_e4m3": "fp8_e4m3_tensor",
        "e5m2": "fp8_e5m2_tensor",
        "fp8_e5m2": "fp8_e5m2_tensor",
        "fp4": "nvfp4",
    },
)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Returns the recipe with a name.

    Args:
      recipe: a name in `jaxq.recipes.RECIPES`; a `Recipe` is returned unchanged.

    Returns:
      The recipe.

    Raises:
      ValueError: if no recipe has that name; the message suggests the nearest names. The name of a
        format is not the name of a recipe, because a format does not say how to scale.
      TypeError: if the argument is neither a name nor a `Recipe`, or it has a `BinaryGrid`.

    Example:
      >>> get_recipe("int8_channel").granularity
      PerChannel()
    """
    if isinstance(recipe, Recipe):
        if isinstance(recipe.format, BinaryGrid):
            raise TypeError(
                "The recipe must have a format with fixed widths, got a BinaryGrid, "
                "which only fake_quant and neighbors take. Use a FloatFormat or an IntFormat."
            )
        return recipe
    if isinstance(recipe, BinaryGrid):
        raise TypeError(
            "A recipe must be a name or a jaxq.Recipe, got a BinaryGrid. Write "
            "jaxq.Recipe(grid) for one scale per tensor, and use it with fake_quant."
        )
    name = recipe.name if isinstance(recipe, Format) else recipe
    if not isinstance(name, str):
        raise TypeError(
            f"A recipe must be a name or a jaxq.Recipe, got {type(recipe).__name__}. "
            "Use a name in jaxq.recipes.RECIPES."
        )
    usual = name  # The catalog's name of a format that is spelled differently, such as "bf16".
    if isinstance(recipe, str) and name.lower() not in {*RECIPES, *RECIPES.suggestions}:
        usual = FORMATS.suggestions.get(name.lower(), name)
    if isinstance(recipe, Format) or usual in FORMATS:
        error_type = TypeError if isinstance(recipe, Format) else ValueError
        raise error_type(
            f"{name!r} is a number format, and a recipe also needs a scaling. {_remedy(usual)}"
        )
    if name not in RECIPES:
        raise RECIPES.unknown(name)
    return RECIPES[name]


def _remedy(name: str) -> str:
    """Returns the advice for a format's name in place of a recipe's."""
    expression = f"jaxq.Recipe({name!r})" if name in FORMATS else "jaxq.Recipe(format)"
    names = [n for n, r in RECIPES.items() if r.element.name == name]
    if not names:
        return f"Write {expression} for one scale per tensor."
    return f"Use a recipe such as {names[0]!r}, or {expression} for one scale per tensor."


def title_of(recipe: Recipe, *, fields: bool = True) -> str:
    """Returns a short text for tables: a name, or the format, the granularity and other fields.

    The axes of the granularity are left out, because a recipe keeps its name when it is placed on
    another axis.

    Args:
      recipe: the recipe.
      fields: True to name the other fields that differ from their defaults.

    Example:
      >>> title_of(Recipe("int4", PerBlock(128, axes=(0,))))
      'int4_g128'
      >>> title_of(Recipe("int5", PerChannel((0,)), gradient="lsq"))
      "int5_channel(gradient='lsq')"
    """
    granularity = recipe.granularity
    standard = dataclasses.replace(recipe, granularity=granularity.on_last_axes)
    name = RECIPES.name_of(standard)
    if name is not None:
        return name
    title = f"{recipe.element.name}_{granularity.label}"
    others = [
        f"{field.name}={field_text(getattr(recipe, field.name))}"
        for field in dataclasses.fields(recipe)
        if field.name not in ("format", "granularity")
        and field_text(getattr(recipe, field.name)) != field_text(field.default)
    ]
    return f"{title}({', '.join(others)})" if others and fields else title
