"""Named recipes, and the look-up that every function with a recipe argument uses.

To add one: a line in `ALL`. The contract tests then include it.
"""

import difflib
from types import MappingProxyType

from jaxq import catalog
from jaxq.formats import Format
from jaxq.recipes import Quantizer
from jaxq.scaling import PerChannel

__all__ = ["ALL", "get_quantizer"]

_CHANNEL = PerChannel((-1,))

ALL = MappingProxyType(
    {
        "int8_tensor": Quantizer("int8"),
        "int8_channel": Quantizer("int8", _CHANNEL),
        "uint8_tensor": Quantizer("uint8", symmetric=False),
        "uint8_channel": Quantizer("uint8", _CHANNEL, symmetric=False),
        "int4_tensor": Quantizer("int4"),
        "int4_channel": Quantizer("int4", _CHANNEL),
        "uint4_channel": Quantizer("uint4", _CHANNEL, symmetric=False),
        "fp8_e4m3_tensor": Quantizer("float8_e4m3fn"),
        "fp8_e4m3_channel": Quantizer("float8_e4m3fn", _CHANNEL),
        "fp8_e5m2_tensor": Quantizer("float8_e5m2"),
    }
)


def get_quantizer(spec: str | Format | Quantizer) -> Quantizer:
    """The recipe that a preset's name, a format or its name, or a recipe stands for.

    Args:
      spec: a name in `jaxq.presets.ALL`; a format or a name in `jaxq.catalog.ALL`, which means
        absmax scaling per tensor; or a `Quantizer`, which is returned as it is.

    Returns:
      The recipe.

    Raises:
      ValueError: nothing has that name; the text gives the nearest names.
      TypeError: the argument is none of these.

    Example:
      >>> get_quantizer("int8_channel").granularity
      PerChannel(axes=(-1,))
    """
    if isinstance(spec, Quantizer):
        return spec
    if isinstance(spec, Format):
        return Quantizer(spec)
    if not isinstance(spec, str):
        raise TypeError(
            f"A recipe must be a name, a format or a jaxq.Quantizer, got {type(spec).__name__}."
        )
    if spec in ALL:
        return ALL[spec]
    if spec in catalog.ALL:
        return Quantizer(spec)
    near = difflib.get_close_matches(spec, [*ALL, *catalog.ALL], n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"Presets: {', '.join(ALL)}."
    raise ValueError(f"No recipe is named {spec!r}. {hint}")
