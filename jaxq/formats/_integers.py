"""Integer and fixed-point formats, which have uniform spacing."""

import dataclasses
import functools
import math

import numpy as np

from jaxq._base.arguments import flags
from jaxq.formats._derived import Derived, require, set_integers

__all__ = ["IntFormat"]


@dataclasses.dataclass(frozen=True)
class IntFormat(Derived):
    """An integer or fixed-point format, with the values k / 2^fraction_bits for all integers k.

    Attributes:
      name: the name, as in `FloatFormat`.
      bits: the width of k in bits, 1 to 16.
      signed: True if k is in two's complement, False if it is unsigned.
      narrow: True if a signed format omits its lowest value, which makes it symmetric.
      fraction_bits: the number of bits after the binary point, -16 to 16.

    Raises:
      ValueError: if the width or `fraction_bits` is out of range, or `narrow` is not possible.
      TypeError: if a field has another type.

    Example:
      >>> IntFormat("int4", 4).values.astype(int).tolist()
      [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]
    """

    name: str
    bits: int
    signed: bool = True
    narrow: bool = False
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        check = functools.partial(require, "IntFormat", self.name)
        set_integers(self, ("bits", "fraction_bits"), "For traced widths, use jaxq.int_grid.")
        owner, remedy = f"IntFormat {self.name!r:.40}", "Omit it for the default."
        flags(owner, remedy, signed=self.signed, narrow=self.narrow)
        check(1 <= self.bits <= 16, "`bits` must be 1 to 16", self.bits)
        check(
            abs(self.fraction_bits) <= 16, "`fraction_bits` must be -16 to 16", self.fraction_bits
        )
        narrowable = self.signed and self.bits >= 2
        check(not self.narrow or narrowable, "narrow=True needs 2 signed bits or more", self.bits)

    @property
    def max_int(self) -> int:
        """The largest integer k."""
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def min_int(self) -> int:
        """The lowest integer k."""
        return (int(self.narrow) - 2 ** (self.bits - 1)) if self.signed else 0

    @property
    def _values(self) -> np.ndarray:
        integers = np.arange(self.min_int, self.max_int + 1, dtype=np.float64)
        return np.ldexp(integers, -self.fraction_bits)

    @property
    def max(self) -> float:
        """The largest value."""
        return math.ldexp(self.max_int, -self.fraction_bits)

    @property
    def min(self) -> float:
        """The lowest value."""
        return math.ldexp(self.min_int, -self.fraction_bits)

    @property
    def min_positive(self) -> float:
        """The smallest positive value; for int1, which has none, the smallest nonzero magnitude."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive value, equal to `min_positive` because the spacing is uniform."""
        return self.min_positive

    @property
    def dynamic_range_db(self) -> float:
        """The dynamic range in dB, 20 log10(largest magnitude / min_positive)."""
        return 20 * math.log10(max(self.max, -self.min) / self.min_positive)
