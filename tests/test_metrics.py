"""Metrics against NumPy in float64, on difficult data, and their memory use."""

import math

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import analysis
from jaxq.analysis import compare, diagnostics, quantization_error, rounding_limits
from jaxq.formats import FORMATS
from jaxq.recipes import PerBlock, PerChannel, Sigmas
from tests import data

FORMATS = [fmt for name, fmt in FORMATS.items() if "takum" not in name]
SEED = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _reset_seed():
    global SEED
    SEED = np.random.default_rng(0)


def pairs(*shape: int, noise: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    x = SEED.standard_normal(shape).astype(np.float32)
    return x, (x + noise * SEED.standard_normal(shape)).astype(np.float32)


def reference(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Returns the fields of a Comparison of finite numbers, computed in float64."""
    x, y = (np.asarray(a).astype(np.result_type(a, np.float64)).ravel() for a in (x, y))
    e, some = np.abs(y - x), x != 0
    power, mse = (x**2).mean(), (e**2).mean()
    relative = (e[some] / np.abs(x[some])).mean()
    cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    with np.errstate(divide="ignore"):
        sqnr = 10 * np.log10(power) - 10 * np.log10(mse)
    return [mse, e.max(), e.mean(), relative, power, sqnr, cosine, 0, 0]


def assert_close(got, want) -> None:
    for name, a, b in zip(got._fields, got, want, strict=True):
        # The relative error of a sum is below 5e-7. A cosine has that of one sum and half that of
        # two others; an SQNR has that of two (2e-6 dB each) and its own rounding at up to 180 dB.
        special = {"sqnr_db": 2e-5, "cosine": 1.2e-6 * max(abs(b), 1e-30)}
        bound = special.get(name, 5e-7 * max(abs(b), 1e-30))
        chex.assert_type(a, jnp.float32)
        assert abs(float(a) - b) <= bound, name


class TestCompare:
    @pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-7])
    def test_comparison_of_many_numbers_matches_float64(self, noise: float):
        x, y = pairs(2**22, noise=noise)
        assert_close(compare(x, y), reference(x, y))

    def test_sqnr_above_150_db_matches_float64(self):
        x = SEED.standard_normal(2**20).astype(np.float32)
        y = x.copy()
        y[::4096] = np.nextafter(y[::4096], np.float32(np.inf))
        want = reference(x, y)
        assert want[5] > 170
        assert_close(compare(x, y), want)

    def test_metrics_of_channels_and_blocks_match_their_parts(self):
        x, y = pairs(600, 12)
        got = compare(x, y, per=PerChannel((-1,)))
        chex.assert_shape(got.mse, (1, 12))
        for i in range(12):
            part = type(got)(*(field[0, i] for field in got))
            assert_close(part, reference(x[:, i], y[:, i]))
        got = compare(x, y, per=PerBlock((256, 5), pad=True))
        chex.assert_shape(got.mse, (3, 3))
        part = type(got)(*(field[2, 2] for field in got))
        assert_close(part, reference(x[512:, 10:], y[512:, 10:]))

    def test_comparison_takes_all_dtypes(self):
        x, y = pairs(64, 3)
        dtypes = (np.float16, ml_dtypes.bfloat16, np.float32)
        for a, b in zip(dtypes, (*dtypes[1:], dtypes[0]), strict=True):
            left, right = x.astype(a), y.astype(b)
            assert_close(compare(left, right), reference(left, right))
        with jax.enable_x64(True):
            x64 = SEED.standard_normal(1000)
            got = compare(x64, x64 * (1 + 1e-12))
            chex.assert_type(got.mse, jnp.float64)
            assert float(got.sqnr_db) == pytest.approx(240, abs=1e-3)
            assert float(compare(x64, x64.astype(np.float32)).sqnr_db) > 140

    @pytest.mark.parametrize("exponent", [-100, -60, 60, 120])
    def test_metrics_are_scale_invariant(self, exponent: int):
        """Uses numbers near 2^-100, whose squares underflow in float32."""
        x, y = (np.clip(a, -4, 4) for a in pairs(5000))
        a, b = (np.ldexp(v, exponent) for v in (x, y))
        got, want = compare(a, b), compare(x, y)
        for name in ("sqnr_db", "cosine", "mean_relative_error"):
            assert getattr(got, name) == getattr(want, name)
        assert got.max_error == np.ldexp(np.float32(want.max_error), exponent)

    def test_metrics_match_extended_precision_at_every_magnitude(self):
        """Compares huge, subnormal and mixed magnitudes with NumPy's extended precision."""
        n = 512
        base, noise = SEED.standard_normal((2, n))
        sizes = {str(size): size for size in (1e-43, 1e-40, 1e-37, 1e-22, 1e20, 3e37)}
        sizes["mixed"] = 2.0 ** SEED.integers(-148, 120, n)
        sizes["two"] = np.where(SEED.random(n) < 0.5, 1e37, 1e-40)
        fields = analysis.Comparison._fields
        for label, size in sizes.items():
            x, y = np.float32(base * size), np.float32(base * size * (1 + noise / 10))
            least = np.abs(x).argmin()
            single = np.where(np.arange(n) == least, 2 * x, x)
            ys = {"near": y, "zero": 0 * x, "minus": -x, "unit": np.float32(base), "one": single}
            for kind, other in ys.items():
                if kind == "one" and x[least] == 0:
                    continue
                got = compare(x, other)
                with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                    want = reference(x.astype(np.longdouble), other.astype(np.longdouble))
                    want = np.array(want).astype(np.float32)
                for name, a, b in zip(fields, got, want, strict=True):
                    if np.isfinite(b):  # Otherwise the result overflows float32.
                        slack = 2e-45 if name not in ("sqnr_db", "cosine") else 2e-5
                        # Sums of 256 equal ratios may round in the same direction.
                        bound = 256 * 2.0**-25 * abs(b) + slack
                        assert abs(float(a) - float(b)) <= bound, (label, kind, name)
                    elif not np.isnan(b):
                        assert float(a) == b, (label, kind, name)
            assert float(compare(x, 0 * x).sqnr_db) == 0
            kl = analysis.kl_of_values(x, y)
            unit = analysis.kl_of_values(np.float32(base), np.float32(base * (1 + noise / 10)))
            if np.ndim(size) == 0 and size > 1e-38:
                assert float(kl) == pytest.approx(float(unit), rel=0.1)
            assert float(kl) > 0

    def test_special_values_have_documented_metrics(self):
        nan, inf = np.nan, np.inf
        fields = compare(np.float32([]), np.float32([]))._fields
        cases = {
            "empty": ([], [], [0, 0, 0, 0, 0, inf, 1, 0, 0]),
            "zeros": ([0, 0], [0, -0.0], [0, 0, 0, 0, 0, inf, 1, 0, 0]),
            "error of zeros": ([0, 0], [0, 2], [2, 2, 1, 0, 0, -inf, 0, 0, 0]),
            "zeros for numbers": ([2, 0], [0, 0], [2, 2, 1, 1, 2, 0, 0, 0, 0]),
            "equal": ([3, -4], [3, -4], [0, 0, 0, 0, 12.5, inf, 1, 0, 0]),
            "lost": ([1, 2], [1, nan], [inf, inf, inf, inf, 2.5, -inf, 1, 0.5, 0]),
            "overflow": ([2, 2], [2, inf], [inf, inf, inf, inf, 4, -inf, 1, 0.5, 0]),
            "skipped": ([nan, inf, 2, -inf], [1, inf, 2, nan], [0, 0, 0, 0, 4, inf, 1, 0, 0.75]),
            "nothing finite": ([nan], [nan], [0, 0, 0, 0, 0, inf, 1, 0, 1]),
        }
        for label, (x, y, want) in cases.items():
            got = compare(np.float32(x), np.float32(y))
            for name, a, b in zip(fields, got, want, strict=True):
                assert float(a) == pytest.approx(b, rel=1e-6, abs=1e-6), (label, name)

    def test_compare_works_under_vmap_and_has_a_zero_gradient(self):
        x, y = pairs(4, 8)
        rows = jax.jit(jax.vmap(compare))(x, y)
        chex.assert_shape(rows.mse, (4,))
        assert float(rows.mse[1]) == pytest.approx(reference(x[1], y[1])[0], rel=1e-6)
        assert float(compare(2.0 * np.ones((), np.float32), np.float32(1)).mse) == 1
        assert (jax.grad(lambda y: compare(x, y).mse)(y) == 0).all()

    def test_invalid_arguments_raise(self):
        x = np.ones((2, 3), np.float32)
        with pytest.raises(ValueError, match=r"shape of `x`, \(2, 3\), got \(3,\)"):
            compare(x, np.ones(3, np.float32))
        with pytest.raises(TypeError, match="got int32"):
            compare(x, np.ones((2, 3), np.int32))
        with pytest.raises(ValueError, match="axis 2"):
            compare(x, x, per=PerChannel((2,)))

    def test_needs_no_temporary_of_tensor_size(self):
        x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        memory = jax.jit(compare).lower(x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < x.size  # Less than one byte per pair of numbers.


class TestDivergences:
    def test_kl_of_logits_matches_float64(self):
        x, y = pairs(5, 7, noise=0.5)
        p, q = (np.exp(a.astype(np.float64)) for a in (x, y))
        p, q = (a / a.sum(1, keepdims=True) for a in (p, q))
        want = (p * np.log(p / q)).sum(1)
        np.testing.assert_allclose(analysis.kl_of_logits(x, y), want, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(analysis.kl_of_logits(x.T, y.T, axis=0), want, rtol=1e-5)

    def test_kl_of_infinite_logits_follows_its_limits(self):
        inf = np.inf
        x = np.float32([[0, -inf], [0, 0], [1, np.nan]])
        y = np.float32([[0, 0], [0, -inf], [1, 1]])
        got = np.asarray(analysis.kl_of_logits(x, y))
        assert got[0] == pytest.approx(math.log(2))
        assert got[1] == inf
        assert np.isnan(got[2])
        assert float(analysis.kl_of_logits(np.float32([]), np.float32([]))) == 0

    def test_kl_of_values_matches_histograms(self):
        x, y = pairs(1000, 2, noise=0.3)
        for i, got in enumerate(analysis.kl_of_values(x, y, per=PerChannel((1,)), bins=20)[0]):
            a, b = x[:, i], y[:, i]
            edges = np.linspace(a.min(), a.max(), 21)
            counts = [np.histogram(np.clip(v, a.min(), a.max()), edges)[0] + 0.5 for v in (a, b)]
            p, q = (c / c.sum() for c in counts)
            assert float(got) == pytest.approx((p * np.log(p / q)).sum(), rel=0.02)

    def test_kl_of_empty_or_equal_constants_is_zero(self):
        for x in ([], [np.nan, np.inf], [2.0, 2.0]):
            assert float(analysis.kl_of_values(np.float32(x), np.float32(x))) == 0

    def test_one_bin_raises(self):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            analysis.kl_of_values(np.ones(2, np.float32), np.ones(2, np.float32), bins=1)


def causes(x: np.ndarray, values: np.ndarray, step: np.ndarray | float) -> dict[str, float]:
    """Returns the fields of a QuantizationError for rounding to step times values."""
    x = x.astype(np.float64)
    u = x / step
    low, high = values[0] - np.diff(values)[0] / 2, values[-1] + np.diff(values)[-1] / 2
    near = values[np.abs(u[..., None] - values).argmin(-1)]
    clipped, y = (u > high) | (u < low), near * step
    flushed = (x != 0) & (near == 0) & ~clipped
    square = (y - x) ** 2
    return {
        "clipped": clipped.mean(),
        "flushed": flushed.mean(),
        "rounded": ((np.abs(y - x) > 1e-9) & ~clipped & ~flushed).mean(),
        "clip_mse": (square * clipped).mean(),
        "rounding_mse": (square * ~clipped).mean(),
    }


class TestQuantizationError:
    @pytest.mark.parametrize(
        "name",
        data.each(
            ["float4_e2m1fn", "float6_e3m2fn", "int4", "ocp_int8", "nf4", "posit8", "uint4"],
            ["float4_e2m1fn", "posit8"],
        ),
    )
    def test_errors_of_casts_match_numpy(self, name: str):
        x = np.concatenate([SEED.standard_normal(500) * s for s in (0.02, 1, 20)])
        x = x.astype(np.float32)
        want = causes(x, jaxq.get_format(name).values, 1.0)
        if name == "posit8":
            want["flushed"] = 0  # Posits never round to 0.
            small = np.abs(x) < 2.0**-24
            assert not small.any()
        got = quantization_error(x, jaxq.get_format(name))
        for field, value in want.items():
            assert float(getattr(got, field)) == pytest.approx(value, rel=1e-5), field

    @pytest.mark.parametrize(
        ("name", "step"),
        [
            data.slow("int4_g32", lambda a: np.float32(a) / np.float32(7)),
            data.slow("mxfp4", lambda a: np.exp2(np.floor(np.log2(a)) - 2)),
            ("nf4_g64", lambda a: a),
        ],
    )
    def test_errors_of_recipes_match_comparison(self, name: str, step):
        x = SEED.standard_normal((8, 64)).astype(np.float32)
        recipe = jaxq.get_recipe(name)
        blocks = x.reshape(-1, np.prod(recipe.cut(x.shape).block))
        scale = step(np.abs(blocks).max(1, keepdims=True)).astype(np.float64)
        want = causes(blocks, recipe.element.values, scale)
        del want["rounded"]  # It depends on the last bit of scaled numbers.
        got = quantization_error(x, name)
        for field, value in want.items():
            assert float(getattr(got, field)) == pytest.approx(value, rel=1e-5, abs=1e-9), field
        assert float(got.errors.mse) == compare(x, jaxq.fake_quant(x, name)).mse
        assert 0.4 < float(got.max_ulp) <= (0.50001 if name == "int4_g32" else 1.0)

    def test_errors_per_block_match_those_of_each_block(self):
        x = SEED.standard_normal((4, 64)).astype(np.float32)
        recipe = jaxq.get_recipe("mxfp4")
        got = quantization_error(x, recipe, per=recipe.granularity)
        assert got.clipped.shape == got.errors.sqnr_db.shape == (4, 2)
        one = quantization_error(x[1:2, 32:], recipe)
        assert got.clipped[1, 1] == one.clipped
        assert float(got.errors.mse[1, 1]) == pytest.approx(float(one.errors.mse), rel=1e-6)

    def test_clipped_numbers_lie_beyond_the_codes_around_a_zero_point(self):
        x = (SEED.standard_normal((16, 32)) + 0.5).astype(np.float32)
        recipe = jaxq.Recipe("uint4", scaling=jaxq.Affine(Sigmas(1.0)))
        q = jaxq.quantize(x, recipe)
        units = x / np.float64(q.scale[0, 0]) + int(np.asarray(q.zero_point)[0, 0])
        clipped = (units > 15.5) | (units < -0.5)
        assert 0.2 < clipped.mean() < 0.5
        square = (np.asarray(q.dequantize(), np.float64) - x) ** 2
        got = quantization_error(x, recipe)
        assert float(got.clipped) == clipped.mean() == diagnostics(x, recipe).overflow
        assert float(got.clip_mse) == pytest.approx((square * clipped).mean(), rel=1e-5)
        assert float(got.rounding_mse) == pytest.approx((square * ~clipped).mean(), rel=1e-5)

    @pytest.mark.parametrize(
        "recipe",
        [
            data.slow("uint4_channel"),
            data.slow("q4_1"),
            data.slow("nvfp4"),
            jaxq.Recipe("int4", outliers=jaxq.Outliers(0.01)),
        ],
        ids=str,
    )
    def test_parts_add_up(self, recipe):
        x = SEED.standard_normal((128, 256)).astype(np.float32)
        got = quantization_error(x, recipe)
        y = np.asarray(jaxq.fake_quant(x, recipe), np.float64)
        mse = np.square(y - x).mean()
        assert float(got.errors.mse) == pytest.approx(mse, rel=1e-6)
        assert float(got.clip_mse + got.rounding_mse) == pytest.approx(mse, rel=1e-6)
        shares = [float(v) for v in (got.clipped, got.flushed, got.rounded)]
        assert sum(shares) == pytest.approx((y != x).mean(), abs=1e-6)
        assert shares[0] < 0.01

    def test_causes_of_special_values_are_documented(self):
        x = np.float32([np.nan, np.inf, -np.inf, 0.0, 1e-9, 1e9, 1.0])
        got = quantization_error(x, "float8_e5m2")
        assert float(got.clipped) == 0.25
        assert float(got.flushed) == 0.25
        assert float(got.errors.lost) == 0.25
        assert float(got.clip_mse) == np.inf
        assert float(got.rounding_mse) == pytest.approx(0, abs=1e-15)
        for field in jax.tree.leaves(quantization_error(np.float32([]), "int8_tensor")):
            assert not np.isnan(field)
        poisoned = quantization_error(np.float32([np.nan, 1.0]), "int8_tensor")
        assert float(poisoned.errors.lost) == 1

    def test_stochastic_recipes_take_a_key(self):
        recipe = jaxq.Recipe("int4", rounding="stochastic")
        x = SEED.standard_normal(64).astype(np.float32)
        key = jax.random.key(0)
        got = quantization_error(x, recipe, key=key)
        assert got.errors.mse == compare(x, jaxq.fake_quant(x, recipe, key=key)).mse
        with pytest.raises(ValueError, match="key"):
            quantization_error(x, recipe)


class TestUlps:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_matches_numpy_spacing(self, dtype):
        x = (SEED.standard_normal(500) * np.exp2(SEED.integers(-10, 10, 500))).astype(dtype)
        y = np.nextafter(np.nextafter(x, dtype(100)), dtype(100))
        want = np.abs(y.astype(np.float64) - x) / np.spacing(np.abs(x)).astype(np.float64)
        got = analysis.ulp_error(x, y, np.dtype(dtype).name)
        np.testing.assert_array_equal(got, want.astype(np.float32))

    def test_ulps_of_integers_codebooks_and_special_values(self):
        x = np.float32([0.3, 100.0, 0.0, np.inf, np.nan, 1.0])
        y = np.float32([1.3, 101.0, 0.5, np.inf, np.nan, np.inf])
        got = analysis.ulp_error(x, y, "int4").tolist()
        assert got == pytest.approx([1, 1, 0.5, 0, 0, np.inf])
        near = analysis.ulp_error(np.float32([-0.9]), np.float32([-0.65]), "nf4")
        assert float(near[0]) == pytest.approx(0.25 / 0.25)  # The ulp: two levels differ by 0.304.


class TestCodes:
    @pytest.mark.parametrize(
        "name", ["nf4_g64", data.slow("int8_channel"), data.slow("uint4_channel"), "int3_g128"]
    )
    def test_usage_counts_codes(self, name: str):
        x = SEED.standard_normal((4, 128)).astype(np.float32)
        q = jaxq.quantize(x, name)
        bits = q.recipe.element.bits
        want = np.bincount(np.asarray(q.unpack()).ravel(), minlength=2**bits)
        share = want[want > 0] / want.sum()
        for usage in (analysis.code_usage(x, name), analysis.code_usage(q)):
            np.testing.assert_array_equal(usage.counts, want)
            assert int(usage.used) == (want > 0).sum()
            assert float(usage.entropy) == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-5)
        rows = analysis.code_usage(q, per=PerBlock((1, 100), pad=True))
        chex.assert_shape(rows.counts, (4, 2, 2**bits))
        np.testing.assert_array_equal(rows.counts.sum((0, 1)), want)

    def test_empty_tensor_uses_no_code(self):
        empty = analysis.code_usage(np.float32([]), "int4")
        assert (int(empty.used), float(empty.entropy)) == (0, 0)

    def test_usage_without_a_recipe_or_of_many_bits_raises(self):
        with pytest.raises(ValueError, match="`recipe` must be given"):
            analysis.code_usage(np.ones(2, np.float32))
        with pytest.raises(ValueError, match="at most 16 bits"):
            analysis.code_usage(np.ones(2, np.float32), "float32")


class TestDiagnostics:
    @pytest.mark.usefixtures("eager")
    # Takums are excluded, because their ends are outside the range of float32.
    @pytest.mark.parametrize("fmt", data.each_format(FORMATS), ids=lambda fmt: fmt.name)
    def test_matches_cast_at_ends_of_range(self, fmt):
        edge = np.array([v for v in rounding_limits(fmt) if v > 0 or v < -1], np.float32)
        edge = np.concatenate([edge, -edge, [0.0, 0.6, -0.6, 1e-45, 3e38, -3e38]])
        edge = edge.astype(np.float32)
        with np.errstate(over="ignore"):
            up, down = (np.nextafter(edge, np.float32(end)) for end in (np.inf, -np.inf))
        x = np.concatenate([edge, up, down])
        x = np.resize(x[np.isfinite(x)], 42)  # One shape, so that few operations are compiled.
        if fmt.min >= 0 and getattr(fmt, "nan", None) is not None:
            pytest.skip("negative numbers become NaN, also those that underflow")
        y = data.in_pieces(lambda x: jaxq.cast(x, fmt), x)
        got = jax.vmap(lambda v: diagnostics(v, fmt))(x[:, None])
        over, under = np.asarray(got.overflow) > 0, np.asarray(got.underflow) > 0
        lost = ~np.isfinite(y)
        assert (over[lost]).all()
        if lost.any():
            np.testing.assert_array_equal(over, lost)
        elif fmt.bits <= 16:
            step = np.diff(fmt.values)
            if isinstance(fmt, jaxq.FloatFormat):  # The last spacing is wider above a power of two.
                step[-1] = 2.0 ** (fmt.emax - fmt.mantissa_bits)
            error = np.abs(y.astype(np.float64) - x)
            if fmt.min < 0 and isinstance(fmt, jaxq.FloatFormat):
                step[0] = step[-1]
            slack = 1e-7 * fmt.max  # The ends are rounded to float32.
            outside = (x > fmt.max) & (error > step[-1] / 2 + slack)
            outside |= (x < fmt.min) & (error > step[0] / 2 + slack)
            assert (over[outside]).all()
            assert (error[over] >= np.minimum(step[0], step[-1]) * 0.499).all()
        flushed = (y == 0) & (x.view(np.int32) & 0x7FFFFFFF != 0) & ~over
        if y.dtype == np.float32 and not (np.abs(y[y != 0]) < 2.0**-126).any():
            np.testing.assert_array_equal(under, flushed)

    @pytest.mark.parametrize(
        "name", ["float16", data.slow("mxfp4"), "uint4_channel", data.slow("nvfp4")]
    )
    def test_agrees_with_quantization_error(self, name):
        x = (SEED.standard_normal((128, 256)) ** 9).astype(np.float32)
        got, want = diagnostics(x, name), quantization_error(x, name)
        assert float(got.overflow) == pytest.approx(float(want.clipped), abs=1e-7)
        assert float(got.underflow) == pytest.approx(float(want.flushed), abs=1e-4)
        assert got.amax == np.abs(x).max()

    def test_diagnostics_take_given_scales(self):
        x = np.float32([[0.4, 3.0, 1e-5, np.nan], [1.0, 900.0, 448.0, -np.inf]])
        got = diagnostics(x, "fp8_e4m3_tensor", scale=np.float32(1.0))
        assert [float(v) for v in got] == [900.0, 0.125, 0.125, 0.25]
        got = diagnostics(x, "fp8_e4m3_tensor", scale=np.float32([[1e-3]]))
        assert float(got.overflow) == pytest.approx(4 / 8)

    def test_diagnostics_of_empty_and_nonfinite_tensors(self):
        empty = diagnostics(np.float32([]), "float16")
        assert [float(v) for v in empty] == [0, 0, 0, 0]
        bad = diagnostics(np.float32([np.nan, np.inf]), "int8_tensor")
        assert [float(v) for v in bad] == [0, 0, 0, 1]
        assert float(diagnostics(np.zeros(4, np.float32), "int8_tensor").underflow) == 0

    def test_invalid_arguments_raise(self):
        x = np.ones((2, 4), np.float32)
        with pytest.raises(ValueError, match="symmetric recipe"):
            diagnostics(x, "float16", scale=1.0)
        with pytest.raises(ValueError, match="one number per block"):
            diagnostics(x, "int8_channel", scale=np.ones(3, np.float32))
        with pytest.raises(TypeError, match="got int32"):
            diagnostics(np.ones(2, np.int32), "float16")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "fp8_e5m2_tensor"])
def test_diagnostics_read_tensor_once(name: str):
    """Checks that one instruction reads the tensor and that no array of its size is written."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    scale = None
    kind = jaxq.analysis.format_or_recipe(name)
    if isinstance(kind, jaxq.Recipe):
        scale = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    compiled = jax.jit(lambda x, s: diagnostics(x, kind, scale=s)).lower(x, scale).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.size // 8
    entry = compiled.as_text().split("ENTRY")[1].splitlines()
    names = [line.split()[0] for line in entry if "f32[1024,1024]" in line and "parameter" in line]
    assert len(names) == 1
    users = [line for line in entry[1:] if f"{names[0]})" in line or f"{names[0]}," in line]
    assert len(users) == 1


class TestTrees:
    def test_total_covers_all_numbers(self):
        params = {
            "a": {"w": SEED.standard_normal((8, 64)).astype(np.float32)},
            "b": {"w": 3 * SEED.standard_normal((16, 96)).astype(np.float32)},
            "bias": np.ones(3, np.float32),
            "step": np.int32(3),
        }
        table = analysis.tree_errors(params, [("w$", "int4_g32")], axis=-1)
        assert [row.path for row in table.rows] == ["a/w", "b/w", "total"]
        small = jaxq.quantize_tree(params, [("w$", "int4_g32")], axis=-1)
        assert analysis.tree_errors(params, small).rows == table.rows
        after = jaxq.dequantize_tree(small)
        leaves = [(params[k]["w"], np.asarray(after[k]["w"])) for k in "ab"]
        for row, (x, y) in zip(table.rows, leaves, strict=False):
            assert row.sqnr_db == pytest.approx(reference(x, y)[5], abs=1e-4)
            assert row.bits == 8 * small[row.path[0]]["w"].nbytes / x.size
        x, y = (np.concatenate([leaf[i].ravel() for leaf in leaves]) for i in range(2))
        want, total = reference(x, y), table.rows[-1]
        assert total.sqnr_db == pytest.approx(want[5], abs=1e-4)
        assert total.mse == pytest.approx(want[0], rel=1e-6)
        assert total.max_error == pytest.approx(want[1], rel=1e-6)
        assert "int4" in str(table)

    def test_totals_at_every_magnitude(self):
        x = SEED.standard_normal((2, 64))
        for size in (1e-41, 1e-22, 1e20, 1e37):
            params = {"a": np.float32(x[0] * size), "b": np.float32(x[1] * size)}
            table = analysis.tree_errors(params, {k: v + v for k, v in params.items()})
            for row in table.rows:
                assert row.sqnr_db == pytest.approx(0, abs=1e-5)
            want = np.mean([np.square(v.astype(np.float64)) for v in params.values()])
            assert table.rows[-1].mse == pytest.approx(want, rel=1e-6)

    def test_arrays_empty_leaves_and_invalid_trees(self):
        x = SEED.standard_normal(64).astype(np.float32)
        half = {"x": x.astype(ml_dtypes.bfloat16), "e": np.float32([])}
        table = analysis.tree_errors({"x": x, "e": np.zeros(0, np.float32)}, half)
        assert [row.format for row in table.rows] == ["float32", "bfloat16", ""]
        assert table.rows[0].sqnr_db == np.inf
        with pytest.raises(ValueError, match="structure"):
            analysis.tree_errors({"x": x}, {"y": x})
        with pytest.raises(ValueError, match="shape"):
            analysis.tree_errors({"x": x}, {"x": x[:3]})
        with pytest.raises(ValueError, match="matches no leaf"):
            analysis.tree_errors({"x": x}, [("nothing", "int8_tensor")])
        for rules in (jaxq.get_product_recipe("w8a8"), {"x": jaxq.get_product_recipe("w8a8")}):
            with pytest.raises(ValueError, match="must be a tensor recipe"):
                analysis.tree_errors({"x": x}, rules)
