"""Named recipes, and the look-up that every function with a recipe argument uses.

To add one: a line in `ALL`. The contract tests then include it.
"""

import dataclasses
import difflib
from types import MappingProxyType
from typing import Any

from jaxq import catalog
from jaxq.blocks import PerBlock, PerChannel, PerToken
from jaxq.formats import Format
from jaxq.recipes import Quantizer
from jaxq.rounding import HalfUp
from jaxq.second_level import DoubleScale, TensorScale

__all__ = ["ALL", "get_quantizer"]

_CHANNEL = PerChannel((-1,))


def _mx(element: str | Format) -> Quantizer:
    """OCP Microscaling Formats (MX) 1.0: blocks of 32 along the last axis, power-of-two scales."""
    return Quantizer(element, PerBlock(32), scale="floor", scale_format="float8_e8m0fnu")


def _gguf(element: str, **fields: Any) -> Quantizer:
    """GGUF's blocks: 32 along the last axis, codes from a float32 scale of which a copy is kept."""
    return Quantizer(
        element,
        PerBlock(32),
        scale_format="float16",
        stored_scale=False,
        reciprocal=True,
        **fields,
    )


ALL = MappingProxyType(
    {
        "int8_tensor": Quantizer("int8"),
        "int8_channel": Quantizer("int8", _CHANNEL),
        "int8_token": Quantizer("int8", PerToken()),
        "uint8_tensor": Quantizer("uint8", zero_point="integer"),
        "uint8_channel": Quantizer("uint8", _CHANNEL, zero_point="integer"),
        "int4_tensor": Quantizer("int4"),
        "int4_channel": Quantizer("int4", _CHANNEL),
        "int4_g32": Quantizer("int4", PerBlock(32)),
        "int4_g64": Quantizer("int4", PerBlock(64)),
        "int4_g128": Quantizer("int4", PerBlock(128)),
        "uint4_channel": Quantizer("uint4", _CHANNEL, zero_point="integer"),
        "uint4_g128": Quantizer("uint4", PerBlock(128), zero_point="integer"),
        "int3_g128": Quantizer("int3", PerBlock(128)),
        "int2_g64": Quantizer("int2", PerBlock(64)),
        "fp8_e4m3_tensor": Quantizer("float8_e4m3fn"),
        "fp8_e4m3_channel": Quantizer("float8_e4m3fn", _CHANNEL),
        "fp8_e4m3_tile128": Quantizer("float8_e4m3fn", PerBlock((128, 128))),
        "fp8_e5m2_tensor": Quantizer("float8_e5m2"),
        # bitsandbytes' blocks run over the flattened tensor: the same where 64 divides a row.
        "nf4": Quantizer("nf4", PerBlock(64)),
        "nf4_dq": Quantizer(
            "nf4",
            PerBlock(64),
            scale_format="dynamic8",
            second_level=DoubleScale(256),
            stored_scale=False,
        ),
        "fp4_bnb": Quantizer("fp4_bnb", PerBlock(64)),
        "mxfp8_e4m3": _mx("float8_e4m3fn"),
        "mxfp8_e5m2": _mx("float8_e5m2"),
        "mxfp6_e2m3": _mx("float6_e2m3fn"),
        "mxfp6_e3m2": _mx("float6_e3m2fn"),
        "mxfp4": _mx("float4_e2m1fn"),
        "mxint8": _mx(dataclasses.replace(catalog.ALL["mxint8"], narrow=True)),
        # TransformerEngine's: blocks of 16, whose scales are relative to one for the tensor.
        "nvfp4": Quantizer(
            "float4_e2m1fn",
            PerBlock(16),
            scale_format="float8_e4m3fn",
            second_level=TensorScale(),
            reciprocal=True,
        ),
        "nvfp4_tile16": Quantizer(  # As its recipe for training has weights.
            "float4_e2m1fn",
            PerBlock((16, 16)),
            scale_format="float8_e4m3fn",
            second_level=TensorScale(),
            reciprocal=True,
        ),
        # Four over six: a block may fill the grid up to 4 only. 256 leaves its scale the room.
        "nvfp4_4over6": Quantizer(
            "float4_e2m1fn",
            PerBlock(16),
            scale_format="float8_e4m3fn",
            second_level=TensorScale(256.0),
            reciprocal=True,
            search=(1.0, 1.5),
        ),
        "q8_0": _gguf("int8", rounding="nearest_away"),
        "q4_0": _gguf("int4", range="extremum", scale="min", rounding=HalfUp(8)),
        "q5_0": _gguf("int5", range="extremum", scale="min", rounding=HalfUp(16)),
        "q4_1": _gguf("uint4", zero_point="minimum", rounding=HalfUp()),
        "q5_1": _gguf("uint5", zero_point="minimum", rounding=HalfUp()),
        # BitNet b1.58 (2024), XNOR-Net (2016).
        "ternary": Quantizer("ternary", range="absmean"),
        "binary": Quantizer("binary", range="absmean"),
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
