"""Errors that newcomers meet: each names the remedy, and the remedy works."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import lora, ptq, serving

W = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def loss(w, x):
    return (x @ w).sum()


def test_closed_over_arrays_are_not_parameters():
    model = jax.tree_util.Partial(lambda w, x: x @ w["weight"], {"weight": jnp.asarray(W)})
    with pytest.raises(ValueError, match=r"closes over arrays.*lambda module, x: jax.vmap"):
        jaxq.quantize_fn(jax.vmap(model), {"weight": "int8_channel"})(W)
    remedy = jaxq.quantize_fn(lambda m, x: jax.vmap(m)(x), {"weight": "int8_tensor"})
    np.testing.assert_allclose(remedy(model, W), W @ jaxq.fake_quant(W, "int8_tensor"), rtol=1e-6)


@pytest.mark.parametrize("make", [jaxq.optim.quantize_state, jaxq.optim.quantize_gradients])
def test_delayed_state_is_refused_by_optimizers(make):
    state = jaxq.delayed_scaling(loss, {"": "fp8_training"})(W, W)
    optimizer = make(optax.adam(1e-3), "int8_tensor") if make is jaxq.optim.quantize_state else None
    optimizer = optimizer or make("int8_tensor")
    with pytest.raises(ValueError, match=r"state of delayed scaling.*state.update\(seen\)"):
        optimizer.init({"w": W, "scaling": state})


def test_delayed_state_among_parameters_is_refused():
    state = jaxq.delayed_scaling(loss, {"": "fp8_training"})(W, W)

    def objective(params):
        return jaxq.quantize_fn(lambda p, x: loss(p["w"], x), params["scaling"])(params, W)

    with pytest.raises(ValueError, match=r"must not contain the state of delayed scaling"):
        jax.grad(objective)({"w": W, "scaling": state})


def test_traced_width_of_format_names_remedy():
    for make, remedy in (
        (lambda n: jaxq.FloatFormat("mine", 5, n), "float_grid"),
        (lambda n: jaxq.FloatFormat("mine", n, 2), "float_grid"),
        (lambda n: jaxq.IntFormat("mine", n), "int_grid"),
    ):
        with pytest.raises(TypeError, match=f"must be an integer, got a traced value.*{remedy}"):
            jax.vmap(lambda n, make=make: jaxq.cast(W, make(n)))(jnp.arange(2, 4))
    assert jaxq.FloatFormat("mine", np.int64(5), np.int64(2)).max == 114688.0


# The arguments that records need, by class; all other public records have defaults.
NEEDED = {
    jaxq.CodebookFormat: {"name": "mine", "levels": (-1.0, 0.0, 1.0)},
    jaxq.FloatFormat: {"name": "mine", "exponent_bits": 4, "mantissa_bits": 3},
    jaxq.IntFormat: {"name": "mine", "bits": 4},
    jaxq.TaperedFormat: {"name": "mine", "bits": 8},
    jaxq.PerBlock: {"sizes": 32},
    jaxq.recipes.SuperBlocks: {"rule": "q4_k"},
    serving.CacheRecipe: {"keys": "int8_token", "values": "int8_token"},
    ptq.Norm: {"scale": "norm", "readers": ("head",)},
    lora.EoRA: {"inputs": ptq.ObservedInputs({}, ())},
}
# Values that are wrong for every field of a type.
WRONG = {
    int: (True, 1.5, "a", [1], np.ones(2)),
    float: (True, "a", float("nan"), float("inf"), [1.0], np.ones(2)),
    bool: (1, "no", [], np.ones(2)),
}
MODULES = (jaxq, jaxq.formats, jaxq.recipes, jaxq.numerics, jaxq.gradients, jaxq.products)
MODULES += (ptq, lora, serving)


def records() -> dict[str, type]:
    """Returns the public records that check their fields, by name."""
    classes = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    return {
        name: cls
        for name, cls in sorted(classes.items())
        if isinstance(cls, type) and hasattr(cls, "__post_init__") and dataclasses.is_dataclass(cls)
    }


def wrong_fields() -> list:
    return [
        pytest.param(cls, field.name, value, id=f"{name}-{field.name}-{type(value).__name__}")
        for name, cls in records().items()
        for field in dataclasses.fields(cls)
        for kind, values in WRONG.items()
        if field.init and field.type in (kind, kind | None)
        for value in values
    ]


def assert_clear(error: BaseException, *names: str) -> None:
    """Checks the form of an error: the names in it, its length, and what was got."""
    text = str(error)
    assert type(error) in (TypeError, ValueError, jaxq.interop.FileError)
    assert all(name in text for name in names), text
    assert ", got " in text
    assert len(text) <= 300, len(text)
    assert text.endswith((".", ").")), text


@pytest.mark.parametrize(("cls", "field", "value"), wrong_fields())
def test_records_check_numbers_and_flags(cls, field, value):
    with pytest.raises((TypeError, ValueError)) as error:
        cls(**{**NEEDED.get(cls, {}), field: value})
    assert_clear(error.value, cls.__name__, f"`{field}`")


X, KEY = jnp.ones((4, 4)), jax.random.key(0)
# For each argument, a call with a value of it.
ARRAYS = {
    "cast x": lambda v: jaxq.cast(v, "int4"),
    "encode x": lambda v: jaxq.encode(v, "int4"),
    "decode codes": lambda v: jaxq.decode(v, "int4"),
    "pack codes": lambda v: jaxq.numerics.pack(v, 4),
    "unpack packed": lambda v: jaxq.numerics.unpack(v, 4, 2),
    "fake_quant x": lambda v: jaxq.fake_quant(v, "int8_tensor"),
    "quantize x": lambda v: jaxq.quantize(v, "int8_tensor"),
    "neighbors x": lambda v: jaxq.neighbors(v, "int8_tensor"),
    "update x": lambda v: jaxq.calibration.update((X, X), v, "int8_tensor"),
    "lsq_scale x": lambda v: jaxq.qat.lsq_scale(v, "int8_tensor"),
    "unit_tanh w": jaxq.qat.unit_tanh,
    "dorefa w": lambda v: jaxq.qat.dorefa(v, 4),
    "soft_round x": lambda v: jaxq.qat.soft_round(v, X, X),
    "soft_round below": lambda v: jaxq.qat.soft_round(X, v, X),
    "uniform_noise above": lambda v: jaxq.qat.uniform_noise(X, X, v, KEY),
    "adaround v": lambda v: jaxq.qat.adaround(v, X, X),
    "adaround_init w": lambda v: jaxq.qat.adaround_init(v, X, X),
    "adaround_penalty v": lambda v: jaxq.qat.adaround_penalty(v, 2.0),
    "rectified_sigmoid v": jaxq.qat.rectified_sigmoid,
    "rectified_sigmoid_inverse h": jaxq.qat.rectified_sigmoid_inverse,
    "dot_general lhs": lambda v: jaxq.dot_general(v, X, (((1,), (0,)), ((), ())), recipe="w8a8"),
    "einsum rhs": lambda v: jaxq.einsum("ij,jk->ik", X, v, recipe="w8a8"),
    "ragged_dot lhs": lambda v: jaxq.ragged_dot(v, X[None], jnp.array([4]), recipe="w8a8"),
    "gptq weight": lambda v: ptq.gptq(v, X, "int8_tensor"),
    "owq hessian": lambda v: ptq.owq(X, v, "int8_tensor"),
    "ptq.collect x": ptq.collect,
    "low_rank w": lambda v: lora.low_rank(v, 1),
    "gguf.quantize x": lambda v: jaxq.interop.gguf.quantize(v, "q8_0"),
    "gguf.unpack data": lambda v: jaxq.interop.gguf.unpack(v, "q8_0"),
    "compare y": lambda v: jaxq.analysis.compare(X, v),
    "chain x": lambda v: jaxq.analysis.chain(v, ["int8_tensor"]),
}
NO_ARRAYS = {
    "None": None,
    "text": "a",
    "dictionary": {},
    "class": dict,
    "ragged": [[1.0], [1.0, 2.0]],
    "objects": np.array([None, 1.0]),
    "masked": np.ma.masked_array(np.ones((4, 4), np.float32), np.eye(4)),
    "shape": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    "quantized": jaxq.quantize(X, "int8_tensor"),
}


@pytest.mark.parametrize("wrong", NO_ARRAYS.values(), ids=NO_ARRAYS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arguments_that_are_no_arrays_raise(name, wrong):
    owner, argument = name.split()
    with pytest.raises(TypeError) as error:
        ARRAYS[name](wrong)
    assert_clear(error.value, owner, f"`{argument}`")


INTEGERS = {
    "fake_quant axis": lambda v: jaxq.fake_quant(X, "int8_channel", axis=v),
    "quantize axis": lambda v: jaxq.quantize(X, "int8_channel", axis=v),
    "neighbors axis": lambda v: jaxq.neighbors(X, "int8_channel", axis=v),
    "Recipe.along axis": lambda v: jaxq.get_recipe("int8_channel").along(v, 2),
    "quantize_tree axis": lambda v: jaxq.quantize_tree({"w": X}, "int8_channel", axis=v),
    "PerChannel axes": jaxq.PerChannel,
    "PerBlock axes": lambda v: jaxq.PerBlock(32, axes=v),
    "PerBlock sizes": jaxq.PerBlock,
    "pack bits": lambda v: jaxq.numerics.pack(np.ones(2, np.uint8), v),
    "unpack n": lambda v: jaxq.numerics.unpack(np.ones(2, np.uint8), 4, v),
    "dorefa bits": lambda v: jaxq.qat.dorefa(X, v),
    "p3109 precision": lambda v: jaxq.formats.p3109(8, v),
    "fixed_point integer_bits": lambda v: jaxq.formats.fixed_point(v, 2),
    "int_grid bits": jaxq.int_grid,
    "float_grid mantissa_bits": lambda v: jaxq.float_grid(4, v),
    "quantize_fn chunk": lambda v: jaxq.quantize_fn(loss, "int8_tensor", chunk=v),
    "delayed_scaling history": lambda v: jaxq.delayed_scaling(loss, "fp8_training", history=v),
    "bits_schedule steps": lambda v: jaxq.optim.bits_schedule(8, 2, steps=v),
    "gptq axis": lambda v: ptq.gptq(X, X, "int8_tensor", axis=v),
    "random_rotation n": lambda v: ptq.random_rotation(v, KEY),
    "low_rank rank": lambda v: lora.low_rank(X, v),
    "gguf.fallback length": lambda v: jaxq.interop.gguf.fallback("q4_k", v),
    "lloyd_max count": jaxq.analysis.lloyd_max,
    "memory context": lambda v: jaxq.analysis.memory("llama-2-7b", context=v),
    "sqnr_table seed": lambda v: jaxq.analysis.sqnr_table(["int8_tensor"], shape=(8,), seed=v),
}


@pytest.mark.parametrize("wrong", [1.5, True, "a", 2j, np.float32(1), [1.5], dict], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_arguments_that_are_no_integers_raise(name, wrong):
    owner, argument = name.split()
    with pytest.raises(TypeError) as error:
        INTEGERS[name](wrong)
    assert_clear(error.value, owner, f"`{argument}`")


@pytest.mark.parametrize("name", ["unpack n", "dorefa bits", "gptq axis", "low_rank rank"])
def test_traced_integers_raise(name):
    with pytest.raises(TypeError, match="got a traced value"):
        jax.jit(INTEGERS[name])(2)


KEYS = {
    "cast": lambda v: jaxq.cast(X, "int4", rounding="stochastic", key=v),
    "fake_quant": lambda v: jaxq.fake_quant(X, jaxq.Recipe("int4", rounding="stochastic"), key=v),
    "quantize": lambda v: jaxq.quantize(X, jaxq.Recipe("int4", rounding="stochastic"), key=v),
    "quantize_tree": lambda v: jaxq.quantize_tree(X, jaxq.Recipe("int4"), key=v),
    "einsum": lambda v: jaxq.einsum("ij,jk->ik", X, X, recipe="mxfp8_training", key=v),
    "quantize_fn": lambda v: jaxq.quantize_fn(loss, "int8_tensor", key=v)(X, X),
    "uniform_noise": lambda v: jaxq.qat.uniform_noise(X, X, X, v),
    "random_rotation": lambda v: ptq.random_rotation(4, v),
    "apply_updates": lambda v: jaxq.optim.apply_updates(X, X, key=v),
    "ptq.learn_rounding": lambda v: ptq.learn_rounding([lambda p, x: x @ p], "int8_tensor")(
        [X], [X], key=v
    ),
}


@pytest.mark.parametrize("wrong", [0, "a", np.ones(2), jax.random.split(KEY)], ids=type)
@pytest.mark.parametrize("name", KEYS)
def test_arguments_that_are_no_key_raise(name, wrong):
    with pytest.raises((TypeError, ValueError)) as error:
        KEYS[name](wrong)
    assert_clear(error.value, name, "`key`")


PATHS = {
    "save path": lambda v: jaxq.save(v, {"w": W}),
    "open_tensors path": jaxq.load,
    "read_log path": jaxq.analysis.read_log,
    "StatisticsLog path": jaxq.analysis.StatisticsLog,
    "ptq.quantize_weights resume": lambda v: ptq.quantize_weights(loss, "int8_tensor", resume=v),
    "ptq.learn_rounding resume": lambda v: ptq.learn_rounding([loss], "int8_tensor", resume=v),
}


@pytest.mark.parametrize("wrong", [3, b"folder", "a\0b", ["a"]], ids=repr)
@pytest.mark.parametrize("name", PATHS)
def test_arguments_that_are_no_path_raise(name, wrong):
    owner, argument = name.split()
    with pytest.raises((TypeError, ValueError)) as error:
        PATHS[name](wrong)
    assert_clear(error.value, owner, f"`{argument}`")


def test_empty_path_does_not_read_the_current_folder():
    with pytest.raises(jaxq.interop.FileError, match="`path` must not be empty"):
        jaxq.load("")


@pytest.mark.parametrize("name", [n for n in PATHS if n.endswith("resume")])
def test_resume_must_be_a_folder(name, tmp_path):
    file = tmp_path / "run.txt"
    file.write_text("text")
    with pytest.raises(ValueError, match=r"`resume` must be a folder, but 'run\.txt' is a file"):
        PATHS[name](file)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"w": NO_ARRAYS["masked"]}, "'w' must be an array without a mask"),
        ({"w\udc80": W}, "keys of a tree must be Unicode text"),
        ({"w": "a\udc80"}, "strings of a tree must be Unicode text"),
        ({1.5: W}, "keys of a tree must be strings or integers"),
        ({"w": np.array([None])}, "must have a dtype of JAX"),
    ],
    ids=["mask", "key", "text", "number", "objects"],
)
def test_trees_that_a_file_cannot_hold_are_not_written(tree, text, tmp_path):
    with pytest.raises((TypeError, ValueError), match=text):
        jaxq.save(tmp_path / "tree.safetensors", tree)
    assert not list(tmp_path.iterdir())
