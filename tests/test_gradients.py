"""Gradient estimators against formulas in NumPy, and contracts of all registered ones."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.gradients import DSQ, ESTIMATORS, LSQ, TrustRegion, get_gradient
from tests import data
from tests.oracle import assert_same

EACH = pytest.mark.parametrize("name", ESTIMATORS)
# One format of each kind: int1 has no positive value, float8_e8m0fnu no zero; bfloat16 has a
# separate implementation.
KINDS = (
    "int1",
    "uint8",
    "ocp_int8",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "float6_e2m3fn",
)
KINDS += ("ternary", "dynamic8", "posit8", "takum8")
FORMATS = ("int4", "uint4", "float4_e2m1fn", "nf4")
CHANNEL, BLOCKS = jaxq.PerChannel((0,)), jaxq.PerBlock(4)


def numbers(shape=(3, 8), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def interval(x, values):
    """Returns the neighbors on a grid in float64; outside the range, the two values at its end."""
    at = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    return values[at - 1], values[at]


def nearest(x, values):
    return values[np.abs(x[..., None] - values).argmin(-1)]


def dsq_slope(x, values, alpha=0.2):
    """Returns the derivative of DSQ's equations 3 to 6.

    There phi = s tanh(k (x - m)), and the value is l + Delta (i + (phi + 1) / 2).
    """
    below, above = interval(x, values)
    delta = above - below
    k = np.log(2 / alpha - 1) / delta
    s = 1 / (1 - alpha)  # Equals 1 / tanh(k delta / 2).
    slope = delta / 2 * s * k * (1 - np.tanh(k * (x - (below + above) / 2)) ** 2)
    return np.where((values[0] <= x) & (x <= values[-1]), slope, 0)


def within(x, values):
    below, above = interval(x, values)
    return np.abs(nearest(x, values) - x) <= (above - below) / 2


# The derivative of rounding in units of the scale, as defined in each paper.
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
@EACH
@pytest.mark.parametrize("fmt", data.each(FORMATS, ["int4", "nf4"]))
def test_cast_matches_formula(name: str, fmt: str):
    values = jaxq.get_format(fmt).values
    x = np.concatenate([numbers().ravel() * values[-1] / 4, values[[0, 2, -1]]]).astype(np.float32)
    x = np.resize(x, 4096)  # The shape of `data.in_pieces`, for which operations are compiled.
    want = SLOPES[name](x.astype(np.float64), values)
    tangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    f = functools.partial(jaxq.cast, fmt=fmt, gradient=name)
    y, dy = jax.jvp(f, (x,), (tangent,))
    assert_same(y, jaxq.cast(x, fmt))
    np.testing.assert_allclose(dy, want * tangent, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vjp(f, x)[1](tangent)[0], want * tangent, rtol=2e-5, atol=1e-7)


# The rule that uses the lowest code, as a cast does.
HALF = jaxq.Symmetric(rule="half")
MINIMUM = jaxq.recipes.ScaleAndMin(stored=True, reciprocal=False)
RECIPES = {
    "int4 per channel": ("int4", CHANNEL, jaxq.Symmetric()),
    "int4 in blocks": ("int4", BLOCKS, jaxq.Symmetric()),
    "uint3 per tensor": ("uint3", jaxq.PerTensor(), jaxq.Symmetric()),
    "e2m1 per channel": ("float4_e2m1fn", CHANNEL, jaxq.Symmetric()),
    "nf4 in blocks": ("nf4", BLOCKS, jaxq.Symmetric()),
    "uint4 with a zero point": ("uint4", CHANNEL, jaxq.Affine()),
    "uint4 with a minimum": ("uint4", CHANNEL, MINIMUM),
}


def recipe_of(kind: str, gradient) -> jaxq.Recipe:
    fmt, granularity, scaling = RECIPES[kind]
    fmt = jaxq.IntFormat("uint3", 3, signed=False) if fmt == "uint3" else fmt
    return jaxq.Recipe(fmt, granularity, scaling, gradient=gradient)


def given(kind: str, x: np.ndarray) -> tuple[jaxq.Recipe, np.ndarray, np.ndarray | None]:
    """Returns a recipe, scales with which some numbers are clipped, and zero points."""
    recipe = recipe_of(kind, "straight_through")
    counts = recipe.cut(x.shape).counts
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.8, 1.2, counts) * 2.5 / recipe.element.max
    scale = scale.astype(np.float16).astype(np.float32)
    if recipe.scaling.zero_point is None:
        return recipe, scale, None
    whole = recipe.scaling.zero_point == "integer"
    zero = rng.integers(3, 9, counts) if whole else rng.uniform(-3, -1, counts).astype(np.float16)
    return recipe, scale, zero.astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    data.each(RECIPES, ["nf4 in blocks", "uint4 with a zero point"]),
)
def test_scales_and_zero_points_match_formula(kind: str):
    """Compares with the chain rule in float64, for each block."""
    x = numbers()
    recipe, scale, zero = given(kind, x)
    cut, values = recipe.cut(x.shape), recipe.element.values
    repeat = tuple(n // m for n, m in zip(x.shape, scale.shape, strict=True))
    expand = lambda a: np.kron(a.astype(np.float64), np.ones(repeat))
    blocks = lambda a: np.asarray(cut.split(jnp.asarray(a))).sum(cut.axes)
    cotangent = np.random.default_rng(3).standard_normal(x.shape)
    s = expand(scale)
    minimum = expand(zero) if recipe.scaling.zero_point == "minimum" else 0.0
    offset = expand(zero) if recipe.scaling.zero_point == "integer" else 0.0
    u = (x - minimum) / s + offset
    assert ((u < values[0]) | (u > values[-1])).any()
    # Rounding before or after adding the zero point differs only at ties.
    level = nearest(u, values)
    arguments = (x, scale) if zero is None else (x, scale, zero)
    # Forward mode must be the transpose of reverse mode, checked with random tangents.
    tangents = tuple(jnp.asarray(numbers(a.shape, 7)) for a in arguments)

    @jax.jit
    def of_all(arguments, cotangent, tangents):
        """Returns value, reverse mode and forward mode of every estimator, in one program."""
        found = {}
        for name in ESTIMATORS:
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
        d_zero = (1 - slope) * (1 if recipe.scaling.zero_point == "minimum" else -s)
        if name == "pact":  # Only clipped numbers contribute to the gradient of the scale.
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


@pytest.mark.parametrize("dtype", ["bfloat16", data.slow("float16")])
def test_narrow_inputs_match_formula(dtype: str):
    """Uses int8 with a scale for which neither ends nor neighbors are numbers of the dtype."""
    values, scale = jaxq.Recipe("int8").element.values, np.float32(0.0713)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1.02, 1.02, 4096) * 127 * scale, jnp.dtype(dtype))
    cotangent = jnp.asarray(rng.standard_normal(4096), jnp.dtype(dtype))

    @jax.jit
    def of_all(x, scale, cotangent):
        def gradients(rule):
            recipe = jaxq.Recipe("int8", gradient=rule)
            return jax.vjp(lambda x, s: jaxq.fake_quant(x, recipe, scale=s), x, scale)[1](cotangent)

        return {name: gradients(name) for name in ESTIMATORS}

    u, c = np.float64(x) / np.float64(scale), np.float64(cotangent)
    level = nearest(u, values)
    assert (np.abs(u - np.floor(u) - 0.5) > 1e-6).all()
    for name, (dx, ds) in of_all(x, jnp.float32(scale), cotangent).items():
        slope = SLOPES[name](u, values)
        np.testing.assert_allclose(np.float64(dx), slope * c, rtol=1e-2, atol=1e-4, err_msg=name)
        d_scale = level - slope * u
        if name == "pact":
            d_scale = np.where(slope == 1, 0, level)
        if name == "lsq":
            d_scale = d_scale / np.sqrt(x.size * 127)
        error = np.abs(d_scale * c).sum() * 1e-5
        np.testing.assert_allclose(ds, (d_scale * c).sum(), atol=error, err_msg=name)


def test_lsq_matches_paper():
    """Compares with LSQ's equation 3 and gradient scale, in the symbols of the paper."""
    v, s, qn, qp = numbers((40,)), np.float32(0.4), 8, 7
    w = v / s
    inside = np.clip(np.rint(w), -qn, qp) - w
    want = np.where(w <= -qn, -qn, np.where(w >= qp, qp, inside)) / np.sqrt(v.size * qp)
    recipe = jaxq.Recipe("int4", scaling=HALF, gradient="lsq")
    f = lambda s: jaxq.fake_quant(v, recipe, scale=s)
    _, got = jax.jvp(f, (jnp.asarray([s]),), (jnp.ones(1),))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    features = jaxq.Recipe("int4", scaling=HALF, gradient=LSQ(count=10))
    g = lambda s: jaxq.fake_quant(v, features, scale=s)
    _, more = jax.jvp(g, (jnp.asarray([s]),), (jnp.ones(1),))
    np.testing.assert_allclose(more, want * 2, rtol=1e-4, atol=1e-6)


def test_lsq_scale_of_empty_tensor_has_zero_gradient():
    recipe, scale = jaxq.Recipe("int4", gradient="lsq"), jnp.ones((1, 1))
    loss = lambda scale: jaxq.fake_quant(jnp.zeros((0, 4)), recipe, scale=scale).sum()
    assert_same(jax.grad(loss)(scale), np.zeros((1, 1), np.float32))


def test_lsq_initial_scale_matches_paper():
    w = numbers((4, 6))
    recipe = jaxq.Recipe("int3", jaxq.PerBlock(4, pad=True))
    want = np.stack([np.abs(w[:, :4]).mean(1), np.abs(w[:, 4:]).mean(1)], 1) * 2 / np.sqrt(3)
    lsq_scale = jax.jit(lambda w: jaxq.qat.lsq_scale(w, recipe))
    np.testing.assert_allclose(lsq_scale(w), want, rtol=1e-6)
    assert_same(lsq_scale(w * 0), np.zeros((4, 2), np.float32))
    chex.assert_shape(jaxq.qat.lsq_scale(np.zeros((0, 3), np.float32), "int4_channel"), (1, 3))


def slope_by_differences(f, x, width=1e-3):
    return (np.float64(f(x + width)) - np.float64(f(x - width))) / (2 * width)


def test_pact_and_clipped_are_derivatives_of_clip():
    """Compares PACT with the derivatives of clip(x, 0, 15 s), and "clipped" with that for x."""
    x, scale = np.float32([-2.0, 0.3, 1.7, 4.1, 8.0, 9.9]), np.float64(0.41)
    clip = lambda x, s: np.clip(x, 0, 15 * s)
    for name in ("pact", "clipped"):
        recipe = jaxq.Recipe("uint4", gradient=name)
        f = lambda x, s, recipe=recipe: jaxq.fake_quant(x, recipe, scale=s)
        s = jnp.float32(scale)
        _, dx = jax.jvp(f, (x, s), (jnp.ones_like(x), jnp.float32(0)))
        np.testing.assert_allclose(dx, slope_by_differences(lambda x: clip(x, scale), x), atol=1e-3)
        if name == "pact":
            _, ds = jax.jvp(f, (x, s), (jnp.zeros_like(x), jnp.float32(1)))
            want = slope_by_differences(lambda s: clip(x, s), scale)
            np.testing.assert_allclose(ds, want, atol=1e-3)


def test_zero_is_true_derivative_of_scales():
    x, recipe = numbers(), jaxq.Recipe("int4", CHANNEL, gradient="zero")
    f = lambda s: np.asarray(jaxq.fake_quant(x, recipe, scale=s))
    scale = np.float32([[0.3], [0.5], [0.9]])
    _, got = jax.jvp(lambda s: jaxq.fake_quant(x, recipe, scale=s), (scale,), (scale * 0 + 1,))
    np.testing.assert_allclose(got, slope_by_differences(f, scale, np.float32(1e-4)), atol=0.02)


@pytest.mark.parametrize("fmt", data.each(FORMATS, ["nf4"]))
def test_dsq_is_derivative_of_soft_rounding(fmt: str):
    values = jaxq.get_format(fmt).values
    recipe = jaxq.Recipe(fmt, scaling=HALF if fmt.startswith("int") else jaxq.Symmetric())
    x = numbers().ravel() * np.float32(values[-1] / 4)

    @functools.partial(jax.jit, static_argnums=1)
    def soft(x, alpha=0.2):
        return jaxq.qat.soft_round(x, *jaxq.neighbors(x, recipe, scale=1.0), alpha=alpha)

    functions = lambda x: jaxq.cast(x, fmt, gradient="dsq").sum(), lambda x: soft(x).sum()
    rule, slope = jax.jit(lambda x: [jax.grad(f)(x) for f in functions])(x)
    np.testing.assert_allclose(slope, rule, rtol=1e-4, atol=1e-6)
    below, above = interval(x, values)
    width = np.float32((above - below).min() / 64)
    by_differences = slope_by_differences(soft, x, width)
    np.testing.assert_allclose(by_differences, rule, rtol=0.02, atol=0.02)
    decided = np.abs(x - (below + above) / 2) > (above - below) / 10
    np.testing.assert_allclose(
        soft(x, 1e-30)[decided], nearest(x, values)[decided], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name", data.each(["straight_through", "clipped", "dsq", "lsq", "pact"], ["dsq"])
)
def test_hessian_matches_formula(name: str):
    """Compares with f'' = D^2 + y D' for f = y^2 / 2, and checks symmetry in x and scale."""
    x, s = np.float64(numbers((6,))), np.float64(0.37)
    values = jaxq.get_format("int4").values
    f = lambda x: (jaxq.cast(x, "int4", gradient=name) ** 2 / 2).sum()
    a = jnp.asarray(x / s, jnp.float32)
    slope = SLOPES[name](x / s, values)
    curvature = slope_by_differences(lambda u: SLOPES[name](u, values), x / s, 1e-5)
    want = slope**2 + np.clip(np.rint(x / s), -8, 7) * curvature
    vector = jnp.asarray(numbers((6,), 5))

    @jax.jit
    def all_transformations(a):
        product = jax.jvp(jax.grad(f), (a,), (vector,))[1]
        return jax.hessian(f)(a), product, jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), vector))(a)

    full, product, other = all_transformations(a)
    np.testing.assert_allclose(full, np.diag(want), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(product, want * vector, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(other, product, rtol=1e-6)

    recipe = jaxq.Recipe("int4", gradient=name)

    def both(p):
        return (jaxq.fake_quant(p[:-1], recipe, scale=p[-1]) ** 2).sum()

    h = jax.jit(jax.hessian(both))(jnp.asarray(np.append(x, s), jnp.float32))
    np.testing.assert_allclose(h, h.T, rtol=1e-4, atol=1e-4)
    assert (h != 0).any()


# The fast cases are a mask with a separate rule for scales, and a smooth function.
@pytest.mark.parametrize("name", data.each(ESTIMATORS, ["lsq"]))
class TestEstimators:
    def gradients_of(self, name, x, scale):
        recipe = jaxq.Recipe("int4", CHANNEL, gradient=name)
        f = lambda x, s: jnp.sin(jaxq.fake_quant(x, recipe, scale=s)).sum()
        return jax.grad(f, (0, 1))(x, scale)

    def test_jit_vmap_scan_and_remat_agree(self, name):
        x, scale = numbers((2, 3, 8)), np.full((2, 3, 1), 0.4, np.float32)
        f = functools.partial(self.gradients_of, name)
        pairs = zip(f(x[0], scale[0]), f(x[1], scale[1]), strict=True)
        want = [np.stack(pair) for pair in pairs]
        recipe = jaxq.Recipe("int4", CHANNEL, gradient=name)

        @jax.checkpoint
        def loss(x, s):
            return jnp.sin(jaxq.fake_quant(x, recipe, scale=s)).sum()

        @jax.jit
        def all_transformations(x, scale):
            _, scanned = jax.lax.scan(lambda c, p: (c, f(*p)), 0, (x, scale))
            return jax.vmap(f)(x, scale), scanned, jax.grad(loss, (0, 1))(x[0], scale[0])

        mapped, scanned, again = all_transformations(x, scale)
        for a, b, c, d in zip(want, mapped, scanned, again, strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(c, a, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(d, a[0], rtol=2e-5, atol=1e-6)

    @pytest.mark.usefixtures("eager")
    def test_gradient_is_nonzero_within_range(self, name):
        """Checks that every estimator except "zero" has a nonzero gradient within the range."""
        if name == "zero":
            pytest.skip("the true derivative is zero")
        for fmt in KINDS:
            end = jaxq.get_format(fmt).max or jaxq.get_format(fmt).min
            # The shape of `data.in_pieces`, for which operations are compiled.
            x = np.full(4096, min(0.3 * end, 1.01), np.float32)
            dx = jax.grad(lambda x, fmt=fmt: jaxq.cast(x, fmt, gradient=name).sum())(x)
            assert (np.asarray(dx) != 0).all(), fmt

    def test_gradients_keep_dtypes_and_take_empty_or_nonfinite_data(self, name):
        recipe = jaxq.Recipe("int4", CHANNEL, gradient=name)

        @jax.jit
        def of(x, s):
            y, pull = jax.vjp(lambda x, s: jaxq.fake_quant(x, recipe, scale=s), x, s)
            return y, *pull(jnp.ones_like(y))

        scale = np.full((3, 1), 0.5, np.float32)
        bad = np.float32([[np.inf, -np.inf, *[1.0] * 6], [0.0, -0.0] * 4, [*range(1, 9)]])
        nan = np.float32([[np.nan, 1.0] * 4] * 3)
        for dtype in ("float32", "float16", "bfloat16"):
            given = lambda a, dtype=dtype: a.astype(jnp.dtype(dtype))
            ordinary = given(numbers())
            y, dx, ds = of(ordinary, scale)
            wide = of(ordinary.astype(np.float32), scale)[2]
            chex.assert_type([y, dx, ds], [jnp.dtype(dtype), jnp.dtype(dtype), jnp.float32])
            np.testing.assert_allclose(ds, wide, rtol=2e-2, atol=2e-3)
            chex.assert_shape(of(given(np.zeros((3, 0))), scale)[1], (3, 0))
            chex.assert_tree_all_finite(of(given(bad), scale)[1:])
            assert_same(of(given(bad), scale * 0)[2], np.zeros((3, 1), np.float32))
            chex.assert_tree_all_finite(of(given(nan), scale)[1])

    def test_dynamic_scales_are_constants(self, name):
        x = jnp.asarray(numbers())
        dx = jax.grad(lambda x: jaxq.fake_quant(x, recipe).sum())
        recipe = jaxq.Recipe("nf4", BLOCKS, gradient=name)
        again = jax.jit(dx)(x)
        np.testing.assert_allclose(again, dx(x), rtol=1e-6)
        assert (again != 0).any() == (name != "zero")

    def test_json_round_trip(self, name):
        for gradient in (name, ESTIMATORS[name]):
            recipe = jaxq.Recipe("int4", gradient=gradient)
            if gradient is name or hasattr(gradient, "__dataclass_fields__"):
                assert jaxq.Recipe.from_json(recipe.to_json()) == recipe


def test_records_with_other_parameters_round_trip():
    for rule in (DSQ(0.05), TrustRegion(0.5), LSQ(64)):
        recipe = jaxq.Recipe("int4", gradient=rule)
        assert jaxq.Recipe.from_json(recipe.to_json()) == recipe
        assert hash(rule) == hash(type(rule)(*vars(rule).values()))


def test_custom_estimator_defines_the_gradient():
    def half(tangent, snap):
        assert snap.below is None
        return jnp.where(snap.y > snap.x, tangent * 0.5, 0)

    recipe = jaxq.Recipe("int4", gradient=half)
    x, scale = jnp.asarray([0.3, 0.8, 1.7]), jnp.float32(1)
    got = jax.grad(lambda x: jaxq.fake_quant(x, recipe, scale=scale).sum())(x)
    assert_same(got, np.float32([0, 0.5, 0.5]))
    ds = jax.grad(lambda s: jaxq.fake_quant(x, recipe, scale=s).sum())(scale)
    np.testing.assert_allclose(ds, 0 + (1 - 0.5 * 0.8) + (2 - 0.5 * 1.7), rtol=1e-6)
    with pytest.raises(TypeError, match="got a function"):
        recipe.to_json()


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("ste", ValueError, "No gradient estimator is named 'ste'"),
        (DSQ, TypeError, r"got the class DSQ. Pass an instance, such as DSQ\(\)"),
        (3, TypeError, "must be a name or a gradient estimator, got int"),
        (lambda: DSQ(1.0), ValueError, "`alpha` must be a number in"),
        (lambda: TrustRegion(0.0), ValueError, "`factor` must be a positive number"),
        (lambda: LSQ(0), ValueError, "`count` must be an integer of at least 1"),
    ],
)
def test_invalid_arguments_raise(spec, error, match):
    with pytest.raises(error, match=match):
        spec() if getattr(spec, "__name__", "") == "<lambda>" else get_gradient(spec)


def test_trust_region_ends_half_steps_outside_the_range():
    """Checks that gradients pass up to `factor` half steps outside the range."""
    x = jnp.asarray([7.4, 7.6, -8.4, -8.6, 0.5, 0.3])
    f = lambda x, rule: jaxq.cast(x, "int4", gradient=rule).sum()
    for factor, want in ((1.0, [1, 0, 1, 0, 1, 1]), (0.7, [0, 0, 0, 0, 0, 1]), (1.5, [1] * 6)):
        rule = TrustRegion(factor)
        assert_same(jax.grad(f)(x, rule), np.float32(want))


def test_trust_region_passes_nearest_rounding_in_float16():
    """Uses float16, in which rounding of y and the interval could reject nearest values."""
    x = jnp.asarray(numbers((100_000,)) * np.float32(13.3), jnp.float16)
    recipe = jaxq.Recipe("int8", gradient="trust_region")
    got = jax.vjp(lambda x: jaxq.fake_quant(x, recipe), x)[1](jnp.ones_like(x))[0]
    assert (got == 1).all()


@pytest.mark.parametrize("name", ["straight_through", "clipped", "lsq"])
def test_infinities_have_gradients_of_large_numbers(name: str):
    def gradients(x, fmt):
        recipe = jaxq.Recipe(fmt, gradient=name)
        f = lambda x, s: (jaxq.fake_quant(x, recipe, scale=s) * jnp.float32([1, 3, 1])).sum()
        return jax.grad(f, (0, 1))(x, jnp.float32(0.1))

    for fmt in ("int8", "float8_e4m3fn"):
        infinite = gradients(jnp.float32([np.inf, -np.inf, 5]), fmt)
        large = gradients(jnp.float32([1e6, -1e6, 5]), fmt)
        if name == "straight_through":  # x / s is infinite, and its gradient is replaced by 0.
            chex.assert_tree_all_finite(infinite)
        else:
            assert_same(infinite[0], large[0])
            assert_same(infinite[1], large[1])


def test_gradients_through_rounding_of_scales():
    """Checks scales that are rounded to float8_e8m0fnu, and zero points rounded to codes."""
    x = jnp.asarray(numbers())
    recipe = jaxq.Recipe("int4", CHANNEL, jaxq.MX("max"), gradient="lsq")
    f = lambda s: jaxq.fake_quant(x, recipe, scale=s)
    free, exact = jnp.full((3, 1), 0.27), jnp.full((3, 1), 0.25)
    assert_same(f(free), f(exact))
    slopes = [jax.grad(lambda s: f(s).sum())(s) for s in (free, exact)]
    assert_same(*slopes)
    assert (slopes[0] != 0).all()
    recipe = jaxq.Recipe("uint4", CHANNEL, jaxq.Affine())
    for given_, used in ((7.4, 7), (99.0, 15), (-3.0, 0)):
        y = jaxq.fake_quant(x, recipe, scale=exact, zero_point=given_)
        assert_same(y, jaxq.fake_quant(x, recipe, scale=exact, zero_point=used))
        q = jaxq.quantize(x, recipe, scale=exact, zero_point=given_)
        assert_same(q.dequantize(), y)


def test_outliers_do_not_affect_gradient_of_scale():
    x = jnp.asarray([[0.3, -0.7, 90.0, 0.2]])
    one, scale = jnp.ones_like(x), jnp.float32(0.1)

    @jax.jit
    def of_all(x, scale):
        """Returns the tangents of scale and tensor by every estimator, in one program."""
        found = []
        for name in ("straight_through", "lsq", "dsq", "trust_region"):
            recipe = jaxq.Recipe("int4", outliers=jaxq.Outliers(0.25), gradient=name)
            f = lambda x, s, recipe=recipe: jaxq.fake_quant(x, recipe, scale=s)
            _, ds = jax.jvp(f, (x, scale), (one * 0, jnp.float32(1)))
            _, dx = jax.jvp(f, (x, scale), (one, jnp.float32(0)))
            found.append((ds, dx))
        return found

    for ds, dx in of_all(x, scale):
        assert ds[0, 2] == 0
        assert dx[0, 2] == 1


def test_unused_scale_gradient_needs_no_memory():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    s = jax.ShapeDtypeStruct((512, 1), jnp.float32)
    recipe = jaxq.Recipe("int4", CHANNEL)

    def both(x, s, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.fake_quant(x, recipe, scale=s), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, s, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 36 * 512
