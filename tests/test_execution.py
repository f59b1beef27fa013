"""Products of codes against NumPy's integers, and against emulation within bounds derived here.

Let K be the number of terms, u = 2^-24, and S the sum of the magnitudes of the terms. The error of
the emulated product is at most (K + 2) u S / (1 - (K + 2) u), from K - 1 additions and one product
of operands that are rounded once each. A product of codes has the error of at most K - 1 additions,
a conversion and two scales. The two therefore differ by at most
(2 K + 5) u S / (1 - (2 K + 5) u).
"""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from tests import data
from tests.data import normal
from tests.oracle import assert_same
from tests.test_dots import both_gradients, dot

HALF_EPS = float(np.finfo(np.float32).eps) / 2
# jaxlib for CPU supports scaled_matmul since version 0.11.
SCALED_MATMUL = jax.__version_info__ >= (0, 11)
TWELVE = jaxq.IntFormat("int12", 12)
# Formats with scales along the contraction: powers of two, and scales that add significant bits.
WIDE = jaxq.Recipe("float16", jaxq.PerBlock(32), jaxq.MX())
NARROW = jaxq.Recipe("float16", jaxq.PerBlock(32), jaxq.Symmetric(scale_format="float8_e4m3fn"))
TILES = jaxq.Recipe("int4", jaxq.PerBlock((2, 32)))


def recipes(lhs, rhs):
    native = jaxq.ProductRecipe(lhs, rhs, execution="native")
    return native, jaxq.ProductRecipe(lhs, rhs)


def assert_within_bound(got, want, magnitudes, terms: int):
    """Asserts the bound above, with 1 % added because S is computed in float32."""
    bound = (2 * terms + 5) * HALF_EPS / (1 - (2 * terms + 5) * HALF_EPS) * magnitudes * 1.01
    assert (np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)) <= bound).all()
    assert (np.asarray(magnitudes) > 0).any()


def integers(x, recipe):
    """Returns the integers and scales of a quantized tensor."""
    q = jaxq.quantize(x, recipe)
    return np.asarray(jaxq.decode(q.unpack(), q.recipe.element)).astype(np.int64), q.scales


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        data.slow("int8_token", "int8_channel"),
        data.slow("int8_tensor", "int4_channel"),
        (TILES, jaxq.Recipe("uint4", jaxq.PerToken())),
    ],
)
def test_integer_products_are_exact(lhs, rhs):
    x, w = normal((6, 32)), normal((32, 4), 1)
    native, emulated = recipes(lhs, rhs)
    transposed = rhs if isinstance(rhs, str) else jaxq.Recipe(rhs.format, jaxq.PerChannel(1))
    (a, left), (b, right) = integers(x, lhs), integers(w, transposed)
    left, right = np.asarray(left), np.asarray(right)
    left = left.repeat(6 // left.shape[0], 0)
    want = (a @ b).astype(np.float32) * left.reshape(6, 1) * right.reshape(1, -1)
    got = jax.jit(functools.partial(dot, recipe=native))(x, w)
    assert_same(got, want)
    assert_same(dot(x, w, native), want)
    magnitudes = (np.abs(a) @ np.abs(b)) * left.reshape(6, 1) * right.reshape(1, -1)
    assert_within_bound(got, dot(x, w, emulated), magnitudes, 32)


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [("fp8_e4m3_tensor", "fp8_e4m3_channel"), data.slow("fp8_e5m2_tensor", "fp8_e4m3_tensor")],
)
def test_float8_products_are_within_bound(lhs, rhs):
    x, w = normal((6, 32)), normal((32, 4), 1)
    native, emulated = recipes(lhs, rhs)
    text = jax.jit(functools.partial(dot, recipe=native)).lower(x, w).as_text()
    assert "f8E4M3FN" in text.split("dot_general")[1]
    magnitudes = jnp.abs(jaxq.fake_quant(x, lhs)) @ jnp.abs(jaxq.fake_quant(w, rhs))
    assert_within_bound(dot(x, w, native), dot(x, w, emulated), magnitudes, 32)


@pytest.mark.parametrize("name", [data.slow("mxfp8_e4m3"), data.slow("mxfp4"), "nvfp4"])
def test_block_formats_use_scaled_matmul_or_raise(name):
    """Checks that a backend without scaled_matmul raises an error when the product is lowered."""
    x, w = normal((6, 64)), normal((64, 4), 1)
    native, emulated = recipes(name, name)
    traced = jax.jit(functools.partial(dot, recipe=native)).trace(x, w)
    assert "scaled_matmul" in str(traced.jaxpr)
    if not SCALED_MATMUL:
        with pytest.raises(NotImplementedError, match="scaled_matmul"):
            traced.lower()
        return
    got = traced.lower().compile()(x, w)
    quantizer = jaxq.get_recipe(name)
    right = jaxq.fake_quant(w.T, quantizer).T
    magnitudes = jnp.abs(jaxq.fake_quant(x, quantizer)) @ jnp.abs(right)
    assert_within_bound(got, dot(x, w, emulated), magnitudes, 64)


def test_native_einsum_takes_permuted_axes():
    x, w = normal((2, 5, 3, 8)), normal((3, 8, 4, 2), 1)
    native, emulated = recipes("int8_token", "int8_token")
    subscripts = "bmhk,hknb->nhbm"
    got = jaxq.einsum(subscripts, x, w, recipe=native)
    want = jaxq.einsum(subscripts, x, w, recipe=emulated)
    # Quantized magnitudes may be larger.
    magnitudes = np.einsum(subscripts, np.abs(x), np.abs(w)) * 1.05
    assert_within_bound(got, want, magnitudes, 8)


def test_native_convolution_stays_within_error_bound():
    x, w = normal((2, 4, 6, 6)), normal((3, 4, 3, 3), 1)
    native, emulated = recipes("int8_token", "int8_channel")
    conv = functools.partial(jaxq.conv_general_dilated, window_strides=(2, 1), padding="SAME")
    magnitudes = lax.conv_general_dilated(jnp.abs(x), jnp.abs(w), (2, 1), "SAME") * 1.05
    got, want = (conv(x, w, recipe=recipe) for recipe in (native, emulated))
    assert_within_bound(got, want, magnitudes, 36)


def test_native_gradient_products_stay_within_error_bound():
    x, w = normal((6, 32)), normal((32, 4), 1)
    gradients = []
    for execution in ("native", "emulated"):
        both = jaxq.SingleProduct("int8_token", "int8_token", execution=execution)
        recipe = jaxq.ProductRecipe("int8_token", "int8_channel", dlhs=both, drhs=both)
        product = functools.partial(dot, recipe=recipe)
        gradients.append(jax.jit(functools.partial(both_gradients, product))(x, w)[1:])
    g = jnp.abs(normal((6, 4), 9))
    magnitudes = (g @ jnp.abs(w).T * 1.05, jnp.abs(x).T @ g * 1.05)
    for got, want, sums, terms in zip(*gradients, magnitudes, (4, 6), strict=True):
        assert_within_bound(got, want, sums, terms)


def test_nonfinite_data_affects_only_its_row():
    x, w = normal((4, 8)).at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf).at[3].set(0.0), jnp.eye(8)
    native, emulated = recipes("int8_token", "int8_channel")
    for recipe in (native, emulated):
        y = np.asarray(dot(x, w, recipe))
        assert np.isnan(y[1:3]).all()
        chex.assert_tree_all_finite(y[0])
        assert_same(y[3], np.zeros(8, np.float32))
    chex.assert_shape(dot(x[:0], w, native), (0, 8))


ACCUMULATION = jaxq.Accumulation("float16", chunk=4)


@pytest.mark.parametrize(
    ("lhs", "rhs", "execution", "text"),
    [
        ("int4_g32", "int4_g32", "native", "lhs: .* MX format or NVFP4, got 'int4'"),
        ("int8_token", "mxfp8_e4m3", "native", "rhs: .* puts scales along the contraction"),
        ("int8_token", "fp8_e4m3_tensor", "native", "integers by integers and floats by floats"),
        ("uint8_tensor", "int8_tensor", "native", "lhs: .* takes no zero point"),
        ("int8_tensor", "q4_1", "native", "rhs: only execution='emulated' .* minima"),
        (jaxq.Recipe("int8", outliers=jaxq.Outliers()), "int8_tensor", "native", "with outliers"),
        (
            jaxq.Recipe("posit8"),
            jaxq.Recipe("posit8"),
            "native",
            "lhs: .* float8 types that JAX has, got 'posit8'",
        ),
        ("int8_tensor", jaxq.Recipe(TWELVE), "native", "rhs: .* at most 8 bits, .* got 'int12'"),
        (None, "int8_tensor", ACCUMULATION, "24 and 7 significant bits for lhs and rhs"),
        ("int4_g32", "int4_g32", ACCUMULATION, "27 and 27 significant bits"),
        ("nf4_g64", "nf4_g64", ACCUMULATION, "24 and 24 significant bits"),
        (WIDE, NARROW, ACCUMULATION, "11 and 15 significant bits"),
        (
            "int8_tensor",
            "int8_tensor",
            jaxq.Accumulation(chunk=5),
            "chunks of 5 must divide .* 64 terms",
        ),
    ],
)
def test_unsupported_executions_raise(lhs, rhs, execution, text):
    recipe = jaxq.ProductRecipe(lhs, rhs, execution=execution)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(functools.partial(dot, recipe=recipe), normal((2, 64)), normal((64, 2)))


def test_unsupported_products_raise():
    x, w = normal((2, 4, 6, 6)), normal((4, 4, 3, 3), 1)
    conv = functools.partial(jaxq.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    with pytest.raises(ValueError, match="conv_general_dilated: an Accumulation is not supported"):
        conv(x, w, recipe=jaxq.ProductRecipe("int8_tensor", "int8_tensor", execution=ACCUMULATION))
    native = jaxq.SingleProduct("int8_tensor", "int8_tensor", execution="native")
    with pytest.raises(ValueError, match="gradient of `rhs`: execution='native' is not supported"):
        jax.grad(lambda w: conv(x, w, recipe=jaxq.ProductRecipe(drhs=native)).sum())(w)
    with pytest.raises(ValueError, match="cannot sum over an axis that only one operand has"):
        jaxq.einsum(
            "ab,cd->ad",
            normal((2, 3)),
            normal((4, 5)),
            recipe=recipes("int8_tensor", "int8_tensor")[0],
        )


def test_native_dot_general_takes_batch_axes():
    x, w = normal((2, 3, 8)), normal((8, 2, 5), 1)
    numbers = (((2,), (0,)), ((0,), (1,)))
    native, emulated = recipes("int8_token", "int8_token")
    got = jaxq.dot_general(x, w, numbers, recipe=native)
    want = jaxq.dot_general(x, w, numbers, recipe=emulated)
    assert_within_bound(got, want, lax.dot_general(jnp.abs(x), jnp.abs(w), numbers) * 1.05, 8)
    assert_same(dot(x[0], w[:, 0], native), got[0])
