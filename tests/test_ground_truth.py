"""Values and codes of every float type, bitwise against ml_dtypes."""

import chex
import jax
import ml_dtypes
import numpy as np
import pytest

import jaxq
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.optimized

FLOATS = [
    fmt
    for fmt in jaxq.formats.FORMATS.values()
    if isinstance(fmt, jaxq.FloatFormat) and fmt.dtype is not None
]


def float32(fmt: jaxq.FloatFormat) -> np.ndarray:
    """Returns all float32 inputs in one array, so that one program suffices."""
    return np.concatenate([data.random_float32(), data.specials(), data.critical(fmt)])


INPUTS = {
    "all float16": lambda _: data.all_float16(),
    "all bfloat16": lambda _: data.all_bfloat16(),
    "float32": float32,
}


def test_every_float_type_of_ml_dtypes_is_covered():
    names = {name for name in ml_dtypes.__all__ if "float" in name}
    assert names <= {fmt.name for fmt in FLOATS}


def reference(x: np.ndarray, fmt: jaxq.FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and values by ml_dtypes."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float32).astype(fmt.dtype)
        return y.view(f"u{y.dtype.itemsize}"), y.astype(np.float32).astype(x.dtype)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("source", INPUTS)
def test_values_and_codes_equal_ml_dtypes(fmt: jaxq.FloatFormat, source: str):
    x = INPUTS[source](fmt)
    codes, values = reference(x, fmt)
    y, encoded = jax.jit(lambda x: (jaxq.cast(x, fmt), jaxq.encode(x, fmt)))(x)
    assert_same(y, values, x)
    got = np.asarray(encoded)
    # jaxq drops NaN payloads in NumPy's types; the NaN codes of ml_dtypes' types all agree.
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x.astype(np.float32))
    compared = ~nan | (fmt.name not in ("float16", "float32"))
    np.testing.assert_array_equal(got[compared], codes[compared])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_nan_has_the_same_bits(fmt: jaxq.FloatFormat):
    x = np.float32([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 0, -0.0])
    codes, want = reference(x, fmt)
    for got in (
        data.in_pieces(lambda x: jaxq.cast(x, fmt), x),
        data.in_pieces(lambda codes: jaxq.decode(codes, fmt), codes),
    ):
        np.testing.assert_array_equal(got.view("u4"), want.view("u4"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_cast_without_jit_equals_ml_dtypes(fmt: jaxq.FloatFormat):
    """Checks casts without jit; `test_contracts` compares jit, vmap and sharding with them."""
    x = data.critical(fmt)
    assert_same(data.in_pieces(lambda x: jaxq.cast(x, fmt), x), reference(x, fmt)[1], x)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_every_code_decodes_to_its_value(fmt: jaxq.FloatFormat):
    dtype = np.asarray(jaxq.encode(np.float32(0), fmt)).dtype
    count = min(2**fmt.bits, 2**20)
    codes = np.linspace(0, 2**fmt.bits - 1, count).astype(dtype)
    with np.errstate(invalid="ignore"):
        values = codes.view(fmt.dtype).astype(np.float32)
    assert_same(jaxq.decode(codes, fmt), values, codes)


class TestMistakesOfHandWrittenConverters:
    """Regression tests for common mistakes in handwritten converters."""

    def test_rounding_up_reaches_the_next_binade(self):
        assert float(jaxq.cast(1.97, "float8_e4m3fn")) == 2.0
        assert float(jaxq.cast(0.0155, "float8_e4m3fn")) == 0.015625  # Subnormal to normal.

    def test_infinity_becomes_nan_only_where_the_format_has_none(self):
        x = np.float32([np.nan, np.inf, -np.inf])
        assert_same(jaxq.cast(x, "float8_e5m2"), x)
        assert_same(jaxq.cast(x, "float8_e4m3fn"), np.full(3, np.nan, np.float32))

    def test_half_of_the_least_value_becomes_zero(self):
        least = np.float32(2.0**-9)
        x = np.float32([least / 2, np.nextafter(least / 2, np.float32(1))])
        assert_same(jaxq.cast(x, "float8_e4m3fn"), np.float32([0, least]))

    def test_e4m3fn_maximum_is_448(self):
        assert jaxq.get_format("float8_e4m3fn").max == 448.0
        assert float(jaxq.cast(464.0, "float8_e4m3fn")) == 448.0
        assert np.isnan(float(jaxq.cast(465.0, "float8_e4m3fn")))

    def test_negative_zero_stays_if_the_format_has_it(self):
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
            chex.assert_type(jaxq.cast(np.float64(x), "float8_e4m3fn"), np.float64)
