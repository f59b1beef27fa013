"""Look-ups by name and the suggestions in their errors."""

import re

import numpy as np
import pytest

import jaxq
from jaxq import lora, ptq, serving
from jaxq._base.registry import suggestion
from jaxq.analysis import distributions

LOOK_UPS = {
    "format": (jaxq.formats.FORMATS, jaxq.get_format),
    "rounding": (jaxq.numerics.ROUNDINGS, jaxq.numerics.get_rounding),
    "estimator": (jaxq.gradients.ESTIMATORS, jaxq.gradients.get_gradient),
    "calibrator": (jaxq.recipes.CALIBRATORS, jaxq.recipes.get_calibrator),
    "recipe": (jaxq.recipes.RECIPES, jaxq.get_recipe),
    "product recipe": (jaxq.products.PRODUCT_RECIPES, jaxq.get_product_recipe),
    "cache recipe": (serving.CACHE_RECIPES, serving.get_cache_recipe),
    "solver": (ptq.SOLVERS, ptq.get_solver),
    "input scaler": (ptq.INPUT_SCALERS, ptq.get_input_scaler),
    "rounding method": (ptq.ROUNDING_METHODS, ptq.get_rounding_method),
    "adapter method": (lora.METHODS, lora.get_method),
    "distribution": (distributions.DISTRIBUTIONS, distributions.get_distribution),
}
EACH = pytest.mark.parametrize(("registry", "find"), LOOK_UPS.values(), ids=LOOK_UPS)


@EACH
def test_names_are_found(registry, find):
    for name, entry in registry.items():
        assert find(name) == entry


@EACH
def test_misspelled_names_get_a_suggestion(registry, find):
    for name in registry:
        with pytest.raises(ValueError, match="Did you mean") as error:
            find(name[:-1] + "!")
        assert name in str(error.value) or len(name) < 6, name


@EACH
def test_unknown_names_list_as_many_names_as_fit(registry, find):
    with pytest.raises(ValueError, match="Known: ") as error:
        find("#")
    text = str(error.value)
    listed = [name for name in registry if re.search(rf"[ ]{re.escape(name)}[, .]", text)]
    assert len(text) <= 300
    rest = re.search(r"and (\d+) more\.$", text)
    assert len(listed) + (int(rest[1]) if rest else 0) == len(registry)


@EACH
@pytest.mark.parametrize("name", [None, 3, ["int8"], {}], ids=str)
def test_names_that_are_no_text_raise(registry, find, name):
    with pytest.raises((TypeError, ValueError), match=r"name|dtype") as error:
        find(name)
    assert len(str(error.value)) <= 300
    assert name not in registry


@EACH
def test_common_spellings_are_suggested_first(registry, find):
    for spelling, name in registry.suggestions.items():
        with pytest.raises(ValueError, match=f"(Did you mean|such as) '?{name}['?,]"):
            find(spelling)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("e4m3", "float8_e4m3fn"), ("fp8", "float8_e4m3fn"), ("bf16", "bfloat16")],
)
def test_spellings_of_formats(spelling, name):
    with pytest.raises(ValueError, match=f"Did you mean {name}[,?]"):
        jaxq.cast(1.0, spelling)


@pytest.mark.parametrize(
    ("spelling", "recipe", "product_recipe"),
    [
        ("fp8", "fp8_e4m3_tensor", "fp8_training"),
        ("fp8_e4m3", "fp8_e4m3_tensor", "fp8_training"),
        ("e4m3", "fp8_e4m3_tensor", "fp8_training"),
        ("mxfp8", "mxfp8_e4m3", "mxfp8_training"),
        ("fp4", "nvfp4", "nvfp4_training"),
    ],
)
def test_spellings_of_recipes(spelling, recipe, product_recipe):
    with pytest.raises(ValueError, match=f"Did you mean {recipe}[,?]"):
        jaxq.quantize(1.0, spelling)
    with pytest.raises(ValueError, match=f"Did you mean {product_recipe}[,?]"):
        jaxq.get_product_recipe(spelling)
    with pytest.raises(ValueError, match="Did you mean") as error:
        jaxq.Rule("mlp", spelling)
    assert recipe in str(error.value)
    assert product_recipe in str(error.value)


@pytest.mark.parametrize("spelling", ["bf16", "BF16", "int8", "int4", "e2m1"])
def test_spellings_of_formats_in_place_of_recipes(spelling):
    with pytest.raises(ValueError, match=rf"'{spelling}' is a number format.*jaxq.Recipe\('"):
        jaxq.quantize(1.0, spelling)


def test_dtypes_of_quantizers_exclude_float64():
    for call in (jaxq.quantize, jaxq.fake_quant, jaxq.analysis.quantization_error):
        with pytest.raises(TypeError, match="must be float16, bfloat16 or float32, got int32"):
            call(np.int32(1), "int8_tensor")


def test_ends_of_paths_are_compared():
    hint = suggestion("upp", ["layers/up", "layers/down"], most=1)
    assert hint == "Did you mean layers/up?"
    assert suggestion("kernel", ["layers/up", "norm"], most=1) == "Known: layers/up and 1 more."
    assert suggestion("kernel", []) == "Known: none."


def test_registries_are_read_only():
    with pytest.raises(TypeError):
        jaxq.formats.FORMATS["mine"] = jaxq.get_format("int8")


def test_names_of_formats_recipes_and_product_recipes_are_disjoint():
    registries = [LOOK_UPS[kind][0] for kind in ("format", "recipe", "product recipe")]
    names = [name for registry in registries for name in registry]
    assert len(names) == len(set(names))


def test_format_in_place_of_recipe_raises_with_remedy():
    for name, fmt in jaxq.formats.FORMATS.items():
        with pytest.raises(ValueError, match=r"number format.*for one scale per tensor"):
            jaxq.get_recipe(name)
        with pytest.raises(TypeError, match=r"number format.*for one scale per tensor"):
            jaxq.get_recipe(fmt)
    with pytest.raises(ValueError, match="Use a recipe such as 'int8_tensor'"):
        jaxq.fake_quant(1.0, "int8")


def test_recipe_in_place_of_product_recipe_raises_with_remedy():
    for name in (*jaxq.recipes.RECIPES, *jaxq.formats.FORMATS):
        with pytest.raises(ValueError, match=r"not a product recipe.*jaxq.ProductRecipe"):
            jaxq.get_product_recipe(name)
