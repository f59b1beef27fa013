"""Integers and fixed point: one spacing for all values."""

import dataclasses
import functools
import math

import numpy as np

from jaxq.formats.derived import Derived, require

__all__ = ["IntFormat"]


@dataclasses.dataclass(frozen=True)
class IntFormat(Derived):
    """Integers, or fixed point: k / 2^fraction_bits for every k of `bits` bits.

    Attributes:
      name: as in `FloatFormat`.
      bits: width, 1 to 16.
      signed: two's complement when True.
      narrow: a signed format that leaves out its lowest value, and so is symmetric.
      fraction_bits: how many of the bits stand behind the binary point.

    Raises:
      ValueError: an impossible width.

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
        check(1 <= self.bits <= 16, "`bits` must be 1 to 16", self.bits)
        check(abs(self.fraction_bits) <= 16, "`fraction_bits` -16 to 16", self.fraction_bits)
        narrowable = self.signed and self.bits >= 2
        check(not self.narrow or narrowable, "narrow=True needs 2 signed bits or more", self.bits)

    @property
    def max_int(self) -> int:
        """Largest integer k."""
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def min_int(self) -> int:
        """Lowest integer k."""
        return (int(self.narrow) - 2 ** (self.bits - 1)) if self.signed else 0

    @property
    def _values(self) -> np.ndarray:
        integers = np.arange(self.min_int, self.max_int + 1, dtype=np.float64)
        return np.ldexp(integers, -self.fraction_bits)

    @property
    def max(self) -> float:
        """Largest value."""
        return math.ldexp(self.max_int, -self.fraction_bits)

    @property
    def min(self) -> float:
        """Lowest value."""
        return math.ldexp(self.min_int, -self.fraction_bits)

    @property
    def tiny(self) -> float:
        """Smallest positive value; for int1, which has none, the smallest magnitude."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def smallest_normal(self) -> float:
        """The same as `tiny`: the spacing is uniform."""
        return self.tiny

    @property
    def dynamic_range_db(self) -> float:
        """20 log10(largest magnitude / tiny), in dB."""
        return 20 * math.log10(max(self.max, -self.min) / self.tiny)
