"""Weights that files store as several tensors, and their conversion to quantized arrays."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.formats import Format, get_format
from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts._bits import pack_bits
from jaxq.quantizers import Quantized
from jaxq.recipes import (
    MX,
    Affine,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    Recipe,
    ScaleAndMin,
    Symmetric,
    title_of,
)

__all__ = [
    "SCALE_FORMATS",
    "Source",
    "StoredWeight",
    "affine_recipe",
    "as_codes",
    "as_stored_scales",
    "build_quantized",
    "fail",
    "group_count",
    "group_length",
    "minimum_recipe",
    "recipe_from_scales",
    "require_shape",
    "symmetric_recipe",
]

# The dtypes of scales, by their names in NumPy and ml_dtypes, which are also names of formats.
SCALE_FORMATS = ("float32", "float16", "bfloat16")

_SMALL = 4096  # Bytes of a tensor that is read when a file is opened.

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight that is stored as several tensors.

    Attributes:
      method: the name of the method or program that defines the layout, such as `"gptq"`.
      shape: the shape of the weight, `[outputs, inputs]`.
      recipe: the recipe of the resulting `Quantized`; None if no recipe can represent the values,
        which are then read as float32.
      parts: the tensors in the file, by their roles.
      build: a function from the arrays of the parts to the `Quantized` or a float32 array.
      note: the reason why there is no recipe; empty if there is one.
    """

    method: str
    shape: tuple[int, ...]
    recipe: Recipe | None
    parts: Mapping[str, Entry]
    build: Callable[[Arrays], Any]
    note: str = ""

    @property
    def title(self) -> str:
        """The method and the recipe, for tables."""
        values = "float32 values" if self.recipe is None else title_of(self.recipe)
        return f"{self.method} {values}"

    def entry(self, name: str) -> Entry:
        """Returns the entry of the weight under a name."""
        start = min(part.start for part in self.parts.values())
        size = sum(part.nbytes for part in self.parts.values())
        return Entry(name, self.title, self.shape, None, start, start + size, layout=self)


class Source(NamedTuple):
    """The tensors of a checkpoint, and its configuration.

    Attributes:
      entries: the tensors as they are stored, by name.
      config: the configuration of the quantization; empty without one.
      raw: a function that reads a tensor.
    """

    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    raw: Callable[[Entry], np.ndarray]

    def read_small(self, entry: Entry) -> np.ndarray:
        """Reads a small tensor, which is needed when the file is opened."""
        if entry.nbytes > _SMALL or entry.numpy_dtype is None:
            fail(
                entry.name,
                f"it has {entry.nbytes} bytes of {entry.dtype}; a few numbers are expected",
            )
        return self.raw(entry)

    def require(self, name: str) -> Entry:
        """Returns the entry of a tensor, which must exist."""
        if name not in self.entries:
            raise FileError(
                f"the tensor {name!r:.120} is missing. Download all files of the checkpoint."
            )
        return self.entries[name]

    def with_suffix(self, suffix: str) -> list[tuple[str, Entry]]:
        """Returns the names that end in a suffix, without the suffix, and their entries."""
        return [
            (name.removesuffix(suffix), entry)
            for name, entry in self.entries.items()
            if name.endswith(suffix)
        ]

    def number(self, key: str, default: int | None = None) -> int:
        """Returns an integer of the configuration."""
        value = self.config.get(key, default)
        if type(value) is not int or not -1 <= value < 2**31:
            raise FileError(
                f"its configuration needs an integer {key!r}, got {value!r:.40}. Correct "
                "config.json."
            )
        return value


def fail(name: str, reason: str) -> NoReturn:
    """Raises a FileError about a tensor."""
    raise FileError(f"{name!r:.120}: {reason}.")


def require_shape(entry: Entry, shape: tuple[int, ...], *dtypes: str) -> None:
    """Raises a FileError unless a tensor has the shape and one of the dtypes."""
    if entry.shape != shape or (dtypes and entry.numpy_dtype not in dtypes):
        wanted = " or ".join(dtypes) or "numbers"
        fail(
            entry.name,
            f"it must be {wanted} of shape {list(shape)}, got {entry.dtype} of shape "
            f"{list(entry.shape)}",
        )


def group_length(entry: Entry, length: int, count: int) -> int:
    """Returns the length of each of the `count` groups of a row."""
    if count < 1 or not length or length % count:
        fail(entry.name, f"{count} groups do not divide rows of {length}")
    return length // count


def group_count(entry: Entry, length: int, size: int) -> int:
    """Returns the number of groups of `size` elements in a row."""
    if length % size:
        fail(entry.name, f"groups of {size} do not divide rows of {length}")
    return length // size


def _granularity(shape: tuple[int, ...], group: int) -> PerBlock | PerToken:
    return PerToken() if group == shape[-1] else PerBlock(group)


def symmetric_recipe(bits: int, shape: tuple[int, ...], group: int, scale: str) -> Recipe:
    """Returns the recipe of signed integers with one scale per group of a row."""
    scaling = Symmetric(rule="half", scale_format=scale)
    return Recipe(f"int{bits}", _granularity(shape, group), scaling)


def affine_recipe(bits: int, shape: tuple[int, ...], group: int, scale: str) -> Recipe:
    """Returns the recipe of unsigned integers with a scale and a zero point per group of a row."""
    return Recipe(f"uint{bits}", _granularity(shape, group), Affine(scale_format=scale))


def minimum_recipe(bits: int, shape: tuple[int, ...], group: int, scale: str) -> Recipe:
    """Returns the recipe of unsigned integers with a scale and a minimum per group of a row."""
    return Recipe(f"uint{bits}", _granularity(shape, group), ScaleAndMin(scale_format=scale))


def recipe_from_scales(
    weight: Entry, scale: Entry, fmt: str, block: tuple[int, int] | None
) -> Recipe:
    """Returns the recipe of plain codes with scales.

    Args:
      weight: the tensor of the codes.
      scale: the tensor of the scales: one per tensor, per row, per group of a row or per tile.
      fmt: the format of the codes.
      block: the shape of a tile; None if there are no tiles.
    """
    shape, scale_shape = weight.shape, scale.shape
    if len(shape) < 2 or scale.numpy_dtype not in (*SCALE_FORMATS, "float8_e8m0fnu"):
        fail(weight.name, f"{scale.dtype} scales of a {len(shape)}-axis weight are unsupported")
    candidates: list[Any] = [PerTensor()]
    if math.prod(scale_shape) != 1:
        candidates = [PerToken()]
        if len(shape) > 2:
            candidates.append(PerChannel((0,)))
        if (
            len(scale_shape) == len(shape)
            and 1 < scale_shape[-1] <= shape[-1]
            and not shape[-1] % scale_shape[-1]
        ):
            candidates.insert(0, PerBlock(shape[-1] // scale_shape[-1]))
    if block is not None and math.prod(scale_shape) != 1:
        candidates = [PerBlock(block, pad=True)]
    integers = fmt.startswith("int")
    for granularity in candidates:
        counts = Recipe(fmt, granularity).cut(shape).counts
        if counts == scale_shape or _squeezed(counts) == _squeezed(scale_shape):
            if scale.numpy_dtype == "float8_e8m0fnu":
                return Recipe(fmt, granularity, MX())
            rule = "half" if integers else "max"
            scaling = Symmetric(rule=rule, scale_format=scale.numpy_dtype)
            return Recipe(fmt, granularity, scaling)
    fail(
        scale.name,
        f"scales of shape {list(scale_shape)} do not fit a weight of shape {list(shape)}",
    )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def as_codes(array: np.ndarray) -> np.ndarray:
    """Returns the bits of an array of narrow numbers as unsigned integers."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return array.view(f"u{array.dtype.itemsize}")


def as_stored_scales(array: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns scales as a `Quantized` stores them: float32, or the codes of another format."""
    if fmt == get_format("float32"):
        return np.ascontiguousarray(array, np.float32)
    return array if array.dtype.kind == "u" else as_codes(array)


def build_quantized(
    recipe: Recipe,
    codes: np.ndarray,
    scale: np.ndarray,
    *,
    zero_point: np.ndarray | None = None,
    second: tuple[np.ndarray | np.floating, ...] = (),
) -> Quantized:
    """Returns a quantized array of codes and scales.

    Args:
      recipe: the recipe.
      codes: the codes, uint8, one per element in the shape of the weight.
      scale: the scales, in any shape with one per block: numbers, or codes as unsigned integers.
      zero_point: the zero points or minima, in the same shape. Default: None.
      second: the arrays of the scaling's second level. Default: ().
    """
    cut = recipe.cut(codes.shape)
    bits = recipe.element.bits
    scales = as_stored_scales(scale, recipe.scale_format).reshape(cut.counts)
    offset = zero_point
    if offset is not None:
        if recipe.scaling.zero_point == "minimum":
            offset = as_stored_scales(offset, recipe.scale_format)
        offset = jnp.asarray(np.ascontiguousarray(offset).reshape(cut.counts))
    packed = codes if bits == 8 else pack_bits(codes, bits)
    return Quantized(
        codes=jax.device_put(np.ascontiguousarray(packed)),
        scale=jax.device_put(scales),
        second=tuple(map(jnp.asarray, second)),
        zero_point=offset,
        outliers=(),
        recipe=recipe,
        dtype=np.dtype(np.float32),
        block=cut.block,
        length=codes.shape[-1],
    )
