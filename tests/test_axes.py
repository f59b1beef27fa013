"""The `axis` argument: blocks along the axis that the products of a model contract."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.recipes import RECIPES, PerChannel
from tests import data
from tests.oracle import assert_same_trees

WEIGHT = data.normal((256, 512))  # K-quants need multiples of 256.
LAYOUTS = {
    "kernels [in, out]": (-2, lambda w, x: x @ w),
    "weights [out, in]": (-1, lambda w, x: w @ x),
}
EACH_LAYOUT = pytest.mark.parametrize(("axis", "multiply"), LAYOUTS.values(), ids=LAYOUTS)


@EACH_LAYOUT
@pytest.mark.parametrize("names", [data.few()[:3], data.slow([*RECIPES])], ids=["few", "all"])
def test_quantize_tree_equals_quantize_weights(axis, multiply, names):
    params = {name: {"kernel": WEIGHT, "bias": jnp.ones(3)} for name in names}
    rules = {f"^{name}/kernel$": name for name in names}
    x = jax.ShapeDtypeStruct(WEIGHT.shape[axis : axis + 1 or None], jnp.float32)

    def model(params, x):
        return [multiply(layer["kernel"], x) for layer in params.values()]

    small = jaxq.quantize_tree(params, rules, axis=axis)
    want = jaxq.quantize_weights(model, rules, strict=True)(params, x)
    for name in names:
        got, stored = small[name]["kernel"], want[name]["kernel"]
        assert got.block == stored.block, name
        assert_same_trees(*map(jax.tree.leaves, (got, stored)))
        assert small[name]["bias"] is params[name]["bias"]
    # The quantized model accepts the tree with the same rules.
    shapes = jax.eval_shape(jaxq.quantize_fn(model, rules), small, x)
    assert len(shapes) == len(names)


@EACH_LAYOUT
def test_tree_with_wrong_axis_raises_in_model(axis, multiply):
    wrong = jaxq.quantize_tree({"w": WEIGHT}, "int4_g32", axis=-3 - axis)
    right = jaxq.quantize_tree({"w": WEIGHT}, "int4_g32", axis=axis)
    quantized = jaxq.quantize_fn(lambda p, x: multiply(p["w"], x), "int4_g32")
    x = jax.ShapeDtypeStruct(WEIGHT.shape[axis : axis + 1 or None], jnp.float32)
    block, other = right["w"].block, wrong["w"].block
    text = rf"'w' must be packed in blocks of \{block}, .* got blocks of \{other}. Pass the axis"
    with pytest.raises(ValueError, match=text.replace(")", r"\)")):
        jax.eval_shape(quantized, wrong, x)
    assert jax.eval_shape(quantized, right, x).ndim == 1


@pytest.mark.parametrize("recipe", ["int4_g32", "int8_channel", "int8_token", "fp8_e4m3_tile128"])
def test_directional_recipe_without_axis_raises(recipe):
    text = f"^quantize_tree: leaf 'w': {recipe} needs `axis`.*axis=-2 for kernels.*axis=-1 for"
    with pytest.raises(ValueError, match=text):
        jaxq.quantize_tree({"w": WEIGHT}, recipe)
    assert jaxq.quantize_tree({"w": WEIGHT}, "int8_tensor")["w"].block == WEIGHT.shape


def test_second_call_keeps_quantized_leaves():
    params = {"kernel": WEIGHT, "table": WEIGHT}
    small = jaxq.quantize_tree(params, {"kernel": "int4_g32"}, axis=-2)
    both = jaxq.quantize_tree(small, {"table": "int4_g32"}, axis=-1)
    assert both["kernel"] is small["kernel"]
    assert (both["kernel"].block, both["table"].block) == ((32, 1), (1, 32))
    with pytest.raises(ValueError, match="leaf 'kernel', which is already quantized"):
        jaxq.quantize_tree(small, {"kernel": "int4_g32"}, axis=-2)


def test_scales_along_first_axis_match_numpy():
    w = np.asarray(WEIGHT)
    blocks = w.reshape(8, 32, -1)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(7)
    want = (np.rint(blocks / scale) * scale).reshape(w.shape)
    for axis in (-2, 0):
        np.testing.assert_array_equal(jaxq.fake_quant(w, "int4_g32", axis=axis), want)
    np.testing.assert_array_equal(jaxq.quantize(w, "int4_g32", axis=-2).dequantize(), want)
    below, above = jax.jit(lambda w: jaxq.neighbors(w, "int4_g32", axis=-2))(w)
    assert ((below == want) | (above == want)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_default_is_last_axis(name):
    recipe = jaxq.get_recipe(name)
    for ndim in (2, 3):
        along = recipe.along(-1, ndim)
        if isinstance(recipe.granularity, PerChannel):
            # Channels are counted among the axes that are not contracted.
            assert along.granularity == PerChannel((-2,))
            assert recipe.along(-2, ndim) == recipe
        else:
            assert along == recipe


@pytest.mark.parametrize(
    ("granularity", "axis", "shape", "block"),
    [
        (jaxq.PerTensor(), -2, (4, 6), (4, 6)),
        (jaxq.PerToken(), -2, (4, 6), (4, 1)),
        (jaxq.PerToken(), 1, (2, 4, 6), (1, 4, 1)),
        (jaxq.PerToken(), -1, (6,), (6,)),
        (jaxq.PerChannel(-1), -2, (2, 4, 6), (2, 4, 1)),
        (jaxq.PerChannel((0, 1)), -2, (2, 4, 6), (1, 4, 1)),
        (jaxq.PerBlock(2), 0, (4, 6), (2, 1)),
        (jaxq.PerBlock((3, 2)), -2, (4, 6), (2, 3)),
        (jaxq.PerBlock((2, 3), (1, 0)), -2, (4, 6), (2, 3)),
        (jaxq.PerBlock(4, pad=True), -2, (6, 6), (4, 1)),
    ],
)
def test_along_places_blocks_on_the_axis(granularity, axis, shape, block):
    assert granularity.along(axis, len(shape)).block(shape) == block


@pytest.mark.parametrize(
    ("granularity", "axis", "ndim", "text"),
    [
        (jaxq.PerToken(), -2, 1, "axis -2 needs a tensor of at least 2 axes, got 1"),
        (jaxq.PerChannel(-1), -1, 1, "other than the contracted axis -1; a tensor of 1 axes has 0"),
        (jaxq.PerBlock((2, 2)), -1, 1, "got 1 axes. Use PerBlock"),
        (jaxq.PerBlock((2, 2, 2)), -1, 3, "the last other one; got 3 axes"),
    ],
)
def test_missing_axes_raise(granularity, axis, ndim, text):
    with pytest.raises(ValueError, match=text):
        granularity.along(axis, ndim)
