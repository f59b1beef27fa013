"""Gradient estimators against their formulas in NumPy, and what holds for each that is listed."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import gradients
from tests.oracle import assert_same

ESTIMATORS = pytest.mark.parametrize("name", gradients.ALL)
# A format of each kind: int1 has no positive value, float8_e8m0fnu no zero, bfloat16 its own way.
KINDS = ("int1", "uint8", "mxint8", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "float6_e2m3fn")
KINDS += ("ternary", "dynamic8", "posit8", "takum8")
FORMATS = ("int4", "uint4", "float4_e2m1fn", "nf4")
CHANNEL, BLOCKS = jaxq.PerChannel((0,)), jaxq.PerBlock(4)


def numbers(shape=(3, 8), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def interval(x, values):
    """Neighbours on a grid, float64; beyond the ends the last two."""
    at = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    return values[at - 1], values[at]


def nearest(x, values):
    return values[np.abs(x[..., None] - values).argmin(-1)]


def dsq_slope(x, values, alpha=0.2):
    """DSQ's equations 3 to 6: phi = s tanh(k (x - m)), the value l + Delta (i + (phi + 1) / 2)."""
    below, above = interval(x, values)
    delta = above - below
    k = np.log(2 / alpha - 1) / delta
    s = 1 / (1 - alpha)  # Which is 1 / tanh(k delta / 2).
    slope = delta / 2 * s * k * (1 - np.tanh(k * (x - (below + above) / 2)) ** 2)
    return np.where((values[0] <= x) & (x <= values[-1]), slope, 0)


def within(x, values):
    below, above = interval(x, values)
    return np.abs(nearest(x, values) - x) <= (above - below) / 2


# The derivative of the snap in units of the scale, as each paper has it.
SLOPES = {
    "straight_through": lambda u, _: np.ones_like(u),
    "clipped": lambda u, values: np.where((values[0] <= u) & (u <= values[-1]), 1.0, 0.0),
    "zero": lambda u, _: np.zeros_like(u),
    "lsq": lambda u, values: np.where((values[0] < u) & (u < values[-1]), 1.0, 0.0),
    "pact": lambda u, values: np.where((values[0] <= u) & (u < values[-1]), 1.0, 0.0),
    "trust_region": lambda u, values: within(u, values).astype(np.float64),
    "dsq": dsq_slope,
}


@pytest.mark.usefixtures("eager")
@ESTIMATORS
@pytest.mark.parametrize("fmt", FORMATS)
def test_formula_of_a_cast(name: str, fmt: str):
    values = jaxq.get_format(fmt).values
    x = np.concatenate([numbers().ravel() * values[-1] / 4, values[[0, 2, -1]]]).astype(np.float32)
    want = SLOPES[name](x.astype(np.float64), values)
    tangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    f = functools.partial(jaxq.cast, fmt=fmt, gradient=name)
    y, dy = jax.jvp(f, (x,), (tangent,))
    assert_same(y, jaxq.cast(x, fmt))
    np.testing.assert_allclose(dy, want * tangent, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vjp(f, x)[1](tangent)[0], want * tangent, rtol=2e-5, atol=1e-7)


RECIPES = {
    "int4 per channel": ("int4", CHANNEL, None),
    "int4 in blocks": ("int4", BLOCKS, None),
    "uint3 per tensor": ("uint3", jaxq.PerTensor(), None),
    "e2m1 per channel": ("float4_e2m1fn", CHANNEL, None),
    "nf4 in blocks": ("nf4", BLOCKS, None),
    "uint4 with a zero point": ("uint4", CHANNEL, "integer"),
    "uint4 with a minimum": ("uint4", CHANNEL, "minimum"),
}


def recipe_of(kind: str, gradient) -> jaxq.Quantizer:
    fmt, granularity, zero_point = RECIPES[kind]
    held = "float16" if zero_point == "minimum" else "float32"
    fmt = jaxq.IntFormat("uint3", 3, signed=False) if fmt == "uint3" else fmt
    return jaxq.Quantizer(
        fmt, granularity, zero_point=zero_point, scale_format=held, gradient=gradient
    )


def given(kind: str, x: np.ndarray) -> tuple[jaxq.Quantizer, np.ndarray, np.ndarray | None]:
    """A recipe, scales under which some numbers are clipped, and zero points."""
    recipe = recipe_of(kind, "straight_through")
    counts = recipe.cut(x.shape).counts
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.8, 1.2, counts) * 2.5 / recipe.element.max
    scale = scale.astype(np.float16).astype(np.float32)
    if recipe.zero_point is None:
        return recipe, scale, None
    whole = recipe.zero_point == "integer"
    zero = rng.integers(3, 9, counts) if whole else rng.uniform(-3, -1, counts).astype(np.float16)
    return recipe, scale, zero.astype(np.float32)


@pytest.mark.parametrize("kind", RECIPES)
def test_formula_of_scales_and_zero_points(kind: str):
    """The chain rule around the snap, by blocks, in float64."""
    x = numbers()
    recipe, scale, zero = given(kind, x)
    cut, values = recipe.cut(x.shape), recipe.element.values
    repeat = tuple(n // m for n, m in zip(x.shape, scale.shape, strict=True))
    spread = lambda a: np.kron(a.astype(np.float64), np.ones(repeat))
    blocks = lambda a: np.asarray(cut.split(jnp.asarray(a))).sum(cut.axes)
    cotangent = np.random.default_rng(3).standard_normal(x.shape)
    s = spread(scale)
    minimum = spread(zero) if recipe.zero_point == "minimum" else 0.0
    offset = spread(zero) if recipe.zero_point == "integer" else 0.0
    u = (x - minimum) / s + offset
    assert ((u < values[0]) | (u > values[-1])).any()
    # Round first and add the zero point after: away from ties that is the same.
    level = nearest(u, values)
    arguments = (x, scale) if zero is None else (x, scale, zero)
    # Forward mode is the transpose, which any tangents tell.
    tangents = tuple(jnp.asarray(numbers(a.shape, 7)) for a in arguments)

    @jax.jit
    def of_all(arguments, cotangent, tangents):
        """The value, reverse mode and forward mode of every estimator, in one program."""
        found = {}
        for name in gradients.ALL:
            rule = recipe_of(kind, name)

            def f(x, scale, zero=None, rule=rule):
                return jaxq.fake_quant(x, rule, scale=scale, zero_point=zero)

            y, pull = jax.vjp(f, *arguments)
            found[name] = y, pull(cotangent), jax.jvp(f, arguments, tangents)[1]
        return found

    found = of_all(arguments, jnp.asarray(cotangent, jnp.float32), tangents)
    for name, (y, got, forward) in found.items():
        slope = SLOPES[name](u, values)
        d_scale = (level - offset) - slope * (u - offset)
        d_zero = (1 - slope) * (1 if recipe.zero_point == "minimum" else -s)
        if name == "pact":  # Nothing of what is rounded away: the ends' own change.
            d_scale = np.where(slope == 1, 0, level - offset)
        if name == "lsq":
            g = 1 / np.sqrt(x.size / scale.size * values[-1])
            d_scale, d_zero = d_scale * g, d_zero * g
        np.testing.assert_allclose(y, (level - offset) * s + minimum, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(got[0], slope * cotangent, rtol=1e-4, atol=1e-5, err_msg=name)
        want = blocks(d_scale * cotangent)
        np.testing.assert_allclose(got[1].ravel(), want.ravel(), rtol=1e-4, atol=3e-5, err_msg=name)
        if zero is not None:
            want = blocks(d_zero * cotangent)
            np.testing.assert_allclose(got[2].ravel(), want.ravel(), rtol=1e-4, atol=3e-5)
        pushed = float((np.asarray(forward, np.float64) * cotangent).sum())
        pulled = sum(np.vdot(np.float64(a), b) for a, b in zip(got, tangents, strict=True))
        np.testing.assert_allclose(pushed, pulled, rtol=1e-4, atol=1e-4)


def test_lsq_as_the_paper_writes_it():
    """Equation 3 and the gradient scale, for a weight with one step: LSQ's own symbols."""
    v, s, qn, qp = numbers((40,)), np.float32(0.4), 8, 7
    w = v / s
    inside = np.clip(np.rint(w), -qn, qp) - w
    want = np.where(w <= -qn, -qn, np.where(w >= qp, qp, inside)) / np.sqrt(v.size * qp)
    recipe = jaxq.Quantizer("int4", gradient="lsq")
    f = lambda s: jaxq.fake_quant(v, recipe, scale=s)
    _, got = jax.jvp(f, (jnp.asarray([s]),), (jnp.ones(1),))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    features = jaxq.Quantizer("int4", gradient=gradients.Lsq(count=10))
    g = lambda s: jaxq.fake_quant(v, features, scale=s)
    _, more = jax.jvp(g, (jnp.asarray([s]),), (jnp.ones(1),))
    np.testing.assert_allclose(more, want * 2, rtol=1e-4, atol=1e-6)


def test_lsq_begins_at_twice_the_mean():
    w = numbers((4, 6))
    recipe = jaxq.Quantizer("int3", jaxq.PerBlock(4, pad=True))
    want = np.stack([np.abs(w[:, :4]).mean(1), np.abs(w[:, 4:]).mean(1)], 1) * 2 / np.sqrt(3)
    np.testing.assert_allclose(jaxq.qat.lsq_scale(w, recipe), want, rtol=1e-6)
    assert_same(jaxq.qat.lsq_scale(w * 0, recipe), np.zeros((4, 2), np.float32))
    assert jaxq.qat.lsq_scale(np.zeros((0, 3), np.float32), "int4_channel").shape == (1, 3)


def slope_by_differences(f, x, width=1e-3):
    return (np.float64(f(x + width)) - np.float64(f(x - width))) / (2 * width)


def test_clips_are_derivatives_of_a_clip():
    """PACT: y = clip(x, 0, a), a = 15 s; a clipped straight-through has its x."""
    x, scale = np.float32([-2.0, 0.3, 1.7, 4.1, 8.0, 9.9]), np.float64(0.41)
    clip = lambda x, s: np.clip(x, 0, 15 * s)
    for name in ("pact", "clipped"):
        recipe = jaxq.Quantizer("uint4", gradient=name)
        f = lambda x, s, recipe=recipe: jaxq.fake_quant(x, recipe, scale=s)
        s = jnp.float32(scale)
        _, dx = jax.jvp(f, (x, s), (jnp.ones_like(x), jnp.float32(0)))
        np.testing.assert_allclose(dx, slope_by_differences(lambda x: clip(x, scale), x), atol=1e-3)
        if name == "pact":
            _, ds = jax.jvp(f, (x, s), (jnp.zeros_like(x), jnp.float32(1)))
            want = slope_by_differences(lambda s: clip(x, s), scale)
            np.testing.assert_allclose(ds, want, atol=1e-3)


def test_zero_is_the_true_derivative_for_scales_too():
    x, recipe = numbers(), jaxq.Quantizer("int4", CHANNEL, gradient="zero")
    f = lambda s: np.asarray(jaxq.fake_quant(x, recipe, scale=s))
    scale = np.float32([[0.3], [0.5], [0.9]])
    _, got = jax.jvp(lambda s: jaxq.fake_quant(x, recipe, scale=s), (scale,), (scale * 0 + 1,))
    np.testing.assert_allclose(got, slope_by_differences(f, scale, np.float32(1e-4)), atol=0.02)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dsq_is_the_derivative_of_soft_rounding(fmt: str):
    values = jaxq.get_format(fmt).values
    recipe = jaxq.Quantizer(fmt)
    x = numbers().ravel() * np.float32(values[-1] / 4)

    @functools.partial(jax.jit, static_argnums=1)
    def soft(x, alpha=0.2):
        return jaxq.qat.soft_round(x, *jaxq.neighbours(x, recipe, scale=1.0), alpha=alpha)

    rule = jax.jit(jax.grad(lambda x: jaxq.cast(x, fmt, gradient="dsq").sum()))(x)
    slope = jax.jit(jax.grad(lambda x: soft(x).sum()))(x)
    np.testing.assert_allclose(slope, rule, rtol=1e-4, atol=1e-6)
    below, above = interval(x, values)
    width = np.float32((above - below).min() / 64)
    by_differences = slope_by_differences(soft, x, width)
    np.testing.assert_allclose(by_differences, rule, rtol=0.02, atol=0.02)
    decided = np.abs(x - (below + above) / 2) > (above - below) / 10
    np.testing.assert_allclose(
        soft(x, 1e-30)[decided], nearest(x, values)[decided], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["straight_through", "clipped", "dsq", "lsq", "pact"])
def test_hessian_by_hand(name: str):
    """f = y^2 / 2 has f'' = D^2 + y D', and is symmetric in x and the scale."""
    x, s = np.float64(numbers((6,))), np.float64(0.37)
    values = jaxq.get_format("int4").values
    f = lambda x: (jaxq.cast(x, "int4", gradient=name) ** 2 / 2).sum()
    a = jnp.asarray(x / s, jnp.float32)
    slope = SLOPES[name](x / s, values)
    turn = slope_by_differences(lambda u: SLOPES[name](u, values), x / s, 1e-5)
    want = slope**2 + np.clip(np.rint(x / s), -8, 7) * turn
    vector = jnp.asarray(numbers((6,), 5))

    @jax.jit
    def three_ways(a):
        product = jax.jvp(jax.grad(f), (a,), (vector,))[1]
        return jax.hessian(f)(a), product, jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), vector))(a)

    full, product, other = three_ways(a)
    np.testing.assert_allclose(full, np.diag(want), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(product, want * vector, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(other, product, rtol=1e-6)

    recipe = jaxq.Quantizer("int4", gradient=name)

    def both(p):
        return (jaxq.fake_quant(p[:-1], recipe, scale=p[-1]) ** 2).sum()

    h = jax.jit(jax.hessian(both))(jnp.asarray(np.append(x, s), jnp.float32))
    np.testing.assert_allclose(h, h.T, rtol=1e-4, atol=1e-4)
    assert (h != 0).any()


@ESTIMATORS
class TestEstimators:
    def gradients_of(self, name, x, scale):
        recipe = jaxq.Quantizer("int4", CHANNEL, gradient=name)
        f = lambda x, s: jnp.sin(jaxq.fake_quant(x, recipe, scale=s)).sum()
        return jax.grad(f, (0, 1))(x, scale)

    def test_jit_vmap_scan_and_remat_agree(self, name):
        x, scale = jnp.asarray(numbers((2, 3, 8))), jnp.full((2, 3, 1), 0.4)
        f = functools.partial(self.gradients_of, name)
        with jax.disable_jit():
            want = [
                np.stack(pair) for pair in zip(f(x[0], scale[0]), f(x[1], scale[1]), strict=True)
            ]
        mapped = jax.jit(jax.vmap(f))(x, scale)
        _, scanned = jax.lax.scan(lambda c, p: (c, f(*p)), 0, (x, scale))
        recipe = jaxq.Quantizer("int4", CHANNEL, gradient=name)

        @jax.checkpoint
        def loss(x, s):
            return jnp.sin(jaxq.fake_quant(x, recipe, scale=s)).sum()

        again = jax.jit(jax.grad(loss, (0, 1)))(x[0], scale[0])
        for a, b, c, d in zip(want, mapped, scanned, again, strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(c, a, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(d, a[0], rtol=2e-5, atol=1e-6)

    @pytest.mark.usefixtures("eager")
    def test_never_an_accidental_zero(self, name):
        """Within the grid every estimator but the true derivative passes something on."""
        if name == "zero":
            return
        for fmt in KINDS:
            end = jaxq.get_format(fmt).max or jaxq.get_format(fmt).min
            x = jnp.float32([min(0.3 * end, 1.01)])
            assert jax.grad(lambda x, fmt=fmt: jaxq.cast(x, fmt, gradient=name).sum())(x) != 0, fmt

    @pytest.mark.usefixtures("eager")
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_keeps_dtype_and_takes_empty_and_bad_data(self, name, dtype):
        recipe = jaxq.Quantizer("int4", CHANNEL, gradient=name)
        f = lambda x, s: jaxq.fake_quant(x, recipe, scale=s)
        ordinary, scale = jnp.asarray(numbers(), dtype), jnp.full((3, 1), 0.5)
        y, pull = jax.vjp(f, ordinary, scale)
        dx, ds = pull(jnp.ones_like(y))
        assert (y.dtype, dx.dtype, ds.dtype) == (dtype, dtype, jnp.float32)
        wide = jax.vjp(f, ordinary.astype(jnp.float32), scale)[1](jnp.ones((3, 8)))
        np.testing.assert_allclose(ds, wide[1], rtol=2e-2, atol=2e-3)
        empty = jnp.zeros((3, 0), dtype)
        assert jax.grad(lambda x: f(x, scale).sum())(empty).shape == (3, 0)
        # All of one shape, for which operations are compiled.
        bad = [[np.inf, -np.inf, *[1.0] * 6], [0.0, -0.0] * 4, [*range(1, 9)]]
        bad = jnp.asarray(bad, dtype)
        for gradient in jax.grad(lambda x, s: f(x, s).sum(), (0, 1))(bad, scale):
            assert np.isfinite(np.float32(gradient)).all()
        nothing = jax.grad(lambda s: f(bad, s).sum())(jnp.zeros((3, 1)))
        assert_same(nothing, np.zeros((3, 1), np.float32))
        nan = jnp.asarray([[np.nan, 1.0] * 4] * 3, dtype)
        dx, ds = jax.grad(lambda x, s: f(x, s).sum(), (0, 1))(nan, scale)
        assert np.isfinite(np.float32(dx)).all()

    def test_scales_of_the_tensor_itself_are_constants(self, name):
        x = jnp.asarray(numbers())
        dx = jax.grad(lambda x: jaxq.fake_quant(x, recipe).sum())
        recipe = jaxq.Quantizer("nf4", BLOCKS, gradient=name)
        again = jax.jit(dx)(x)
        np.testing.assert_allclose(again, dx(x), rtol=1e-6)
        assert (again != 0).any() == (name != "zero")

    def test_json_round_trip(self, name):
        for gradient in (name, gradients.ALL[name]):
            recipe = jaxq.Quantizer("int4", gradient=gradient)
            if gradient is name or hasattr(gradient, "__dataclass_fields__"):
                assert jaxq.Quantizer.from_json(recipe.to_json()) == recipe


def test_records_with_other_parameters_round_trip():
    for rule in (gradients.Dsq(0.05), gradients.TrustRegion(0.5), gradients.Lsq(64)):
        recipe = jaxq.Quantizer("int4", gradient=rule)
        assert jaxq.Quantizer.from_json(recipe.to_json()) == recipe
        assert hash(rule) == hash(type(rule)(*vars(rule).values()))


def test_a_users_own():
    def halves(tangent, snap):
        assert snap.below is None
        return jnp.where(snap.y > snap.x, tangent * 0.5, 0)

    recipe = jaxq.Quantizer("int4", gradient=halves)
    x, scale = jnp.asarray([0.3, 0.8, 1.7]), jnp.float32(1)
    got = jax.grad(lambda x: jaxq.fake_quant(x, recipe, scale=scale).sum())(x)
    assert_same(got, np.float32([0, 0.5, 0.5]))
    ds = jax.grad(lambda s: jaxq.fake_quant(x, recipe, scale=s).sum())(scale)
    np.testing.assert_allclose(ds, 0 + (1 - 0.5 * 0.8) + (2 - 0.5 * 1.7), rtol=1e-6)
    with pytest.raises(TypeError, match="functions cannot be written"):
        recipe.to_json()


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("ste", ValueError, "No gradient estimator is named 'ste'"),
        (gradients.Dsq, TypeError, r"got a class: Dsq\(\)"),
        (3, TypeError, "must be a name or a function, got int"),
        (lambda: gradients.Dsq(1.0), ValueError, "`alpha` must be in"),
        (lambda: gradients.TrustRegion(0.0), ValueError, "`factor` must be positive"),
        (lambda: gradients.Lsq(0), ValueError, "`count` must be at least 1"),
    ],
)
def test_wrong_arguments(spec, error, match):
    with pytest.raises(error, match=match):
        spec() if getattr(spec, "__name__", "") == "<lambda>" else gradients.get_gradient(spec)


def test_trust_region_beyond_the_ends():
    """Up to half a step beyond they are kept, as many half steps as `factor` says."""
    x = jnp.asarray([7.4, 7.6, -8.4, -8.6, 0.5, 0.3])
    f = lambda x, rule: jaxq.cast(x, "int4", gradient=rule).sum()
    for factor, want in ((1.0, [1, 0, 1, 0, 1, 1]), (0.7, [0, 0, 0, 0, 0, 1]), (1.5, [1] * 6)):
        rule = gradients.TrustRegion(factor)
        assert_same(jax.grad(f)(x, rule), np.float32(want))


def test_trust_region_keeps_all_that_rounds_to_nearest():
    """In half precision y and the interval are rounded, so that y may seem the farther end."""
    x = jnp.asarray(numbers((100_000,)) * np.float32(13.3), jnp.float16)
    recipe = jaxq.Quantizer("int8", gradient="trust_region")
    got = jax.vjp(lambda x: jaxq.fake_quant(x, recipe), x)[1](jnp.ones_like(x))[0]
    assert (got == 1).all()


def test_scales_are_learned_through_their_format():
    """Rounded to float8_e8m0fnu, and a zero point to the integers of the format."""
    x = jnp.asarray(numbers())
    recipe = jaxq.Quantizer("int4", CHANNEL, scale_format="float8_e8m0fnu", gradient="lsq")
    f = lambda s: jaxq.fake_quant(x, recipe, scale=s)
    free, exact = jnp.full((3, 1), 0.27), jnp.full((3, 1), 0.25)
    assert_same(f(free), f(exact))
    slopes = [jax.grad(lambda s: f(s).sum())(s) for s in (free, exact)]
    assert_same(*slopes)
    assert (slopes[0] != 0).all()
    recipe = jaxq.Quantizer("uint4", CHANNEL, zero_point="integer")
    for given_, used in ((7.4, 7), (99.0, 15), (-3.0, 0)):
        y = jaxq.fake_quant(x, recipe, scale=exact, zero_point=given_)
        assert_same(y, jaxq.fake_quant(x, recipe, scale=exact, zero_point=used))
        q = jaxq.quantize(x, recipe, scale=exact, zero_point=given_)
        assert_same(q.dequantize(), y)


def test_outliers_that_are_kept_apart_move_no_scale():
    x = jnp.asarray([[0.3, -0.7, 90.0, 0.2]])
    for name in ("straight_through", "lsq", "dsq", "trust_region"):
        recipe = jaxq.Quantizer("int4", outliers=jaxq.Outliers(0.25), gradient=name)
        f = lambda x, s, recipe=recipe: jaxq.fake_quant(x, recipe, scale=s)
        one, scale = jnp.ones_like(x), jnp.float32(0.1)
        _, ds = jax.jvp(f, (x, scale), (one * 0, jnp.float32(1)))
        _, dx = jax.jvp(f, (x, scale), (one, jnp.float32(0)))
        assert ds[0, 2] == 0
        assert dx[0, 2] == 1


def test_a_scale_that_nobody_learns_costs_nothing():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    s = jax.ShapeDtypeStruct((512, 1), jnp.float32)
    recipe = jaxq.Quantizer("int4", CHANNEL)

    def both(x, s, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.fake_quant(x, recipe, scale=s), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, s, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 36 * 512
