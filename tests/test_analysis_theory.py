"""Predicted errors against published tables and measured errors.

`test_theory` covers every named recipe.
"""

import math

import chex
import numpy as np
import pytest
from scipy import stats

import jaxq
from jaxq import analysis
from jaxq.analysis import expected_error, lloyd_max
from jaxq.analysis.distributions import DISTRIBUTIONS, StudentT, get_distribution
from jaxq.recipes import Percentile
from tests import data, random_recipes

ALL = [*DISTRIBUTIONS.values(), StudentT(3.0)]
SCIPY = {
    "gaussian": stats.norm(),
    "laplace": stats.laplace(scale=math.sqrt(0.5)),
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "student_t5": stats.t(5, scale=math.sqrt(3 / 5)),
    "student_t3": stats.t(3, scale=math.sqrt(1 / 3)),
}


@pytest.mark.parametrize("d", ALL, ids=lambda d: d.name)
class TestDistributions:
    def test_distributions_match_scipy(self, d):
        other = SCIPY[d.name]
        assert other.var() == pytest.approx(1)
        x = np.linspace(0, 1.7, 18)
        np.testing.assert_allclose(d.density(x), other.pdf(x), rtol=1e-12)
        np.testing.assert_allclose(d.density(-x), other.pdf(x), rtol=1e-12)
        assert d.entropy == pytest.approx(float(other.entropy()) / math.log(2), rel=1e-9)
        tail = d.tail(x)
        for i in (0, 5, 17):
            for k, got in enumerate(tail):
                want = other.expect(lambda v, k=k: v**k, lb=x[i], ub=min(d.support, np.inf))
                assert got[i] == pytest.approx(want, rel=1e-6)
        chance = np.array([0.5, 1e-3, 1e-9])
        np.testing.assert_allclose(d.tail(d.beyond(chance)).mass, chance, rtol=1e-6)

    def test_samples_follow_distribution(self, d):
        x = d.sample(np.random.default_rng(0), (1000, 20))
        chex.assert_shape(x, (1000, 20))
        assert stats.kstest(x.ravel(), SCIPY[d.name].cdf).pvalue > 1e-3


class TestLloydMax:
    @pytest.mark.parametrize(
        ("count", "error", "top"),
        [
            (2, 0.3634, 0.7980),
            (3, 0.1902, 1.224),
            (4, 0.1175, 1.510),
            (8, 0.03454, 2.152),
            (16, 0.009497, 2.733),
            (32, 0.002499, 3.263),
        ],
    )
    def test_matches_published_table(self, count: int, error: float, top: float):
        """Compares with Max (1960), table 1, whose last digits are inexact."""
        best = lloyd_max(count)
        assert best.mse == pytest.approx(error, rel=2.5e-3)
        assert best.levels[-1] == pytest.approx(top, rel=1e-3)

    @pytest.mark.parametrize(
        ("count", "error"), [(2, 0.5), (4, 0.1762), (8, 0.0545), (16, 0.0154), (32, 0.00414)]
    )
    def test_matches_published_laplace_table(self, count: int, error: float):
        """Compares with Paez and Glisson (1972), table 1."""
        assert lloyd_max(count, "laplace").mse == pytest.approx(error, rel=1e-2)

    @pytest.mark.parametrize("d", ALL, ids=lambda d: d.name)
    @pytest.mark.parametrize("count", [1, 2, 5, 64, 255])
    def test_levels_are_means_of_their_cells(self, d, count: int):
        best, other = lloyd_max(count, d), SCIPY[d.name]
        assert len(best.levels) == count
        np.testing.assert_array_equal(best.levels, -best.levels[::-1])
        edges = np.concatenate([[-d.support], best.thresholds, [d.support]])
        middle = count // 2
        for i in {middle, count - 1}:  # The middle cell and the unbounded last cell.
            low, high = edges[i], edges[i + 1]
            mass = other.cdf(high) - other.cdf(low)
            first = other.expect(lambda v: v, lb=low, ub=high)
            assert first == pytest.approx(best.levels[i] * mass, rel=1e-5, abs=1e-9)

    @pytest.mark.parametrize("d", ALL, ids=lambda d: d.name)
    def test_many_levels_approach_panter_dite_limit(self, d):
        """Compares with the limit: (the integral of the cube root of the density)^3 / (12 n^2)."""
        t = np.linspace(0, math.asinh(1e12), 2**18)
        roots = np.cbrt(d.density(np.sinh(t))) * np.cosh(t)
        limit = (2 * np.trapezoid(roots, t)) ** 3 / 12
        assert lloyd_max(4096, d).mse * 4096**2 == pytest.approx(limit, rel=0.02)

    def test_invalid_counts_raise(self):
        for count in (0, 2**16 + 1):
            with pytest.raises(ValueError, match="1 to 65536"):
                lloyd_max(count)


class TestBounds:
    @pytest.mark.parametrize(
        ("count", "step", "error"),
        [(2, 1.596, 0.3634), (4, 0.9957, 0.1188), (8, 0.5860, 0.03744), (16, 0.3352, 0.01154)],
    )
    def test_optimal_clip_matches_published_table(self, count: int, step: float, error: float):
        """Compares with Max (1960), table 2, for evenly spaced levels."""
        levels = tuple(float(v) for v in np.arange(count) - (count - 1) / 2)
        best = analysis.optimal_clip(jaxq.CodebookFormat("even", levels))
        assert best.clip / ((count - 1) / 2) == pytest.approx(step, rel=2e-3)
        assert best.mse == pytest.approx(error, rel=1e-3)

    def test_optimal_clip_minimizes_measured_error(self):
        x = np.random.default_rng(0).laplace(0, math.sqrt(0.5), 2**20).astype(np.float32)

        def error(clip: float) -> float:
            y = np.asarray(jaxq.fake_quant(x, "int4_tensor", scale=np.float32(clip / 7)))
            return float(np.mean((y.astype(np.float64) - x) ** 2))

        best = analysis.optimal_clip("int4", "laplace")
        assert best.mse == pytest.approx(error(best.clip), rel=0.01)
        assert error(best.clip) < min(error(best.clip * f) for f in (0.9, 1.1))

    def test_shannon_bound_is_6_02_db_per_bit(self):
        assert analysis.shannon_sqnr_db(1) == pytest.approx(6.0206, abs=1e-4)
        assert analysis.shannon_sqnr_db(0) == pytest.approx(0, abs=1e-12)
        for d in ALL:
            for bits in (1, 4, 8):
                assert lloyd_max(2**bits, d).sqnr_db < analysis.shannon_sqnr_db(bits, d) + 1e-9
        with pytest.raises(ValueError, match="must be a number of at least 0"):
            analysis.shannon_sqnr_db(-1)

    def test_bounds_are_ordered_and_approach_the_limit(self):
        rows = analysis.bounds_table([1, 3, 8]).rows
        for row in rows:
            assert row.uniform_db <= row.lloyd_max_db + 1e-9 < row.shannon_db
        assert rows[-1].gap_db == pytest.approx(
            10 * math.log10(math.pi * math.sqrt(3) / 2), abs=0.1
        )


STOCHASTIC = jaxq.Recipe("int3", jaxq.PerBlock(64), rounding="stochastic")
DIRECTED = jaxq.Recipe("int5", jaxq.PerToken(), rounding="toward_zero")


@pytest.mark.parametrize(
    "recipe",
    [
        *map(data.slow, ["int4_g32", "mxfp4", "uint4_g128", "int4_tensor", "float8_e5m2"]),
        data.slow("nvfp4"),  # `test_theory` measures it, too.
        "bfloat16",
        data.slow("nf4_dq"),
        STOCHASTIC,
        data.slow(DIRECTED),
    ],
    ids=str,
)
def test_measured_error_matches_theory(recipe):
    """Tests all distributions together, so that they share compiled programs."""
    for d in [*DISTRIBUTIONS][1:]:  # `test_theory` covers the first one, normal numbers.
        (row,) = analysis.sqnr_table([recipe], d).rows
        error = abs(row.measured_db - row.expected_db)
        assert error <= 4 * row.deviation_db, (d, row)
        assert row.gap_db == row.shannon_db - row.expected_db > 0


def test_deviation_matches_samples():
    rng = np.random.default_rng(1)
    for name in ("int4_tensor", "int4_g32", "float8_e4m3fn"):
        expected = expected_error(name, (4, 128))
        errors = []
        for _ in range(300):
            x = rng.standard_normal((4, 128)).astype(np.float32)
            kind = jaxq.get_format(name) if name in jaxq.formats.FORMATS else None
            y = jaxq.fake_quant(x, name) if kind is None else jaxq.cast(x, kind)
            errors.append(np.mean((np.asarray(y, np.float64) - x) ** 2))
        assert np.mean(errors) == pytest.approx(expected.mse, abs=4 * expected.deviation / 17)
        assert np.std(errors) == pytest.approx(expected.deviation, rel=0.2)


PER_32 = jaxq.PerBlock(32)
SPECIAL = {
    "bounded numbers": (jaxq.Recipe("ocp_int8", PER_32, jaxq.MX("max")), "uniform"),
    "directed": (jaxq.Recipe("int4", jaxq.PerBlock(64), rounding="toward_zero"), "gaussian"),
    "directed, zero point": (
        jaxq.Recipe("uint4", PER_32, jaxq.Affine(), rounding="toward_zero"),
        "laplace",
    ),
    "posit": (jaxq.Recipe("posit8", PER_32), "gaussian"),
    "average of one": (jaxq.Recipe("int4", PER_32, jaxq.Symmetric("ema")), "laplace"),
    "percentile": (
        jaxq.Recipe("int4", jaxq.PerBlock(2**15), jaxq.Symmetric(Percentile(percent=99.0))),
        "laplace",
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_recipes_match_samples(name: str):
    recipe, distribution = SPECIAL[name]
    width = 2**15 if name == "percentile" else 512
    compare_with_samples(recipe, (2**18 // width, width), distribution, np.random.default_rng(0))


@pytest.mark.parametrize("seed", data.each(range(6), range(2)))
def test_random_recipes_match_samples(seed: int):
    """Tests the first random recipe for which the theory is implemented."""
    rng = np.random.default_rng(seed)
    while True:
        case = random_recipes.draw(rng)
        try:
            expected_error(*case)
        except analysis.NoTheoryError:
            continue
        return compare_with_samples(*case, rng)


def compare_with_samples(
    recipe: jaxq.Recipe, shape: tuple[int, int], name: str, rng: np.random.Generator
) -> None:
    expected = expected_error(recipe, shape, name)
    mse, deviation = random_recipes.sample_errors(recipe, shape, name, rng)
    signed = isinstance(recipe.scaling, jaxq.recipes.SignedScale)
    estimated = not signed and recipe.scaling.range not in ("absmax", "ema")
    slack = (1e-2 if estimated else 1e-3) * expected.mse
    assert abs(mse - expected.mse) <= 4 * max(deviation, expected.deviation) + slack


class TestLimits:
    def test_block_of_one_has_no_error(self):
        assert expected_error(jaxq.Recipe("int4", jaxq.PerBlock(1)), (8, 8)).mse < 1e-10

    def test_error_of_each_rounding_mode_matches_theory(self):
        """Compares the errors of a fine grid: 1/12, 1/6 and 1/3 of the squared step."""
        errors = [
            expected_error(jaxq.Recipe("int8", rounding=mode), (4096,), "uniform").mse
            for mode in ("nearest_even", "stochastic", "down")
        ]
        assert errors[1] / errors[0] == pytest.approx(2, rel=0.01)
        assert errors[2] / errors[0] == pytest.approx(4, rel=0.02)

    def test_recipes_without_theory_raise(self):
        for recipe in (
            "nvfp4_4over6",
            jaxq.Recipe("int4", outliers=jaxq.Outliers()),
            jaxq.Recipe("int4", rounding="to_odd"),
            jaxq.Recipe("int4", rounding=jaxq.numerics.Stochastic(4)),
            jaxq.Recipe("posit8", rounding="stochastic"),
            jaxq.Recipe("int4", scaling=jaxq.Symmetric("mse")),
            jaxq.Recipe("int4", jaxq.PerBlock(64), jaxq.Symmetric("percentile")),
            jaxq.Recipe("int4", jaxq.PerBlock(64), jaxq.Symmetric("sigmas")),
            jaxq.Recipe("uint4", jaxq.PerBlock(1), jaxq.Affine()),
        ):
            with pytest.raises(analysis.NoTheoryError, match="theory"):
                expected_error(recipe, (64, 64))
        row = analysis.sqnr_table(["nvfp4_4over6"], shape=(64, 64)).rows[0]
        assert np.isnan(row.expected_db)
        assert row.gap_db == row.shannon_db - row.measured_db

    def test_empty_tensor_has_no_error(self):
        assert expected_error("int4_tensor", (0, 3)) == (0, 0)

    def test_unknown_distributions_raise(self):
        with pytest.raises(ValueError, match="Did you mean gaussian"):
            get_distribution("normal")
        with pytest.raises(ValueError, match="above 2"):
            StudentT(2)
