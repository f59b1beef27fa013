"""IEEE formats of any width against MPFR, including subnormals and overflow."""

import gmpy2
import numpy as np
import pytest

import jaxq
from tests import data
from tests.oracle import assert_same

MODES = {
    "nearest_even": gmpy2.RoundToNearest,
    "toward_zero": gmpy2.RoundToZero,
    "up": gmpy2.RoundUp,
    "down": gmpy2.RoundDown,
}
WIDTHS = [(2, 1), (3, 4), (4, 3), (5, 2), (5, 10), (6, 9), (7, 8), (8, 1), (8, 7), (8, 10)]


def ieee(exponent_bits: int, mantissa_bits: int) -> jaxq.FloatFormat:
    return jaxq.FloatFormat("ieee", exponent_bits, mantissa_bits, inf=True, nan="ieee")


def inputs(fmt: jaxq.FloatFormat) -> np.ndarray:
    x = np.concatenate([data.specials(), data.random_float32(1500)])
    near_one = np.random.default_rng(0).standard_normal(1500).astype(np.float32)
    return np.concatenate([x, near_one * np.float32(fmt.smallest_normal), near_one * 100])


def rounded(x: np.ndarray, fmt: jaxq.FloatFormat, mode: int) -> np.ndarray:
    """Rounds to an IEEE format by MPFR, whose significands are in [1/2, 1)."""
    context = gmpy2.context(
        precision=fmt.mantissa_bits + 1,
        emin=fmt.emin - fmt.mantissa_bits + 1,
        emax=fmt.emax + 1,
        subnormalize=True,
        round=mode,
    )
    exact = [gmpy2.mpfr(float(v)) for v in x]  # Exact, in the default context of 53 bits.
    with gmpy2.context(context) as active:
        return np.array([float(active.plus(v)) for v in exact], np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), WIDTHS)
def test_casts_match_mpfr(exponent_bits: int, mantissa_bits: int, mode: str):
    fmt = ieee(exponent_bits, mantissa_bits)
    x = inputs(fmt)
    assert_same(jaxq.cast(x, fmt, rounding=mode), rounded(x, fmt, MODES[mode]), x)


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), WIDTHS)
def test_to_odd_rounds_to_odd_code(exponent_bits: int, mantissa_bits: int):
    """Checks also that nothing overflows, because the largest finite code is odd."""
    fmt = ieee(exponent_bits, mantissa_bits)
    x = inputs(fmt)
    near, far = (rounded(x, fmt, m) for m in (gmpy2.RoundToZero, gmpy2.RoundAwayZero))
    unit = np.maximum(np.frexp(near.astype(np.float64))[1] - 1, fmt.emin) - mantissa_bits
    with np.errstate(invalid="ignore"):
        odd = np.ldexp(near.astype(np.float64), -unit) % 2 == 1
    want = np.where(odd, near, far)
    assert np.isfinite(want[np.isfinite(x)]).all()
    assert_same(jaxq.cast(x, fmt, rounding="to_odd"), want, x)
