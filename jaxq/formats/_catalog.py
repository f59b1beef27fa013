"""The catalog of named number formats, and the lookup by name.

To add a format, list it in `_FORMATS`. The contract tests, the table of properties and the
benchmarks then include it automatically.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from jaxq._base.arguments import choice, described, flags, integer, items_of
from jaxq._base.registry import Registry
from jaxq._base.tables import Table
from jaxq.formats._codebooks import CodebookFormat
from jaxq.formats._floats import FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._integers import IntFormat
from jaxq.formats._tapered import TaperedFormat

__all__ = ["FORMATS", "fixed_point", "formats_table", "get_format", "p3109"]


def p3109(
    bits: int,
    precision: int,
    *,
    signed: bool = True,
    domain: Literal["extended", "finite"] = "extended",
) -> FloatFormat:
    """Returns the IEEE P3109 format binary{K}p{P}{s|u}{e|f}.

    Args:
      bits: the width K, 3 to 15.
      precision: the precision P, i.e. the bits of the significand including the hidden one: 1 to
        K - 1 for signed formats, 1 to K for unsigned ones.
      signed: True if the format is signed (letter s), False if it is unsigned (letter u).
      domain: `"extended"` for a format with infinities (letter e), or `"finite"` for one that uses
        their codes for finite values (letter f).

    Returns:
      The format. Its bias is 2^(exponent_bits - 1), NaN has one code, and there is no -0.

    Raises:
      ValueError: if K, P or `domain` is out of range.

    Example:
      >>> p3109(8, 3).max, p3109(8, 4).min_positive
      (49152.0, 0.0009765625)

    References:
      IEEE SA P3109 Working Group, interim report 3, section 4.
    """
    example = "Use, for example, p3109(8, 4)."
    flags("p3109", example, signed=signed)
    bits = integer("p3109", "bits", bits, example, least=3, most=15)
    most = bits - int(signed)
    precision = integer("p3109", "precision", precision, example, least=1, most=most)
    choice("p3109", "domain", domain, ("extended", "finite"), "Use 'extended'.")
    name = f"binary{bits}p{precision}{'s' if signed else 'u'}{domain[:1]}"
    exponent_bits = bits - precision + 1 - int(signed)
    return FloatFormat(
        name,
        exponent_bits=exponent_bits,
        mantissa_bits=precision - 1,
        bias=2 ** (exponent_bits - 1),
        signed=signed,
        inf=domain == "extended",
        nan="negative_zero" if signed else "all_ones",
    )


def fixed_point(integer_bits: int, fraction_bits: int, *, signed: bool = True) -> IntFormat:
    """Returns the fixed-point format Qm.n, or UQm.n when unsigned.

    Its values are k / 2^n, where k has m + n bits in addition to the sign.

    Args:
      integer_bits: the number m of bits before the binary point, not counting the sign.
      fraction_bits: the number n of bits after the binary point.
      signed: True if k is in two's complement, False if it is unsigned.

    Returns:
      A format of m + n + 1 bits if signed, else of m + n bits.

    Raises:
      ValueError: if the width is not 1 to 16 bits.

    Example:
      >>> fixed_point(3, 4).max
      7.9375
    """
    example = "Use, for example, fixed_point(3, 4)."
    flags("fixed_point", example, signed=signed)
    integer_bits = integer("fixed_point", "integer_bits", integer_bits, example)
    fraction_bits = integer("fixed_point", "fraction_bits", fraction_bits, example)
    name = f"{'' if signed else 'u'}q{integer_bits}.{fraction_bits}"
    bits = integer_bits + fraction_bits + int(signed)
    return IntFormat(name, bits, signed=signed, fraction_bits=fraction_bits)


_IEEE: dict[str, Any] = {"inf": True, "nan": "ieee"}
_FNUZ: dict[str, Any] = {"nan": "negative_zero"}

_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# GGUF's IQ4_NL and IQ4_XS.
_IQ4_LEVELS = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
# In code order, with the sign in the top bit; bitsandbytes' code 8 is a second zero.
_BNB_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_BNB_FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in _BNB_FP4_TWELFTHS)


def _dynamic_levels(*, signed: bool) -> tuple[float, ...]:
    """Returns the levels of the 8-bit dynamic tree of Dettmers (2015), in code order.

    Each of seven decades, from 10^k / 10 to 10^k, is divided into 2^(k + 6) equal intervals (twice
    as many when unsigned), whose midpoints are levels; 0 and 1 are added. The values match
    bitsandbytes on x86 bit for bit: steps are float32, and each boundary is computed from the
    nearer end and rounded once (a fused multiply-add).
    """
    start, middles = np.float32(0.1), []
    for k in range(-6, 1):
        parts = 2 ** (k + 6 + int(not signed))
        step = np.float64((np.float32(1) - start) / np.float32(parts))
        i = np.arange(parts + 1)  # The products and sums below are exact in float64.
        ends = np.where(2 * i < parts + 1, start + step * i, 1 - step * (parts - i))
        ends = ends.astype(np.float32)
        middles.append(np.float32(10.0**k) * ((ends[:-1] + ends[1:]) / np.float32(2)))
    positive = np.concatenate([*middles, [np.float32(1)]])
    negative = -np.concatenate(middles)[::-1] if signed else positive[:0]
    return tuple(np.concatenate([negative, [np.float32(0)], positive]).tolist())


_FORMATS: tuple[Format, ...] = (
    # IEEE 754 and its truncations.
    FloatFormat("float32", 8, 23, **_IEEE),
    FloatFormat("tf32", 8, 10, **_IEEE),
    FloatFormat("float16", 5, 10, **_IEEE),
    FloatFormat("bfloat16", 8, 7, **_IEEE),
    # The float8 types of ml_dtypes: the two of OCP, IEEE-like ones, FNUZ ones, and the MX scale.
    FloatFormat("float8_e3m4", 3, 4, **_IEEE),
    FloatFormat("float8_e4m3", 4, 3, **_IEEE),
    FloatFormat("float8_e4m3fn", 4, 3, nan="all_ones"),
    FloatFormat("float8_e4m3fnuz", 4, 3, bias=8, **_FNUZ),
    FloatFormat("float8_e4m3b11fnuz", 4, 3, bias=11, **_FNUZ),
    FloatFormat("float8_e5m2", 5, 2, **_IEEE),
    FloatFormat("float8_e5m2fnuz", 5, 2, bias=16, **_FNUZ),
    FloatFormat(
        "float8_e8m0fnu", 8, 0, signed=False, nan="all_ones", zero=False, parity="significand"
    ),
    # OCP microscaling elements.
    FloatFormat("float6_e2m3fn", 2, 3),
    FloatFormat("float6_e3m2fn", 3, 2),
    FloatFormat("float4_e2m1fn", 2, 1),
    # Beyond ml_dtypes: Intel's E3M4 (one NaN magnitude, no inf) and unsigned scales.
    FloatFormat("float8_e3m4fn", 3, 4, nan="all_ones"),
    FloatFormat("float7_ue4m3fn", 4, 3, signed=False, nan="all_ones"),
    FloatFormat("float8_ue5m3fn", 5, 3, signed=False, nan="all_ones"),
    # The 8-bit signed extended formats of IEEE P3109; `p3109` makes the rest of the family.
    *(p3109(8, precision) for precision in range(1, 8)),
    # Powers of two with a zero: sign and exponent only.
    FloatFormat("float4_e3m0", 3, 0),
    # Integers and fixed point.
    *(IntFormat(f"int{bits}", bits) for bits in (*range(1, 9), 16)),
    *(IntFormat(f"uint{bits}", bits, signed=False) for bits in (*range(1, 9), 16)),
    IntFormat("ocp_int8", 8, fraction_bits=6),
    IntFormat("ternary", 2, narrow=True),
    # Posits of the 2022 standard (es = 2), posits with other es, and takums.
    TaperedFormat("posit8", 8),
    TaperedFormat("posit16", 16),
    TaperedFormat("posit8_es0", 8, 0),
    TaperedFormat("posit8_es1", 8, 1),
    TaperedFormat("posit16_es1", 16, 1),
    TaperedFormat("takum8", 8, None),
    TaperedFormat("takum16", 16, None),
    # Codebooks.
    CodebookFormat("nf4", _NF4_LEVELS),
    CodebookFormat("fp4_bnb", _BNB_FP4_LEVELS),
    CodebookFormat("dynamic8", _dynamic_levels(signed=True)),
    CodebookFormat("udynamic8", _dynamic_levels(signed=False)),
    CodebookFormat("binary", (-1.0, 1.0), ties="up"),
    CodebookFormat("iq4", _IQ4_LEVELS, ties="up"),
)

FORMATS: Registry[Format] = Registry(
    "number format",
    {fmt.name: fmt for fmt in _FORMATS},
    {
        "e4m3": "float8_e4m3fn",
        "fp8": "float8_e4m3fn",
        "float8": "float8_e4m3fn",
        "e4m3fn": "float8_e4m3fn",
        "fp8_e4m3": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
        "fp8_e5m2": "float8_e5m2",
        "e8m0": "float8_e8m0fnu",
        "e2m3": "float6_e2m3fn",
        "e3m2": "float6_e3m2fn",
        "fp6": "float6_e2m3fn",
        "e2m1": "float4_e2m1fn",
        "fp4": "float4_e2m1fn",
        "bf16": "bfloat16",
        "fp16": "float16",
        "f16": "float16",
        "half": "float16",
        "fp32": "float32",
        "f32": "float32",
        "float": "float32",
    },
)


def get_format(spec: "str | Format | np.dtype | type") -> Format:
    """Returns the format with a given name or dtype.

    Args:
      spec: a name in `jaxq.formats.FORMATS`, a NumPy or ml_dtypes dtype (or scalar type, such as
        `jnp.bfloat16`) of the same name, or a format, which is returned unchanged.

    Returns:
      The format.

    Raises:
      ValueError: if no format has that name. The message suggests the nearest names.
      TypeError: if `spec` is not a name, a dtype or a format.

    Example:
      >>> get_format("float8_e4m3fn").max
      448.0
    """
    if isinstance(spec, Format):
        return spec
    if isinstance(spec, str):
        name = str(spec)
    else:
        try:  # NumPy reads None as float64, arrays as their dtype, and sequences as structures.
            name = np.dtype(spec).name if isinstance(spec, np.dtype | type) else None
        except (TypeError, ValueError, AttributeError):
            name = None
        if name is None:
            raise TypeError(
                "get_format: `spec` must be a name such as 'float8_e4m3fn', a dtype or a format, "
                f"got {described(spec)}. Use a name in jaxq.formats.FORMATS."
            )
    return FORMATS.find(name)


@dataclasses.dataclass(frozen=True)
class FormatRow:
    """One row of `formats_table`: properties of a format, in the units of its attributes."""

    name: str
    bits: int
    max: float
    smallest_normal: float
    min_positive: float
    precision_at_1: float
    distinct_values: int
    dynamic_range_db: float
    decimal_digits: float


def formats_table(formats: "Iterable[str | Format] | None" = None) -> Table:
    """Returns a table that compares the properties of number formats.

    Args:
      formats: the formats to compare, each in any form that `get_format` accepts; None means the
        whole catalog.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Example:
      >>> print(formats_table(["float8_e4m3fn", "int4"]))  # doctest: +NORMALIZE_WHITESPACE
      name  bits  max  smallest_normal  min_positive  precision_at_1  distinct_values ...
      float8_e4m3fn     8  448         0.015625    0.001953           0.125              253 ...
      int4              4    7                1             1               1               16 ...
    """
    specs = FORMATS.values() if formats is None else items_of("formats_table", "formats", formats)
    chosen = [get_format(spec) for spec in specs]
    return Table(
        tuple(
            FormatRow(
                name=fmt.name,
                bits=fmt.bits,
                max=fmt.max,
                smallest_normal=fmt.smallest_normal,
                min_positive=fmt.min_positive,
                precision_at_1=fmt.eps,
                distinct_values=fmt.num_values,
                dynamic_range_db=fmt.dynamic_range_db,
                decimal_digits=fmt.decimal_digits,
            )
            for fmt in chosen
        )
    )
