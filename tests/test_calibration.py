"""Calibrators against NumPy, and the algebraic laws of their states."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec

import jaxq
from jaxq.quantizers import calibration
from jaxq.recipes import CALIBRATORS, get_calibrator
from tests import data
from tests.oracle import assert_same

SHAPE = (16, 3)
# Calibrators without float sums, so that the order of merges changes no bit.
EXACT = ("absmax", "extremum", "percentile", "mse", "entropy")


def batches(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_t(4, (5, *SHAPE)).astype(np.float32)
    return x * np.linspace(0.5, 2, 3, dtype=np.float32) + np.float32(0.25)


def small(name: str):
    """Returns a calibrator with few bins and tries, for laws that do not depend on their number."""
    if name == "extremum":  # No other scaling than `SignedScale` has this calibrator.
        return jaxq.recipes.SignedScale().calibrator
    calibrator = CALIBRATORS[name]
    fields = {field.name for field in dataclasses.fields(calibrator)}
    fewer = {"digits": 4, "tries": 8}
    return dataclasses.replace(calibrator, **{k: v for k, v in fewer.items() if k in fields})


def recipe(name, *, two_sided: bool = False, channels: bool = True, bits: int = 4, **more):
    granularity = jaxq.PerChannel(-1) if channels else jaxq.PerTensor()
    if name == "extremum":
        scaling = jaxq.recipes.SignedScale("float32", stored=True)
    else:
        scaling = jaxq.Affine(name) if two_sided else jaxq.Symmetric(name)
    return jaxq.Recipe(f"{'u' * two_sided}int{bits}", granularity, scaling, **more)


# One calibrator of each implementation: averages, moments, histograms and searches in histograms.
# "extremum" is added below.
REPRESENTATIVES = (("ema", True), ("gaussian", True), ("percentile", True), ("mse", False))
CASES = pytest.mark.parametrize(
    ("name", "two_sided"),
    [
        (name, two_sided) if (name, two_sided) in REPRESENTATIVES else data.slow(name, two_sided)
        for name, calibrator in CALIBRATORS.items()
        for two_sided in (False, True)[: 1 + calibrator.two_sided]
    ]
    + [("extremum", False)],  # The calibrator of `SignedScale`.
)


def laws_recipe(name: str, two_sided: bool) -> jaxq.Recipe:
    return recipe(name if name == "extremum" else small(name), two_sided=two_sided)


def run(xs, r, state=None):
    state = calibration.init(SHAPE, r) if state is None else state
    for x in xs:
        state = calibration.update(state, x, r)
    return state


def range_of(scale: calibration.Calibrated, r: jaxq.Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and upper ends of the range that scales cover."""
    fmt, s = r.element, np.asarray(scale.scale)
    if isinstance(r.scaling, jaxq.recipes.SignedScale):
        return s * fmt.min, s * fmt.min
    if scale.zero_point is None:
        return -s * fmt.max, s * fmt.max
    z = np.asarray(scale.zero_point)
    return s * (fmt.min - z), s * (fmt.max - z)


@CASES
class TestLaws:
    def test_merge_is_associative_with_identity(self, name, two_sided):
        r, xs = laws_recipe(name, two_sided), batches()
        a, b, c = (run(xs[i : i + 1], r) for i in range(3))
        merge = functools.partial(calibration.merge, recipe=r)
        left, right = merge(merge(a, b), c), merge(a, merge(b, c))
        none = calibration.init(SHAPE, r)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
        same = assert_same if name in EXACT else close
        for pair in ((left, right), (merge(none, a), a), (merge(a, none), a)):
            states = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), s) for s in pair]
            jax.tree.map(same, *states)
        got, want = (calibration.finalize(s, r).scale for s in (left, run(xs[:3], r)))
        same(got, want)

    def test_scan_and_gather_equal_sequential_updates(self, name, two_sided):
        r, xs = laws_recipe(name, two_sided), jnp.asarray(batches()[:4])
        want = calibration.finalize(run(xs, r), r)
        step = lambda s, x: (calibration.update(s, x, r), None)
        state, _ = jax.lax.scan(step, calibration.init(SHAPE, r), xs)
        np.testing.assert_allclose(calibration.finalize(state, r).scale, want.scale, rtol=2e-5)
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=PartitionSpec("batch"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        def everywhere(x):
            state = calibration.update(calibration.init(SHAPE, r), x[0], r)
            return calibration.finalize(calibration.gather(state, r, "batch"), r).scale

        np.testing.assert_allclose(everywhere(xs), want.scale, rtol=2e-5)

    def test_nonfinite_data_affects_only_its_channel_and_no_data_gives_zero(self, name, two_sided):
        r, xs = laws_recipe(name, two_sided), batches()[:2]
        clean = np.asarray(calibration.finalize(run(xs, r), r).scale)
        for bad in (np.nan, np.inf, -np.inf):
            dirty = xs.copy()
            dirty[0, 3, 1] = bad
            scale = np.array(calibration.finalize(run(dirty, r), r).scale)
            assert np.isnan(scale[0, 1])
            scale[0, 1] = clean[0, 1]
            assert_same(scale, clean)
        for nothing in (calibration.init(SHAPE, r), run(xs * 0, r)):
            assert (np.asarray(calibration.finalize(nothing, r).scale) == 0).all()
        empty = calibration.update(calibration.init((0, 3), r), np.zeros((0, 3), np.float32), r)
        assert (np.asarray(calibration.finalize(empty, r).scale) == 0).all()

    def test_dynamic_scales_equal_calibrated_scales(self, name, two_sided):
        r, x = laws_recipe(name, two_sided), batches()[0]
        both = jax.jit(lambda x: (jaxq.fake_quant(x, r), jaxq.quantize(x, r).dequantize()))
        y, stored = both(x)
        assert_same(stored, y)
        # The calibrated mean of one batch may differ from the dynamic one in the last bit.
        if name not in ("ema", "extremum"):
            given = calibration.finalize(run([x], r), r)
            scaling = jaxq.Affine() if two_sided else jaxq.Symmetric()
            static = dataclasses.replace(r, scaling=scaling)
            kw = given._asdict()
            if name in EXACT:
                assert_same(jaxq.fake_quant(x, static, **kw), y)
            q = jaxq.quantize(x, static, **kw)
            assert_same(q.dequantize(), jaxq.fake_quant(x, static, **kw))
        again = jaxq.Recipe.from_json(r.to_json())
        assert again == r


def test_absmax_and_extremum_scales_match_numpy():
    xs = batches()
    for two_sided in (False, True):
        r = recipe("absmax", two_sided=two_sided, bits=8)
        scale = calibration.finalize(run(xs, r), r)
        flat = xs.reshape(-1, 3)
        if two_sided:
            want = (np.maximum(flat.max(0), 0) - np.minimum(flat.min(0), 0)) / np.float32(255)
            np.testing.assert_allclose(scale.scale[0], want, rtol=3e-7)
        else:
            assert_same(scale.scale[0], np.abs(flat).max(0) / np.float32(127))
    r = recipe("extremum")
    top = flat[np.abs(flat).argmax(0), np.arange(3)]
    assert_same(calibration.finalize(run(xs, r), r).scale[0], top / np.float32(-8))


@pytest.mark.parametrize("decay", [0.9, 0.99999])
def test_ema_corrects_the_bias_of_its_start(decay: float):
    xs = batches()
    r = recipe(CALIBRATORS["ema"].__class__(decay))
    average = 0.0
    for i, x in enumerate(xs):
        average = decay * average + (1 - decay) * np.abs(x).max(0).astype(np.float64)
        scale = calibration.finalize(run(xs[: i + 1], r), r).scale[0]
        np.testing.assert_allclose(scale, average / (1 - decay ** (i + 1)) / 7, rtol=1e-5)


@pytest.mark.parametrize("two_sided", [False, True])
def test_sigmas_range_matches_mean_and_deviation(two_sided: bool):
    xs = batches()
    r = recipe(CALIBRATORS["sigmas"].__class__(2.0), two_sided=two_sided, bits=8)
    flat = xs.reshape(-1, 3).astype(np.float64)
    mean, sigma = flat.mean(0), flat.std(0)
    low, high = range_of(calibration.finalize(run(xs, r), r), r)
    step = np.asarray(calibration.finalize(run(xs, r), r).scale)[0]
    if two_sided:
        assert (np.abs(low[0] - np.maximum(mean - 2 * sigma, flat.min(0))) <= step).all()
        want = np.minimum(mean + 2 * sigma, flat.max(0))
        assert (np.abs(high[0] - want) <= step).all()
    else:
        want = np.minimum(np.abs(mean) + 2 * sigma, np.abs(flat).max(0))
        np.testing.assert_allclose(high[0], want, rtol=1e-5)


def test_absmean_scale_matches_numpy():
    xs = batches()
    r = recipe("absmean")
    want = np.abs(xs.reshape(-1, 3)).mean(0) / np.float32(7)
    np.testing.assert_allclose(calibration.finalize(run(xs, r), r).scale[0], want, rtol=1e-5)


# Banner et al. (2019): the optimal clips for 2 to 8 bits, in units of sigma and of b.
PUBLISHED = {
    "gaussian": (1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
    "laplace": (2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_aciq_matches_published_clips(name: str):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if name == "gaussian" else rng.laplace
    x = (draw(size=100_000) if name == "laplace" else draw(100_000)).astype(np.float32)
    x[:2] = -50, 50  # Extreme values, because ranges are limited to those of the data.
    unit = x.std() if name == "gaussian" else np.abs(x).mean()
    offset = abs(x.mean())
    calibrator, cut = CALIBRATORS[name], jaxq.Recipe("int8").cut(x.shape)
    state = calibrator.measure(cut.split(jnp.asarray(x)), cut, False)
    for bits, clip in zip(range(2, 9), PUBLISHED[name], strict=True):
        _, high = calibrator.finalize(state, jaxq.get_format(f"int{bits}"), False)
        assert abs((float(high.ravel()[0]) - offset) / unit - clip) < 0.011


@pytest.mark.parametrize("percent", [data.slow(100.0), 99.0, data.slow(50.0)])
def test_percentile_range_matches_numpy(percent: float):
    xs = batches()
    flat = xs.reshape(-1, 3)
    calibrator = CALIBRATORS["percentile"].__class__(percent)
    r = recipe(calibrator)
    high = range_of(calibration.finalize(run(xs, r), r), r)[1][0]
    want = np.quantile(np.abs(flat), percent / 100, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(high, want, rtol=2**-6)
    cut = r.cut(SHAPE)
    measure = jax.jit(lambda x: calibrator.measure(cut.split(x), cut, True))
    state = functools.reduce(calibrator.merge, map(measure, xs))
    low, high = jax.jit(lambda state: calibrator.finalize(state, r.element, True))(state)
    for end, sign in ((low, -1), (high, 1)):
        want = sign * np.quantile(sign * flat, percent / 100, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(end.ravel(), want, rtol=2**-6)


def test_mse_search_minimizes_squared_error():
    """Compares with the best of the same ranges, found by exhaustive search over the data."""
    x = np.random.default_rng(0).standard_t(3, 20_000).astype(np.float32)
    for fmt in ("int8", "int4", "float4_e2m1fn"):
        r = jaxq.Recipe(fmt, scaling=jaxq.Symmetric("mse"))
        static = jaxq.Recipe(fmt)

        def error(scale, static=static):
            return float(((np.asarray(jaxq.fake_quant(x, static, scale=scale)) - x) ** 2).mean())

        top = np.abs(x).max() / jaxq.get_format(fmt).max
        errors = [error(np.float32(top * 2 ** (-k / 16))) for k in range(64)]
        got = error(
            calibration.finalize(calibration.update(calibration.init((1,), r), x, r), r).scale
        )
        assert errors[0] > 2 * min(errors) or fmt == "int8"
        assert got <= 1.02 * min(errors)
    assert error(np.float32(top)) > got


def divergence(counts: np.ndarray, middles: np.ndarray, high: float, levels: int) -> float:
    """Returns the KL divergence of TensorRT's P and Q for symmetric integers."""
    inside = middles <= high
    p = np.where(inside, counts, 0).astype(np.float64)
    codes = np.rint(middles / (high / levels))
    q = np.zeros_like(p)
    for code in np.unique(codes[inside]):
        members = inside & (codes == code)
        full = members & (counts > 0)
        if full.any():
            q[full] = p[members].sum() / full.sum()
    p[np.flatnonzero(inside)[-1]] += counts[~inside].sum()
    p, q = p / p.sum(), q / max(q.sum(), 1)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum())


def test_entropy_minimizes_divergence():
    x = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    x[0] = 60
    r = jaxq.Recipe("int6", scaling=jaxq.Symmetric("entropy"))
    calibrator = get_calibrator("entropy")
    digits = calibrator.digits
    key = np.abs(x).view(np.int32) >> (23 - digits)
    counts = np.bincount(key, minlength=255 << digits)
    edges = (np.arange((255 << digits) + 1, dtype=np.int64) << (23 - digits)).astype(np.uint32)
    edges = edges.view(np.float32).astype(np.float64)
    some = slice(64 << digits, 140 << digits)  # The nonempty bins.
    middles = ((edges[:-1] + edges[1:]) / 2)[some]
    factors = np.exp2(-np.arange(64) / 16)
    losses = [divergence(counts[some], middles, 60 * f, 31) for f in factors]
    state = calibration.update(calibration.init((1,), r), x, r)
    got = float(calibration.finalize(state, r).scale[0]) * 31 / 60
    near = losses[int(np.argmin(np.abs(factors - got)))]
    assert near <= min(losses) * 1.02
    assert got < 0.5  # The range excludes the outlier.


@CASES
def test_padding_does_not_affect_ranges(name: str, two_sided: bool):
    x = jnp.abs(jnp.asarray(batches()[0][:2].reshape(1, 6))) + 1
    padded, alone = (
        jaxq.Recipe("int4", jaxq.PerBlock(4, pad=True)).cut(shape) for shape in ((1, 6), (1, 2))
    )
    calibrator = small(name)

    @jax.jit
    def both(x):
        state = calibrator.measure(padded.split(x), padded, two_sided)
        return state, calibrator.measure(alone.split(x[:, 4:]), alone, two_sided)

    state, want = both(x)
    last = jax.tree.map(lambda leaf: leaf[:, :, 1:], state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), last, want)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="No calibrator is named 'maxabs'"):
        jaxq.Symmetric("maxabs")
    with pytest.raises(TypeError, match="a name or a calibrator"):
        jaxq.Symmetric(CALIBRATORS["ema"].__class__)
    with pytest.raises(ValueError, match="must be plain numbers"):
        calibration.init((4, 32), "nvfp4")
    with pytest.raises(ValueError, match="as the state has"):
        calibration.update(
            calibration.init((4, 3), "int8_channel"), np.ones((4, 2), "f4"), "int8_channel"
        )
    with pytest.raises(TypeError, match="got int32"):
        calibration.update(
            calibration.init((4,), "int8_tensor"), np.ones(4, np.int32), "int8_tensor"
        )
    for make, text in (
        (lambda: CALIBRATORS["ema"].__class__(1.0), "decay"),
        (lambda: CALIBRATORS["sigmas"].__class__(0.0), "positive"),
        (lambda: CALIBRATORS["percentile"].__class__(0.0), "percent"),
        (lambda: CALIBRATORS["percentile"].__class__(digits=20), "digits"),
        (lambda: CALIBRATORS["mse"].__class__(0), "tries"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


class TestGivenScales:
    def test_given_scales_are_used_unchanged(self):
        x = batches()[0]
        scale = np.float32([0.1, 0.3, 0.5])
        y = jaxq.fake_quant(x, "int4_channel", scale=scale)
        units = np.clip(np.rint(x / scale), -7, 7) + 0.0
        assert_same(y, (units * scale).astype(np.float32))
        assert_same(jaxq.quantize(x, "int4_channel", scale=scale).dequantize(), y)
        y = jaxq.fake_quant(x, "uint8_tensor", scale=0.05, zero_point=100.0)
        units = np.clip(np.rint(x / np.float32(0.05)) + 100, 0, 255) - 100
        assert_same(y, ((units + 0.0) * np.float32(0.05)).astype(np.float32))

    def test_invalid_scales_raise(self):
        x = batches()[0]
        for kw, name, text in (
            ({"scale": np.ones(5)}, "int4_channel", "must broadcast to one number per block"),
            ({"scale": np.ones((1, 1, 1))}, "int4_channel", "must broadcast"),
            ({"zero_point": 1.0}, "uint8_tensor", "was given without `scale`"),
            ({"scale": 1.0}, "uint8_tensor", "both `scale`"),
            ({"scale": 1.0, "zero_point": 1.0}, "int8_tensor", "takes no `zero_point`"),
            ({"scale": 1.0}, "nf4_dq", "must be plain numbers"),
        ):
            shaped = np.resize(x, (16, 64)) if name == "nf4_dq" else x
            with pytest.raises(ValueError, match=text):
                jaxq.fake_quant(shaped, name, **kw)

    def test_clipped_gradient_uses_range_of_given_scales(self):
        r = jaxq.Recipe("uint4", scaling=jaxq.Affine(), gradient="clipped")
        x = jnp.asarray([-1.1, -0.9, 0.0, 0.4, 0.6])
        g = jax.grad(lambda x: jaxq.fake_quant(x, r, scale=0.1, zero_point=10.0).sum())(x)
        assert g.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("fmt", ["int2", "int4"])
def test_mse_search_uses_grid_of_recipe(fmt):
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    best = jaxq.fake_quant(x, jaxq.Recipe(fmt, scaling=jaxq.Symmetric("mse")))
    factors = jnp.exp2(-jnp.arange(64, dtype=jnp.float32) / 16)[:, None]
    tried = jax.vmap(lambda s: jaxq.fake_quant(x, jaxq.Recipe(fmt), scale=s))(
        factors * np.abs(x).max() / np.float32(jaxq.Recipe(fmt).element.max)
    )
    error = lambda y: np.square(np.asarray(y, np.float64) - x).mean(-1)
    # The search sees numbers only to the width of a bin.
    assert error(best) < error(tried).min() * 1.001
