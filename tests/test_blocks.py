"""Granularities, scale rules and scale formats against NumPy, exact fractions and gfloat."""

import fractions
import math

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import MX, Affine, Symmetric
from jaxq._jax.serialization import to_json
from jaxq.recipes import ScaleAndMin, SignedScale
from tests import data
from tests.oracle import assert_same

E8M0 = "float8_e8m0fnu"


def weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]):
    """Yields the index of every block's scale and the slices of the block."""
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    for at in np.ndindex(*counts):
        yield at, tuple(slice(i * b, i * b + b) for i, b in zip(at, block, strict=True))


@pytest.mark.parametrize(
    ("granularity", "shape", "block"),
    [
        data.slow(jaxq.PerTensor(), (4, 6), (4, 6)),
        (jaxq.PerToken(), (2, 3, 8), (1, 1, 8)),
        (jaxq.PerChannel((0, -1)), (2, 3, 4), (1, 3, 1)),
        data.slow(jaxq.PerBlock(4), (3, 8), (1, 4)),
        data.slow(jaxq.PerBlock(2, axes=0), (6, 5), (2, 1)),
        data.slow(jaxq.PerBlock(2, axes=-2), (2, 6, 5), (1, 2, 1)),
        data.slow(jaxq.PerBlock((2, 3)), (2, 4, 9), (1, 2, 3)),
        (jaxq.PerBlock((2, 3), axes=(0, 2)), (4, 2, 9), (2, 1, 3)),
        data.slow(jaxq.PerBlock(4, pad=True), (3, 10), (1, 4)),
        (jaxq.PerBlock((4, 4), pad=True), (5, 7), (4, 4)),
        data.slow(jaxq.PerBlock(32, pad=True), (3, 10), (1, 10)),
    ],
)
def test_every_block_has_its_own_scale(granularity, shape, block):
    x = weights(shape)
    recipe = jaxq.Recipe("int4", granularity)
    q = jaxq.quantize(x, recipe)
    y = np.asarray(q.dequantize())
    for at, where in blocks_of(shape, block):
        scale = np.abs(x[where]).max() / np.float32(7)
        assert q.scale[at] == scale
        assert_same(y[where], (np.rint(x[where] / scale) + 0.0).astype(np.float32) * scale)
    assert_same(jaxq.fake_quant(x, recipe), y)
    gradient = jax.grad(lambda x: jaxq.fake_quant(x, recipe).sum())(x)
    assert_same(gradient, np.ones(shape, np.float32))


def test_padding_does_not_affect_scales():
    x = np.abs(weights((10,))) + 1  # Zeros of the padding would change the mean and the minimum.
    mean = jaxq.Recipe("ternary", jaxq.PerBlock(8, pad=True), Symmetric("absmean"))
    want = [x[:8].mean(), x[8:].mean()]
    np.testing.assert_allclose(jaxq.quantize(x, mean).scale, want, rtol=1e-6)
    lowest = jaxq.Recipe("uint8", jaxq.PerBlock(8, pad=True), Affine())
    assert_same(jaxq.fake_quant(x, lowest)[8:], jaxq.fake_quant(x[8:], lowest))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.PerBlock(0), "at least 1"),
        (lambda: jaxq.PerBlock((2, 2), axes=0), "one axis per size"),
        (lambda: jaxq.fake_quant(jnp.ones((2, 9)), "int4_g32"), "does not divide axis 1"),
        (lambda: jaxq.fake_quant(jnp.ones(()), "int8_token"), "at least 1 axes, got 0"),
        (lambda: jaxq.Recipe("int4", scaling=Symmetric), "must be a record of jaxq.recipes"),
        (lambda: jaxq.Recipe("int4", 32), "such as PerTensor"),
        (lambda: Symmetric(rule="floor"), "one of max, half, got 'floor'. Use MX"),
        (lambda: MX("half"), "one of floor, ceil, even, rceil, max, got 'half'"),
        (lambda: Symmetric("no"), "No calibrator is named"),
        (lambda: Symmetric(scale_format="int8"), "float format with a NaN"),
        (lambda: Symmetric(scale_format=E8M0), "Use MX"),
        (lambda: Symmetric(search=(0.0,)), "a tuple of positive numbers"),
        (lambda: Affine("absmean"), "measures both extremes"),
        (lambda: SignedScale(scale_format="float7_ue4m3fn"), "must have a sign"),
        (lambda: jaxq.Recipe("nf4", scaling=Symmetric(rule="half")), "needs an integer format"),
        (lambda: jaxq.Recipe("posit8", scaling=MX("even")), "needs an integer or float format"),
        (lambda: jaxq.Recipe("nf4", scaling=Symmetric("laplace")), "evenly spaced levels"),
        (lambda: jaxq.Recipe("nf4", scaling=Affine()), "such as 'uint8'"),
        (lambda: jaxq.Recipe("uint4", scaling=SignedScale()), "such as 'int4'"),
        (lambda: jaxq.Recipe("int4", scaling=ScaleAndMin()), "such as 'uint4'"),
        (
            lambda: jaxq.Recipe("uint4", scaling=ScaleAndMin(scale_format="float32")),
            "exact in float32, got 'float32'. Use 'float16'",
        ),
        (lambda: jaxq.Recipe.from_json("[]"), "must describe a recipe"),
        (lambda: jaxq.Recipe.from_json('{"type": "Nothing"}'), "must name records"),
    ],
)
def test_invalid_arguments_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_functions_have_no_json():
    recipe = jaxq.Recipe("int8", rounding=jaxq.numerics.ROUNDINGS["up"])
    with pytest.raises(TypeError, match="got a function"):
        recipe.to_json()
    with pytest.raises(TypeError, match=r"numbers, strings or None, got dict. Convert"):
        to_json("save", ({"a": 1},), {})
    stochastic = jaxq.Recipe("int8", rounding=jaxq.Stochastic(8, "B"))
    assert jaxq.Recipe.from_json(stochastic.to_json()) == stochastic


def exponent(amax: float, fmt: str, rule: str) -> int:
    """Returns the exponent of an MX scale, computed with exact fractions."""
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
        digits = {"ocp_int8": 6}.get(fmt) or getattr(element, "mantissa_bits", 0)
        unit = fractions.Fraction(2) ** (floor_log2(a) - digits)
        e = floor_log2(math.floor(a / unit + fractions.Fraction(1, 2)) * unit) - emax
    else:
        product = fractions.Fraction(float(np.float32(amax) * np.float32(1 / element.max)))
        low = floor_log2(product)
        e = low + (fractions.Fraction(2) ** low < product)
    return min(max(e, -127), 127)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize(
    "fmt",
    [data.slow("float8_e4m3fn"), data.slow("float8_e5m2"), "float4_e2m1fn", "ocp_int8"],
)
def test_power_of_two_rules_match_exact_arithmetic(fmt: str, rule: str):
    rng = np.random.default_rng(0)
    amax = np.exp2(rng.uniform(-125, 127.9, 60)).astype(np.float32)
    whole = np.exp2(rng.integers(-120, 127, 20)).astype(np.float32)
    edges = [np.nextafter(whole, np.float32(0)), whole, np.nextafter(whole, np.float32(np.inf))]
    edges += [whole * np.float32(1.9375), whole * np.float32(1.75), whole * np.float32(1.96875)]
    amax = np.concatenate([amax, *edges, np.float32([448, 150, 6, 57344, 127 / 64])])
    recipe = jaxq.Recipe(fmt, jaxq.PerToken(), MX(rule))
    q = jaxq.quantize(amax[:, None], recipe)
    want = np.array([exponent(float(a), fmt, rule) for a in amax])
    np.testing.assert_array_equal(np.asarray(q.scale)[:, 0].astype(int) - 127, want)


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float4_e2m1fn"])
def test_max_rule_casts_quotient_to_e8m0(fmt: str):
    amax = np.exp2(np.random.default_rng(0).uniform(-100, 100, 200)).astype(np.float32)
    recipe = jaxq.Recipe(fmt, jaxq.PerToken(), MX("max"))
    largest = np.float32(jaxq.get_format(fmt).max)
    want = (amax / largest).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(jaxq.quantize(amax[:, None], recipe).scale[:, 0], want)


def test_rceil_matches_published_example():
    x = np.float32([[150.0, 1.0]])
    for rule, byte in (("rceil", 126), ("ceil", 127), ("floor", 126)):
        recipe = jaxq.Recipe("float8_e4m3fn", jaxq.PerToken(), MX(rule))
        assert jaxq.quantize(x, recipe).scale.tolist() == [[byte]]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mxfp8_e4m3", "mxfp8_e4m3"),
        data.slow("mxfp8_e5m2", "mxfp8_e5m2"),
        data.slow("mxfp6_e2m3", "mxfp6_e2m3"),
        data.slow("mxfp6_e3m2", "mxfp6_e3m2"),
        ("mxfp4", "mxfp4_e2m1"),
    ],
)
def test_mx_formats_match_gfloat(name: str, theirs: str):
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


@pytest.mark.parametrize(
    "scale_format", ["float16", data.slow("bfloat16"), "float8_e4m3fn", data.slow("float7_ue4m3fn")]
)
def test_scales_are_rounded_to_their_format_and_stored_in_it(scale_format: str):
    x = weights((6, 32))
    q = jaxq.quantize(
        x, jaxq.Recipe("int4", jaxq.PerBlock(16), Symmetric(scale_format=scale_format))
    )
    exact = np.abs(x.reshape(6, 2, 16)).max(-1) / np.float32(7)
    scale = np.asarray(jaxq.cast(exact, scale_format))
    assert_same(q.scales, scale)
    assert q.scale.dtype.itemsize == (1 if "8" in scale_format or "7" in scale_format else 2)
    units = np.clip(np.rint(x.reshape(6, 2, 16) / scale[..., None]), -8, 7)
    assert_same(q.dequantize(), ((units + 0.0) * scale[..., None]).astype("f4").reshape(6, 32))


def test_small_scale_stays_nonzero():
    x = np.float32([[1e-9, -2e-9]])
    q = jaxq.quantize(x, jaxq.Recipe("int8", jaxq.PerToken(), Symmetric(scale_format="float16")))
    assert float(q.scales[0, 0]) == jaxq.get_format("float16").min_positive


def test_half_rule_divides_amax_by_half_code_more():
    x = weights((5, 40))
    q = jaxq.quantize(x, jaxq.Recipe("int4", jaxq.PerToken(), Symmetric(rule="half")))
    scale = np.abs(x).max(1, keepdims=True) / np.float32(7.5)
    assert_same(q.scale, scale)
    units = np.clip(np.rint(x / scale), -8, 7)
    assert units.min() == -8
    assert_same(q.dequantize(), (units + 0.0).astype(np.float32) * scale)


def test_reciprocal_multiplies_by_inverse_scale():
    x = weights((40, 64))
    q = jaxq.quantize(x, jaxq.Recipe("int8", jaxq.PerToken(), Symmetric(reciprocal=True)))
    inverse = np.float32(1) / (np.abs(x).max(1, keepdims=True) / np.float32(127))
    units = np.rint(x * inverse)
    np.testing.assert_array_equal(np.asarray(q.codes).view(np.int8), units)


def nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Returns codes, block scales and tensor scale by TransformerEngine's arithmetic in NumPy."""
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


@pytest.mark.parametrize("octaves", [0, 8, 30])
def test_nvfp4_matches_transformer_engine(octaves: int):
    rng = np.random.default_rng(octaves)
    x = rng.standard_normal((64, 128)) * np.exp2(rng.integers(-octaves, 1, (64, 128)))
    x = (x * np.exp2(rng.integers(-octaves, 1, (64, 1)))).astype(np.float32)
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
    @pytest.mark.parametrize(
        ("fmt", "granularity"),
        [
            ("int4", jaxq.PerBlock(32)),
            ("float6_e2m3fn", jaxq.PerBlock((4, 3), axes=(0, 1))),
            data.slow("float6_e2m3fn", jaxq.PerBlock(32)),
            data.slow("int4", jaxq.PerBlock((4, 3), axes=(0, 1))),
            *(
                data.slow(fmt, granularity)
                for fmt in ("int4", "float6_e2m3fn")
                for granularity in (jaxq.PerTensor(), jaxq.PerChannel(-1), jaxq.PerChannel(0))
            ),
        ],
    )
    def test_indexing_selects_rows_and_slices(self, fmt, granularity):
        q = jaxq.quantize(weights((8, 6, 64)), jaxq.Recipe(fmt, granularity))
        y = np.asarray(q.dequantize())
        for index in (0, -3, slice(4, 8), slice(0, 4), slice(4, None)):
            assert_same(q[index].dequantize(), y[index])
            chex.assert_shape(q[index], y[index].shape)
        if granularity in (jaxq.PerChannel(0), jaxq.PerBlock(32)):
            assert_same(q[5][1:5:3].dequantize(), y[5][1:5:3])
        assert len(q) == 8
        assert len(list(q)) == 8

    def test_unsupported_indices_raise(self):
        q = jaxq.quantize(np.ones((8, 4), "f4"), jaxq.Recipe("int4", jaxq.PerBlock(4, axes=0)))
        with pytest.raises(IndexError, match="out of range"):
            q[8]
        with pytest.raises(ValueError, match="whole blocks of 4 rows"):
            q[1:5]
        with pytest.raises(TypeError, match="two axes"):
            list(q[0])
        for index in ((slice(None), 0), None, ..., "codes", np.array([0, 1]), np.ones(8, bool)):
            with pytest.raises(
                TypeError, match="Quantized: an index must be an integer or a slice"
            ):
                q[index]

    def test_empty_tensors_stay_empty(self):
        for recipe in ("int4_g32", "int4_channel", "uint4_channel", "mxfp4", "int4_tensor"):
            for shape in ((3, 0), (0, 32), (0,)):
                q = jaxq.quantize(jnp.zeros(shape), recipe)
                chex.assert_shape(q, shape)
                chex.assert_shape(q.dequantize(), shape)
                chex.assert_shape(jaxq.fake_quant(jnp.zeros(shape), recipe), shape)

    def test_scalar_tensors_have_no_length(self):
        q = jaxq.quantize(jnp.float32(-3), "int4_tensor")
        chex.assert_shape(q, ())
        assert_same(q.dequantize(), np.float32(-3))
        with pytest.raises(TypeError, match="scalar"):
            len(q)
