"""Ragged products, as in a mixture of experts, against NumPy and in whole models."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same, assert_same_trees

SIZES = jnp.array([5, 0, 9], jnp.int32)
GROUPS = [range(5), range(0), range(5, 14)]  # Rows 14 and 15 belong to no group.
INT8_CHANNEL = jaxq.get_recipe("int8_channel")


X, W, G = data.normal((16, 32)), data.normal((3, 32, 8), 1), data.normal((16, 8), 2)


def with_gradients(function):
    y, pull = jax.vjp(function, X, W)
    return (y, *pull(G))


def of_rows(function, groups=GROUPS):
    """Calls a function with the index and the rows of each group, and stacks the results."""
    return np.stack([function(i, list(rows)) for i, rows in enumerate(groups)])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residuals", ["quantized", "original"])
def test_without_quantizers_matches_jax_bitwise(residuals):
    recipe = jaxq.ProductRecipe(residuals=residuals)
    got = with_gradients(lambda x, w: jaxq.ragged_dot(x, w, SIZES, recipe=recipe))
    for a, b in zip(got, with_gradients(lambda x, w: lax.ragged_dot(x, w, SIZES)), strict=True):
        assert_same(a, b)
    assert_same(jaxq.ragged_dot(X, W, SIZES), lax.ragged_dot(X, W, SIZES))


@pytest.mark.parametrize("name", [data.slow("w8a8"), "fp8_training", "blocks"])
def test_products_match_numpy_per_group(name):
    """Compares values and gradients with NumPy, group by group, with quantized operands."""
    block = jaxq.Recipe("float8_e4m3fn", jaxq.PerBlock(8))
    own = {
        "blocks": jaxq.ProductRecipe(
            block,
            block,
            dlhs=jaxq.SingleProduct(block, block),
            drhs=jaxq.SingleProduct(block, "int8_token"),
            residuals="original",
        ),
    }
    recipe = own.get(name) or dataclasses.replace(
        jaxq.get_product_recipe(name),
        dlhs=jaxq.SingleProduct(block),
        drhs=jaxq.SingleProduct(block),
    )
    got = with_gradients(jax.jit(lambda x, w: jaxq.ragged_dot(x, w, SIZES, recipe=recipe)))

    def quantized(x, quantizer, contracted):
        """Quantizes an operand: each group's matrix separately, the rows of `x` together."""
        if quantizer is None:
            return x
        if isinstance(quantizer.granularity, jaxq.PerToken | jaxq.PerChannel):
            free = [axis for axis in range(x.ndim) if axis != contracted % x.ndim]
            quantizer = dataclasses.replace(quantizer, granularity=jaxq.PerChannel(tuple(free)))
        elif isinstance(quantizer.granularity, jaxq.PerBlock):
            quantizer = dataclasses.replace(quantizer, granularity=jaxq.PerBlock(8, contracted))
        return np.asarray(jaxq.fake_quant(x, quantizer))

    (left, right), (dl, dr), (wl, wr) = (product.operands for product in recipe.products)
    x, w = quantized(X, left, -1), quantized(W, right, 1)
    y, dx = np.zeros((16, 8), np.float32), np.zeros((16, 32), np.float32)
    again = (x, w) if recipe.residuals == "quantized" else (X, W)
    g, second = quantized(G, dl, -1), quantized(again[1], dr, 2)
    for i, rows in enumerate(map(list, GROUPS)):
        y[rows] = np.asarray(x)[rows] @ np.asarray(w)[i]
        dx[rows] = np.asarray(g)[rows] @ np.asarray(second)[i].T
    g, first = quantized(G, wl, 0), quantized(again[0], wr, 0)
    dw = of_rows(lambda _, rows: np.asarray(first)[rows].T @ np.asarray(g)[rows])
    for a, b in zip(got, (y, dx, dw), strict=True):
        close(a, b)


def test_ragged_contraction_and_batch_match_numpy():
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    recipe = jaxq.ProductRecipe("int8_token", "int8_channel")
    got = jaxq.products.ragged_dot_general(X, G, SIZES, numbers, recipe=recipe)
    columns = dataclasses.replace(INT8_CHANNEL, granularity=jaxq.PerChannel(1))
    x, g = jaxq.fake_quant(X, columns), jaxq.fake_quant(G, columns)
    close(got, of_rows(lambda _, rows: np.asarray(x)[rows].T @ np.asarray(g)[rows]))
    numbers = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())
    got = jaxq.products.ragged_dot_general(
        X.reshape(2, 8, 32), W[:2], SIZES[:2], numbers, recipe=recipe
    )
    want = jaxq.einsum("bmk,bkn->bmn", X.reshape(2, 8, 32), W[:2], recipe=recipe)
    close(got, want)


@pytest.mark.slow
def test_vmap_computes_scales_per_element():
    recipe = dataclasses.replace(jaxq.get_product_recipe("fp8_training"), residuals="original")

    def gradients(x, w, sizes):
        y = lambda x, w: (jaxq.ragged_dot(x, w, sizes, recipe=recipe) ** 2).sum()
        return jax.grad(y, (0, 1))(x, w)

    batch = [jnp.stack([x, 3 * x]) for x in (X, W)]
    sizes = jnp.stack([SIZES, SIZES[::-1]])
    got = jax.vmap(gradients)(*batch, sizes)
    for i in range(2):
        want = gradients(batch[0][i], batch[1][i], sizes[i])
        for a, b in zip(got, want, strict=True):
            close(a[i] / 81, b / 81)


def test_unsupported_recipes_raise():
    gradient = lambda recipe: jax.grad(lambda w: jaxq.ragged_dot(X, w, SIZES, recipe=recipe).sum())(
        W
    )
    transformed = jaxq.SingleProduct("int8_token", "int8_token", jaxq.Hadamard(8, (1,) * 8))
    with pytest.raises(
        ValueError, match="gradient of `rhs`: a Hadamard transform along the ragged"
    ):
        gradient(jaxq.ProductRecipe(drhs=transformed))
    # This transform is along the outputs, within each group.
    gradient(jaxq.ProductRecipe(dlhs=transformed))
    blocks = jaxq.SingleProduct(jaxq.Recipe("int8", jaxq.PerBlock(12)))
    with pytest.raises(ValueError, match=r"gradient of `rhs`: the cotangent: .* must divide"):
        gradient(jaxq.ProductRecipe(drhs=blocks))
    with pytest.raises(ValueError, match="ragged_dot: execution='native' is not supported"):
        jaxq.ragged_dot(
            X, W, SIZES, recipe=jaxq.ProductRecipe("int8_tensor", "int8_tensor", execution="native")
        )


def moe(params, x, sizes):
    """Computes two scanned layers of experts and an output layer."""

    def layer(x, p):
        h = jax.nn.gelu(lax.ragged_dot(x, p["up"], sizes))
        return x + jax.checkpoint(lambda h: lax.ragged_dot(h, p["down"], sizes))(h), None

    return lax.scan(layer, x, params["experts"])[0] @ params["out"]


def moe_by_hand(recipe):
    def model(params, x, sizes):
        def layer(x, p):
            h = jax.nn.gelu(jaxq.ragged_dot(x, p["up"], sizes, recipe=recipe))
            return x + jaxq.ragged_dot(h, p["down"], sizes, recipe=recipe), None

        return lax.scan(layer, x, params["experts"])[0] @ params["out"]

    return model


PARAMS = {
    "experts": {
        "up": data.normal((2, 3, 32, 16), 3) / 4,
        "down": data.normal((2, 3, 16, 32), 4) / 4,
    },
    "out": data.normal((32, 8), 5),
}
FP8 = dataclasses.replace(jaxq.get_product_recipe("fp8_training"), residuals="original")


def test_quantized_model_matches_model_by_hand():
    def step(model):
        loss = lambda params, x: (model(params, x, SIZES) ** 2).mean()
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(PARAMS, X)

    got, want = (step(m) for m in (jaxq.quantize_fn(moe, [("experts", FP8)]), moe_by_hand(FP8)))
    assert_same_trees(got, want)


@pytest.mark.parametrize(
    ("recipe", "block"), [data.slow("int4_channel", (1, 32, 1)), (jaxq.PerBlock(8), (1, 8, 1))]
)
def test_stored_experts_match_bitwise(recipe, block):
    if not isinstance(recipe, str):
        recipe = jaxq.Recipe("int4", recipe)
    rules = [("experts", recipe)]
    stored = jaxq.quantize_weights(moe, rules)(PARAMS, X, SIZES)
    up = stored["experts"]["up"]
    assert up.block == block
    along = dataclasses.replace(jaxq.get_recipe(recipe), granularity=jaxq.PerBlock(block[1]))
    experts = PARAMS["experts"]["up"].swapaxes(-1, -2)
    dequantized = jax.vmap(jaxq.dequantize)(up)
    assert_same(dequantized, jaxq.fake_quant(experts, along).swapaxes(-1, -2))
    quantized = jax.jit(jaxq.quantize_fn(moe, rules))
    close(quantized(stored, X, SIZES), quantized(PARAMS, X, SIZES))
    row = jaxq.explain(moe, rules)(PARAMS, X, SIZES).rows[0]
    assert (row.operation, row.times, row.flops) == ("ragged_dot_general", 2, 4 * 16 * 32 * 16)
    assert (row.bits, row.bytes) == (4 + 32 / block[1], up.nbytes)


@pytest.mark.slow
def test_experts_take_static_and_delayed_scales():
    rules = [("experts", jaxq.ProductRecipe("int8_tensor", "int8_channel"))]
    y, state = jaxq.observe(moe, rules)(PARAMS, X, SIZES)
    static = jax.jit(jaxq.quantize_fn(moe, jaxq.freeze(rules, state)))
    close(static(PARAMS, X, SIZES), y)  # The frozen scales are those of this batch.
    assert not np.allclose(
        static(PARAMS, 2 * X, SIZES), jaxq.quantize_fn(moe, rules)(PARAMS, 2 * X, SIZES)
    )

    delayed = jaxq.delayed_scaling(moe, [("experts", "fp8_training")], history=2)(PARAMS, X, SIZES)
    loss = lambda params, state: (jaxq.quantize_fn(moe, state)(params, X, SIZES) ** 2).mean()
    seen = jax.jit(jax.grad(loss, 1))(PARAMS, delayed)
    lhs, rhs, cotangent = (history.amax[:, 0] for history in seen.histories["experts/up"])
    assert float(lhs[0]) == float(jnp.abs(X).max())
    assert_same(rhs, jnp.abs(PARAMS["experts"]["up"]).max((1, 2, 3)))
    assert bool((cotangent > 0).all())
