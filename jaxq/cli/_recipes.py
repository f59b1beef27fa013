"""The command `jaxq recipes`: the named recipes and the block types of GGUF."""

import argparse
from typing import Any

from jaxq._base.registry import Registry
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES
from jaxq.cli._output import bad_input, print_json, print_table
from jaxq.formats import FORMATS
from jaxq.interop import gguf
from jaxq.recipes import RECIPES, get_recipe

__all__ = ["BLOCK_TYPES", "NAMES", "OTHER_TYPES", "run"]

# Recipes and block types of GGUF, for look-ups.
NAMES: Registry[Any] = Registry(
    "recipe", {**RECIPES, **gguf.TYPES}, {**gguf.TYPES.suggestions, **RECIPES.suggestions}
)

# Types that the commands quantize piece by piece instead of as recipes, with an importance matrix.
BLOCK_TYPES = tuple(name for name in gguf.TYPES if name not in RECIPES or name in SUPER_BLOCK_RULES)

# The block types of recipes that do not have the name of their type.
OTHER_TYPES = {
    name: type
    for type in gguf.TYPES
    for name, recipe in RECIPES.items()
    if recipe == gguf.recipe_of(type) and name not in gguf.TYPES
}

_SHAPE = (4096, 4096)


def run(args: argparse.Namespace) -> None:
    """Prints one line per recipe."""
    rows = []
    with bad_input():
        for name in args.names or [*RECIPES, *(n for n in gguf.TYPES if n not in RECIPES)]:
            if name not in NAMES and name not in FORMATS:
                raise NAMES.unknown(name)
            if name in gguf.TYPES and name not in RECIPES:
                layout = gguf.TYPES[name]
                bits, block = 8 * layout.size / layout.block, layout.block
                row = {"elements": "GGUF", "granularity": f"PerBlock({block})", "scales": "GGUF"}
            else:
                recipe = get_recipe(name)
                bits = recipe.bits_per_weight(_SHAPE)
                row = {
                    "elements": recipe.element.name,
                    "granularity": str(recipe.granularity),
                    "scales": recipe.scale_format.name,
                }
            rows.append({"name": name, "bits": bits, **row})
    if args.json:
        return print_json(rows)
    print_table(rows, "Bits per element of a 4096 x 4096 weight, scales included", [*rows[0]][2:])
    return None
