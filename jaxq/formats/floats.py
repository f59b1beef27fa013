"""Binary floating point: sign, exponent and mantissa."""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from jaxq.formats.derived import Derived, require

__all__ = ["FloatFormat"]


@dataclasses.dataclass(frozen=True)
class FloatFormat(Derived):
    """A binary floating-point format: sign, exponent field, mantissa field.

    A code with exponent field E and mantissa field M stands for 2^(E - bias) (1 + M / 2^m), and
    with E = 0 for the subnormal 2^(1 - bias) M / 2^m, save for the codes that `inf` and `nan` take.

    Attributes:
      name: what `repr`, errors and the catalogue call it; ml_dtypes' name where it has the type.
      exponent_bits: width of the exponent field, at least 1.
      mantissa_bits: width m of the mantissa field, at least 0.
      bias: what is subtracted from E; None means 2^(exponent_bits - 1) - 1, as in IEEE 754.
      signed: whether there is a sign bit.
      inf: whether there is an infinity. It takes the highest magnitude that `nan` leaves.
      nan: which codes are NaN. `"ieee"`: an all-ones exponent is reserved for infinity and NaN.
        `"all_ones"`: only the all-ones magnitude. `"negative_zero"`: only the code of -0, which
        the format then lacks. `None`: no code.
      zero: whether E = 0 holds zero and the subnormals; False makes it a normal binade (E8M0).
      subnormals: False leaves only zero at E = 0.
      parity: what "even" means when the mantissa has no bits. `"code"`: the code is even (IEEE
        P3109). `"significand"`: the significand is even, so that ties go away from zero, as
        ml_dtypes' float8_e8m0fnu does.

    Raises:
      ValueError: a width or the bias is impossible, or the specials leave no finite value.

    Example:
      >>> e4m3 = FloatFormat("my_e4m3", exponent_bits=4, mantissa_bits=3, nan="all_ones")
      >>> e4m3.max, e4m3.tiny, e4m3.num_values
      (448.0, 0.001953125, 253)

    References:
      IEEE 754-2019, section 3.4; OCP 8-bit Floating Point Specification 1.0; IEEE P3109 interim
      report 3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    signed: bool = True
    inf: bool = False
    nan: Literal["ieee", "all_ones", "negative_zero"] | None = None
    zero: bool = True
    subnormals: bool = True
    parity: Literal["code", "significand"] = "code"

    def __post_init__(self) -> None:
        check = functools.partial(require, "FloatFormat", self.name)
        e, m = self.exponent_bits, self.mantissa_bits
        check(e >= 1, "`exponent_bits` must be at least 1 (else use IntFormat)", e)
        check(m >= 0, "`mantissa_bits` must be at least 0", m)
        check(m <= 23, "`mantissa_bits` must be at most 23", m)
        check(self.bits <= 32, "at most 32 bits in all", self.bits)
        check(
            self.bits <= 16 or e <= 8,
            "`exponent_bits` beyond 8 need a format of at most 16 bits",
            e,
        )
        check(
            self.nan in ("ieee", "all_ones", "negative_zero", None),
            "`nan` must be 'ieee', 'all_ones', 'negative_zero' or None",
            self.nan,
        )
        check(
            self.nan != "negative_zero" or (self.signed and self.zero),
            "nan='negative_zero' needs a signed format with a zero",
            f"signed={self.signed}, zero={self.zero}",
        )
        check(self.zero or m == 0 or self.subnormals, "zero=False leaves no subnormals to drop", m)
        check(
            self.nan != "ieee" or self.inf or m > 0,
            "nan='ieee' needs a mantissa bit or inf=True",
            f"mantissa_bits={m}",
        )
        check(self.max_code >= int(self.zero), "some finite value must remain", self.max_code)
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (e - 1) - 1)

    @property
    def bits(self) -> int:
        """Width of a code, the sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """Code of the largest finite magnitude, without the sign."""
        if self.nan == "ieee":
            return (2**self.exponent_bits - 1 << self.mantissa_bits) - 1
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        return top - int(self.nan == "all_ones") - int(self.inf)

    @property
    def inf_code(self) -> int | None:
        """Code of +inf, or None."""
        return self.max_code + 1 if self.inf else None

    @property
    def nan_code(self) -> int | None:
        """The NaN code that a cast emits, without a sign where the sign is free, or None.

        An IEEE format has several; its quiet NaN without a payload is the one.
        """
        if self.nan == "ieee":
            return (self.max_code + 1) | (1 << self.mantissa_bits >> 1)
        if self.nan == "negative_zero":
            return 2 ** (self.bits - 1)
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 if self.nan else None

    @property
    def negative_zero(self) -> bool:
        """Whether -0 is distinct from 0."""
        return self.signed and self.zero and self.nan != "negative_zero"

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value, a power of two."""
        assert self.bias is not None
        return int(self.zero) - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value's binade."""
        assert self.bias is not None
        return max((self.max_code >> self.mantissa_bits) - self.bias, self.emin)

    def magnitude(self, code: int) -> float:
        """Value of a code without its sign, up to `max_code`."""
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if self.zero and exponent == 0:
            return math.ldexp(mantissa, self.emin - self.mantissa_bits) * self.subnormals
        significand = mantissa + 2**self.mantissa_bits
        shift = exponent - int(self.zero) + self.emin - self.mantissa_bits
        try:
            return math.ldexp(significand, shift)
        except OverflowError:
            return math.inf

    @property
    def max(self) -> float:
        """Largest finite value (infinite where it lies beyond float64)."""
        return self.magnitude(self.max_code)

    @property
    def min(self) -> float:
        """Lowest finite value."""
        return -self.max if self.signed else (0.0 if self.zero else self.tiny)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with a full significand."""
        return math.ldexp(1.0, self.emin)

    @property
    def tiny(self) -> float:
        """Smallest positive value."""
        lowest = self.smallest_normal
        has_subnormals = self.zero and self.subnormals and self.mantissa_bits
        return math.ldexp(lowest, -self.mantissa_bits) if has_subnormals else lowest

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value; NaN where 1 is not below the maximum."""
        if not (self.tiny <= 1 < self.max):
            return math.nan
        return math.ldexp(1.0, max(0, self.emin) - self.mantissa_bits)

    @property
    def dynamic_range_db(self) -> float:
        """20 log10(max / tiny), in dB, also where max or tiny lie beyond float64."""
        mantissa = self.max_code % 2**self.mantissa_bits
        octaves = self.emax + math.log2(1 + mantissa / 2**self.mantissa_bits) - self.emin
        has_subnormals = self.zero and self.subnormals
        return 20 * math.log10(2) * (octaves + self.mantissa_bits * int(has_subnormals))

    @property
    def num_values(self) -> int:
        """Number of distinct finite values; NaN, infinities and a second zero do not count."""
        flushed = 0 if self.subnormals or not self.zero else 2**self.mantissa_bits - 1
        positive = self.max_code + int(not self.zero) - flushed
        return positive * (1 + int(self.signed)) + int(self.zero)

    @property
    def _values(self) -> np.ndarray:
        lost = math.isinf(self.max) or self.tiny == 0
        require("FloatFormat", self.name, not lost, "`values` must lie within float64", self.emax)
        magnitudes = [self.magnitude(code) for code in range(self.max_code + 1)]
        positive = np.unique(np.array(magnitudes, np.float64))
        return np.unique(np.concatenate([-positive, positive])) + 0.0 if self.signed else positive
