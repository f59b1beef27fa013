"""Correction of biases for the mean error of quantized weights."""

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests.ptq_data import normal

pytestmark = pytest.mark.unoptimized

RULES = {"layers": jaxq.Recipe("int2", jaxq.PerChannel())}
BIASES = {"layers/up": "layers/up_bias", "layers/down": "layers/down_bias"}


def model(params, x):
    """Scans over layers of two products: a kernel `[in, heads, out]`, and a transposed one."""

    def layer(x, w):
        h = jnp.einsum("td,dhk->thk", x, w["up"]) + w["up_bias"][None]
        return x + jax.nn.relu(h).reshape(-1, 8) @ w["down"].T + w["down_bias"][None], None

    return lax.scan(layer, x, params["layers"])[0] @ params["head"]


PARAMS = {
    "layers": {
        "up": normal(1, 2, 6, 2, 4), "up_bias": normal(2, 2, 2, 4),
        "down": normal(3, 2, 6, 8), "down_bias": normal(4, 2, 6),
    },
    "head": normal(5, 6, 3),
}  # fmt: skip
BATCHES = [normal(6 + n, 10, 6) + n for n in range(2)]


def test_mean_error_of_products_is_subtracted_from_biases():
    packed = jaxq.quantize_weights(model, RULES)(PARAMS, BATCHES[0])
    new, report = ptq.correct_biases(model, RULES, BIASES)(PARAMS, packed, BATCHES)
    w = {name: np.float64(x) for name, x in PARAMS["layers"].items()}
    error = {n: np.float64(packed["layers"][n].dequantize()) - w[n] for n in ("up", "down")}
    x = np.float64(np.concatenate(BATCHES))
    largest = []
    for k in range(2):
        up = np.tensordot(x.mean(0), error["up"][k], 1)
        np.testing.assert_allclose(new["layers"]["up_bias"][k], w["up_bias"][k] - up, atol=1e-5)
        h = np.maximum(np.tensordot(x, w["up"][k], 1) + w["up_bias"][k], 0).reshape(-1, 8)
        down = error["down"][k] @ h.mean(0)
        np.testing.assert_allclose(
            new["layers"]["down_bias"][k], w["down_bias"][k] - down, atol=1e-5, rtol=1e-5
        )
        x = x + h @ w["down"][k].T + w["down_bias"][k]
        largest += [
            (f"layers/up[{k}]", np.abs(up).max()),
            (f"layers/down[{k}]", np.abs(down).max()),
        ]
    changes = {row.product: row.largest for row in report.rows}
    assert changes == pytest.approx(dict(largest), rel=1e-4)
    assert {row.tokens for row in report.rows} == {20}
    assert "layers/up_bias" in str(report)
    assert all(new["layers"][n] is packed["layers"][n] for n in ("up", "down"))


def test_products_that_share_a_bias_are_corrected_without_masked_tokens():
    def fn(params, x, y):
        return x @ params["a"] + y @ params["b"] + params["bias"].astype(x.dtype)

    params = {"a": normal(1, 4, 3), "b": normal(2, 5, 3), "bias": jnp.ones((1, 3), jnp.bfloat16)}
    x, y = normal(3, 8, 4) + 1, normal(4, 8, 5) - 1
    mask = np.arange(8) < 5
    rules = jaxq.Recipe("int2")
    packed = jaxq.quantize_weights(fn, {"a|b": rules})(params, x, y)
    correct = ptq.correct_biases(
        fn, {"a|b": rules}, {"a": "bias", "b": "bias"}, mask=lambda *_: mask
    )
    new, _ = correct(params, packed, [(x, y)])
    shift = sum(
        np.float64(v)[mask].mean(0) @ (np.float64(packed[n].dequantize()) - np.float64(params[n]))
        for n, v in (("a", x), ("b", y))
    )
    chex.assert_type(new["bias"], jnp.bfloat16)
    chex.assert_shape(new["bias"], (1, 3))
    np.testing.assert_allclose(np.float64(new["bias"][0]), 1 - shift, rtol=1e-2)


@pytest.mark.parametrize(
    ("biases", "words"),
    [
        ({"layers/upp": "layers/up_bias"}, "Did you mean layers/up"),
        ({"head": "layers/up_bias"}, "whose weight `rules` quantize"),
        ({"layers/up": "layers/bias"}, "leaf of `packed`"),
        ({"layers/up": "layers/down"}, "must be a float array"),
        ({"layers/up": "layers/down_bias"}, r"shape \(2, 2, 4\)"),
    ],
)
def test_wrong_names_and_shapes_are_errors(biases, words):
    packed = jaxq.quantize_weights(model, RULES)(PARAMS, BATCHES[0])
    with pytest.raises(ValueError, match=words):
        ptq.correct_biases(model, RULES, biases)(PARAMS, packed, BATCHES)


def test_parameters_that_are_not_packed_are_errors():
    with pytest.raises(ValueError, match="must be packed"):
        ptq.correct_biases(model, RULES, BIASES)(PARAMS, PARAMS, BATCHES)
    with pytest.raises(ValueError, match=r"structure of `params`, got the leaf .* in `params` but"):
        ptq.correct_biases(model, RULES, BIASES)(PARAMS, PARAMS["layers"], BATCHES)


def test_packed_parameters_with_other_names_are_errors():
    renamed = {"other" if name == "layers" else name: leaf for name, leaf in PARAMS.items()}
    words = "got the leaf 'layers/.*' in `params` but not in `packed`"
    with pytest.raises(ValueError, match=words):
        ptq.correct_biases(model, RULES, BIASES)(PARAMS, renamed, BATCHES)
