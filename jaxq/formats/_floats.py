"""Binary floating-point formats."""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from jaxq._base.arguments import choice, flags, integer
from jaxq.formats._derived import Derived, require, set_integers

__all__ = ["FloatFormat"]


@dataclasses.dataclass(frozen=True)
class FloatFormat(Derived):
    """A binary floating-point format with a sign, an exponent field and a mantissa field.

    A code with exponent field E and mantissa field M has the value 2^(E - bias) (1 + M / 2^m). If
    E = 0 it is the subnormal 2^(1 - bias) M / 2^m. The exceptions are the codes of `inf` and `nan`.

    Attributes:
      name: the name in `repr`, errors and the catalog; the ml_dtypes name where one exists.
      exponent_bits: the width of the exponent field, at least 1.
      mantissa_bits: the width m of the mantissa field, at least 0.
      bias: the exponent bias; None means 2^(exponent_bits - 1) - 1, as in IEEE 754.
      signed: True if the format has a sign bit.
      inf: True if the format has infinities. Their code is the highest magnitude not used by NaN.
      nan: the codes that are NaN. `"ieee"`: an all-ones exponent is reserved for infinity and NaN.
        `"all_ones"`: only the all-ones magnitude. `"negative_zero"`: only the code of -0, so that
        the format has no -0. `None`: no code.
      zero: True if E = 0 encodes zero and the subnormals; if False it is a normal binade (E8M0).
      subnormals: True if the format has subnormals; if False, E = 0 encodes only zero.
      parity: the meaning of "even" for formats without mantissa bits. `"code"`: the code is even
        (IEEE P3109). `"significand"`: the significand is even, so that ties round away from zero,
        as in float8_e8m0fnu of ml_dtypes.

    Raises:
      ValueError: if a width or the bias is not possible, or no finite value would remain.
      TypeError: if a field has another type.

    Example:
      >>> e4m3 = FloatFormat("my_e4m3", exponent_bits=4, mantissa_bits=3, nan="all_ones")
      >>> e4m3.max, e4m3.min_positive, e4m3.num_values
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
        fields = ["exponent_bits", "mantissa_bits"] + ["bias"] * (self.bias is not None)
        set_integers(self, fields, "For traced widths, use jaxq.float_grid.")
        owner, remedy = f"FloatFormat {self.name!r:.40}", "Omit it for the default."
        flags(
            owner,
            remedy,
            signed=self.signed,
            inf=self.inf,
            zero=self.zero,
            subnormals=self.subnormals,
        )
        e, m = self.exponent_bits, self.mantissa_bits
        check(e >= 1, "`exponent_bits` must be at least 1 (else use IntFormat)", e)
        check(m >= 0, "`mantissa_bits` must be at least 0", m)
        check(m <= 23, "`mantissa_bits` must be at most 23", m)
        check(self.bits <= 32, "the format must have at most 32 bits", self.bits)
        check(
            self.bits <= 16 or e <= 8,
            "`exponent_bits` must be at most 8 in a format of more than 16 bits",
            e,
        )
        choice(owner, "nan", self.nan, ("ieee", "all_ones", "negative_zero", None), remedy)
        choice(owner, "parity", self.parity, ("code", "significand"), remedy)
        if self.bias is not None:
            integer(owner, "bias", self.bias, remedy, least=-(2**16), most=2**16)
        check(
            self.nan != "negative_zero" or (self.signed and self.zero),
            "nan='negative_zero' needs a signed format with a zero",
            f"signed={self.signed}, zero={self.zero}",
        )
        check(
            self.zero or m == 0 or self.subnormals,
            "`subnormals` must be True if zero=False, because E = 0 is then a normal binade",
            self.subnormals,
        )
        check(
            self.nan != "ieee" or self.inf or m > 0,
            "nan='ieee' needs a mantissa bit or inf=True",
            f"mantissa_bits={m}",
        )
        check(
            self.max_code >= int(self.zero),
            "`inf` and `nan` must leave a code for a finite value",
            f"inf={self.inf}, nan={self.nan!r}",
        )
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (e - 1) - 1)

    @property
    def bits(self) -> int:
        """The width of a code in bits, including the sign."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest finite magnitude, without the sign."""
        if self.nan == "ieee":
            return (2**self.exponent_bits - 1 << self.mantissa_bits) - 1
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        return top - int(self.nan == "all_ones") - int(self.inf)

    @property
    def inf_code(self) -> int | None:
        """The code of +inf, or None."""
        return self.max_code + 1 if self.inf else None

    @property
    def nan_code(self) -> int | None:
        """The code of the canonical NaN, or None if the format has no NaN.

        For an IEEE format, which has several, it is the positive quiet NaN without a payload.
        """
        if self.nan == "ieee":
            return (self.max_code + 1) | (1 << self.mantissa_bits >> 1)
        if self.nan == "negative_zero":
            return 2 ** (self.bits - 1)
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 if self.nan else None

    @property
    def negative_zero(self) -> bool:
        """True if -0 is distinct from 0."""
        return self.signed and self.zero and self.nan != "negative_zero"

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal value, which is a power of two."""
        assert self.bias is not None
        return int(self.zero) - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the binade that contains the largest finite value."""
        assert self.bias is not None
        return max((self.max_code >> self.mantissa_bits) - self.bias, self.emin)

    def magnitude(self, code: int) -> float:
        """Returns the value of a code without its sign, for codes up to `max_code`."""
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
        """The largest finite value (infinite if it exceeds the range of float64)."""
        return self.magnitude(self.max_code)

    @property
    def min(self) -> float:
        """The lowest finite value."""
        return -self.max if self.signed else (0.0 if self.zero else self.min_positive)

    @property
    def scaled_max(self) -> float:
        """The value to which quantizers scale the amax of a block.

        This is `max` if float32 can represent it. Otherwise it is the largest value below 2, or the
        largest value of the lowest binade if all normal values are larger.
        """
        if self.emax < 128:
            return self.max
        return math.ldexp(2.0 - 2.0**-self.mantissa_bits, max(0, self.emin))

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value, i.e. with a full significand."""
        return math.ldexp(1.0, self.emin)

    @property
    def min_positive(self) -> float:
        """The smallest positive value: the smallest subnormal if the format has subnormals."""
        lowest = self.smallest_normal
        has_subnormals = self.zero and self.subnormals and self.mantissa_bits
        return math.ldexp(lowest, -self.mantissa_bits) if has_subnormals else lowest

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger value, or NaN if 1 is not below the maximum."""
        if not (self.min_positive <= 1 < self.max):
            return math.nan
        return math.ldexp(1.0, max(0, self.emin) - self.mantissa_bits)

    @property
    def dynamic_range_db(self) -> float:
        """The dynamic range in dB, 20 log10(max / min_positive); defined beyond float64, too."""
        mantissa = self.max_code % 2**self.mantissa_bits
        octaves = self.emax + math.log2(1 + mantissa / 2**self.mantissa_bits) - self.emin
        has_subnormals = self.zero and self.subnormals
        return 20 * math.log10(2) * (octaves + self.mantissa_bits * int(has_subnormals))

    @property
    def num_values(self) -> int:
        """The number of distinct finite values, not counting NaN, infinities or a second zero."""
        flushed = 0 if self.subnormals or not self.zero else 2**self.mantissa_bits - 1
        positive = self.max_code + int(not self.zero) - flushed
        return positive * (1 + int(self.signed)) + int(self.zero)

    @property
    def _values(self) -> np.ndarray:
        out_of_range = math.isinf(self.max) or self.min_positive == 0
        require(
            "FloatFormat",
            self.name,
            not out_of_range,
            "`values` must lie within float64",
            self.emax,
        )
        magnitudes = [self.magnitude(code) for code in range(self.max_code + 1)]
        positive = np.unique(np.array(magnitudes, np.float64))
        return np.unique(np.concatenate([-positive, positive])) + 0.0 if self.signed else positive
