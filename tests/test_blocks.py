"""Granularity, scale rules and scale formats against NumPy, exact fractions and gfloat."""

import fractions
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests.oracle import assert_same

E8M0 = "float8_e8m0fnu"


def weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]):
    """The index of every block of a tensor, and its place among the scales."""
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    for at in np.ndindex(*counts):
        yield at, tuple(slice(i * b, i * b + b) for i, b in zip(at, block, strict=True))


@pytest.mark.parametrize(
    ("granularity", "shape", "block"),
    [
        (jaxq.PerTensor(), (4, 6), (4, 6)),
        (jaxq.PerToken(), (2, 3, 8), (1, 1, 8)),
        (jaxq.PerChannel((0, -1)), (2, 3, 4), (1, 3, 1)),
        (jaxq.PerBlock(4), (3, 8), (1, 4)),
        (jaxq.PerBlock(2, axes=0), (6, 5), (2, 1)),
        (jaxq.PerBlock(2, axes=-2), (2, 6, 5), (1, 2, 1)),
        (jaxq.PerBlock((2, 3)), (2, 4, 9), (1, 2, 3)),
        (jaxq.PerBlock((2, 3), axes=(0, 2)), (4, 2, 9), (2, 1, 3)),
        (jaxq.PerBlock(4, pad=True), (3, 10), (1, 4)),
        (jaxq.PerBlock((4, 4), pad=True), (5, 7), (4, 4)),
        (jaxq.PerBlock(32, pad=True), (3, 10), (1, 10)),
    ],
)
def test_every_block_has_its_own_scale(granularity, shape, block):
    x = weights(shape)
    recipe = jaxq.Quantizer("int4", granularity)
    q = jaxq.quantize(x, recipe)
    y = np.asarray(q.dequantize())
    for at, where in blocks_of(shape, block):
        scale = np.abs(x[where]).max() / np.float32(7)
        assert q.scale[at] == scale
        assert_same(y[where], (np.rint(x[where] / scale) + 0.0).astype(np.float32) * scale)
    assert_same(jaxq.fake_quant(x, recipe), y)
    gradient = jax.grad(lambda x: jaxq.fake_quant(x, recipe).sum())(x)
    assert_same(gradient, np.ones(shape, np.float32))


def test_padding_counts_for_nothing():
    x = np.abs(weights((10,))) + 1  # Its zeros would move a mean and a minimum.
    mean = jaxq.Quantizer("ternary", jaxq.PerBlock(8, pad=True), range="absmean")
    want = [x[:8].mean(), x[8:].mean()]
    np.testing.assert_allclose(jaxq.quantize(x, mean).scale, want, rtol=1e-6)
    lowest = jaxq.Quantizer("uint8", jaxq.PerBlock(8, pad=True), zero_point="integer")
    assert_same(jaxq.fake_quant(x, lowest)[8:], jaxq.fake_quant(x[8:], lowest))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.PerBlock(0), "at least 1"),
        (lambda: jaxq.PerBlock((2, 2), axes=0), "one axis a size"),
        (lambda: jaxq.fake_quant(jnp.ones((2, 9)), "int4_g32"), "does not divide axis 1"),
        (lambda: jaxq.fake_quant(jnp.ones(()), "int8_token"), "at least 1 axes, got 0"),
        (lambda: jaxq.Quantizer("int4", jaxq.PerBlock(2), scale="floor"), "float8_e8m0fnu"),
        (lambda: jaxq.Quantizer("int4", scale="no"), "must be one of max, min, half"),
        (lambda: jaxq.Quantizer("int4", range="no"), "No calibrator is named"),
        (lambda: jaxq.Quantizer("int4", scale_format="int8"), "float format with a NaN"),
        (lambda: jaxq.Quantizer("nf4", scale="half"), "needs an integer format"),
        (lambda: jaxq.Quantizer("uint4", zero_point="integer", range="absmean"), "two sides"),
        (lambda: jaxq.Quantizer("uint4", zero_point="minimum"), "needs a `scale_format`, such as"),
        (lambda: jaxq.Quantizer("int4", zero_point="minimum"), "such as 'uint8'"),
        (lambda: jaxq.Quantizer("int4", second_level=jaxq.TensorScale()), "narrow scale format"),
        (lambda: jaxq.Quantizer("int4", range="extremum"), "need each other"),
        (lambda: jaxq.Quantizer("nf4", range="laplace"), "evenly spaced levels"),
        (lambda: jaxq.Quantizer("int4", search=(0.0,)), "positive factors"),
        (lambda: jaxq.Quantizer.from_json("[]"), "must be a recipe's"),
        (lambda: jaxq.Quantizer.from_json('{"type": "Nothing"}'), "no record is called"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_function_is_not_written_as_json():
    recipe = jaxq.Quantizer("int8", rounding=jaxq.rounding.ALL["up"])
    with pytest.raises(TypeError, match="functions cannot be written"):
        recipe.to_json()
    stochastic = jaxq.Quantizer("int8", rounding=jaxq.Stochastic(8, "B"))
    assert jaxq.Quantizer.from_json(stochastic.to_json()) == stochastic


def exponent(amax: float, fmt: str, rule: str) -> int:
    """The exponent of an MX scale by exact arithmetic."""
    element = jaxq.get_format(fmt)
    a = fractions.Fraction(amax)
    emax = math.floor(math.log2(element.max))

    def floor_log2(a: fractions.Fraction) -> int:
        guess = a.numerator.bit_length() - a.denominator.bit_length()
        return guess if fractions.Fraction(2) ** guess <= a else guess - 1

    if rule == "floor":
        e = floor_log2(a) - emax
    elif rule == "ceil":
        low = floor_log2(a)
        e = low + (fractions.Fraction(2) ** low < a) - emax
    elif rule == "even":
        digits = {"mxint8": 6}.get(fmt) or getattr(element, "mantissa_bits", 0)
        unit = fractions.Fraction(2) ** (floor_log2(a) - digits)
        e = floor_log2(math.floor(a / unit + fractions.Fraction(1, 2)) * unit) - emax
    else:
        product = fractions.Fraction(float(np.float32(amax) * np.float32(1 / element.max)))
        low = floor_log2(product)
        e = low + (fractions.Fraction(2) ** low < product)
    return min(max(e, -127), 127)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "mxint8"])
def test_powers_of_two_by_every_rule(fmt: str, rule: str):
    rng = np.random.default_rng(0)
    amax = np.exp2(rng.uniform(-125, 127.9, 60)).astype(np.float32)
    whole = np.exp2(rng.integers(-120, 127, 20)).astype(np.float32)
    edges = [np.nextafter(whole, np.float32(0)), whole, np.nextafter(whole, np.float32(np.inf))]
    edges += [whole * np.float32(1.9375), whole * np.float32(1.75), whole * np.float32(1.96875)]
    amax = np.concatenate([amax, *edges, np.float32([448, 150, 6, 57344, 127 / 64])])
    recipe = jaxq.Quantizer(fmt, jaxq.PerToken(), scale=rule, scale_format=E8M0)
    q = jaxq.quantize(amax[:, None], recipe)
    want = np.array([exponent(float(a), fmt, rule) for a in amax])
    np.testing.assert_array_equal(np.asarray(q.scale)[:, 0].astype(int) - 127, want)


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float4_e2m1fn"])
def test_the_rule_called_rne_is_a_cast_of_the_quotient(fmt: str):
    amax = np.exp2(np.random.default_rng(0).uniform(-100, 100, 200)).astype(np.float32)
    recipe = jaxq.Quantizer(fmt, jaxq.PerToken(), scale_format=E8M0)
    largest = np.float32(jaxq.get_format(fmt).max)
    want = (amax / largest).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(jaxq.quantize(amax[:, None], recipe).scale[:, 0], want)


def test_the_published_example_of_rceil():
    x = np.float32([[150.0, 1.0]])
    for rule, byte in (("rceil", 126), ("ceil", 127), ("floor", 126)):
        recipe = jaxq.Quantizer("float8_e4m3fn", jaxq.PerToken(), scale=rule, scale_format=E8M0)
        assert jaxq.quantize(x, recipe).scale.tolist() == [[byte]]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mxfp8_e4m3", "mxfp8_e4m3"),
        ("mxfp8_e5m2", "mxfp8_e5m2"),
        ("mxfp6_e2m3", "mxfp6_e2m3"),
        ("mxfp6_e3m2", "mxfp6_e3m2"),
        ("mxfp4", "mxfp4_e2m1"),
    ],
)
def test_mx_formats_are_those_of_gfloat(name: str, theirs: str):
    block = pytest.importorskip("gfloat.block")
    formats = pytest.importorskip("gfloat.formats")
    info = getattr(formats, f"format_info_{theirs}")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 32)) * np.exp2(rng.integers(-90, 100, (24, 1)))
    x = np.concatenate([x, x * np.exp2(rng.integers(-12, 1, x.shape))]).astype(np.float32)
    x[0] = 0
    want = [
        block.quantize_block(info, row.astype(np.float64), block.compute_scale_amax) for row in x
    ]
    assert_same(jaxq.fake_quant(x, name), np.array(want, np.float32), x)


@pytest.mark.parametrize("held", ["float16", "bfloat16", "float8_e4m3fn", "float7_ue4m3fn"])
def test_scales_in_other_formats(held: str):
    x = weights((6, 32))
    q = jaxq.quantize(x, jaxq.Quantizer("int4", jaxq.PerBlock(16), scale_format=held))
    exact = np.abs(x.reshape(6, 2, 16)).max(-1) / np.float32(7)
    scale = np.asarray(jaxq.cast(exact, held))
    assert_same(q.scales, scale)
    assert q.scale.dtype.itemsize == (1 if "8" in held or "7" in held else 2)
    units = np.clip(np.rint(x.reshape(6, 2, 16) / scale[..., None]), -8, 7)
    assert_same(q.dequantize(), ((units + 0.0) * scale[..., None]).astype("f4").reshape(6, 32))


def test_a_small_scale_does_not_become_zero():
    x = np.float32([[1e-9, -2e-9]])
    q = jaxq.quantize(x, jaxq.Quantizer("int8", jaxq.PerToken(), scale_format="float16"))
    assert float(q.scales[0, 0]) == jaxq.get_format("float16").tiny


def test_half_a_step_beyond():
    x = weights((5, 40))
    q = jaxq.quantize(x, jaxq.Quantizer("int4", jaxq.PerToken(), scale="half"))
    scale = np.abs(x).max(1, keepdims=True) / np.float32(7.5)
    assert_same(q.scale, scale)
    units = np.clip(np.rint(x / scale), -8, 7)
    assert units.min() == -8
    assert_same(q.dequantize(), (units + 0.0).astype(np.float32) * scale)


def test_by_the_reciprocal():
    x = weights((40, 64))
    q = jaxq.quantize(x, jaxq.Quantizer("int8", jaxq.PerToken(), reciprocal=True))
    inverse = np.float32(1) / (np.abs(x).max(1, keepdims=True) / np.float32(127))
    units = np.rint(x * inverse)
    np.testing.assert_array_equal(np.asarray(q.codes).view(np.int8), units)


def nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """TransformerEngine's arithmetic in NumPy: codes, block scales, the tensor's scale."""
    largest = np.finfo(np.float32).max
    f = np.float32
    with np.errstate(divide="ignore", over="ignore"):
        amax = np.abs(x).max()
        enlarge = min(f(448 * 6) / amax, largest) if amax else f(1)
        block = np.abs(x.reshape(-1, 16)).max(1, keepdims=True)
        scale = np.minimum(block * (enlarge * f(1 / 6)), f(448)).astype(ml_dtypes.float8_e4m3fn)
        inverse = np.minimum(f(1) / (scale.astype(f) * (f(1) / enlarge)), largest)
        units = np.clip(x.reshape(-1, 16) * inverse, f(-6), f(6)).astype(ml_dtypes.float4_e2m1fn)
    codes = units.view(np.uint8).reshape(x.shape)
    return codes, scale.view(np.uint8), np.float32(f(1) / enlarge)


@pytest.mark.parametrize("spread", [0, 8, 30])
def test_nvfp4_is_transformer_engines(spread: int):
    rng = np.random.default_rng(spread)
    x = rng.standard_normal((64, 128)) * np.exp2(rng.integers(-spread, 1, (64, 128)))
    x = (x * np.exp2(rng.integers(-spread, 1, (64, 1)))).astype(np.float32)
    x[5, :40] = 0
    for array in (x, x * np.float32(1e-15), x * np.float32(1e30), x * 0):
        q = jaxq.quantize(array, "nvfp4")
        codes, scale, tensor_scale = nvfp4(array)
        np.testing.assert_array_equal(q.unpack(), codes)
        np.testing.assert_array_equal(np.asarray(q.scale).ravel(), scale.ravel())
        assert_same(q.second[0], tensor_scale)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(-1, 16)
        step = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor_scale
        assert_same(q.dequantize(), (values * step).reshape(x.shape))


class TestIndexing:
    def test_rows_and_slices(self):
        x = weights((8, 6, 64))
        for granularity in (
            jaxq.PerTensor(),
            jaxq.PerChannel(-1),
            jaxq.PerChannel(0),
            jaxq.PerBlock(32),
            jaxq.PerBlock((4, 3), axes=(0, 1)),
        ):
            for fmt in ("int4", "float6_e2m3fn"):
                q = jaxq.quantize(x, jaxq.Quantizer(fmt, granularity))
                y = np.asarray(q.dequantize())
                for index in (0, -3, slice(4, 8), slice(0, 4), slice(4, None)):
                    assert_same(q[index].dequantize(), y[index])
                    assert q[index].shape == y[index].shape
                assert_same(q[5][1:5:3].dequantize(), y[5][1:5:3]) if granularity in (
                    jaxq.PerChannel(0),
                    jaxq.PerBlock(32),
                ) else None
                assert len(q) == 8
                assert len(list(q)) == 8

    def test_what_cannot_be_indexed(self):
        q = jaxq.quantize(np.ones((8, 4), "f4"), jaxq.Quantizer("int4", jaxq.PerBlock(4, axes=0)))
        with pytest.raises(IndexError, match="out of range"):
            q[8]
        with pytest.raises(ValueError, match="whole blocks of 4 rows"):
            q[1:5]
        with pytest.raises(TypeError, match="two axes"):
            list(q[0])

    def test_empty(self):
        for recipe in ("int4_g32", "int4_channel", "uint4_channel", "mxfp4", "int4"):
            for shape in ((3, 0), (0, 32), (0,)):
                q = jaxq.quantize(jnp.zeros(shape), recipe)
                assert q.shape == shape
                assert q.dequantize().shape == shape
                assert jaxq.fake_quant(jnp.zeros(shape), recipe).shape == shape

    def test_scalars(self):
        q = jaxq.quantize(jnp.float32(-3), "int4")
        assert q.shape == ()
        assert_same(q.dequantize(), np.float32(-3))
        with pytest.raises(TypeError, match="scalar"):
            len(q)
