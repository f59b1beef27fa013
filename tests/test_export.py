"""Functions exported with symbolic dimensions give the same bits as those compiled per shape."""

import jax
import pytest
from jax import export, lax
from jax import numpy as jnp

import jaxq
from jaxq.numerics import ROUNDINGS
from jaxq.recipes import CALIBRATORS, RECIPES
from tests import data
from tests.oracle import assert_same, assert_same_trees

KEY = jax.random.key(1)


def array(*shape: int) -> jax.Array:
    return data.normal(shape, sum(shape))


def symbolic(shape: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)


def check(function, shape: str, *inputs: jax.Array) -> None:
    exported = export.export(jax.jit(function))(symbolic(shape))
    for x in inputs:
        assert_same_trees(exported.call(x), jax.jit(function)(x))


def works(function, shape: str) -> bool:
    """Returns whether tracing with a symbolic shape succeeds, and checks the error if not."""
    try:
        jax.eval_shape(function, symbolic(shape))
    except ValueError as error:
        text = str(error)
        assert text.startswith(("Recipe of", "quantize: ")), text
        assert "symbolic" in text, text
        assert "Export" in text, text
        assert len(text) < 300
        return False
    return True


def fake_quants(recipes: dict[str, jaxq.Recipe], shape: str) -> dict:
    """Returns the `fake_quant` of each recipe that supports a symbolic shape."""

    def one(recipe):
        drawing = recipe.rounding == "stochastic"
        return lambda x: jaxq.fake_quant(x, recipe, key=KEY if drawing else None)

    functions = {name: one(recipe) for name, recipe in recipes.items()}
    return {name: function for name, function in functions.items() if works(function, shape)}


def check_all(functions: dict, names, shape: str, *inputs: jax.Array) -> None:
    """Checks several recipes in one program, so that shared parts compile once."""
    check(lambda x: {name: functions[name](x) for name in names}, shape, *inputs)


def test_named_recipes_export_with_a_symbolic_batch():
    others = {"fp8_e4m3_tile128", "nvfp4_tile16"}
    names = {*data.structures(), *others} & {*data.unsearched()}
    working = fake_quants({name: RECIPES[name] for name in names}, "b, 256")
    assert names - set(working) == others, "tiles do not divide the symbolic batch"
    check_all(working, ("uint8_channel", "nf4_dq", "q4_0"), "b, 256", array(3, 256))
    working = fake_quants({name: RECIPES[name] for name in others}, "128*b, 256")
    check_all(working, ("nvfp4_tile16",), "128*b, 256", array(128, 256))
    assert set(working) == others


@pytest.mark.slow
def test_all_named_recipes_but_tiles_export():
    working = fake_quants(dict(RECIPES), "b, 256")
    assert set(RECIPES) - set(working) == {"fp8_e4m3_tile128", "nvfp4_tile16"}
    check_all(working, ("int8_tensor", "nvfp4", "mxfp4"), "b, 256", array(3, 256))


def test_calibrators_export_with_a_symbolic_batch():
    def recipe(name, granularity):
        scaling = jaxq.recipes.SignedScale() if name == "extremum" else jaxq.Symmetric(name)
        return jaxq.Recipe("int4", granularity, scaling)

    recipes = {
        (name, granularity): recipe(name, granularity)
        for name in (*CALIBRATORS, "extremum")
        for granularity in (jaxq.PerTensor(), jaxq.PerToken())
    }
    working = fake_quants(recipes, "b, 16")
    histograms = {"percentile", "mse", "entropy"}
    unbounded = {(name, jaxq.PerToken()) for name in histograms}
    assert set(recipes) - set(working) == unbounded
    names = [(name, jaxq.PerTensor()) for name in ("extremum", "ema", "sigmas", "percentile")]
    check_all(working, [*names, ("absmean", jaxq.PerToken())], "b, 16", array(5, 16))
    shape = export.symbolic_shape("b, 16", constraints=["b <= 9"])
    for name in unbounded:  # Their memory is bounded if the batch is.
        one = lambda x, name=name: jaxq.fake_quant(x, recipes[name])
        jax.eval_shape(one, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_rounding_modes_export_with_any_symbolic_axis():
    def all_modes(x):
        return {
            name: jaxq.cast(
                x, "float8_e5m2", rounding=name, key=KEY if name == "stochastic" else None
            )
            for name in ROUNDINGS
        }

    check(all_modes, "b, 3, c", array(2, 3, 5))


def test_other_recipes_export_with_symbolic_shapes():
    recipes = {
        "minimum": jaxq.Recipe("uint4", jaxq.PerChannel(-1), jaxq.recipes.ScaleAndMin()),
        "stochastic": jaxq.Recipe("int8", rounding="stochastic"),
        "search": jaxq.Recipe("int4", scaling=jaxq.Symmetric(search=(1.0, 0.9))),
        "outliers": jaxq.Recipe("int4", outliers=jaxq.Outliers(0.1)),
        "padded": jaxq.Recipe("int4", jaxq.PerBlock(16, axes=(0,), pad=True)),
    }
    working = fake_quants(recipes, "b, 20")
    assert set(working) == {"minimum", "stochastic", "search"}
    check_all(working, working, "b, 20", array(7, 20))
    assert set(fake_quants(recipes, "20, b")) == {"minimum", "stochastic", "padded"}


def test_gradient_of_given_scales_exports():
    recipe = jaxq.Recipe("int4", gradient="lsq")
    gradient = jax.grad(lambda scale, x: jaxq.fake_quant(x, recipe, scale=scale).sum())
    check(lambda x: gradient(jnp.float32(0.1), x), "b, 8", array(3, 8))


def test_exported_function_returns_quantized():
    exported = export.export(jax.jit(lambda x: jaxq.quantize(x, "uint8_tensor")))
    x = array(3, 8)
    q = exported(symbolic("b, 8")).call(x)
    assert_same(q.dequantize(), jaxq.fake_quant(x, "uint8_tensor"))
    assert q.block == (None, 8)
    assert not works(lambda x: jaxq.quantize(x, "int8_tensor"), "8, b")


def products(x):
    kernel = array(32, 16)
    image = x.reshape(-1, 2, 4, 4)
    return (
        jaxq.einsum("bi,io->bo", x, kernel, recipe="fp8_training"),
        jax.grad(lambda w: jaxq.einsum("bi,io->bo", x, w, recipe="w8a8").sum())(kernel),
        jaxq.dot_general(x, kernel, (((1,), (0,)), ((), ())), recipe="nvfp4_training"),
        jaxq.conv_general_dilated(image, array(4, 2, 3, 3), (1, 1), "SAME", recipe="w8a8"),
    )


def test_products_export_with_a_symbolic_batch():
    check(products, "b, 32", array(3, 32))


def model(params, x):
    x = jnp.take(params["table"], jnp.abs(x * 9).astype(jnp.int32), axis=0)
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["out"]


@pytest.mark.parametrize("kind", ["stored", *map(data.slow, ["quantized", "static", "observed"])])
def test_quantized_functions_export_with_a_symbolic_batch(kind):
    params = {"table": array(50, 16), "layers": array(3, 16, 16), "out": array(16, 4)}
    drawing = jaxq.Recipe("int8", jaxq.PerToken(), rounding="stochastic")
    rules = [
        ("table", "int8_token"),
        ("layers", jaxq.ProductRecipe("uint8_tensor", "int8_channel")),
        ("out", jaxq.ProductRecipe(drawing, "int4_channel")),
    ]
    observe = jax.jit(jaxq.observe(model, rules, key=KEY))
    frozen = jaxq.freeze(rules, observe(params, array(2, 3))[1])
    stored = jax.jit(jaxq.quantize_weights(model, rules))(params, array(2, 3))

    run = jaxq.quantize_fn(model, rules, key=KEY)
    functions = {
        "quantized": lambda x: run(params, x),
        "stored": lambda x: run(stored, x),
        "static": lambda x: jaxq.quantize_fn(model, frozen, key=KEY)(params, x),
        "observed": lambda x: jaxq.observe(model, rules, key=KEY)(params, x)[1],
    }
    check(functions[kind], "b, t", array(2, 3))


def test_error_names_recipe_axis_and_remedy():
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(16, axes=0))
    with pytest.raises(ValueError, match=r"int4: PerBlock.* axis 0 .* \(b, 4\). Export .* '16\*n'"):
        jax.eval_shape(lambda x: jaxq.fake_quant(x, recipe), symbolic("b, 4"))
    gradient = jax.grad(lambda w, x: jaxq.einsum("bi,io->bo", x, w, recipe="mxfp8_training").sum())
    with pytest.raises(ValueError, match=r"blocks of 32 .* have b elements .* Export .* '32\*n'"):
        jax.eval_shape(gradient, array(32, 32), symbolic("b, 32"))
