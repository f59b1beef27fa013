"""jaxq against ml_dtypes: every float type, bit for bit, values and codes."""

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxq
from tests import data
from tests.oracle import assert_same

FLOATS = [
    fmt
    for fmt in jaxq.catalog.ALL.values()
    if isinstance(fmt, jaxq.FloatFormat) and fmt.dtype is not None
]
INPUTS = {
    "all float16": data.all_float16,
    "all bfloat16": data.all_bfloat16,
    "random float32": data.random_float32,
    "specials": data.specials,
}


def test_every_float_type_of_ml_dtypes_is_here():
    names = {name for name in ml_dtypes.__all__ if "float" in name}
    assert names <= {fmt.name for fmt in FLOATS}


def reference(x: np.ndarray, fmt: jaxq.FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """ml_dtypes' codes and values."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float32).astype(fmt.dtype)
        return y.view(f"u{y.dtype.itemsize}"), y.astype(np.float32).astype(x.dtype)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("source", [*INPUTS, "critical"])
def test_cast_and_encode(fmt: jaxq.FloatFormat, source: str):
    x = data.critical(fmt) if source == "critical" else INPUTS[source]()
    codes, values = reference(x, fmt)
    assert_same(jaxq.cast(x, fmt), values, x)
    got = np.asarray(jaxq.encode(x, fmt))
    # Of NumPy's own types jaxq keeps no NaN payload; of ml_dtypes' every NaN code agrees.
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x.astype(np.float32))
    compared = ~nan | (fmt.name not in ("float16", "float32"))
    np.testing.assert_array_equal(got[compared], codes[compared])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_cast_without_jit(fmt: jaxq.FloatFormat):
    """Under jit, vmap and sharding casts are all the same: `test_contracts`."""
    x = data.critical(fmt)
    x = np.resize(x, -(-len(x) // 1024) * 1024)  # Few lengths, so few operations are compiled.
    assert_same(jaxq.cast(x, fmt), reference(x, fmt)[1], x)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_decode_of_every_code(fmt: jaxq.FloatFormat):
    dtype = np.asarray(jaxq.encode(np.float32(0), fmt)).dtype
    count = min(2**fmt.bits, 2**20)
    codes = np.linspace(0, 2**fmt.bits - 1, count).astype(dtype)
    with np.errstate(invalid="ignore"):
        values = codes.view(fmt.dtype).astype(np.float32)
    assert_same(jaxq.decode(codes, fmt), values, codes)


class TestMistakesOfHandWrittenConverters:
    """What converters in courses and blog posts get wrong, pinned."""

    def test_a_mantissa_that_rounds_up_to_the_next_binade(self):
        assert float(jaxq.cast(1.97, "float8_e4m3fn")) == 2.0
        assert float(jaxq.cast(0.0155, "float8_e4m3fn")) == 0.015625  # Subnormal to normal.

    def test_nan_and_inf(self):
        x = np.float32([np.nan, np.inf, -np.inf])
        assert_same(jaxq.cast(x, "float8_e5m2"), x)
        assert_same(jaxq.cast(x, "float8_e4m3fn"), np.full(3, np.nan, np.float32))

    def test_the_threshold_of_zero(self):
        least = np.float32(2.0**-9)
        x = np.float32([least / 2, np.nextafter(least / 2, np.float32(1))])
        assert_same(jaxq.cast(x, "float8_e4m3fn"), np.float32([0, least]))

    def test_the_largest_value_is_448_and_not_240(self):
        assert jaxq.get_format("float8_e4m3fn").max == 448.0
        assert float(jaxq.cast(464.0, "float8_e4m3fn")) == 448.0
        assert np.isnan(float(jaxq.cast(465.0, "float8_e4m3fn")))

    def test_negative_zero(self):
        assert np.signbit(jaxq.cast(-0.0, "float8_e4m3fn"))
        assert not np.signbit(jaxq.cast(-0.0, "float8_e4m3fnuz"))

    def test_integers_round_half_to_even_then_saturate(self):
        x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -1e9, np.inf, np.nan])
        want = np.float32([0, 2, 2, 0, -2, 126, 127, 127, -128, 127, 0])
        assert_same(jaxq.cast(x, "int8"), want)

    def test_float64_rounds_once(self):
        x = 1.0625 + 2.0**-40  # Through float32 this is a tie, and rounds to 1.0.
        with jax.enable_x64(True):
            assert float(jaxq.cast(np.float64(x), "float8_e4m3fn")) == 1.125
            assert jaxq.cast(np.float64(x), "float8_e4m3fn").dtype == np.float64
