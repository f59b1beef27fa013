"""Recipes: everything that says how a tensor is quantized, as one frozen record."""

import dataclasses
import json
import math
from typing import Any, get_args

from jaxq import rounding
from jaxq.blocks import Cut, Granularity, PerTensor
from jaxq.catalog import get_format
from jaxq.formats import FloatFormat, Format, IntFormat
from jaxq.gradients import Gradient, get_gradient
from jaxq.rounding import Rounding, get_rounding
from jaxq.scaling import E8M0, POWERS_OF_TWO, RANGES, SCALES

__all__ = ["Quantizer"]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A recipe: everything that says how a tensor is quantized. Frozen, hashable, static in jit.

    Attributes:
      format: the element format, as `jaxq.get_format` takes it; held as a record.
      granularity: which elements share a scale.
      range: what the grid covers, a name in `jaxq.scaling.RANGES`. `"extremes"`: every number of a
        block. `"absmean"`: the mean magnitude, beyond which numbers are clipped.
      symmetric: True scales by the largest magnitude of the range. False maps the range to all
        integers of the format with a zero point; integers only.
      scale: how a magnitude becomes a scale, a name in `jaxq.scaling.SCALES`. `"max"`: it goes to
        the format's largest value. `"half"`: half a step beyond it. `"floor"`, `"ceil"`, `"even"`,
        `"rceil"`: powers of two, as the MX formats have them, for `scale_format`
        float8_e8m0fnu. (With that format `"max"` is the rule that some call RNE.)
      scale_format: the format that holds the scales, a float with a NaN.
      tensor_scale: True makes the scales relative to one float32 number for the whole tensor, so
        that a narrow `scale_format` covers its range, as NVFP4 does.
      reciprocal: True multiplies by the rounded reciprocal of the scale; False divides.
      rounding: a mode of `jaxq.rounding`. `"stochastic"` makes the functions take a key.
      gradient: an estimator of `jaxq.gradients`.

    A symmetric integer recipe with `scale="max"` uses the codes -max to max only: int8 means -127
    to 127, so that the grid is symmetric, as absmax quantization is usually defined and most int8
    checkpoints have it.

    Quantizing once more what a recipe gave changes nothing where the range is the extremes and
    there is no zero point. A zero point's scale is rounded from a difference, which moves in the
    last bits; a mean is another one after rounding.

    Raises:
      ValueError: an unknown name, or fields that do not go together; the text says which.

    Example:
      >>> from jaxq.blocks import PerBlock
      >>> recipe = Quantizer("int4", PerBlock(128), scale_format="float16")
      >>> recipe.bits_per_weight((64, 256))
      4.125
      >>> Quantizer.from_json(recipe.to_json()) == recipe
      True
    """

    format: str | Format
    granularity: Granularity = PerTensor()
    range: str = "extremes"
    symmetric: bool = True
    scale: str = "max"
    scale_format: str | Format = "float32"
    tensor_scale: bool = False
    reciprocal: bool = False
    rounding: str | Rounding = "nearest_even"
    gradient: str | Gradient = "straight_through"

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        object.__setattr__(self, "format", fmt)
        get_rounding(self.rounding)
        get_gradient(self.gradient)
        if not isinstance(self.granularity, Granularity):
            raise ValueError(
                "Quantizer: `granularity` must be one of those in jaxq.blocks, such as "
                f"PerTensor() or PerChannel(axes), got {self.granularity!r}."
            )
        for name, value, known in (("range", self.range, RANGES), ("scale", self.scale, SCALES)):
            if value not in known:
                raise ValueError(
                    f"Quantizer: `{name}` must be one of {', '.join(known)}, got {value!r}."
                )
        if not self.symmetric and not (isinstance(fmt, IntFormat) and fmt.fraction_bits == 0):
            raise ValueError(
                f"Quantizer: symmetric=False needs an integer format, got {fmt.name!r}. "
                "Use symmetric=True, or a format such as 'uint8'."
            )
        if not self.symmetric and (self.scale, self.range) != ("max", "extremes"):
            raise ValueError(
                "Quantizer: symmetric=False needs scale='max' and range='extremes', got "
                f"scale={self.scale!r} and range={self.range!r}."
            )
        if not 0 < fmt.max < math.inf:
            raise ValueError(
                f"Quantizer: absmax scaling needs a finite, positive `max`, got {fmt.max} of "
                f"{fmt.name!r}."
            )
        held = get_format(self.scale_format)
        object.__setattr__(self, "scale_format", held)
        if not isinstance(held, FloatFormat) or held.nan is None or held.max > 2.0**128:
            raise ValueError(
                "Quantizer: `scale_format` must be a float format with a NaN within float32's "
                f"range, got {held.name!r}."
            )
        narrow = held != E8M0 and held.bits < 32 and self.scale == "max" and self.symmetric
        if self.tensor_scale and not narrow:
            raise ValueError(
                "Quantizer: tensor_scale=True needs symmetric=True, scale='max' and a scale format "
                f"such as 'float8_e4m3fn', got scale={self.scale!r} in {held.name!r}."
            )
        kinds = {"half": IntFormat, "even": FloatFormat | IntFormat}.get(self.scale, Format)
        if not isinstance(fmt, kinds):
            raise ValueError(
                f"Quantizer: scale={self.scale!r} needs an integer format"
                f"{' or a float' if self.scale == 'even' else ''}, got {fmt.name!r}."
            )
        if SCALES[self.scale] in POWERS_OF_TWO and held != E8M0:
            raise ValueError(
                f"Quantizer: scale={self.scale!r} gives powers of two and needs "
                f"scale_format='float8_e8m0fnu', got {held.name!r}."
            )

    @property
    def element(self) -> Format:
        """The element format as a record."""
        return get_format(self.format)

    @property
    def held(self) -> Format:
        """The scales' format as a record."""
        return get_format(self.scale_format)

    def cut(self, shape: tuple[int, ...]) -> Cut:
        """The blocks of a tensor."""
        return Cut(shape, self.granularity.block(shape))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Bits that a tensor of a shape takes, scales and zero points included, an element."""
        size, counts = math.prod(shape), self.cut(shape).counts
        zero_point_bits = 0 if self.symmetric else 8 if self.element.bits <= 8 else 16
        block_bits = self.held.bits + zero_point_bits
        more = block_bits * math.prod(counts) + 32 * self.tensor_scale
        return self.element.bits + more / size if size else math.nan

    def to_json(self) -> str:
        """The recipe as text, from which `from_json` makes an equal one.

        Raises:
          TypeError: the rounding or the gradient is a function of the user's.
        """
        return json.dumps(_plain(self))

    @staticmethod
    def from_json(text: str) -> "Quantizer":
        """The recipe that `to_json` wrote.

        Raises:
          ValueError: the text is not that of a recipe.
        """
        recipe = _record(json.loads(text))
        if not isinstance(recipe, Quantizer):
            raise ValueError(f"Quantizer.from_json: the text must be a recipe's, got {text!r}.")
        return recipe


def _records() -> dict[str, type]:
    """Every frozen record that a recipe may hold."""
    kinds = [*get_args(Granularity), *get_args(Format), rounding.Stochastic, Quantizer]
    return {kind.__name__: kind for kind in kinds}


def _plain(value: Any) -> Any:
    """A record as a dictionary of what JSON has, its class under `"type"`."""
    if dataclasses.is_dataclass(value) and type(value).__name__ in _records():
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"Quantizer.to_json: functions cannot be written, got {value!r}. "
        "Use a name that jaxq knows."
    )


def _record(value: Any) -> Any:
    """What `_plain` was given."""
    if isinstance(value, list):
        return tuple(_record(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = _records().get(value.get("type", ""))
    if kind is None:
        raise ValueError(f"Quantizer.from_json: no record is called {value.get('type')!r}.")
    return kind(**{name: _record(item) for name, item in value.items() if name != "type"})
