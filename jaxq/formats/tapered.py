"""Tapered formats, posits and takums: the larger the exponent, the fewer bits of fraction."""

import dataclasses
import functools
import math

import numpy as np

from jaxq.formats.derived import Derived, require

__all__ = ["TaperedFormat"]


@dataclasses.dataclass(frozen=True)
class TaperedFormat(Derived):
    """Posits and linear takums: precision tapers off as the exponent grows.

    The code of a negative number is the two's complement of its magnitude's; 0 has code 0, and the
    code 2^(bits - 1) is NaR, "not a real". There are no infinities and there is no -0. Bits that a
    short code has no room for count as zeros.

    Attributes:
      name: as in `FloatFormat`.
      bits: width, 5 to 16 of a posit, 6 to 16 of a takum.
      exponent_bits: of a posit, es, 0 to 3: a run of k + 1 ones or -k zeros, its end, es bits of
        exponent, the fraction. None makes it a takum: a direction bit, three bits that say how many
        bits the exponent takes, the exponent, the fraction.

    Raises:
      ValueError: an impossible width.

    Example:
      >>> posit8 = TaperedFormat("posit8", 8, exponent_bits=2)
      >>> posit8.max, posit8.tiny, posit8.num_values
      (16777216.0, 5.960464477539063e-08, 255)

    References:
      Standard for Posit Arithmetic (2022); Hunhold, "Beating Posits at Their Own Game: Takum
      Arithmetic" (2024), definition of linear takums.
    """

    name: str
    bits: int
    exponent_bits: int | None = 2

    def __post_init__(self) -> None:
        check = functools.partial(require, "TaperedFormat", self.name)
        least = 6 if self.exponent_bits is None else 5
        check(least <= self.bits <= 16, f"`bits` must be {least} to 16", self.bits)
        possible = self.exponent_bits is None or 0 <= self.exponent_bits <= 3
        check(possible, "`exponent_bits` must be 0 to 3, or None for a takum", self.exponent_bits)

    @property
    def signed(self) -> bool:
        """Always."""
        return True

    @property
    def emax(self) -> int:
        """Largest exponent that is not beyond the largest value's."""
        if self.exponent_bits is None:
            return 254
        return (self.bits - 2 << self.exponent_bits) - 1

    @property
    def emin(self) -> int:
        """Least exponent that is not below the smallest positive value's."""
        if self.exponent_bits is None:
            return -255
        return -(self.bits - 2 << self.exponent_bits)

    def magnitude(self, code: int) -> float:
        """Value of a code from 1 to 2^(bits - 1) - 1."""
        string = f"{code:0{self.bits - 1}b}"
        if self.exponent_bits is None:
            regime = int(string[1:4], 2)
            size = regime if string[0] == "1" else 7 - regime
            start, base = 4, (2**size - 1 if string[0] == "1" else 1 - 2 ** (size + 1))
        else:
            run = len(string) - len(string.lstrip(string[0]))
            size, start = self.exponent_bits, run + 1
            base = (run - 1 if string[0] == "1" else -run) * 2**size
        exponent, fraction = string[start : start + size], string[start + size :]
        significand = int("1" + fraction, 2)
        shift = base + int(exponent.ljust(size, "0") or "0", 2)
        return math.ldexp(significand, shift - len(fraction))

    @property
    def _values(self) -> np.ndarray:
        positive = np.array([self.magnitude(code) for code in range(1, 2 ** (self.bits - 1))])
        return np.concatenate([-positive[::-1], [0.0], positive])

    @property
    def smallest_normal(self) -> float:
        """The same as `tiny`: there are no subnormals."""
        return self.tiny
