"""Rounding modes and overflow policies against an enumerating oracle and gfloat."""

import fractions
import itertools
import math
import warnings

import gfloat
import gfloat.formats
import jax
import numpy as np
import pytest

import jaxq
from jaxq.numerics import ROUNDINGS
from tests import data, oracle
from tests.oracle import assert_same

DETERMINISTIC = [name for name in ROUNDINGS if name != "stochastic"]
FLOATS = [
    fmt
    for fmt in jaxq.formats.FORMATS.values()
    if isinstance(fmt, jaxq.FloatFormat) and fmt.bits <= 8 and fmt.parity == "code" and fmt.zero
]
UNUSUAL = [
    jaxq.FloatFormat("no_subnormals", 4, 3, nan="all_ones", subnormals=False),
    jaxq.FloatFormat("inf_below_nan", 3, 2, inf=True, nan="all_ones"),
    jaxq.FloatFormat("inf_only", 3, 2, inf=True),
    jaxq.FloatFormat("low_bias", 5, 2, bias=-3),
    jaxq.FloatFormat("subnormal_float32", 4, 3, bias=128, nan="all_ones"),
    jaxq.FloatFormat("across_the_edge", 5, 4, bias=125, inf=True, nan="ieee"),
    jaxq.FloatFormat("unsigned", 4, 3, signed=False),
    jaxq.formats.p3109(6, 1, signed=False),
    jaxq.formats.p3109(5, 5, signed=False, domain="finite"),
]


def few(fmt: jaxq.FloatFormat) -> np.ndarray:
    return np.concatenate([data.specials(), data.critical(fmt), data.random_float32(500)])


def cast(x: np.ndarray, fmt: jaxq.Format, **options) -> np.ndarray:
    """Casts without jit in pieces of one shape, so that few operations are compiled."""
    return data.in_pieces(lambda x: jaxq.cast(x, fmt, **options), x)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fmt", data.each_format([*FLOATS, *UNUSUAL]), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_modes_match_enumeration(fmt: jaxq.FloatFormat, mode: str):
    x = few(fmt)
    for overflow in (None, "saturate", "propagate", "SatNone"):
        want = oracle.cast(x, fmt, mode, overflow).astype(np.float32)
        assert_same(cast(x, fmt, rounding=mode, overflow=overflow), want, x)


GFLOAT = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}


@pytest.mark.parametrize("bits", range(3, 16))
def test_p3109_limits_match_gfloat(bits: int):
    """Compares the limits of every format of the family whose values fit into float64."""
    for precision in range(1, bits + 1):
        for signed in (True, False):
            if signed and precision == bits:
                continue
            for domain in ("extended", "finite"):
                fmt = jaxq.formats.p3109(bits, precision, signed=signed, domain=domain)
                if not -900 < fmt.emin - fmt.mantissa_bits < fmt.emax < 900:
                    continue
                info = gfloat.formats.format_info_p3109(
                    bits,
                    precision,
                    gfloat.types.Signedness.Signed if signed else gfloat.types.Signedness.Unsigned,
                    gfloat.Domain.Extended if domain == "extended" else gfloat.Domain.Finite,
                )
                assert fmt.max == info.max
                assert fmt.min_positive == info.smallest
                assert fmt.bias == info.bias
                assert fmt.name.startswith(f"binary{bits}p{precision}")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("mode", GFLOAT)
@pytest.mark.parametrize("precision", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("bits", [6, 8, 11])
def test_p3109_roundings_match_gfloat(bits: int, precision: int, mode: str):
    if precision >= bits:
        pytest.skip("no such format")
    fmt = jaxq.formats.p3109(bits, precision)
    info = gfloat.formats.format_info_p3109(bits, precision)
    x = np.concatenate([data.specials(), data.random_float32(2000)])
    if bits <= 8:
        x = np.concatenate([x, data.critical(fmt)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        want = gfloat.round_ndarray(info, x.astype(np.float64), GFLOAT[mode]).astype(np.float32)
    assert_same(cast(x, fmt, rounding=mode), want, x)


P3109_MODES = {
    "nearest_even": "NearestTiesToEven",
    "nearest_away": "NearestTiesToAway",
    "toward_zero": "TowardZero",
    "up": "TowardPositive",
    "down": "TowardNegative",
    "to_odd": "ToOdd",
}


def p3109_saturated(x, low, high, sat, mode, signed, extended):
    """Saturates by the table in section 4.7.5 of P3109's interim report 4.0.

    The first matching row of the table applies.
    """
    inf = math.inf
    rows = [
        (math.isnan(x), math.nan),
        (low <= x <= high, x),
        (sat == "SatFinite", low if x < low else high),
        (sat == "SatPropagate" and x == inf, inf if extended else high),
        (sat == "SatPropagate" and x == -inf, -inf if signed and extended else low),
        (sat == "SatPropagate", low if x < low else high),
        (x == inf, inf if extended else high),
        (x == -inf and signed and extended, -inf),
        (x == -inf and not signed, math.nan),
        (x == -inf, low),
        (mode == "ToOdd" and not signed and extended and x > high, high),
        (mode in ("TowardZero", "TowardNegative") and x > high, high),
        (mode in ("TowardZero", "TowardPositive") and x < low, low),
        (x < low and signed and extended, -inf),
        (x < low and not signed, math.nan),
        (x < low, low),
        (extended, inf),
        (True, high),
    ]
    return next(result for fits, result in rows if fits)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("mode", P3109_MODES)
@pytest.mark.parametrize("precision", [1, 3])
def test_p3109_saturation_matches_the_report(precision: int, mode: str):
    """Computes the values before saturation with one more exponent bit."""
    for signed, domain in itertools.product((True, False), ("extended", "finite")):
        fmt = jaxq.formats.p3109(6, precision, signed=signed, domain=domain)
        e = fmt.exponent_bits
        wide = jaxq.FloatFormat("wide", e + 1, precision - 1, bias=fmt.bias)
        ends = np.float32([fmt.max, fmt.max * 1.05, fmt.max * 1.3, fmt.max * 1.9, fmt.max * 3])
        x = np.concatenate(
            [
                ends,
                np.float32([fmt.min_positive, fmt.min_positive / 3, fmt.min_positive * 0.9, 1, 0]),
            ]
        )
        x = np.concatenate([x, -x, np.float32([np.inf, -np.inf, np.nan])])
        infinite = ~np.isfinite(x)
        before = np.where(infinite, x, cast(x, wide, rounding=mode))
        for sat in ("SatFinite", "SatPropagate", "SatNone"):
            rule = sat, P3109_MODES[mode], signed, domain == "extended"
            want = [p3109_saturated(float(v), fmt.min, fmt.max, *rule) for v in before]
            got = cast(x, fmt, rounding=mode, overflow=sat)
            assert_same(got, np.float32(want) + np.float32(0), x)

            def decoded(x, fmt=fmt, sat=sat):
                return jaxq.decode(jaxq.encode(x, fmt, rounding=mode, overflow=sat), fmt)

            assert_same(data.in_pieces(decoded, x), got, x)


@pytest.mark.parametrize("rule", ["A", "B", "C"])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "bfloat16", "int8", "binary8p1se"])
def test_stochastic_rules_match_enumeration(rule: str, fmt: str):
    """Compares the result for every random value with the rule, and checks the exact mean."""
    bits = 5
    tiny = jaxq.get_format(fmt).min_positive
    k = fractions.Fraction
    # Multiples of an eighth of the smallest spacing, including subnormals, and other numbers.
    x = np.float32([tiny * (i + j / 64) for i in (0, 1, 2) for j in (0, 1, 8, 21, 32, 40, 63)])
    if fmt == "binary8p1se":
        x = x[x < 2 * tiny]
    x = np.concatenate([x, -x])
    r = np.arange(2**bits, dtype=np.uint8)
    grid = np.broadcast_to(r[:, None], (len(r), len(x)))
    many = np.broadcast_to(x[None, :], grid.shape)
    mode = jaxq.Stochastic(bits, rule)
    got = np.asarray(jaxq.cast(many, fmt, rounding=mode, random_bits=grid), np.float64)
    n = 2**bits
    for j, value in enumerate(x):
        units = k(float(abs(value))) / k(float(tiny))
        whole = units.numerator // units.denominator
        v = units - whole
        for i in range(n):
            if rule == "A":
                away = int(v * n) + i >= n
            elif rule == "B":
                away = int(v * 2 * n) + 2 * i + 1 >= 2 * n
            else:
                away = round(v * n) + i >= n  # Python rounds a Fraction half to even.
            want = float((whole + away) * k(float(tiny)))
            assert abs(got[i, j]) == want, (value, i)
        if (v * n).denominator == 1:
            mean = sum(k(abs(g)) for g in got[:, j]) / n
            assert mean == k(float(abs(value)))


def test_stochastic_bits_come_from_key_and_are_uncorrelated():
    x = np.full((256, 256), 1.03125, np.float32)
    key = jax.random.key(0)
    y = np.asarray(jaxq.cast(x, "float8_e4m3fn", rounding="stochastic", key=key)) > 1.03
    mode = jaxq.Stochastic(23)
    drawn = jax.random.bits(key, x.shape, mode.random_dtype)
    explicit = jaxq.cast(x, "float8_e4m3fn", rounding=mode, random_bits=drawn)
    np.testing.assert_array_equal(y, np.asarray(explicit) > 1.03)
    n = y.size
    assert abs(y.mean() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    centered = y - y.mean()
    for shift in (1, 2, 16):
        for axis in (0, 1):
            r = (centered * np.roll(centered, shift, axis)).mean() / centered.var()
            assert abs(r) < 5 / n**0.5


def test_own_function_defines_the_rounding():
    def half_down(units, negative, random):
        del negative, random
        return jax.numpy.ceil(units - 0.5)

    x = np.float32([0.5, 1.5, 2.5, 2.6])
    assert_same(jaxq.cast(x, "int8", rounding=half_down), np.float32([0, 1, 2, 3]))


CODEBOOKS = [
    *(jaxq.get_format(name) for name in ("nf4", "fp4_bnb", "binary", "dynamic8", "udynamic8")),
    # Many levels between neighboring powers of two, and some distant ones.
    jaxq.CodebookFormat("crowded", (*(1 + i * 2.0**-20 for i in range(60)), -1e3, -1e-3, 0, 1e3)),
    jaxq.CodebookFormat("below_zero", tuple(-1.5 - i / 64 for i in range(50)), ties="up"),
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("mode", DETERMINISTIC)
@pytest.mark.parametrize(
    "fmt",
    data.each(CODEBOOKS, [fmt for fmt in CODEBOOKS if fmt.name not in ("fp4_bnb", "dynamic8")]),
    ids=lambda fmt: fmt.name,
)
def test_codebooks_match_enumeration_in_every_mode(fmt: jaxq.CodebookFormat, mode: str):
    levels = fmt.values
    middles = (levels[:-1] + levels[1:]) / 2
    exact = np.concatenate([levels, middles, [0.0, -0.0, 2, -2]]).astype(np.float32)
    x = np.concatenate(
        [exact, np.nextafter(exact, np.float32(9)), np.nextafter(exact, -np.float32(9))]
    )
    x = np.concatenate([x, np.float32([1e-40, -1e-40, np.inf, -np.inf, np.nan])])
    got = cast(x, fmt, rounding=mode)
    if mode.startswith("nearest"):
        assert_same(got, oracle.nearest_level(x, list(fmt.levels), fmt.ties).astype(np.float32), x)
        return
    clean = np.nan_to_num(x.astype(np.float64), nan=0.0)
    i = np.clip(np.searchsorted(levels, clean, side="right") - 1, 0, len(levels) - 2)
    low, high = levels[i], levels[i + 1]
    negative = high <= 0
    near, far = np.where(negative, high, low), np.where(negative, low, high)
    near_odd = np.where(negative, i + 1, i) % 2 == 1
    chosen = {
        "toward_zero": near,
        "up": high,
        "down": low,
        "to_odd": np.where(near_odd, near, far),
    }[mode]
    on = np.isin(clean, levels)
    want = np.clip(np.where(on, clean, chosen), levels[0], levels[-1])
    want = np.where(clean >= levels[-1], levels[-1], np.where(clean <= levels[0], levels[0], want))
    assert_same(got, (want + 0.0).astype(np.float32), x)


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_codebooks_match_enumeration_in_float64(fmt: jaxq.CodebookFormat):
    middles = (fmt.values[:-1] + fmt.values[1:]) / 2
    exact = np.concatenate([fmt.values, middles])
    x = np.concatenate([exact, np.nextafter(exact, 9), np.nextafter(exact, -9), [np.nan, 1e300]])
    with jax.enable_x64(True):
        got = jaxq.cast(x, fmt)
    assert_same(got, oracle.nearest_level(x, list(fmt.levels), fmt.ties) + 0.0, x)
