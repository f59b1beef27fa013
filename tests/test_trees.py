"""Quantization of parameter trees: rules, reports and errors."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same


def parameters() -> dict:
    rng = np.random.default_rng(0)
    layer = lambda: {
        "kernel": jax.device_put(np.float32(rng.standard_normal((64, 32)))),
        "bias": jax.device_put(rng.standard_normal(32).astype(jnp.bfloat16)),
    }
    return {"layers": [layer(), layer()], "head": layer(), "step": jnp.zeros((), jnp.int32)}


def test_first_matching_rule_applies():
    params = parameters()
    rules = [("head", None), (r"layers/1/.*kernel", "mxfp4"), ("kernel", "int8_channel")]
    small = jaxq.quantize_tree(params, rules, axis=-2)
    assert small["layers"][0]["kernel"].recipe == jaxq.get_recipe("int8_channel")
    assert small["layers"][1]["kernel"].recipe == jaxq.get_recipe("mxfp4").along(-2, 2)
    assert small["head"]["kernel"] is params["head"]["kernel"]
    assert small["step"] is params["step"]
    back = jaxq.dequantize_tree(small)
    chex.assert_trees_all_equal_structs(back, params)
    for i, recipe in enumerate(("int8_channel", "mxfp4")):
        kernel = params["layers"][i]["kernel"]
        assert_same(back["layers"][i]["kernel"], jaxq.fake_quant(kernel, recipe, axis=-2))
        assert_same(back["layers"][i]["bias"], params["layers"][i]["bias"])


def test_report_counts_bytes():
    params = parameters()
    small = jaxq.quantize_tree(params, {"kernel": "int4_channel"}, axis=-2)
    report = jaxq.tree_report(small)
    by_path = {row.path: row for row in report.rows}
    kernel = small["head"]["kernel"]
    assert by_path["head/kernel"].bytes_after == kernel.nbytes == 64 * 32 // 2 + 32 * 4
    assert by_path["head/kernel"].bytes_before == 64 * 32 * 4
    assert by_path["head/bias"].bytes_after == by_path["head/bias"].bytes_before == 64
    total = report.rows[-1]
    assert total.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert total.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert "head/kernel" in str(report)
    shapes = jax.eval_shape(
        lambda p: jaxq.quantize_tree(p, {"kernel": "int4_channel"}, axis=-2), params
    )
    assert jaxq.tree_report(shapes) == report


def test_quantized_tree_passes_through_jit():
    params = parameters()
    rules = [("kernel", "int4_channel")]
    small = jax.jit(lambda p: jaxq.quantize_tree(p, rules, axis=-2))(params)

    @jax.jit
    def apply(params, x):
        params = jaxq.dequantize_tree(params)
        return x @ params["head"]["kernel"]

    x = jnp.ones((2, 64))
    want = x @ jaxq.fake_quant(params["head"]["kernel"], "int4_channel")
    np.testing.assert_allclose(apply(small, x), want, rtol=1e-5)


def test_optimizer_states_are_quantized_as_trees():
    state = optax.adam(1e-3).init({"w": jnp.ones((8, 8))})
    small = jaxq.quantize_tree(state, {"mu/w": "int8_channel"}, axis=-2)
    assert isinstance(small[0].mu["w"], jaxq.Quantized)
    assert small[0].nu["w"] is state[0].nu["w"]


def test_leaves_use_different_random_bits():
    w = data.normal((64, 64))
    recipe = jaxq.Recipe("int4", rounding="stochastic")
    small = jaxq.quantize_tree({"a": w, "b": w}, [("", recipe)], key=jax.random.key(0))
    assert (np.asarray(small["a"].codes) != np.asarray(small["b"].codes)).any()


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("kernel", "int4_g128")], "leaf 'head/kernel': PerBlock.*128 does not divide axis 0"),
        ([("", "int8_token")], "leaf 'head/bias': .*axis -2 needs a tensor of at least 2 axes"),
    ],
)
def test_recipe_that_does_not_fit_raises(rules, text):
    with pytest.raises(ValueError, match=text):
        jaxq.quantize_tree(parameters(), rules, axis=-2)


def test_empty_tree_takes_no_rules():
    with pytest.raises(ValueError, match="matches no leaf, because there is none"):
        jaxq.quantize_tree({}, [("w", "int8_tensor")])
    assert jaxq.quantize_tree({}, []) == {}
    assert jaxq.tree_report({}).rows[-1].bytes_after == 0
