"""IEEE formats of any width against MPFR, which rounds subnormals and overflow by itself."""

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), WIDTHS)
def test_ieee_formats(exponent_bits: int, mantissa_bits: int, mode: str):
    fmt = jaxq.FloatFormat("ieee", exponent_bits, mantissa_bits, inf=True, nan="ieee")
    x = np.concatenate([data.specials(), data.random_float32(1500)])
    near_one = np.random.default_rng(0).standard_normal(1500).astype(np.float32)
    x = np.concatenate([x, near_one * np.float32(fmt.smallest_normal), near_one * 100])
    # MPFR's significands are in [1/2, 1).
    context = gmpy2.context(
        precision=mantissa_bits + 1,
        emin=fmt.emin - mantissa_bits + 1,
        emax=fmt.emax + 1,
        subnormalize=True,
        round=MODES[mode],
    )
    exact = [gmpy2.mpfr(float(v)) for v in x]  # In the context of float64.
    with gmpy2.context(context) as active:
        want = [float(active.plus(v)) for v in exact]
    assert_same(jaxq.cast(x, fmt, rounding=mode), np.array(want, np.float32), x)
