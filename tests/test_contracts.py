"""Contracts that every entry of a registry must satisfy."""

import functools
from dataclasses import fields

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.formats import FORMATS, p3109
from jaxq.numerics import ROUNDINGS
from jaxq.products import PRODUCT_RECIPES
from jaxq.recipes import CALIBRATORS, RECIPES
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.optimized

EACH_FORMAT = pytest.mark.parametrize(
    "fmt", data.each_format(FORMATS.values()), ids=lambda fmt: fmt.name
)
# Without jit each operation compiles once for all formats; another test compares jit with no jit.
EAGER = pytest.mark.usefixtures("eager")
EACH_RECIPE = pytest.mark.parametrize("name", data.each(RECIPES, data.kinds()))
STRUCTURES = pytest.mark.parametrize("name", data.each(data.structures(), data.few()))
SHAPE = (128, 256)  # Divisible by the block sizes of all recipes.


def inputs() -> np.ndarray:
    wide = data.random_float32(2000)
    normal = np.random.default_rng(1).standard_normal(2000).astype(np.float32) * 3
    return np.concatenate([data.specials(), wide, normal])[:4016].reshape(8, -1)


EXTREMES = np.float32([3.4028235e38, -3.4028235e38, 1.2e-38, -1e-40, 1, 0])
WIDE = [
    jaxq.FloatFormat("e9m6_ieee", 9, 6, inf=True, nan="ieee"),
    jaxq.FloatFormat("e9m4_fn", 9, 4, nan="all_ones"),
    jaxq.FloatFormat("e10m2_bias", 10, 2, bias=700),
    jaxq.FloatFormat("e11m3_unsigned", 11, 3, signed=False, subnormals=False),
    jaxq.FloatFormat("e12m3", 12, 3),
    jaxq.FloatFormat("e4m3_tiny", 4, 3, bias=300),
    *(p3109(bits, precision) for bits, precision in ((10, 1), (11, 2), (15, 1), (15, 5))),
]


@EAGER
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fmt", data.each_format(WIDE), ids=lambda fmt: fmt.name)
def test_formats_wider_than_the_dtype_keep_exact_codes(fmt: jaxq.FloatFormat, dtype: str):
    limits = np.finfo(dtype)
    rng = np.random.default_rng(0)
    x = np.concatenate([2.0 ** rng.uniform(-149, 127.9, 500), [0, 1, 1.75, 1e-45, np.inf, np.nan]])
    x = np.concatenate([x, limits.max / np.array([1, 1.5, 3]), [limits.tiny * 3]]).astype(dtype)
    x = np.concatenate([x, -x])
    with jax.enable_x64(dtype == "float64"):
        for overflow in ("saturate", None):

            def all_of(x, overflow=overflow):
                codes = jaxq.encode(x, fmt, overflow=overflow)
                decoded = jaxq.decode(codes, fmt, dtype=dtype)
                return codes, decoded, jaxq.cast(x, fmt, overflow=overflow)

            codes, decoded, y = data.in_pieces(all_of, x)
            assert_same(decoded, y)
    finite = np.isfinite(y) & (y != 0) & (np.abs(y) >= np.ldexp(1.0, max(fmt.emin, -1074)))
    significand, exponent = np.frexp(np.abs(y[finite]).astype(np.float64))
    want = (exponent - 1 + fmt.bias) * 2**fmt.mantissa_bits
    want = want + ((2 * significand - 1) * 2**fmt.mantissa_bits).astype(int)
    want = np.where(y[finite] < 0, want + 2 ** (fmt.bits - 1), want)
    np.testing.assert_array_equal(codes[finite], want)
    # The largest float rounds up to the next power of two, which `cast` returns as infinity.
    if fmt.emax > limits.maxexp:
        top = (limits.maxexp + fmt.bias) * 2**fmt.mantissa_bits
        assert codes[x == limits.max].tolist() == [top]


def fast_elements() -> list:
    """Returns few formats with every kind, sign, size and range of exponents."""
    features = {
        fmt: {
            ("sign", type(fmt), fmt.min < 0),
            ("size", type(fmt), fmt.bits > 8),
            ("range", type(fmt), fmt.max >= 2.0**126),
        }
        for fmt in [*FORMATS.values(), *WIDE]
        if 2.0**-126 < fmt.max and fmt.bits <= 16
    }
    return data.cover(features)


@pytest.mark.parametrize(
    "fmt", data.each([*FORMATS.values(), *WIDE], fast_elements()), ids=lambda fmt: fmt.name
)
def test_recipes_of_any_format_stay_finite(fmt):
    """Checks that finite input stays finite, and that infinities equal 1e38 with a given scale."""
    if not 2.0**-126 < fmt.max or fmt.bits > 16:
        pytest.skip("not an element format")
    rows = [np.resize(EXTREMES, 8), np.full(8, 3.4028235e38), np.full(8, 3e-39)]
    x = np.float32([*rows, np.resize([5, 1, 1e-3, -2], 8)])
    recipe = jaxq.Recipe(fmt, jaxq.PerChannel((0,)), rounding="up")

    @jax.jit
    def both(x, scale):
        found = []
        for options in ({}, {"scale": scale}):
            y = jaxq.fake_quant(x, recipe, **options)
            found.append((y, jaxq.quantize(x, recipe, **options).dequantize()))
        return found

    scale = np.float32([[2.0**-30], [0], [1], [2.0**-100]])
    y, stored = both(x, scale)[0]
    chex.assert_tree_all_finite(y)
    assert_same(stored, y)
    x[0, :4], x[1:] = (np.inf, -np.inf, 1e38, -1e38), 1.5
    y, stored = both(x, scale)[1]
    chex.assert_tree_all_finite(y)
    assert_same(stored, y)
    if fmt.max < 2.0**126:
        assert_same(y[0, :2], y[0, 2:4])


def test_values_of_wide_format_raise():
    with pytest.raises(ValueError, match="at most 16 bits"):
        _ = jaxq.get_format("float32").values


@EACH_FORMAT
class TestFormats:
    def test_values_are_distinct_finite_sorted_and_counted(self, fmt):
        if fmt.bits > 16:
            pytest.skip("too many values to list")
        values = fmt.values
        chex.assert_tree_all_finite(values)
        assert (np.diff(values) > 0).all()
        assert len(values) == fmt.num_values
        assert (values[0], values[-1]) == (fmt.min, fmt.max)
        assert (values[values > 0].min(initial=fmt.min_positive)) == fmt.min_positive

    def test_is_hashable_with_exact_repr(self, fmt):
        assert hash(fmt) == hash(jaxq.get_format(fmt.name))
        assert eval(repr(fmt), dict(vars(jaxq))) == fmt

    @EAGER
    def test_values_survive_cast_and_encode(self, fmt):
        if fmt.bits > 16:
            pytest.skip("too many values to list")
        with np.errstate(over="ignore"):  # Takums have values outside the range of float32.
            values = fmt.values.astype(np.float32)
        values = values[values == fmt.values]
        assert_same(data.in_pieces(lambda x: jaxq.cast(x, fmt), values), values)
        codes = data.in_pieces(lambda x: jaxq.encode(x, fmt), values)
        assert len(np.unique(codes)) == len(values)
        assert_same(data.in_pieces(lambda codes: jaxq.decode(codes, fmt), codes), values)

    @EAGER
    def test_cast_equals_decoded_codes_in_all_modes(self, fmt):
        x = inputs()
        bits = np.random.default_rng(2).integers(0, 2**23, x.shape, dtype=np.uint32)
        for mode in ROUNDINGS:

            def both(x, bits, mode=mode):
                random = {"random_bits": bits} if mode == "stochastic" else {}
                codes = jaxq.encode(x, fmt, rounding=mode, **random)
                return jaxq.cast(x, fmt, rounding=mode, **random), jaxq.decode(codes, fmt)

            y, decoded = data.in_pieces(both, x, bits)
            assert_same(decoded, y, x)

    def test_eager_jit_vmap_and_sharded_agree(self, fmt):
        x = inputs()
        f = functools.partial(jaxq.cast, fmt=fmt)
        with jax.disable_jit():
            y = np.asarray(f(x))
        assert_same(f(x), y, x)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        sharded, mapped = jax.jit(lambda x: (f(x), jax.vmap(f)(x)))(jax.device_put(x, sharding))
        assert sharded.sharding.is_equivalent_to(sharding, 2)
        assert_same(sharded, y, x)
        assert_same(mapped, y, x)

    def test_keeps_shape_and_dtype(self, fmt):
        chex.assert_shape(jaxq.cast(np.zeros((0, 3), np.float32), fmt), (0, 3))
        for dtype, shape in (("float16", ()), ("bfloat16", (0,)), ("float32", (2, 3))):
            x = jax.ShapeDtypeStruct(shape, dtype)
            y = jax.eval_shape(functools.partial(jaxq.cast, fmt=fmt), x)
            chex.assert_trees_all_equal_shapes_and_dtypes(x, y)

    @EAGER
    def test_gradients_are_straight_through(self, fmt):
        # The shape of `data.in_pieces`, for which operations are compiled.
        x, ones = np.resize(np.float32([0.3, -0.7, 1e9]), 4096), np.ones(4096, np.float32)
        f = lambda x: (jaxq.cast(x, fmt) * 2).sum()
        assert_same(jax.grad(f)(x), np.full(4096, 2, np.float32))
        assert_same(jax.jvp(f, (x,), (ones,))[1], np.float32(2 * 4096))
        chex.assert_tree_all_finite(jax.jvp(jax.grad(f), (x,), (ones,))[1])


def test_cotangents_are_not_quantized():
    """Checks that jaxq does not quantize cotangents, unlike a pair of `astype` conversions."""
    cotangent = jnp.asarray([1.03, 1e-4, 1000.0])
    x = jnp.ones(3)
    _, pull = jax.vjp(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), x)
    assert np.isnan(pull(cotangent)[0][2])
    _, pull = jax.vjp(lambda x: jaxq.cast(x, "float8_e4m3fn"), x)
    assert_same(pull(cotangent)[0], np.asarray(cotangent))


def difficult_tensors() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal(SHAPE).astype(np.float32)
    bad = ordinary.copy()
    bad[3, 4], bad[5, 6] = np.nan, np.inf
    cases = [ordinary, bad, ordinary * 1e-40, ordinary * 1e37, ordinary * 0, ordinary * 0 - 2.5]
    return [*cases, rng.choice(EXTREMES, SHAPE)]


def assert_quantize_equals_fake_quant(x: np.ndarray, name: str) -> None:
    q = jaxq.quantize(x, name)
    y = jaxq.fake_quant(x, name)
    chex.assert_equal_shape([x, y, q])
    chex.assert_type(y, x.dtype)
    assert_same(y, q.dequantize())
    # A float16 copy of a scale may be infinite, as in GGUF.
    if np.isfinite(x).all() and not data.has_narrow_scales(q.recipe):
        chex.assert_tree_all_finite(y)


@EACH_RECIPE
class TestRecipes:
    def test_stored_equals_simulated(self, name):
        for x in difficult_tensors():
            assert_quantize_equals_fake_quant(x, name)

    def test_nonfinite_block_affects_no_other_block(self, name):
        if jaxq.get_recipe(name).scaling.second_level == "blocks":
            pytest.skip("blocks share their second scale: see test_blocks.py")
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        clean = np.asarray(jaxq.fake_quant(x, name))
        rows, columns = (
            slice(at // b * b, at // b * b + b)
            for at, b in zip((2, 1), jaxq.get_recipe(name).cut(SHAPE).block, strict=True)
        )
        for bad in (np.nan, np.inf, -np.inf):
            dirty = x.copy()
            dirty[2, 1] = bad
            y = np.array(jaxq.fake_quant(dirty, name))
            assert np.isnan(y[rows, columns]).all()
            y[rows, columns] = clean[rows, columns]
            assert_same(y, clean)

    def test_zeros_stay_zeros(self, name):
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        x[:, : SHAPE[1] // 2] = 0
        y = np.asarray(jaxq.fake_quant(x, name))
        if name != "binary_absmean":  # A binary block has no zero unless all of it is zero.
            assert (y[:, : SHAPE[1] // 2] == 0).all()
        assert (np.asarray(jaxq.fake_quant(x * 0, name)) == 0).all()

    def test_bytes_match_bits_per_weight(self, name):
        q = jaxq.quantize(np.ones(SHAPE, np.float32), name)
        assert q.codes.nbytes == SHAPE[0] * SHAPE[1] * q.recipe.element.bits // 8
        assert 8 * q.nbytes == q.recipe.bits_per_weight(SHAPE) * SHAPE[0] * SHAPE[1]

    def test_json_round_trip(self, name):
        recipe = jaxq.get_recipe(name)
        again = jaxq.Recipe.from_json(recipe.to_json())
        assert again == recipe
        assert hash(again) == hash(recipe)

    def test_repr_is_short_and_evaluates_to_the_recipe(self, name):
        recipe = jaxq.get_recipe(name)
        text = repr(recipe)
        assert len(text) < 300
        names = vars(jaxq) | vars(jaxq.recipes) | vars(jaxq.numerics)
        assert eval(text, names) == recipe

    def test_fake_quant_is_idempotent(self, name):
        """Skips recipes with a zero point or a mean, which are not idempotent."""
        scaling = jaxq.get_recipe(name).scaling
        plain = not scaling.two_sided and scaling.range == "absmax" and not scaling.search
        if not plain or not scaling.stored or scaling.searches_elements:
            pytest.skip("a second pass may change this recipe's values")
        x = data.normal(SHAPE)
        y = jaxq.fake_quant(x, name)
        assert_same(jaxq.fake_quant(y, name), y)


def scaled_recipes() -> dict[str, jaxq.Recipe]:
    """Returns one recipe of each structure and calibrator, except those with float16 scales."""
    found = {n: RECIPES[n] for n in data.structures() if not RECIPES[n].scaling.searches_elements}
    for name, calibrator in CALIBRATORS.items():
        found[name] = jaxq.Recipe("int4", jaxq.PerBlock((8, 64)), jaxq.Symmetric(name))
        if calibrator.two_sided:
            recipe = jaxq.Recipe("uint4", jaxq.PerBlock((8, 64)), jaxq.Affine(name))
            found[f"{name}_zero_point"] = recipe
    found["search"] = jaxq.Recipe("int4", jaxq.PerBlock(32), jaxq.Symmetric(search=(1.0, 0.9)))
    found["outliers"] = jaxq.Recipe("int4", outliers=jaxq.Outliers(0.01, 2.0, "bfloat16"))
    return {name: r for name, r in found.items() if r.scale_format.name != "float16"}


def fast_scaled_recipes() -> set[str]:
    """Returns recipes that together have every kind of sum: of values, squares and errors."""
    return {*data.few(), "absmean", "sigmas_zero_point", "mse_zero_point", "search", "outliers"}


@pytest.mark.parametrize("name", data.each(scaled_recipes(), fast_scaled_recipes()))
def test_scaling_by_powers_of_two_commutes(name):
    """Checks that no internal sum or square overflows or underflows for normal numbers."""
    recipe = scaled_recipes()[name]
    shape = SHAPE if name in RECIPES else (8, 64)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = np.where(np.abs(x) < 0.01, np.float32(0.01), x)
    powers = np.float32([1, 2.0**120, 2.0**-100]).reshape(3, 1, 1)
    if name in RECIPES:  # Compiled for other tests, too.
        y = np.stack([jaxq.fake_quant(one, name) for one in x * powers])
    else:
        y = np.asarray(jax.vmap(lambda x: jaxq.fake_quant(x, recipe))(x * powers))
    assert_same(y, y[:1] * powers)


def symmetric_recipes() -> dict[str, tuple[jaxq.Recipe, dict]]:
    """Returns recipes for signed integers without a zero point, and arguments to pass."""
    plain = jaxq.Recipe("int4")
    scalings = {name: jaxq.Symmetric(name) for name in CALIBRATORS}
    scalings["search"] = jaxq.Symmetric(search=(1.0, 0.6))
    found: dict[str, tuple[jaxq.Recipe, dict]] = {
        name: (jaxq.Recipe("int4", scaling=scaling), {}) for name, scaling in scalings.items()
    }
    found["given"] = plain, {"scale": 0.1}
    found["stochastic"] = (
        jaxq.Recipe("int4", rounding="stochastic"),
        {"scale": 0.1, "key": jax.random.key(0)},
    )
    found["int2"] = jaxq.Recipe("int2"), {"scale": 0.5}
    for rule in ("floor", "ceil", "even", "rceil"):
        found[rule] = jaxq.Recipe("ocp_int8", scaling=jaxq.MX(rule)), {}
    return found


# The other calibrators and scale rules share the code that limits the range of codes.
SYMMETRIC = ("mse", "absmean", "search", "given", "stochastic", "int2", "floor", "rceil")


@pytest.mark.parametrize("name", data.each(symmetric_recipes(), SYMMETRIC))
def test_negating_a_tensor_negates_its_codes(name):
    """Checks that symmetric integers never use the lowest code."""
    recipe, given = symmetric_recipes()[name]
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    x[:2] = 3.99, -3.99

    @jax.jit
    def both(x):
        return jaxq.fake_quant(x, recipe, **given), jaxq.quantize(x, recipe, **given).unpack()

    (y, codes), (z, _) = jax.device_get((both(x), both(-x)))
    assert_same(y + np.float32(0), np.float32(0) - z)
    assert not (codes == 2 ** (recipe.element.bits - 1)).any()


def test_half_rule_and_cast_use_lowest_code():
    x = np.float32([-100, 100])
    half = jaxq.Recipe("int4", scaling=jaxq.Symmetric(rule="half"))
    assert_same(jaxq.fake_quant(x, half, scale=1.0), np.float32([-8, 7]))
    assert_same(jaxq.cast(x, "int4"), np.float32([-8, 7]))
    unsigned = jaxq.Recipe("int4", scaling=jaxq.Affine())
    assert_same(jaxq.fake_quant(x, unsigned, scale=1.0, zero_point=0.0), np.float32([-8, 7]))


@STRUCTURES
class TestStructures:
    def test_stored_equals_simulated_in_bfloat16(self, name):
        for x in difficult_tensors():
            assert_quantize_equals_fake_quant(x.astype(jnp.bfloat16), name)

    def test_larger_program_with_gradient_keeps_bits(self, name):
        x = data.normal(SHAPE)

        def step(carry, x):
            before = jax.nn.standardize(x @ x.T)
            y, straight_through = jax.vjp(lambda x: jaxq.fake_quant(x, name), x)
            return carry + jnp.tanh(y.T @ before), (y, *straight_through(x))

        _, (y, gradient) = jax.lax.scan(step, jnp.zeros_like(x.T), x[None])
        assert_same(y[0], jaxq.fake_quant(x, name))
        assert_same(gradient[0], x)

    def test_infinities_saturate_with_given_scales(self, name):
        recipe = jaxq.get_recipe(name)
        if not recipe.scaling.takes_scales:
            pytest.skip("this recipe takes no scales")
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        x[3, 4], x[5, 6] = np.inf, -np.inf
        point = {} if recipe.scaling.zero_point is None else {"zero_point": np.float32(1)}
        if recipe.outliers is not None:
            pytest.skip("infinities are stored as outliers")
        y = jaxq.fake_quant(x, name, scale=np.float32(0.125), **point)
        clipped = np.clip(x, np.float32(-1e30), np.float32(1e30))
        assert_same(jaxq.fake_quant(clipped, name, scale=np.float32(0.125), **point), y)
        stored = jaxq.quantize(x, name, scale=np.float32(0.125), **point)
        assert_same(stored.dequantize(), y)
        chex.assert_tree_all_finite(y)

    def test_quantized_is_a_pytree(self, name):
        """Uses bfloat16 tensors, whose codes and scales equal those of the same float32 numbers."""
        x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(jnp.bfloat16)
        each = [jaxq.quantize(layer.astype(np.float32), name) for layer in x]
        values = np.stack([q.dequantize() for q in each]).astype(x.dtype)

        @jax.jit
        def stack(x):
            stacked = jax.vmap(lambda x: jaxq.quantize(x, name))(x)
            return jax.tree.map(lambda leaf: leaf, stacked)

        stacked = stack(x)
        chex.assert_shape(stacked, x.shape)
        for i, q in enumerate(each):
            leaves = jax.tree.leaves(stacked[i]), jax.tree.leaves(q)
            chex.assert_trees_all_equal(*leaves, strict=True)
        assert_same(stacked.dequantize(), values)
        _, scanned = jax.lax.scan(lambda c, layer: (c, layer.dequantize()), 0, stacked)
        assert_same(scanned, values)
        assert_same(stacked[-1].dequantize(), values[-1])
        shaped = jax.eval_shape(lambda x: jaxq.quantize(x, name), x[0])
        chex.assert_shape(shaped, SHAPE)

    def test_float16_input_uses_float32_scales(self, name):
        """Checks that scales of a float16 tensor of tiny numbers are computed in float32."""
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        tiny = (x * np.float32(2.0**-21)).astype(np.float16)
        y = np.asarray(jaxq.fake_quant(tiny, name))
        assert_same(y, jaxq.fake_quant(tiny.astype(np.float32), name).astype(jnp.float16))
        if not data.has_narrow_scales(jaxq.get_recipe(name)):
            assert (y != 0).any()


@pytest.mark.parametrize("name", data.each(PRODUCT_RECIPES, data.product_kinds()))
class TestProductRecipes:
    """Contracts of product recipes; `test_dots.py` compares their gradients with formulas."""

    SIZE = 128  # Divisible by the block sizes of all recipes.

    def operands(self):
        return tuple(data.normal((self.SIZE, self.SIZE), seed) for seed in (0, 1))

    def dot(self, name, x, w):
        key = jax.random.key(0) if PRODUCT_RECIPES[name].draws else None
        return jaxq.einsum("mk,kn->mn", x, w, recipe=name, key=key)

    def test_is_hashable_with_exact_repr(self, name):
        recipe = jaxq.get_product_recipe(name)
        assert jaxq.get_product_recipe(recipe) is recipe
        again = jaxq.ProductRecipe(**{f.name: getattr(recipe, f.name) for f in fields(recipe)})
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert eval(repr(recipe), vars(jaxq) | vars(jaxq.recipes)) == recipe

    def test_inference_of_one_token_needs_no_key(self, name):
        x, w = self.operands()
        y = jaxq.einsum("k,kn->n", x[0], w, recipe=name)
        chex.assert_shape(y, (self.SIZE,))
        want = np.asarray(x)[0] @ np.asarray(w)
        assert 0 < np.linalg.norm(y - want) / np.linalg.norm(want) < 0.25

    def test_gradients_and_tangents_approximate_float32(self, name):
        x, w = self.operands()
        f = lambda x, w: (self.dot(name, x, w) ** 2).sum()

        @jax.jit
        def of(x, w):
            return jax.grad(f, (0, 1))(x, w), jax.jvp(f, (x, w), (x, w))[1]

        gradients, tangent = of(x, w)
        x, w = np.asarray(x), np.asarray(w)
        y = x @ w
        for got, want in zip(gradients, (2 * y @ w.T, 2 * x.T @ y), strict=True):
            assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.25
        np.testing.assert_allclose(tangent, 4 * (y**2).sum(), rtol=0.1)
