"""The schemes of compressed-tensors: the format and the arguments of a recipe, and its tensors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxq.formats import Format, IntFormat, get_format
from jaxq.interop._layouts import pack_bits
from jaxq.interop._safetensors import Tensor
from jaxq.quantizers import Quantized
from jaxq.recipes import (
    MX,
    Affine,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    Recipe,
    Symmetric,
    TwoLevel,
    get_recipe,
)

__all__ = ["Scheme", "scheme_of", "weight_tensors"]

_E2M1, _E4M3 = get_format("float4_e2m1fn"), get_format("float8_e4m3fn")
_SCALES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Scheme(NamedTuple):
    """The scheme of a weight in the configuration of compressed-tensors.

    Attributes:
      format: the name of the format, such as `"pack-quantized"`.
      weights: the quantization arguments of the weights, as in `config.json`.
      activations: the quantization arguments of the inputs; None if they are not quantized.

    Example:
      >>> import jaxq
      >>> from jaxq.interop import compressed_tensors
      >>> recipe = jaxq.Recipe("float8_e4m3fn", jaxq.PerToken())
      >>> scheme = compressed_tensors.scheme_of(recipe, dynamic_activations=True)
      >>> scheme.weights["strategy"], scheme.activations["strategy"]
      ('channel', 'token')
    """

    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None


def scheme_of(recipe: Recipe, *, dynamic_activations: bool = False) -> Scheme:
    """Returns the scheme in which a recipe's weights `[outputs, inputs]` are stored.

    Args:
      recipe: the recipe: integers of 2 to 8 bits per group or per output, symmetric or with a zero
        point; float8_e4m3fn per tensor, output or tile; `"nvfp4"`, `"mxfp4"` or `"mxfp8_e4m3"`.
      dynamic_activations: True if the program that runs the model should quantize the inputs to
        the same 8-bit format, with one scale per token. Default: False.

    Returns:
      The scheme, whose fields `write` stores in `config.json`.

    Raises:
      ValueError: if no scheme can represent the recipe, or `dynamic_activations` is True and the
        weights are neither int8 nor float8_e4m3fn.

    Example:
      >>> import jaxq
      >>> scheme_of(jaxq.get_recipe("mxfp4")).format
      'mxfp4-pack-quantized'
    """
    recipe = get_recipe(recipe)
    element, scaling = recipe.element, recipe.scaling
    strategy, group, block = _strategy(recipe)
    plain = recipe.outliers is None and not isinstance(scaling, TwoLevel | MX)
    is_int = isinstance(element, IntFormat) and element.fraction_bits == 0 and element.bits >= 2
    scales = recipe.scale_format.name in _SCALES
    args: dict[str, Any] = {"num_bits": element.bits, "type": "float", "symmetric": True}
    args |= {"strategy": strategy, "group_size": group, "block_structure": block}
    args |= {"dynamic": False, "actorder": None}
    fmt = None
    if is_int and plain and scales and element.bits <= 8 and strategy in ("group", "channel"):
        signed = isinstance(scaling, Symmetric) and element.min < 0
        if signed or isinstance(scaling, Affine):
            fmt = "int-quantized" if dynamic_activations and signed else "pack-quantized"
            args |= {"type": "int", "symmetric": signed}
    elif element == _E4M3 and plain and scales and strategy in ("tensor", "channel", "block"):
        fmt = "float-quantized" if isinstance(scaling, Symmetric) else None
    elif isinstance(scaling, MX) and group == 32 and element in (_E2M1, _E4M3):
        fmt = "mxfp4-pack-quantized" if element == _E2M1 else "mxfp8-quantized"
        args["scale_dtype"] = "torch.uint8"
    elif isinstance(scaling, TwoLevel) and group == 16 and element == _E2M1:
        fmt = "nvfp4-pack-quantized" if recipe.scale_format == _E4M3 else None
        args |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if fmt is None or recipe.outliers is not None:
        raise ValueError(
            f"compressed_tensors: no scheme stores {element.name} with {type(scaling).__name__} "
            f"scaling, {recipe.scale_format.name} scales and {recipe.granularity}. Use integers "
            "per group or PerToken(), float8_e4m3fn, nvfp4, mxfp4 or mxfp8_e4m3."
        )
    return Scheme(fmt, args, _activations(fmt, element, dynamic_activations))


def _strategy(recipe: Recipe) -> tuple[str | None, int | None, list[int] | None]:
    """Returns the strategy, the length of a group and the shape of a tile."""
    granularity = recipe.granularity
    if isinstance(granularity, PerTensor):
        return "tensor", None, None
    if isinstance(granularity, PerToken) or granularity in (PerChannel(-2), PerChannel(0)):
        return "channel", None, None
    if isinstance(granularity, PerBlock):
        sizes: Any = granularity.sizes
        if granularity.axes in ((-1,), (1,)):
            return "group", sizes[0], None
        if granularity.axes in ((-2, -1), (0, 1)):
            return "block", None, [int(n) for n in sizes]
    return None, None, None


def _activations(fmt: str, element: Format, dynamic: bool) -> dict[str, Any] | None:
    if not dynamic:
        return None
    if fmt not in ("int-quantized", "float-quantized") or element.bits != 8:
        raise ValueError(
            "compressed_tensors: `dynamic_activations` needs weights of int8 or float8_e4m3fn, got "
            f"{element.name} in {fmt}. Omit it, or use 'int8_token' (one scale per output of a "
            "weight `[outputs, inputs]`)."
        )
    kind = "int" if fmt == "int-quantized" else "float"
    args = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token"}
    return {**args, "dynamic": True}


def weight_tensors(
    name: str, q: Quantized, scheme: Scheme, read: Callable[[], Quantized]
) -> list[Tensor]:
    """Returns the tensors that store a weight.

    Args:
      name: the name of the weight, which ends in `.weight`.
      q: the weight, or a tree of `jax.ShapeDtypeStruct` like it.
      scheme: its scheme.
      read: a function that returns the weight.
    """
    rows, columns = q.shape
    bits, fmt = q.recipe.element.bits, scheme.format
    words = -(-columns * bits // 32)

    def part(suffix: str, dtype: str, shape: tuple[int, ...], make: Callable) -> Tensor:
        return Tensor(f"{name}{suffix}", dtype, shape, lambda: make(read()))

    counts = (1,) if scheme.weights["strategy"] == "tensor" else q.scale.shape
    kind = "U8" if fmt.startswith("mx") else _SCALES.get(q.recipe.scale_format.name, "F8_E4M3")
    scale = part("_scale", kind, counts, lambda q: np.asarray(q.scale).reshape(counts))
    if fmt == "pack-quantized":
        shape = np.array([rows, columns], np.int64)
        parts = [
            part("_packed", "I32", (rows, words), functools.partial(_packed, bits=bits)),
            scale,
            part("_shape", "I64", (2,), lambda _: shape),
        ]
        if q.zero_point is not None:
            size = (-(-rows * bits // 32), counts[-1])
            make = functools.partial(_packed_zeros, bits=bits)
            parts.append(part("_zero_point", "I32", size, make))
        return parts
    if bits == 8:
        dtype = "I8" if fmt == "int-quantized" else "F8_E4M3"
        return [part("", dtype, (rows, columns), lambda q: np.asarray(q.unpack())), scale]
    nibbles = part("_packed", "U8", (rows, columns // 2), lambda q: np.asarray(q.codes))
    if fmt != "nvfp4-pack-quantized":
        return [nibbles, scale]
    return [nibbles, scale, part("_global_scale", "F32", (1,), _global_scale)]


def _packed(q: Quantized, *, bits: int) -> np.ndarray:
    codes = np.asarray(q.unpack())
    if q.zero_point is None:  # Signed codes are stored as offsets from the lowest one.
        codes = codes ^ np.uint8(1 << (bits - 1))
    return pack_bits(codes, bits, 4).view("<i4")


def _packed_zeros(q: Quantized, *, bits: int) -> np.ndarray:
    zeros = np.asarray(q.zero_point).astype(np.uint8)
    return np.ascontiguousarray(pack_bits(np.ascontiguousarray(zeros.T), bits, 4).view("<i4").T)


def _global_scale(q: Quantized) -> np.ndarray:
    """Returns the global scale of NVFP4, by which the format divides and a recipe multiplies.

    If no float32 number gives exactly the same scales, the result is the rounded reciprocal.
    """
    factor = np.float32(q.second[0])
    digits = np.arange(8, 16, dtype=np.float32)  # The significands of float8_e4m3fn.
    nearest = np.float32(1) / factor
    near = [
        nearest,
        np.nextafter(nearest, np.float32(0)),
        np.nextafter(nearest, np.float32(np.inf)),
    ]
    exact = (g for g in near if (digits / g == digits * factor).all())
    return np.array([next(exact, nearest)], np.float32)
