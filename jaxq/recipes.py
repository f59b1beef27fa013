"""Recipes: everything that says how a tensor is quantized, as one frozen record."""

import dataclasses
import math

from jaxq.catalog import get_format
from jaxq.formats import Format, IntFormat
from jaxq.gradients import Gradient, get_gradient
from jaxq.rounding import Rounding, get_rounding
from jaxq.scaling import Granularity, PerChannel, PerTensor

__all__ = ["Quantizer"]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A recipe: everything that says how a tensor is quantized. Frozen, hashable, static in jit.

    Attributes:
      format: the element format, as `jaxq.get_format` takes it; held as a record.
      granularity: which elements share a scale.
      symmetric: True scales by the largest magnitude (absmax), to the format's largest value. False
        maps [min, max] to all integers of the format with a zero point; integers only.
      rounding: a mode of `jaxq.rounding`. `"stochastic"` makes the functions take a key.
      gradient: an estimator of `jaxq.gradients`.

    A symmetric integer recipe uses the codes -max to max only: int8 means -127 to 127, so that the
    grid is symmetric, as absmax quantization is usually defined and most int8 checkpoints have it.

    Raises:
      ValueError: an unknown name, an asymmetric recipe of a format that is not an integer or has
        fraction bits, or a format without a positive value.

    Example:
      >>> recipe = Quantizer("int4", PerChannel((-1,)))
      >>> recipe.bits_per_weight((64, 32))
      4.5
    """

    format: str | Format
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    rounding: str | Rounding = "nearest_even"
    gradient: str | Gradient = "straight_through"

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        object.__setattr__(self, "format", fmt)
        get_rounding(self.rounding)
        get_gradient(self.gradient)
        if not isinstance(self.granularity, PerTensor | PerChannel):
            raise ValueError(
                "Quantizer: `granularity` must be PerTensor() or PerChannel(axes), got "
                f"{self.granularity!r}."
            )
        if not self.symmetric and not (isinstance(fmt, IntFormat) and fmt.fraction_bits == 0):
            raise ValueError(
                f"Quantizer: symmetric=False needs an integer format, got {fmt.name!r}. "
                "Use symmetric=True, or a format such as 'uint8'."
            )
        if not 0 < fmt.max < math.inf:
            raise ValueError(
                f"Quantizer: absmax scaling needs a finite, positive `max`, got {fmt.max} of "
                f"{fmt.name!r}."
            )

    @property
    def element(self) -> Format:
        """The element format as a record."""
        return get_format(self.format)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Bits that a tensor of a shape takes, scales and zero points included, an element."""
        size = math.prod(shape)
        reduced = self.granularity.reduced_axes(len(shape))
        groups = math.prod(n for axis, n in enumerate(shape) if axis not in reduced)
        group_bits = 32 if self.symmetric else 32 + self.element.bits
        return self.element.bits + group_bits * groups / size if size else math.nan
