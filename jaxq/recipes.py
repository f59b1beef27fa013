"""Recipes: everything that says how a tensor is quantized, as one frozen record."""

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from jaxq import rounding
from jaxq.blocks import Cut, Granularity, PerTensor
from jaxq.calibrators import ALL as CALIBRATORS
from jaxq.calibrators import get_calibrator
from jaxq.catalog import get_format
from jaxq.codecs import code_dtype
from jaxq.formats import FloatFormat, Format, IntFormat
from jaxq.gradients import ALL as GRADIENTS
from jaxq.gradients import Gradient, get_gradient
from jaxq.outliers import Outliers
from jaxq.ranges import Calibrator, Extremum
from jaxq.rounding import Rounding, get_rounding
from jaxq.scaling import E8M0, POWERS_OF_TWO, SCALES
from jaxq.second_level import DoubleScale, SecondLevel, TensorScale

__all__ = ["Quantizer"]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A recipe: everything that says how a tensor is quantized. Frozen, hashable, static in jit.

    Attributes:
      format: the element format, as `jaxq.get_format` takes it; held as a record.
      granularity: which elements share a scale.
      range: what of a block's numbers the grid covers: a name in `jaxq.calibrators.ALL` or a
        calibrator. `"absmax"`: all of them.
      zero_point: None scales by a magnitude: the recipe is symmetric. `"integer"` maps the range,
        widened to hold 0, to all integers of the format, y = s (q - z), and 0 to 0. `"minimum"`
        keeps the low end of the range in the format of the scales, y = s q + m, as GGUF's Q4_1.
      scale: how a magnitude becomes a scale, a name in `jaxq.scaling.SCALES`. `"max"`: it goes to
        the format's largest value. `"min"`: a signed one, of `range="extremum"`, goes to the lowest
        value. `"half"`: to half a step beyond the largest. `"floor"`, `"ceil"`, `"even"`,
        `"rceil"`: powers of two, as the MX formats have them, for `scale_format`
        float8_e8m0fnu. (With that format `"max"` is the rule that some call RNE.)
      scale_format: the format that holds the scales: a float with a NaN, or any with `DoubleScale`.
      second_level: how the scales are scaled in their turn, so that a narrow `scale_format` covers
        their range: None, `TensorScale` (NVFP4) or `DoubleScale` (QLoRA).
      stored_scale: True divides the elements by the scale as stored, which is never below its
        format's least positive value. False divides them by the float32 number before that
        rounding, as GGUF and bitsandbytes do; stored is a copy, which may be 0 or infinite.
      reciprocal: True multiplies by the rounded reciprocal of the scale; False divides.
      search: factors of the range that each block tries, the one of least squared error kept (of
        equals the first): `(1.0, 1.5)` makes NVFP4 "four over six".
      outliers: which numbers are kept apart in a wider format, or None.
      rounding: a mode of `jaxq.rounding`. `"stochastic"` makes the functions take a key.
      gradient: an estimator of `jaxq.gradients`.

    A symmetric integer recipe with `scale="max"` uses the codes -max to max only: int8 means -127
    to 127, so that the grid is symmetric, as absmax quantization is usually defined and most int8
    checkpoints have it.

    Quantizing once more what a recipe gave changes nothing where the range is the absmax, the grid
    reaches as far down as up, there is no zero point, the scale is the stored one, there is one
    factor, and nothing is kept apart. A zero point's scale is rounded from a difference, which
    moves in the last bits; a mean is another one after rounding; a scale that is not the stored one
    leaves the largest number beside the grid, and so does a grid without its negative (dynamic8,
    or an unsigned format given negative numbers).

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
    range: str | Calibrator = "absmax"
    zero_point: Literal["integer", "minimum"] | None = None
    scale: str = "max"
    scale_format: str | Format = "float32"
    second_level: SecondLevel | None = None
    stored_scale: bool = True
    reciprocal: bool = False
    search: tuple[float, ...] = ()
    outliers: Outliers | None = None
    rounding: str | Rounding = "nearest_even"
    gradient: str | Gradient = "straight_through"

    def __post_init__(self) -> None:
        fmt, scales = get_format(self.format), get_format(self.scale_format)
        calibrator = get_calibrator(self.range)
        object.__setattr__(self, "format", fmt)
        object.__setattr__(self, "scale_format", scales)
        object.__setattr__(self, "search", tuple(self.search))
        get_rounding(self.rounding)
        get_gradient(self.gradient)
        _check(
            isinstance(self.granularity, Granularity),
            "`granularity` must be one of those in jaxq.blocks, such as PerTensor() or "
            "PerChannel(axes)",
            self.granularity,
        )
        _check(self.scale in SCALES, f"`scale` must be one of {', '.join(SCALES)}", self.scale)
        _check(
            0 < fmt.max < math.inf,
            f"scaling needs a format with a finite, positive `max`, not {fmt.name!r}",
            fmt.max,
        )
        _check(
            isinstance(fmt, calibrator.formats),
            f"range={self.range!r} needs an element format with evenly spaced levels",
            fmt.name,
        )
        _check(all(f > 0 for f in self.search), "`search` must hold positive factors", self.search)
        self._check_zero_point(fmt, scales, calibrator)
        self._check_scale(fmt, scales)

    def _check_zero_point(self, fmt: Format, scales: Format, calibrator: Calibrator) -> None:
        _check(
            self.zero_point in (None, "integer", "minimum"),
            "`zero_point` must be None, 'integer' or 'minimum'",
            self.zero_point,
        )
        if self.zero_point is None:
            return
        name = f"zero_point={self.zero_point!r}"
        whole = isinstance(fmt, IntFormat) and fmt.fraction_bits == 0
        _check(
            whole and (self.zero_point == "integer" or not fmt.signed),
            f"{name} needs an integer format such as 'uint8' (else leave it out)",
            fmt.name,
        )
        _check(calibrator.two_sided, f"{name} needs a range of two sides", self.range)
        _check(self.scale == "max", f"{name} needs scale='max'", self.scale)
        _check(self.second_level is None, f"{name} has no second level", self.second_level)
        if self.zero_point == "integer":
            _check(self.stored_scale, f"{name} needs stored_scale=True", self.stored_scale)
            return
        digits = getattr(scales, "mantissa_bits", 23) + 1
        _check(
            digits + fmt.bits <= 24 and scales != E8M0,
            f"{name} needs a `scale_format`, such as 'float16', whose products with the elements "
            "are float32 numbers",
            scales.name,
        )

    def _check_scale(self, fmt: Format, scales: Format) -> None:
        level, name = self.second_level, f"scale={self.scale!r}"
        if isinstance(level, DoubleScale):
            fits = 0 < scales.max <= 2.0**128
            _check(fits, "`scale_format` needs a positive `max` within float32", scales.name)
        else:
            within = isinstance(scales, FloatFormat) and scales.nan is not None
            _check(
                within and scales.max <= 2.0**128,
                "`scale_format` must be a float format with a NaN within float32's range",
                scales.name,
            )
        narrow = scales != E8M0 and scales.bits < 32
        _check(
            level is None or (narrow and self.scale == "max"),
            f"a second level needs scale='max', a narrow scale format; with {name}",
            scales.name,
        )
        if isinstance(level, TensorScale):
            _check(
                level.largest <= scales.max,
                f"TensorScale needs `largest` within {scales.name!r}",
                level.largest,
            )
        kinds = {"half": IntFormat, "even": FloatFormat | IntFormat}.get(self.scale, Format)
        _check(
            isinstance(fmt, kinds),
            f"{name} needs an integer format{' or a float' if self.scale == 'even' else ''}",
            fmt.name,
        )
        _check(
            SCALES[self.scale] not in POWERS_OF_TWO or scales == E8M0,
            f"{name} gives powers of two and needs scale_format='float8_e8m0fnu'",
            scales.name,
        )
        signed = isinstance(get_calibrator(self.range), Extremum)
        _check(
            (self.scale == "min") == signed and (not signed or (fmt.min < 0 and self.reciprocal)),
            "scale='min' and range='extremum' need each other, a signed format and reciprocal=True",
            f"{name}, range={self.range!r}, {fmt.name}, reciprocal={self.reciprocal}",
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

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of a shape as `jaxq.quantize` stores it, scales and all."""
        size, blocks = math.prod(shape), math.prod(self.cut(shape).counts)
        row = shape[-1] if shape else 1
        scale = code_dtype(self.held).itemsize
        zero_point = {
            None: 0,
            "integer": code_dtype(self.element).itemsize,
            "minimum": scale,
        }[self.zero_point]
        # Each row of codes is packed by itself.
        total = math.prod(shape[:-1]) * -(-row * self.element.bits // 8)
        total += (scale + zero_point) * blocks
        if self.second_level is not None:
            total += self.second_level.bits(blocks) // 8
        if self.outliers is not None:
            total += self.outliers.bits(size) // 8
        return total

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Bits that a tensor of a shape takes, an element: `nbytes` in another unit."""
        size = math.prod(shape)
        return 8 * self.nbytes(shape) / size if size else math.nan

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


def _check(ok: bool, requirement: str, got: object) -> None:
    """Raises the one error text of a recipe: what must hold, what was got."""
    if not ok:
        raise ValueError(f"Quantizer: {requirement}, got {got!r}.")


def _records() -> dict[str, type]:
    """Every frozen record that a recipe may hold."""
    kinds = [*get_args(Granularity), *get_args(Format), *get_args(SecondLevel)]
    kinds += [type(calibrator) for calibrator in CALIBRATORS.values()]
    kinds += [type(g) for g in GRADIENTS.values() if dataclasses.is_dataclass(g)]
    kinds += [rounding.Stochastic, rounding.HalfUp, Outliers, Quantizer]
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
