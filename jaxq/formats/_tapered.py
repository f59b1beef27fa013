"""Tapered formats (posits and takums), whose precision decreases away from 1."""

import dataclasses
import functools
import math

import numpy as np

from jaxq.formats._derived import Derived, require, set_integers

__all__ = ["TaperedFormat"]


@dataclasses.dataclass(frozen=True)
class TaperedFormat(Derived):
    """A posit or linear takum format, whose precision decreases as the exponent grows.

    The code of a negative number is the two's complement of the code of its magnitude; 0 has
    code 0, and the code 2^(bits - 1) is NaR, "not a real". There are no infinities and no -0. Bits
    that do not fit in a short code count as zeros.

    Fractions have the most bits between 1 / useed and useed, where useed is 2^(2^es) for a posit
    and 2 for a takum. Quantizers therefore scale the amax of a block to the largest value below
    useed, `scaled_max`, and not to `max`, which has no fraction bits.

    Attributes:
      name: the name, as in `FloatFormat`.
      bits: the width, 5 to 16 for a posit and 6 to 16 for a takum.
      exponent_bits: the exponent size es of a posit, 0 to 3, or None for a takum. A posit consists
        of a run of k + 1 ones or -k zeros, a bit that ends the run, es exponent bits, and the
        fraction. A takum consists of a direction bit, three bits that give the number of exponent
        bits, the exponent, and the fraction.

    Raises:
      ValueError: if a width is out of range.
      TypeError: if a field has another type.

    Example:
      >>> posit8 = TaperedFormat("posit8", 8, exponent_bits=2)
      >>> posit8.max, posit8.min_positive, posit8.num_values
      (16777216.0, 5.960464477539063e-08, 255)

    References:
      Standard for Posit Arithmetic (2022); Hunhold, "Beating Posits at Their Own Game: Takum
      Arithmetic" (2024), definition of linear takums; Lu et al., "Training Deep Neural
      Networks Using Posit Number System" (2019), which scales tensors for the same purpose.
    """

    name: str
    bits: int
    exponent_bits: int | None = 2

    def __post_init__(self) -> None:
        check = functools.partial(require, "TaperedFormat", self.name)
        fields = ["bits"] + ["exponent_bits"] * (self.exponent_bits is not None)
        set_integers(self, fields, "Write, for example, TaperedFormat('posit8', 8).")
        min_bits = 6 if self.exponent_bits is None else 5
        check(min_bits <= self.bits <= 16, f"`bits` must be {min_bits} to 16", self.bits)
        valid = self.exponent_bits is None or 0 <= self.exponent_bits <= 3
        check(valid, "`exponent_bits` must be 0 to 3, or None for a takum", self.exponent_bits)

    @property
    def signed(self) -> bool:
        """Always True."""
        return True

    @property
    def emax(self) -> int:
        """A bound on the exponents: no value exceeds 2^(emax + 1)."""
        if self.exponent_bits is None:
            return 254
        return (self.bits - 2 << self.exponent_bits) - 1

    @property
    def emin(self) -> int:
        """A bound on the exponents: no positive value is below 2^emin."""
        if self.exponent_bits is None:
            return -255
        return -(self.bits - 2 << self.exponent_bits)

    def magnitude(self, code: int) -> float:
        """Returns the value of a code from 1 to 2^(bits - 1) - 1."""
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
    def scaled_max(self) -> float:
        """The largest value below useed, i.e. the largest with as many fraction bits as 1."""
        # The code begins with the shortest prefix of numbers from 1 on; all other bits are ones.
        prefix = 4 if self.exponent_bits is None else 2
        ones = 2 ** (self.bits - 1 - prefix) - 1
        return self.magnitude(2 ** (self.bits - 2) + ones)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive value, equal to `min_positive` because there are no subnormals."""
        return self.min_positive
