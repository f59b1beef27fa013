"""What a number format is: frozen, hashable records from which everything else is derived.

A record stores the minimum (widths, bias, which special values exist) and derives the rest. The
named formats are in `catalog`; the arithmetic that uses these records is in `grids` and `codecs`.

To add one: describe it with one of these classes and list it in `catalog`.
"""

import dataclasses
import functools
import math
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np

__all__ = ["CodebookFormat", "FloatFormat", "Format", "IntFormat", "TaperedFormat"]

_ENUMERABLE_BITS = 16  # Formats wider than this have too many values to list.


def _check(owner: str, name: str, ok: bool, requirement: str, got: object) -> None:
    """Raises the one error text of this module: who, what must hold, what was got."""
    if not ok:
        raise ValueError(f"{owner} {name!r}: {requirement}, got {got!r}.")


class _Derived:
    """What every format derives from its own `values`, `bits`, `max`, `min` and `tiny`."""

    name: str
    bits: int

    @property
    def num_values(self) -> int:
        """Number of distinct finite values; NaN, infinities and a second zero do not count."""
        return len(self.values)

    @property
    def values(self) -> np.ndarray:
        """All distinct finite values, ascending, as float64.

        Raises:
          ValueError: the format has more than 16 bits.
        """
        _check(
            type(self).__name__,
            self.name,
            self.bits <= _ENUMERABLE_BITS,
            f"`values` lists formats of at most {_ENUMERABLE_BITS} bits",
            f"{self.bits} bits",
        )
        return self._values

    @property
    def _values(self) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} lists no values.")

    @property
    def max(self) -> float:
        """Largest finite value."""
        return float(self.values[-1])

    @property
    def min(self) -> float:
        """Lowest finite value: negative for a signed format."""
        return float(self.values[0])

    @property
    def tiny(self) -> float:
        """Smallest positive value (the smallest subnormal where the format has them)."""
        return float(self.values[self.values > 0][0])

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value; NaN where 1 is not below the maximum."""
        above = self.values[self.values > 1]
        has_one = bool(np.any(self.values == 1)) and len(above) > 0
        return float(above[0] - 1) if has_one else math.nan

    @property
    def dynamic_range_db(self) -> float:
        """20 log10(max / tiny): the span from the largest to the smallest positive value, in dB."""
        return 20 * (math.log10(self.max) - math.log10(self.tiny))

    @property
    def decimal_digits(self) -> float:
        """Decimal digits that the relative spacing at 1 carries, -log10(eps); NaN without eps."""
        return 0.0 - math.log10(self.eps)

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy or ml_dtypes dtype with exactly these values, or None."""
        return _dtypes().get(self.name)


@dataclasses.dataclass(frozen=True)
class FloatFormat(_Derived):
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
        check = functools.partial(_check, "FloatFormat", self.name)
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
        _check("FloatFormat", self.name, not lost, "`values` must lie within float64", self.emax)
        magnitudes = [self.magnitude(code) for code in range(self.max_code + 1)]
        positive = np.unique(np.array(magnitudes, np.float64))
        return np.unique(np.concatenate([-positive, positive])) + 0.0 if self.signed else positive


@dataclasses.dataclass(frozen=True)
class IntFormat(_Derived):
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
        check = functools.partial(_check, "IntFormat", self.name)
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


@dataclasses.dataclass(frozen=True)
class CodebookFormat(_Derived):
    """Any table of at most 256 levels: code i stands for `levels[i]`.

    Attributes:
      name: as in `FloatFormat`.
      levels: the value of each code, in code order; they need not be sorted. They are held as
        float32 numbers, which is what every known table prints. Of codes with equal values the
        first is the one that encoding gives.
      ties: where a value goes that is exactly half way between two levels: `"down"` (the lower)
        or `"up"`. Both "nearest" roundings use it.

    Raises:
      ValueError: fewer than two distinct levels, more than 256, or levels that are not finite.

    Example:
      >>> CodebookFormat("ternary", (-1.0, 0.0, 1.0)).bits
      2
    """

    name: str
    levels: tuple[float, ...]
    ties: Literal["down", "up"] = "down"

    def __post_init__(self) -> None:
        check = functools.partial(_check, "CodebookFormat", self.name)
        check(2 <= len(self.levels) <= 256, "`levels` must hold 2 to 256 values", len(self.levels))
        levels = np.asarray(self.levels, np.float32)
        check(bool(np.isfinite(levels).all()), "`levels` must be finite", self.levels)
        check(len(np.unique(levels)) >= 2, "`levels` must differ", self.levels)
        subnormal = (levels != 0) & (np.abs(levels) < np.finfo(np.float32).tiny)
        check(not subnormal.any(), "`levels` must not be float32 subnormals", self.levels)
        check(self.ties in ("down", "up"), "`ties` must be 'down' or 'up'", self.ties)
        object.__setattr__(self, "levels", tuple(float(v) + 0.0 for v in levels))

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def signed(self) -> bool:
        """Whether some level is negative."""
        return min(self.levels) < 0

    @property
    def _values(self) -> np.ndarray:
        return np.unique(np.asarray(self.levels, np.float64))

    @property
    def smallest_normal(self) -> float:
        """The same as `tiny`."""
        return self.tiny


@dataclasses.dataclass(frozen=True)
class TaperedFormat(_Derived):
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
        check = functools.partial(_check, "TaperedFormat", self.name)
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


Format: TypeAlias = FloatFormat | IntFormat | CodebookFormat | TaperedFormat


@functools.cache
def _dtypes() -> dict[str, np.dtype]:
    """Every floating or integer dtype of NumPy and ml_dtypes that a format can equal, by name."""
    named = {n: np.dtype(n) for n in ("float16", "float32", "int8", "uint8", "int16", "uint16")}
    for name in ml_dtypes.__all__:
        kind = getattr(ml_dtypes, name)
        if isinstance(kind, type) and issubclass(kind, np.generic):
            named[name] = np.dtype(kind)
    return named
