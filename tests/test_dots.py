"""Quantized products against JAX's products and against explicit formulas."""

import dataclasses
import functools
import itertools

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import SingleProduct
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.optimized

MATMUL = (((1,), (0,)), ((), ()))
KEY = jax.random.key(7)
# Recipes without quantizers: one calls JAX directly, the other uses the custom gradient rule.
UNQUANTIZED = [jaxq.ProductRecipe(), jaxq.ProductRecipe(residuals="original")]


def both_gradients(f, x, w):
    """Returns the value and the gradients of both operands for a random cotangent."""
    y, pull = jax.vjp(f, x, w)
    return (y, *pull(data.normal(y.shape, 9).astype(y.dtype)))


def dot(x, w, recipe, key=None):
    return jaxq.dot_general(x, w, MATMUL, recipe=recipe, key=key)


@pytest.mark.parametrize("recipe", UNQUANTIZED, ids=["plain", "by the rule"])
class TestWithoutQuantizers:
    """Values and gradients must equal those of JAX bitwise."""

    def agree(self, ours, theirs, x, w):
        for got, want in zip(both_gradients(ours, x, w), both_gradients(theirs, x, w), strict=True):
            assert_same(got, want)

    def test_dot_general_without_recipes_equals_jax(self, recipe):
        x, w = data.normal((3, 4, 5, 6)), data.normal((6, 3, 7, 4), 1)
        numbers = (((3, 1), (0, 3)), ((0,), (1,)))
        options = {"precision": "highest", "preferred_element_type": jnp.float32}
        self.agree(
            lambda x, w: jaxq.dot_general(x, w, numbers, **options, recipe=recipe),
            lambda x, w: lax.dot_general(x, w, numbers, **options),
            x.astype(jnp.bfloat16),
            w,
        )

    @pytest.mark.parametrize("subscripts", ["...ij,...jk->k...i", "bhqd,bhkd"])
    def test_einsum_without_recipes_equals_jax(self, recipe, subscripts):
        x, w = data.normal((2, 3, 4, 5)), data.normal((2, 3, 5, 5), 1)
        self.agree(
            lambda x, w: jaxq.einsum(subscripts, x, w, recipe=recipe),
            lambda x, w: jnp.einsum(subscripts, x, w),
            x,
            w,
        )

    @pytest.mark.parametrize("groups", [1, 2])
    def test_conv_without_recipes_equals_jax(self, recipe, groups):
        options = {
            "window_strides": (2, 1),
            "padding": "SAME",
            "rhs_dilation": (1, 2),
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
            "feature_group_count": groups,
        }
        x, w = data.normal((2, 7, 6, 4)), data.normal((3, 2, 4 // groups, 8), 1)
        self.agree(
            lambda x, w: jaxq.conv_general_dilated(x, w, **options, recipe=recipe),
            lambda x, w: lax.conv_general_dilated(x, w, **options),
            x,
            w,
        )


def test_no_recipe_equals_jax():
    x, w = data.normal((2, 3)), data.normal((3, 4), 1)
    assert_same(jaxq.dot_general(x, w, MATMUL), lax.dot_general(x, w, MATMUL))
    three = ("ij,jk,kl->il", x, w, data.normal((4, 5), 2))
    assert_same(jaxq.einsum(*three), jnp.einsum(*three))
    image, kernel = data.normal((1, 2, 5, 5)), data.normal((3, 2, 3, 3), 1)
    arguments = (image, kernel, (1, 1), "VALID")
    assert_same(jaxq.conv_general_dilated(*arguments), lax.conv_general_dilated(*arguments))


def along(quantizer, contracted: int):
    """Returns a recipe for a matrix with explicit axes for the contracted axis."""
    if quantizer is None:
        return lambda x, _: x
    granularity, stochastic = quantizer.granularity, quantizer.rounding == "stochastic"
    if isinstance(granularity, jaxq.PerToken | jaxq.PerChannel):
        granularity = jaxq.PerChannel(1 - contracted)
    if isinstance(granularity, jaxq.PerBlock) and len(granularity.sizes) == 1:
        granularity = jaxq.PerBlock(granularity.sizes[0], axes=contracted)
    literal = dataclasses.replace(quantizer, granularity=granularity)
    return lambda x, key: jaxq.fake_quant(x, literal, key=key if stochastic else None)


def hadamard(x, signs, axis: int):
    """Applies the fast Hadamard transform to blocks of 16 along an axis, in NumPy."""
    x = np.moveaxis(np.asarray(x), axis, -1)
    y = x.reshape(-1, 16) * np.asarray(signs, np.float32)
    for half in (1, 2, 4, 8):
        pairs = y.reshape(-1, 8 // half, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(-1, 16)
    return jnp.asarray(np.moveaxis((y * np.float32(0.25)).reshape(x.shape), -1, axis))


@pytest.mark.parametrize(
    "name",
    data.each(jaxq.products.PRODUCT_RECIPES, ["mxfp8_training", "nvfp4_training"]),
)
def test_gradients_match_formula(name: str):
    """Compares bitwise with `lax.dot_general` of quantized operands."""
    recipe = jaxq.get_product_recipe(name)
    size = 128 if "128" in name else 32
    x, w, g = (
        data.normal((size, 2 * size)),
        data.normal((2 * size, 3 * size), 1),
        data.normal((size, 3 * size), 2),
    )
    keys = jax.random.split(KEY, 9).reshape(3, 3)
    key = KEY if recipe.draws else None

    @jax.jit
    def ours(x, w, g):
        y, pull = jax.vjp(lambda x, w: dot(x, w, recipe, key), x, w)
        return (y, *pull(g))

    qx, qw = along(recipe.operands[0], 1)(x, None), along(recipe.operands[1], 0)(w, None)
    left, right = (qx, qw) if recipe.residuals == "quantized" else (x, w)
    quantizers = recipe.dlhs.operands
    cotangent = along(quantizers[0], 1)(g, keys[1][0])
    right = along(quantizers[1], 1)(right, keys[1][1])
    (dx,) = jax.linear_transpose(lambda x: lax.dot_general(x, right, MATMUL), x)(cotangent)
    cotangent, quantizers = g, recipe.drhs.operands
    if recipe.drhs.hadamard is not None:
        signs = recipe.drhs.hadamard.signs
        cotangent, left = hadamard(g, signs, 0), hadamard(left, signs, 0)
    cotangent = along(quantizers[0], 0)(cotangent, keys[2][0])
    left = along(quantizers[1], 0)(left, keys[2][1])
    (dw,) = jax.linear_transpose(lambda w: lax.dot_general(left, w, MATMUL), w)(cotangent)
    for got, want in zip(ours(x, w, g), (lax.dot_general(qx, qw, MATMUL), dx, dw), strict=True):
        assert_same(got, want)


class TestPublishedRecipes:
    """Fields of product recipes, compared with the publications."""

    @staticmethod
    def of(quantizer):
        """Returns the main fields of a recipe."""
        return (
            quantizer.element.name,
            quantizer.granularity,
            quantizer.scaling,
            quantizer.rounding,
        )

    def test_nvfp4_training_matches_published_recipe(self):
        """Checks blocks, weight tiles, stochastic cotangents and the transform of size 16."""
        recipe = jaxq.get_product_recipe("nvfp4_training")
        block, tile = jaxq.PerBlock(16), jaxq.PerBlock((16, 16))
        nearest, stochastic = (
            (jaxq.TwoLevel(), rounding) for rounding in ("nearest_even", "stochastic")
        )
        operands = [*recipe.operands, *recipe.dlhs.operands, *recipe.drhs.operands]
        assert [self.of(quantizer) for quantizer in operands] == [
            ("float4_e2m1fn", block, *nearest),
            ("float4_e2m1fn", tile, *nearest),
            ("float4_e2m1fn", block, *stochastic),
            ("float4_e2m1fn", tile, *nearest),
            ("float4_e2m1fn", block, *stochastic),
            ("float4_e2m1fn", block, *nearest),
        ]
        assert jaxq.TwoLevel().largest == 448
        assert recipe.residuals == "original"
        assert (recipe.hadamard, recipe.dlhs.hadamard) == (None, None)
        assert recipe.drhs.hadamard.size == 16

    def test_fp8_training_matches_published_recipe(self):
        """Checks E4M3 operands, E5M2 cotangents, tensor scales and quantized residuals."""
        recipe = jaxq.get_product_recipe("fp8_training")
        e4m3, e5m2 = (
            (name, jaxq.PerTensor(), jaxq.Symmetric(), "nearest_even")
            for name in ("float8_e4m3fn", "float8_e5m2")
        )
        assert [self.of(quantizer) for quantizer in recipe.operands] == [e4m3, e4m3]
        for product in (recipe.dlhs, recipe.drhs):
            assert self.of(product.operands[0]) == e5m2
            assert product.operands[1] is None
        assert recipe.residuals == "quantized"

    @pytest.mark.parametrize(
        ("name", "element", "rule"),
        [
            ("mxfp8_training", "float8_e4m3fn", "rceil"),
            ("mxfp6_training", "float6_e3m2fn", "floor"),
            ("mxfp4_training", "float4_e2m1fn", "floor"),
        ],
    )
    def test_mx_training_matches_published_recipe(self, name, element, rule):
        """Checks blocks of 32, quantized again for every product."""
        recipe = jaxq.get_product_recipe(name)
        want = (element, jaxq.PerBlock(32), jaxq.MX(rule), "nearest_even")
        operands = [*recipe.operands, *recipe.dlhs.operands, *recipe.drhs.operands]
        assert [self.of(quantizer) for quantizer in operands] == [want] * 6
        assert recipe.residuals == "original"

    def test_int8_training_matches_published_recipe(self):
        """Checks that the weight gradient is float and the input's cotangent is stochastic."""
        recipe = jaxq.get_product_recipe("int8_training")
        plain, stochastic = (
            ("int8", jaxq.PerToken(), jaxq.Symmetric(), rounding)
            for rounding in ("nearest_even", "stochastic")
        )
        operands = [*recipe.operands, *recipe.dlhs.operands]
        assert [self.of(quantizer) for quantizer in operands] == [plain, plain, stochastic, plain]
        assert recipe.drhs.plain
        assert recipe.residuals == "original"


def test_residuals_are_quantized_or_original_operands():
    x, w, g = data.normal((8, 16)), data.normal((16, 4), 1), data.normal((8, 4), 2)
    qx, qw = jaxq.fake_quant(x, "int8_token"), jaxq.fake_quant(w, "int4_channel")
    for residuals, left, right in (("quantized", qx, qw), ("original", x, w)):
        recipe = jaxq.ProductRecipe("int8_token", "int4_channel", residuals=residuals)
        y, pull = jax.vjp(lambda x, w, r=recipe: dot(x, w, r), x, w)
        assert_same(y, qx @ qw)
        _, want = jax.vjp(lambda x, w: lax.dot_general(x, w, MATMUL), left, right)
        for got, gradient in zip(pull(g), want(g), strict=True):
            assert_same(got, gradient)


def test_clipped_operands_have_no_gradient():
    clipped = jaxq.Recipe("int4", scaling=jaxq.Symmetric("absmean"), gradient="clipped")
    x, w = data.normal((8, 16)), data.normal((16, 4), 1)
    for residuals in ("quantized", "original"):
        recipe = jaxq.ProductRecipe(clipped, clipped, residuals=residuals)
        _, dx, dw = both_gradients(lambda x, w, r=recipe: dot(x, w, r), x, w)
        inside = [np.abs(a) <= float(jnp.abs(a).mean()) for a in (x, w)]
        for gradient, passed in ((dx, inside[0]), (dw, inside[1])):
            assert_same(np.asarray(gradient)[~passed], np.zeros((~passed).sum(), np.float32))
            assert (np.asarray(gradient)[passed] != 0).all()


def test_cotangents_are_not_quantized_by_default():
    cotangent = jnp.asarray([[1.03, 1e-4, 1000.0]])
    x, w = jnp.ones((1, 3)), jnp.eye(3)
    fp8 = "fp8_e4m3_tensor"
    for execution in ("emulated", "native"):
        recipe = jaxq.ProductRecipe(fp8, fp8, execution=execution, residuals="original")
        assert_same(jax.vjp(lambda x, r=recipe: dot(x, w, r), x)[1](cotangent)[0], cotangent)
    recipe = dataclasses.replace(recipe, dlhs=SingleProduct("fp8_e5m2_tensor"))
    (got,) = jax.vjp(lambda x: dot(x, w, recipe), x)[1](cotangent)
    assert_same(got, jaxq.fake_quant(cotangent, "fp8_e5m2_tensor"))


class TestDerivatives:
    """Forward mode and second derivatives through quantizers of the gradient products."""

    BOTH = SingleProduct("int8_token", "int8_token")
    RECIPE = jaxq.ProductRecipe(
        "int8_token", "int8_token", dlhs=BOTH, drhs=BOTH, residuals="original"
    )

    def test_forward_mode_matches_product_rule(self):
        x, w, dx, dw = (data.normal(shape, i) for i, shape in enumerate([(4, 8), (8, 3)] * 2))
        for recipe in (self.RECIPE, dataclasses.replace(self.RECIPE, execution="native")):
            f = functools.partial(dot, recipe=recipe)
            y, tangent = jax.jvp(f, (x, w), (dx, dw))
            assert_same(y, f(x, w))
            np.testing.assert_allclose(tangent, dx @ w + x @ dw, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("execution", ["emulated", "native"])
    def test_second_derivatives_are_straight_through(self, execution):
        x, w, v = data.normal((4, 8)), data.normal((8, 3), 1), data.normal((4, 8), 2)
        recipe = dataclasses.replace(
            self.RECIPE, dlhs=dataclasses.replace(self.BOTH, execution=execution)
        )
        gradient = jax.grad(lambda x: (dot(x, w, recipe) ** 2).sum() / 2)
        # The gradient product quantizes w with one scale per row.
        seen = jaxq.fake_quant(w, jaxq.Recipe("int8", jaxq.PerChannel(0)))
        quantized = functools.partial(jaxq.fake_quant, recipe="int8_token")
        first = quantized(dot(x, w, recipe)) @ seen.T
        np.testing.assert_allclose(gradient(x), first, rtol=1e-5, atol=1e-5)
        over = jax.jit(lambda x: jax.jvp(gradient, (x,), (v,))[1])
        np.testing.assert_allclose(over(x), v @ w @ seen.T, rtol=1e-5, atol=1e-5)
        reverse = jax.jit(jax.grad(lambda x: (gradient(x) * v).sum()))(x)
        np.testing.assert_allclose(reverse, quantized(v @ seen) @ seen.T, rtol=1e-5, atol=1e-5)

    def test_second_derivatives_equal_those_of_composition(self):
        x, w, v = data.normal((4, 8)), data.normal((8, 3), 1), data.normal((4, 8), 2)

        def composed(x):
            y = jaxq.fake_quant(x, "int8_token") @ jaxq.fake_quant(w, "int8_channel")
            return (y**3).sum()

        ours = lambda x: (dot(x, w, "w8a8") ** 3).sum()
        both = [
            jax.jit(lambda x, f=f: jax.jvp(jax.grad(f), (x,), (v,)))(x) for f in (ours, composed)
        ]
        for got, want in zip(*both, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class TestKeys:
    def test_missing_and_unused_keys_raise(self):
        x, w = data.normal((4, 8)), data.normal((8, 3), 1)
        assert_same(dot(x, w, "int8_training"), dot(x, w, "w8a8"))  # The forward pass needs no key.
        with pytest.raises(
            ValueError, match=r"gradient of `lhs`: `key` must be given.*random bits for lhs"
        ):
            jax.grad(lambda x: dot(x, w, "int8_training").sum())(x)
        # The product of this gradient draws no random bits.
        jax.grad(lambda w: dot(x, w, "int8_training").sum())(w)
        forward = jaxq.ProductRecipe(jaxq.Recipe("int8", rounding="stochastic"))
        with pytest.raises(
            ValueError, match=r"dot_general: `key` must be given.*random bits for lhs"
        ):
            dot(x, w, forward)
        with pytest.raises(ValueError, match="draws no random bits, got a key"):
            dot(x, w, "w8a8", KEY)
        signs = jaxq.ProductRecipe("int8_tensor", "int8_tensor", hadamard=8)
        with pytest.raises(ValueError, match="random bits for hadamard"):
            dot(x, w, signs)

    def test_operands_use_different_random_bits(self):
        """Quantizes the same numbers as four operands of the three products."""
        rough = jaxq.Recipe("int2", rounding="stochastic")
        both = SingleProduct(rough, rough)
        recipe = jaxq.ProductRecipe(rough, rough, dlhs=both, drhs=both, residuals="original")
        x = data.normal((16, 16))
        eye = jnp.eye(16)
        seen = [dot(x, eye, recipe, KEY), dot(eye, x, recipe, KEY)]
        seen += jax.vjp(lambda a, b: dot(a, b, recipe, KEY), eye, eye)[1](x)
        assert all((a != b).any() for a, b in itertools.combinations(seen, 2))

    def test_gradients_agree_under_jit_vmap_scan_and_remat(self):
        x, w = data.normal((8, 8)), data.normal((8, 16), 1)
        f = lambda x, key: (dot(x, w, "int8_training", key) ** 2).sum()
        keys = jax.random.split(KEY, 2)

        @jax.jit
        def all_transformations(x):
            one = jnp.stack([jax.grad(f)(x, keys[i]) for i in range(2)])
            remat = jnp.stack([jax.grad(jax.checkpoint(f))(x, keys[i]) for i in range(2)])
            mapped = jax.lax.map(lambda key: jax.grad(f)(x, key), keys)
            return one, remat, mapped, jax.vmap(jax.grad(f), (None, 0))(x, keys)

        one, *others = all_transformations(x)
        assert (one[0] != one[1]).any()
        for other in others:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)

    def test_raw_keys_draw_the_same_bits_as_typed_keys(self):
        x, w, old = data.normal((4, 8)), data.normal((8, 3), 1), jax.random.PRNGKey(7)
        f = jax.jit(jax.grad(lambda x, key: dot(x, w, "int8_training", key).sum()))
        assert_same(f(x, old), f(x, jax.random.wrap_key_data(old)))


def test_vmap_computes_scales_per_element():
    x, w = (
        data.normal((3, 4, 8)) * jnp.asarray([1.0, 9.0, 81.0])[:, None, None],
        data.normal((8, 5), 1),
    )
    both = SingleProduct("int8_tensor", "int8_tensor")
    recipe = jaxq.ProductRecipe("int8_tensor", "int8_tensor", dlhs=both, drhs=both)
    f = jax.jit(lambda x, w: both_gradients(lambda x, w: dot(x, w, recipe), x, w))
    many = jax.jit(jax.vmap(f, (0, None)))(x, w)
    for i in range(3):
        for got, want in zip(many, f(x[i], w), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-4)


def test_bfloat16_operands_keep_their_dtype_and_bits():
    x, w = data.normal((16, 32)).astype(jnp.bfloat16), data.normal((32, 16), 1).astype(jnp.bfloat16)
    options = {"preferred_element_type": jnp.float32}

    @jax.jit
    def f(x, w):
        ours = functools.partial(
            jaxq.dot_general, dimension_numbers=MATMUL, **options, recipe="nvfp4_training", key=KEY
        )
        return both_gradients(ours, x, w)

    y, dx, dw = f(x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    tile = dataclasses.replace(jaxq.get_recipe("nvfp4"), granularity=jaxq.PerBlock((16, 16)))
    left, right = jaxq.fake_quant(x, "nvfp4"), jaxq.fake_quant(w, tile)
    assert_same(y, lax.dot_general(left, right, MATMUL, **options))


def test_convolution_matches_formula():
    """Uses scales per image, per feature, and per block of channels or of the batch."""
    options = {"window_strides": (1, 2), "padding": "SAME"}
    x, w = data.normal((4, 8, 5, 6)), data.normal((8, 8, 3, 3), 1)
    conv = functools.partial(lax.conv_general_dilated, **options)
    block = jaxq.Recipe("int8", jaxq.PerBlock(4))
    recipe = jaxq.ProductRecipe(
        "int8_token",
        "int8_channel",
        dlhs=SingleProduct(block, block),
        drhs=SingleProduct(block, "int8_token"),
        residuals="original",
    )

    def fake(x, axes=None, block=None):
        granularity = jaxq.PerChannel(axes) if block is None else jaxq.PerBlock(4, axes=block)
        return jaxq.fake_quant(x, jaxq.Recipe("int8", granularity))

    y, pull = jax.vjp(lambda x, w: jaxq.conv_general_dilated(x, w, **options, recipe=recipe), x, w)
    assert_same(y, conv(fake(x, 0), fake(w, 0)))
    g = data.normal(y.shape, 2)
    (dx,) = jax.linear_transpose(lambda x: conv(x, fake(w, block=0)), x)(fake(g, block=1))
    (dw,) = jax.linear_transpose(lambda w: conv(fake(x, 1), w), w)(fake(g, block=0))
    for got, want in zip(pull(g), (dx, dw), strict=True):
        assert_same(got, want)


def test_calls_of_one_shape_compile_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(w, x, key):
        return w - 0.1 * jax.grad(lambda w: (dot(x, w, "int8_training", key) ** 2).sum())(w)

    w = data.normal((8, 3))
    for i in range(3):
        w = step(w, data.normal((4, 8), i), jax.random.fold_in(KEY, i))


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "fp8_training", "mxfp8_training"])
def test_temporaries_have_size_of_quantized_operands(name: str):
    """Checks that temporary memory is at most one array per quantized operand, and scales."""
    recipe, n = jaxq.get_product_recipe(name), 512
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)

    def all_three(x, w, g):
        y, pull = jax.vjp(lambda x, w: dot(x, w, recipe), x, w)
        return (y, *pull(g))

    compiled = jax.jit(all_three).lower(x, x, x).compile()
    operands = [*recipe.operands, *recipe.dlhs.operands, *recipe.drhs.operands]
    bound = sum(quantizer is not None for quantizer in operands) + 0.25
    assert compiled.memory_analysis().temp_size_in_bytes <= bound * 4 * n * n


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x, w: dot(x, w, "nothing"), ValueError, "No product recipe is named"),
        (lambda x, w: dot(x, w, "int8_token"), ValueError, r"jaxq.ProductRecipe\(lhs, rhs\)"),
        (lambda x, w: dot(x, w, 3), TypeError, "must be a name or a jaxq.ProductRecipe, got int"),
        (
            lambda x, w: dot(x.astype(jnp.int32), w.astype(jnp.int32), "w8a16"),
            TypeError,
            "dot_general: rhs: must be of dtype .* got int32",
        ),
        (
            lambda x, w: dot(x, w, "mxfp8_training"),
            ValueError,
            "dot_general: lhs: .*which have 8 elements",
        ),
        (
            lambda x, w: jax.grad(lambda x: dot(x, w, jaxq.ProductRecipe(dlhs=BLOCKS)).sum())(x),
            ValueError,
            "dot_general, gradient of `lhs`: the cotangent: .*blocks of 4 .* which have 3",
        ),
        (
            lambda x, w: jax.grad(lambda w: dot(x, w, jaxq.ProductRecipe(drhs=TRANSFORMED)).sum())(
                w
            ),
            ValueError,
            r"gradient of `rhs`: the cotangent: Hadamard\(16\): blocks of 16 .* which have 4",
        ),
        (
            lambda x, w: jaxq.einsum("ij,jk,kl->il", x, w, w, recipe="w8a16"),
            ValueError,
            "exactly two operands, got 3",
        ),
        (lambda _, w: jaxq.einsum("ii,ij->j", w, w, recipe="w8a16"), ValueError, "`lhs` once"),
        (lambda x, w: jaxq.einsum("ij,jk", x, w[0], recipe="w8a16"), ValueError, "`rhs` once"),
        (lambda x, w: jaxq.einsum("ij,jk->il", x, w, recipe="w8a16"), ValueError, "got 'il'"),
        (lambda x, w: jaxq.einsum("ij,jk->ii", x, w, recipe="w8a16"), ValueError, "got 'ii'"),
        (
            lambda *_: jaxq.conv_general_dilated(
                jnp.ones((1, 16, 4, 4)),
                jnp.ones((16, 8, 3, 3)),
                (1, 1),
                "SAME",
                feature_group_count=2,
                recipe=jaxq.ProductRecipe(hadamard=jaxq.Hadamard(2, (1, 1))),
            ),
            ValueError,
            "mix the groups of a grouped product",
        ),
        (lambda *_: jaxq.ProductRecipe("no such"), ValueError, "No recipe is named 'no such'"),
        (lambda *_: jaxq.ProductRecipe(residuals="none"), ValueError, "`residuals` must be"),
        (
            lambda *_: jaxq.ProductRecipe(dlhs="w8a16"),
            ValueError,
            "`dlhs` must be a jaxq.SingleProduct",
        ),
        (lambda *_: SingleProduct(execution="fast"), ValueError, "`execution` must be"),
        (
            lambda *_: SingleProduct("int8_tensor", execution="native"),
            ValueError,
            "needs both operands quantized",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, text):
    with pytest.raises(error, match=text):
        call(data.normal((4, 8)), data.normal((8, 3), 1))


BLOCKS = SingleProduct(jaxq.Recipe("int4", jaxq.PerBlock(4)))
TRANSFORMED = SingleProduct(hadamard=jaxq.Hadamard(16, (1,) * 16))
