"""Properties of formats against published figures and ml_dtypes.finfo, look-up and errors."""

import fractions
import hashlib
import itertools
import math

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests import data

# OCP 8-bit Floating Point 1.0, table 1; OCP Microscaling 1.0, tables 1 to 5; IEEE 754; P3109.
PUBLISHED = {
    "float8_e4m3fn": (448.0, 2.0**-6, 2.0**-9, 253),
    "float8_e5m2": (57344.0, 2.0**-14, 2.0**-16, 247),
    "float6_e2m3fn": (7.5, 1.0, 0.125, 63),
    "float6_e3m2fn": (28.0, 0.25, 0.0625, 63),
    "float4_e2m1fn": (6.0, 1.0, 0.5, 15),
    "float16": (65504.0, 2.0**-14, 2.0**-24, 63487),
    "bfloat16": (3.3895313892515355e38, 2.0**-126, 2.0**-133, 65279),
    "tf32": (3.4011621342146535e38, 2.0**-126, 2.0**-136, 522239),
    "float32": (3.4028234663852886e38, 2.0**-126, 2.0**-149, 4278190079),
    "binary8p3se": (49152.0, 2.0**-15, 2.0**-17, 253),
    "binary8p4se": (224.0, 2.0**-7, 2.0**-10, 253),
    "ocp_int8": (1 + 63 / 64, 1 / 64, 1 / 64, 256),
    "int4": (7.0, 1.0, 1.0, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_match_published_figures(name: str):
    fmt = jaxq.get_format(name)
    assert (fmt.max, fmt.smallest_normal, fmt.min_positive, fmt.num_values) == PUBLISHED[name]


def test_values_are_a_copy():
    fmt = jaxq.get_format("posit8")
    fmt.values[:] = 0
    assert fmt.max == 2.0**24


@pytest.mark.parametrize("name", [n for n in ml_dtypes.__all__ if "float" in n])
def test_properties_match_ml_dtypes_finfo(name: str):
    fmt, info = jaxq.get_format(name), ml_dtypes.finfo(name)
    assert fmt.bits == info.bits
    assert (fmt.min, fmt.max) == (float(info.min), float(info.max))
    assert fmt.smallest_normal == float(info.smallest_normal) == float(info.tiny)
    assert fmt.min_positive == float(info.smallest_subnormal)
    assert fmt.eps == float(info.eps)
    assert fmt.dtype == np.dtype(getattr(ml_dtypes, name))


def test_table_has_the_published_figures():
    rows = {row.name: row for row in jaxq.formats_table().rows}
    assert rows["float8_e4m3fn"].max == 448.0, "not 240: only one magnitude is NaN"
    assert rows["float8_e5m2"].distinct_values == 247, "NaN, infinities and -0 are not counted"
    assert rows["int8"].dynamic_range_db == pytest.approx(42.144, abs=1e-3)
    assert rows["float16"].decimal_digits == pytest.approx(3.0103, abs=1e-4)
    assert "float8_e4m3fn" in str(jaxq.formats_table(["float8_e4m3fn"]))


def nearest_float32(exact: fractions.Fraction) -> np.float32:
    near = np.float32(float(exact))
    around = (near, np.nextafter(near, np.float32(-9)), np.nextafter(near, np.float32(9)))
    return min(around, key=lambda v: abs(fractions.Fraction(float(v)) - exact))


@pytest.mark.parametrize(("name", "signed"), [("dynamic8", True), ("udynamic8", False)])
def test_dynamic_levels_match_exact_arithmetic(name: str, signed: bool):
    """Recomputes the levels: midpoints of PyTorch's float32 linspace times powers of ten."""
    k = fractions.Fraction
    start = k(float(np.float32(0.1)))
    whole = k(float(nearest_float32(1 - start)))
    levels = {0.0, 1.0}
    for decade in range(7):
        n = 2 ** (decade + (not signed))
        step = whole / n
        up = [nearest_float32(start + step * i) for i in range(n + 1)]
        down = [nearest_float32(1 - step * (n - i)) for i in range(n + 1)]
        ends = [up[i] if i < (n + 1) // 2 else down[i] for i in range(n + 1)]
        scale = k(float(np.float32(10.0 ** (decade - 6))))
        for low, high in itertools.pairwise(ends):
            middle = nearest_float32(k(float(low)) + k(float(high))) / np.float32(2)
            level = float(nearest_float32(scale * k(float(middle))))
            levels |= {level, -level} if signed else {level}
    assert len(levels) == 256
    np.testing.assert_array_equal(jaxq.get_format(name).levels, sorted(levels))


def test_dynamic_levels_match_bitsandbytes():
    """Compares with the levels printed by bitsandbytes."""
    levels = np.asarray(jaxq.get_format("dynamic8").levels, np.float32)
    published = {
        0: -0.992968738079071,
        28: -0.5992187261581421,
        126: -5.500000384017767e-07,
        127: 0.0,
        143: 0.001281249918974936,
        191: 0.10703125596046448,
        192: 0.12109375,
        228: 0.6273437738418579,
        255: 1.0,
    }
    for code, level in published.items():
        assert levels[code] == np.float32(level), code
    digest = hashlib.sha256(levels.astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "e732639a65f497b4"


def test_formats_are_found_by_name_and_dtype():
    e4m3 = jaxq.get_format("float8_e4m3fn")
    assert jaxq.get_format(jnp.float8_e4m3fn) is e4m3
    assert jaxq.get_format(np.dtype(ml_dtypes.float8_e4m3fn)) is e4m3
    assert jaxq.get_format(e4m3) is e4m3
    with pytest.raises(ValueError, match="Did you mean float8_e4m3fn"):
        jaxq.get_format("float8_e4m3f")
    with pytest.raises(ValueError, match="No number format is named 'complex64'"):
        jaxq.get_format(np.dtype("complex64"))
    with pytest.raises(TypeError, match=r"a dtype or a format, got 3\.5"):
        jaxq.get_format(3.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.FloatFormat("x", 0, 3), "`exponent_bits` must be at least 1"),
        (lambda: jaxq.FloatFormat("x", 4, -1), "`mantissa_bits` must be at least 0"),
        (lambda: jaxq.FloatFormat("x", 4, 24), "`mantissa_bits` must be at most 23"),
        (lambda: jaxq.FloatFormat("x", 9, 10), "at most 8 in a format of more than 16 bits"),
        (lambda: jaxq.FloatFormat("x", 4, 3, nan="fnuz"), "`nan` must be"),
        (lambda: jaxq.FloatFormat("x", 4, 3, signed=False, nan="negative_zero"), "signed"),
        (lambda: jaxq.IntFormat("x", 17), "`bits` must be 1 to 16"),
        (lambda: jaxq.IntFormat("x", 1, narrow=True), "2 signed bits"),
        (lambda: jaxq.CodebookFormat("x", (1.0, 1.0)), "two different values"),
        (lambda: jaxq.CodebookFormat("x", (1.0, math.inf)), "finite"),
        (lambda: jaxq.formats.p3109(16, 3), "`bits` must be an integer from 3 to 15"),
        (lambda: jaxq.formats.p3109(8, 8), "`precision` must be an integer from 1 to 7"),
        (lambda: jaxq.Recipe("float8_e4m3fn", scaling=jaxq.Affine()), "needs an integer format"),
        (lambda: jaxq.Stochastic(24), "`bits` must be an integer from 1 to 23"),
        (lambda: jaxq.float_grid(4, 3, inf=True, nan=False), "needs nan=True"),
    ],
)
def test_invalid_records_raise(make, text: str):
    with pytest.raises(ValueError, match=text):
        make()


def test_codes_with_the_precision_of_float32_decode_to_the_cast():
    fmt = jaxq.FloatFormat("e6m23", 6, 23)
    x = data.normal((64,)) * np.float32(2.0) ** np.arange(-32, 32)
    np.testing.assert_array_equal(jaxq.decode(jaxq.encode(x, fmt), fmt), jaxq.cast(x, fmt))


@pytest.mark.parametrize("bits", data.each(range(1, 17), (1, 3, 4, 8, 13)))
def test_packed_bits_match_numpy_and_unpack_again(bits: int):
    rng, lengths = np.random.default_rng(bits), (0, 13, 64)
    dtype = np.uint8 if bits <= 8 else np.uint16
    rows = [rng.integers(0, 2**bits, (3, n)).astype(dtype) for n in lengths]

    @jax.jit
    def both(rows):
        packed = [jaxq.numerics.pack(codes, bits) for codes in rows]
        back = [jaxq.numerics.unpack(p, bits, n) for p, n in zip(packed, lengths, strict=True)]
        return packed, back

    for codes, packed, unpacked in zip(rows, *both(rows), strict=True):
        n = codes.shape[-1]
        chex.assert_shape(packed, (3, -(-n * bits // 8)))
        # NumPy's own bit order is the oracle: one string of bits, the low bit first.
        spread = (codes[..., None] >> np.arange(bits, dtype=dtype)) & 1
        want = np.packbits(spread.reshape(3, -1).astype(np.uint8), axis=-1, bitorder="little")
        np.testing.assert_array_equal(packed, want.reshape(packed.shape))
        np.testing.assert_array_equal(unpacked, codes)


class TestBadInput:
    @pytest.mark.parametrize("x", [np.int32(3), 1j, "three", np.array([object()]), True])
    def test_unsupported_dtypes_raise(self, x):
        with pytest.raises(TypeError, match="`x` must be float16"):
            jaxq.cast(x, "int8")

    def test_missing_and_unused_keys_raise(self):
        key = np.asarray([0, 1], np.uint32)
        with pytest.raises(ValueError, match="got neither"):
            jaxq.cast(1.0, "int8", rounding="stochastic")
        with pytest.raises(ValueError, match="draws no random bits"):
            jaxq.cast(1.0, "int8", key=key)
        with pytest.raises(ValueError, match="of shape"):
            jaxq.cast(1.0, "int8", rounding="stochastic", random_bits=key)
        with pytest.raises(ValueError, match="at least 32 bits per element"):
            jaxq.cast(1.0, "int8", rounding="stochastic", random_bits=np.uint8(3))

    def test_unknown_names_raise(self):
        with pytest.raises(ValueError, match="No rounding mode"):
            jaxq.cast(1.0, "int8", rounding="nearest")
        with pytest.raises(ValueError, match="No gradient estimator"):
            jaxq.cast(1.0, "int8", gradient="ste")
        with pytest.raises(ValueError, match="`overflow` must be"):
            jaxq.cast(1.0, "int8", overflow="wrap")
        with pytest.raises(ValueError, match="Did you mean int8_tensor"):
            jaxq.fake_quant(1.0, "int8_tensr")

    def test_invalid_axes_raise(self):
        with pytest.raises(ValueError, match="axis 2 needs a tensor of at least 3 axes"):
            jaxq.fake_quant(jnp.ones((2, 2)), jaxq.Recipe("int8", jaxq.PerChannel((2,))))
        with pytest.raises(ValueError, match="must be distinct"):
            jaxq.fake_quant(jnp.ones((2, 2)), jaxq.Recipe("int8", jaxq.PerChannel((1, -1))))

    def test_invalid_codes_raise(self):
        with pytest.raises(TypeError, match="unsigned integers"):
            jaxq.decode(jnp.ones(3), "int8")
        with pytest.raises(ValueError, match="at least 16 bits"):
            jaxq.decode(jnp.uint8(3), "bfloat16")
        with pytest.raises(ValueError, match=r"must have 2 bytes .* got 1"):
            jaxq.numerics.unpack(jnp.zeros(1, jnp.uint8), 4, 3)
