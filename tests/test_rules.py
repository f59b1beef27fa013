"""Rules, which have the same forms and errors for models, trees and optimizers."""

from typing import Any

import jax
import optax
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import optim
from jaxq.recipes import RECIPES

PARAMS = {
    "layer": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)},
    "head": {"kernel": jnp.ones((32, 32))},
    "step": jnp.ones(3, jnp.int32),
}
X = jnp.ones((2, 64))
G32 = jaxq.get_recipe("int4_g32")


def model(params: Any, x: Any) -> Any:
    x = x @ params["layer"]["kernel"] + params["layer"]["bias"][None]
    return x @ params["head"]["kernel"]


def state_of(rules: Any) -> Any:
    # The paths of moments are those of the parameters after "0/trace/".
    return optim.quantize_state(optax.sgd(1.0, momentum=0.9), rules, min_size=64).init(PARAMS)


TREES = {
    "quantize_tree": lambda rules: jaxq.quantize_tree(PARAMS, rules, axis=-2),
    "quantize_state": state_of,
    "quantize_gradients": lambda rules: optim.quantize_gradients(rules).init(PARAMS),
}
MODELS = {
    "quantize_fn": lambda rules: jaxq.quantize_fn(model, rules)(PARAMS, X),
    "quantize_weights": lambda rules: jaxq.quantize_weights(model, rules)(PARAMS, X),
    "observe": lambda rules: jaxq.observe(model, rules)(PARAMS, X),
    "freeze": lambda rules: jaxq.freeze(rules, None),
    "delayed_scaling": lambda rules: jaxq.delayed_scaling(model, rules)(PARAMS, X),
    "explain": lambda rules: jaxq.explain(model, rules)(PARAMS, X),
}
FORMS = {
    "mapping": {"head": None, "kernel": "int4_g32"},
    "mapping of records": {"head": None, "kernel": G32},
    "pairs": [("head", None), ("kernel", "int4_g32")],
    "tuple of rules": (jaxq.Rule("head"), jaxq.Rule("kernel", "int4_g32")),
    "both": [jaxq.Rule("head", None), ("kernel", G32)],
}


def names_of(result: Any) -> list[str]:
    leaves = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, jaxq.Quantized))
    return [x.recipe.element.name for x in leaves if isinstance(x, jaxq.Quantized)]


@pytest.mark.parametrize("rules", FORMS.values(), ids=FORMS)
def test_all_forms_are_equivalent(rules):
    assert names_of(TREES["quantize_tree"](rules)) == ["int4"]
    assert names_of(TREES["quantize_state"](rules)) == ["int4"]
    assert names_of(MODELS["quantize_weights"](rules)) == ["int4"]
    residual = TREES["quantize_gradients"](rules).residual
    assert [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(residual)] == ["layer"]
    assert [row.recipe for row in MODELS["explain"](rules).rows] == ["- int4_g32", "-"]


@pytest.mark.parametrize("recipe", ["int8_tensor", jaxq.get_recipe("int8_tensor")])
def test_single_recipe_applies_to_everything(recipe):
    assert names_of(TREES["quantize_tree"](recipe)) == ["int8"] * 3
    assert names_of(TREES["quantize_state"](recipe)) == ["int8"] * 2
    assert len(jax.tree.leaves(TREES["quantize_gradients"](recipe).residual)) == 3
    assert [row.recipe for row in MODELS["explain"](recipe).rows] == ["- int8_tensor"] * 2
    # An empty tree is not an error.
    assert jaxq.quantize_tree({}, recipe) == {}


def test_single_product_recipe_applies_to_all_products():
    for recipe in ("w8a8", jaxq.get_product_recipe("w8a8")):
        assert [row.recipe for row in MODELS["explain"](recipe).rows] == [
            "int8_token int8_channel"
        ] * 2


@pytest.mark.parametrize("owner", [*TREES, *MODELS])
@pytest.mark.parametrize(
    ("rules", "kind", "text"),
    [
        (None, TypeError, "`rules` must be recipes, got None"),
        (3, TypeError, "must be a name or a jaxq.Recipe, got int"),
        (jaxq.Rule("kernel"), TypeError, r"must be a sequence, got Rule\('kernel'\). Put it into"),
        (("kernel", "int4_g32"), TypeError, "must be a jaxq.Rule or a pair .* got 'kernel'"),
        (
            [("kernel", "w8a8", None)],
            TypeError,
            r"must be a jaxq.Rule or a pair \(pattern, recipe\)",
        ),
        ("w8b8", ValueError, "no recipe is named 'w8b8'. Did you mean w8a8"),
        (
            {"kernel": "int4_g33"},
            ValueError,
            "no recipe is named 'int4_g33'. Did you mean int4_g3",
        ),
        ({"kernel": "int4"}, ValueError, "'int4' is a number format, .* Use a recipe"),
        ({"(": "int8_tensor"}, ValueError, r"must be a regular expression, got '\('"),
    ],
)
def test_malformed_rules_raise(owner, rules, kind, text):
    with pytest.raises(kind, match=rf"^{owner}: .*{text}") as error:
        {**TREES, **MODELS}[owner](rules)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("owner", [*TREES, *(name for name in MODELS if name != "freeze")])
@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"kernle": "int8_tensor"}, r"Rule\('kernle'\) matches no .*Did you mean .*/kernel"),
        (
            [("kernel", "int8_tensor"), ("head/kernel", "int4_tensor")],
            r"Rule\('head/kernel'\) applies to nothing: the earlier Rule\('kernel'\) applies to .*"
            r"head/kernel'.* Move Rule\('head/kernel'\) before it, or remove it.$",
        ),
        (
            {"step": "int8_tensor"},
            r"Rule\('step'\) matches only leaf '.*step', which has the dtype",
        ),
    ],
)
def test_unused_rules_raise(owner, rules, text):
    with pytest.raises(ValueError, match=rf"^{owner}: {text}") as error:
        {**TREES, **MODELS}[owner](rules)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("owner", TREES)
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (jaxq.Rule("kernel", "int8_tensor", operation="gather"), "sets `operation`, which only"),
        (jaxq.Rule("kernel", "int8_tensor", scope="mlp"), "sets `scope`, which only products have"),
        (jaxq.Rule(scope="mlp"), "sets `scope`, which only products have"),
        (jaxq.Rule("kernel", output="int8_tensor"), "sets `output`, which only products have"),
        (("kernel", "w4a16_g128"), "product recipe 'w4a16_g128'. .*weight, 'int4_g128'.$"),
        (("kernel", jaxq.get_product_recipe("w8a8")), "recipe 'w8a8'. .*weight, 'int8_channel'.$"),
        (jaxq.Rule("kernel", "nvfp4_training"), "'nvfp4_training'. .*weight, 'nvfp4_tile16'.$"),
        (("kernel", jaxq.ProductRecipe(None, jaxq.Recipe("int7"))), "ProductRecipe. Use its `rhs`"),
        (("kernel", jaxq.ProductRecipe("int8_token")), "Use a recipe such as 'int8_channel'"),
    ],
)
def test_product_rules_for_trees_raise(owner, rule, text):
    for rules in ([rule], [("bias", None), rule]):
        with pytest.raises(ValueError, match=rf"^{owner}: Rule\(.*{text}") as error:
            TREES[owner](rules)
        assert len(str(error.value)) <= 300


def test_rules_with_arrays_of_products_raise():
    delayed = jaxq.delayed_scaling(model, "fp8_training")(PARAMS, X)
    for name, state in (("Delayed", delayed), ("Adapted", jaxq.models.Adapted({}, ()))):
        for owner, function in TREES.items():
            with pytest.raises(TypeError, match=f"^{owner}: .* got {name} rules, which belong"):
                function(state)
        with pytest.raises(ValueError, match=f"^switch: .*without a state, got {name} rules"):
            jaxq.models.switch(model, state)


def test_optimizer_explains_unquantized_arrays():
    for pattern, reason in (
        ("bias", "which has 32 elements, fewer than min_size=64"),
        ("count", "which has the dtype int32"),
    ):
        tx = optim.quantize_state(optax.adam(1.0), {pattern: "int8_tensor"}, min_size=64)
        with pytest.raises(ValueError, match=reason):
            tx.init(PARAMS)


def test_updates_take_rules_with_formats():
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    update = jax.tree.map(lambda x: x * 0.3, params)
    key = jax.random.key(0)
    for fmt in ({"a": "int4"}, [("a", "int4")], [("b", None), ("", "int4")]):
        new = optim.apply_updates(params, update, fmt=fmt, key=key)
        assert (new["a"] == jnp.round(new["a"])).all()
        assert (new["b"] == params["b"] + update["b"]).all()
    with pytest.raises(TypeError, match="assigns a recipe, which this function does not take"):
        optim.apply_updates(params, update, fmt=[jaxq.Rule("a", "int8_tensor")], key=key)
    with pytest.raises(ValueError, match=r"apply_updates: Rule\('c'\) matches no leaf"):
        optim.apply_updates(params, update, fmt={"c": "int4"}, key=key)


def test_recipe_and_product_recipe_are_distinguished():
    assert jaxq.Rule("w", "int4_g128").recipe == RECIPES["int4_g128"]
    assert jaxq.Rule("w", "w4a16_g128").recipe == jaxq.get_product_recipe("w4a16_g128")
    assert jaxq.Rule("w", "int4_g128").product == jaxq.Rule("w", "w4a16_g128").product
