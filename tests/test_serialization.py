"""Round trips of all pytrees through Flax's state dictionaries, msgpack, pickle and exports."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
from typing import Any

import jax
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax import export
from jax import numpy as jnp

import jaxq
from jaxq import analysis, lora, serving
from jaxq.quantizers import calibration
from tests import data
from tests.oracle import assert_same_trees

W = data.normal((64, 64))
PARAMS, X = {"a": W, "b": W * 2}, W[:4]
TOKENS = W.reshape(64, 2, 32)
RULES = [
    ("a", jaxq.ProductRecipe(jaxq.Recipe("uint8", scaling=jaxq.Affine("ema")), "nvfp4")),
    jaxq.Rule(
        "b",
        "fp8_training",
        scope="",
        output=jaxq.Recipe("int8", scaling=jaxq.Symmetric("percentile")),
    ),
]


# Pytrees that exist only while a function is traced, within a training step or a call.
WITHIN_A_STEP = {"BlockData", "StoredView", "Monitored", "Row", "Switch", "Switched", "Tensor"}


def model(params, x):
    return ((x @ params["a"]) @ params["b"]).sum()


def optimizer_states() -> Any:
    params = {"w": W, "row": jnp.ones((3, 300))}
    drawing = jaxq.Recipe("int8", rounding="stochastic")
    adam = jaxq.optim.quantize_state(optax.adam(1e-3), min_size=500)
    feedback = jaxq.optim.quantize_gradients(drawing, key=jax.random.key(0))
    return optax.chain(feedback, adam).init(params)


@pytest.fixture(scope="module")
def examples() -> dict:
    return make_examples()


@jax.jit
def make_examples() -> dict:
    """Returns example pytrees, computed in one program."""
    _, observed = jaxq.observe(model, RULES)(PARAMS, X)
    gradients, adam = optimizer_states()
    delayed = jaxq.delayed_scaling(model, RULES, history=3)(PARAMS, X)
    _, inputs = jaxq.ptq.observe(model, RULES)(PARAMS, X)
    moments = jaxq.Recipe("int8", jaxq.PerToken(), jaxq.Symmetric("sigmas"))
    return {
        "a grid": jaxq.float_grid(4, 3),
        "quantized": [
            jaxq.quantize(W, name)
            for name in ("int8_tensor", "q4_1", "nvfp4", "nf4_dq", "int4_g32")
        ],
        "outliers": jaxq.quantize(W, jaxq.Recipe("int4", outliers=jaxq.Outliers(0.01))),
        "a scalar": jaxq.quantize(jnp.bfloat16(3), "int8_tensor"),
        "weights": jaxq.quantize_weights(model, RULES)(PARAMS, X),
        "observed": observed,
        "frozen": jaxq.freeze(RULES, observed),
        "delayed": delayed,
        "its amax": [h.largest() for h in delayed.histories["b"] if h is not None],
        "inputs of products": inputs,
        "input scales": jaxq.ptq.InputScales({"a": X[0]}, (("a", "a"),), (("b", "is tied"),)),
        "input rotations": jaxq.ptq.InputRotations(
            {"a": jnp.ones(64)}, (("a", 64),), (("a", "a"),), (("b", "is tied"),)
        ),
        "adapted": lora.adapt(model, "int4_g32", lora.QLoRA(2))(PARAMS, X),
        "cache": serving.KVCache.empty((256, 2, 32), "kivi2").append(TOKENS, -TOKENS),
        "moments": calibration.update(calibration.init(X.shape, moments), X, moments),
        "optimizer": (gradients, adam),
        "named tuples": [gradients, adam._replace(inner={"w": W})],
        "analysis": [
            analysis.compare(W, W),
            analysis.quantization_error(W, "int4_tensor"),
            analysis.code_usage(jaxq.quantize(W, "int4_tensor")),
        ],
    }


def classes() -> set[type]:
    """Returns the dataclasses of jaxq that are pytrees."""
    found: set[Any] = set()
    for module in pkgutil.walk_packages(jaxq.__path__, "jaxq."):
        if "__main__" not in module.name:
            found |= {
                cls
                for _, cls in inspect.getmembers(
                    importlib.import_module(module.name), inspect.isclass
                )
                if cls.__module__.startswith("jaxq.")
            }
    is_node = jax.tree_util.default_registry.is_node
    return {
        cls
        for cls in found
        if isinstance(cls, type) and hasattr(cls, "__dataclass_fields__") and is_node(cls)
    }


def classes_in(tree) -> set[type]:
    """Returns the classes of a tree's nodes."""
    pending, found = [jax.tree.structure(tree)], set()
    while pending:
        node = pending.pop()
        if node.node_data() is not None:
            found.add(node.node_data()[0])
        pending += node.children()
    return found


def test_every_pytree_has_an_example(examples):
    missing = {c for c in classes() - classes_in(examples) if c.__name__ not in WITHIN_A_STEP}
    assert not missing, f"add an example of {missing}"


def test_every_pytree_survives_serialization(examples):
    zeros = jax.tree.map(jnp.zeros_like, examples)
    assert_same_trees(pickle.loads(pickle.dumps(examples)), examples)
    assert_same_trees(copy.deepcopy(examples), examples)
    assert_same_trees(
        serialization.from_state_dict(zeros, serialization.to_state_dict(examples)), examples
    )
    assert_same_trees(serialization.from_bytes(zeros, serialization.to_bytes(examples)), examples)


def test_exported_functions_accept_and_return_all(examples):
    pytest.importorskip("flatbuffers", reason="jax.export needs it to write functions")
    # jax.export requires registered named tuples, and those of Optax are not registered.
    own = {name: tree for name, tree in examples.items() if name != "optimizer"}
    own["optimizer"] = jax.tree.leaves(examples["optimizer"], is_leaf=dataclasses.is_dataclass)
    exported = export.export(jax.jit(lambda tree: (tree, {"again": tree})))(own)
    first, second = export.deserialize(exported.serialize()).call(own)
    assert_same_trees(first, own)
    assert_same_trees(second["again"], own)


def test_train_state_survives_flax_serialization():
    tx = jaxq.optim.quantize_state(optax.adam(1e-3))
    state = TrainState.create(apply_fn=model, params=PARAMS, tx=tx)
    with jax.numpy_dtype_promotion("standard"):  # Required by Optax.
        state = state.apply_gradients(grads=PARAMS)
    again = TrainState.create(apply_fn=model, params=PARAMS, tx=tx)
    assert_same_trees(serialization.from_bytes(again, serialization.to_bytes(state)), state)


def test_restoring_with_another_recipe_raises():
    state = serialization.to_state_dict(jaxq.quantize(W, "int4_channel"))
    with pytest.raises(ValueError, match="the target Quantized must have the recipe"):
        serialization.from_state_dict(jaxq.quantize(W, "nf4_g64"), state)


def test_recipes_with_own_functions_restore_into_a_target():
    def floor(units, negative, random):
        del negative, random
        return jnp.floor(units)

    q = jaxq.quantize(W, jaxq.Recipe("int4", rounding=floor))
    zeros = jax.tree.map(jnp.zeros_like, q)
    assert_same_trees(serialization.from_bytes(zeros, serialization.to_bytes(q)), q)


@pytest.mark.parametrize(
    "imports",
    [
        "import flax.serialization, jaxq",
        "import jaxq, importlib.util; importlib.util.find_spec('flax.serialization')",
        "import jaxq, sys; from jaxq._jax.serialization import _Finder\n"
        "sys.meta_path.insert(0, _Finder())",
    ],
)
def test_flax_may_be_imported_before_or_after(imports: str):
    code = f"""{imports}
import sys, jax.numpy as jnp
q = jaxq.quantize(jnp.ones(4), "int8_tensor")
from flax import serialization
print(len(serialization.from_bytes(q, serialization.to_bytes(q))))
print([f for f in sys.meta_path if "jaxq" in type(f).__module__])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "[]"]


def test_product_recipes_and_rules_survive_json():
    for recipe in jaxq.products.PRODUCT_RECIPES.values():
        assert jaxq.ProductRecipe.from_json(recipe.to_json()) == recipe
    rules = jaxq.models.rules_from_json(jaxq.models.rules_to_json(RULES))
    assert rules == (jaxq.Rule(*RULES[0]), RULES[1])
    assert jaxq.models.rules_from_json(jaxq.models.rules_to_json("w8a8")) == (
        jaxq.Rule("", "w8a8"),
    )


def test_json_of_another_record_raises():
    with pytest.raises(ValueError, match="must describe a product recipe"):
        jaxq.ProductRecipe.from_json(jaxq.get_recipe("nvfp4").to_json())
    with pytest.raises(ValueError, match="must describe a list of rules"):
        jaxq.models.rules_from_json(jaxq.get_recipe("nvfp4").to_json())


def test_reprs_of_recipes_are_short_and_evaluate_to_equal_recipes():
    names = {**vars(jaxq), **vars(jaxq.numerics), **vars(jaxq.recipes)}
    for name, recipe in jaxq.recipes.RECIPES.items():
        assert len(repr(recipe)) < 300, name
        assert eval(repr(recipe), names) == recipe
    for recipe in jaxq.products.PRODUCT_RECIPES.values():
        assert eval(repr(recipe), names) == recipe
