"""Errors of all named recipes on normal numbers: measured, predicted and by quadrature."""

import functools

import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq.analysis import expected_error
from jaxq.recipes import RECIPES
from tests import data
from tests.quadrature import Model, mean_squared_error

ROWS, COLUMNS = 1024, 1024
SIZE = ROWS * COLUMNS


@functools.cache
def sample() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def levels(name: str) -> np.ndarray:
    """Returns the values of a format, from ml_dtypes or by a formula."""
    if name.startswith("int"):
        top = 2 ** (int(name[3:]) - 1) - 1
        return np.arange(-top, top + 1.0)
    if name.startswith("float"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        codes = np.arange(2 ** jaxq.get_format(name).bits, dtype=np.uint8).view(dtype)
        values = codes.astype(np.float64)
        return np.unique(values[np.isfinite(values)])
    return np.unique(jaxq.get_format(name).levels)


def over(top: float):
    return lambda a: a / top


def floor(emax: int):
    return lambda a: np.exp2(np.floor(np.log2(a)) - emax)


def in_e4m3(largest: float):
    """Returns NVFP4's scale function, with E4M3 scales relative to the tensor scale."""
    tensor = np.abs(sample()).max()

    def scale(a):
        enlarge = 448 * largest / tensor
        relative = np.minimum(a / largest * enlarge, 448).astype(ml_dtypes.float8_e4m3fn)
        return relative.astype(np.float64) / enlarge

    return scale


def half_precision(scale):
    return lambda a: scale(a).astype(np.float16).astype(np.float64)


def integer_zero_point(lowest: int):
    """Returns the offset of the levels for an integer zero point."""
    return lambda low, s: (
        -s * (np.clip(lowest - np.rint(np.minimum(low, 0) / s), 0, 2**16) - lowest)
    )


def symmetric(name: str, block: int) -> Model:
    values = levels(name)
    return Model(values, over(values.max()), block)


def mx(name: str, emax: int) -> Model:
    return Model(levels(name), floor(emax), 32, jumps=(1.0,))


def unsigned(bits: int, block: int) -> Model:
    top = 2**bits - 1
    return Model(np.arange(top + 1.0), over(top), block, integer_zero_point(0))


def gguf_minimum(bits: int) -> Model:
    top = 2**bits - 1
    return Model(
        np.arange(top + 1.0),
        half_precision(over(top)),
        32,
        lambda low, _: low.astype(np.float16).astype(np.float64),
    )


def gguf_extremum(bits: int) -> Model:
    top = 2 ** (bits - 1)
    return Model(np.arange(-top, top + 0.0), half_precision(over(top)), 32, signed=True)


MEAN = np.sqrt(2 / np.pi)
MODELS: dict[str, Model] = {
    **{f"int8_{kind}": symmetric("int8", n) for kind, n in (("tensor", SIZE), ("channel", ROWS))},
    "int8_token": symmetric("int8", COLUMNS),
    "int4_token": symmetric("int4", COLUMNS),
    **{f"int4_{kind}": symmetric("int4", n) for kind, n in (("tensor", SIZE), ("channel", ROWS))},
    **{f"int4_g{n}": symmetric("int4", n) for n in (32, 64, 128)},
    "int3_g128": symmetric("int3", 128),
    "int2_g64": symmetric("int2", 64),
    "uint8_channel": unsigned(8, ROWS),
    "uint4_channel": unsigned(4, ROWS),
    "uint4_g128": unsigned(4, 128),
    "uint8_tensor": unsigned(8, SIZE),
    "uint8_token": unsigned(8, COLUMNS),
    "uint4_tensor": unsigned(4, SIZE),
    "fp8_e4m3_tensor": symmetric("float8_e4m3fn", SIZE),
    "fp8_e4m3_channel": symmetric("float8_e4m3fn", ROWS),
    "fp8_e4m3_token": symmetric("float8_e4m3fn", COLUMNS),
    "fp8_e4m3_g128": symmetric("float8_e4m3fn", 128),
    "fp8_e4m3_tile128": symmetric("float8_e4m3fn", 128 * 128),
    "fp8_e5m2_tensor": symmetric("float8_e5m2", SIZE),
    "nf4_g64": symmetric("nf4", 64),
    "fp4_bnb_g64": symmetric("fp4_bnb", 64),
    "mxfp8_e4m3": mx("float8_e4m3fn", 8),
    "mxfp8_e5m2": mx("float8_e5m2", 15),
    "mxfp6_e2m3": mx("float6_e2m3fn", 2),
    "mxfp6_e3m2": mx("float6_e3m2fn", 4),
    "mxfp4": mx("float4_e2m1fn", 2),
    "mxint8": Model(np.arange(-127, 128) / 64.0, floor(0), 32, jumps=(1.0,)),
    "nvfp4": Model(levels("float4_e2m1fn"), in_e4m3(6), 16),
    "nvfp4_tile16": Model(levels("float4_e2m1fn"), in_e4m3(6), 256),
    "q8_0": Model(levels("int8"), half_precision(over(127)), 32),
    "tq2_0": Model(np.array([-1.0, 0, 1]), half_precision(over(1)), 256),
    "q4_0": gguf_extremum(4),
    "q5_0": gguf_extremum(5),
    "q4_1": gguf_minimum(4),
    "q5_1": gguf_minimum(5),
    # The scale from the mean magnitude of the tensor is a constant.
    "ternary_absmean": Model(np.array([-1.0, 0, 1]), lambda a: MEAN + 0 * a, SIZE),
    "binary_absmean": Model(np.array([-1.0, 1]), lambda a: MEAN + 0 * a, SIZE),
}
# Recipes without a formula: the recipe that each is derived from, and bounds of the error ratio.
DERIVED = {"nf4_dq": ("nf4_g64", 0.99, 1.02), "nvfp4_4over6": ("nvfp4", 0.75, 0.95)}


def measured(name: str) -> tuple[float, float]:
    """Returns the mean squared error of a recipe and its standard error."""
    squares = (np.asarray(jaxq.fake_quant(sample(), name), np.float64) - sample()) ** 2
    # Errors within a block are correlated, so the deviation is that of tiles, rows and columns.
    tiles = squares.reshape(8, 128, 8, 128).mean((1, 3)).ravel()
    rows, columns = (squares.mean(axis) for axis in (1, 0))
    errors = (part.std() / np.sqrt(part.size - 1) for part in (tiles, rows, columns))
    return float(squares.mean()), float(max(errors))


def test_every_recipe_is_covered():
    searched = {name for name, recipe in RECIPES.items() if recipe.scaling.searches_elements}
    assert set(RECIPES) == set(MODELS) | set(DERIVED) | searched


# Larger tolerances for discontinuous scales, which the quadrature's nodes do not resolve, and for
# unstored scales, which the quadrature ignores.
ROUGH = {"q8_0": 2e-3, "nvfp4": 2e-3, "nvfp4_tile16": 2e-3, "mxint8": 1e-3}
ROUGH |= dict.fromkeys(["uint8_channel", "uint4_g128", "q4_1", "q5_1"], 1e-3)


@pytest.mark.parametrize("name", data.each(MODELS, {*data.few()} - {*DERIVED} | {"mxint8"}))
def test_measured_error_matches_theory_and_quadrature(name: str):
    error, deviation = measured(name)
    model, expected = MODELS[name], expected_error(name, (ROWS, COLUMNS))
    assert abs(error - expected.mse) <= 4 * expected.deviation
    # The ends of a single block are those of the sample; those of many blocks are integrated over.
    ends = (float(sample().min()), float(sample().max())) if model.block == SIZE else None
    want = mean_squared_error(model, ends)
    assert abs(error - want) <= 4 * deviation
    if ends is None:
        assert expected.mse == pytest.approx(want, rel=ROUGH.get(name, 1e-4))


def jumping(place: float, offset: int):
    """Returns a power-of-two scale function that doubles at `place` times powers of two."""
    return lambda a: np.exp2(np.floor(np.log2(a / place)) + offset)


def in_e4m3_alone(a: np.ndarray) -> np.ndarray:
    return np.maximum((a / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), 2.0**-9)


# Unnamed recipes whose scales are discontinuous at numbers other than powers of two.
E4M3_JUMPS = tuple(6 * (1 + k / 16) for k in range(1, 16, 2))
UNNAMED = {
    ("ocp_int8", "even", "float8_e8m0fnu", 32): Model(
        np.arange(-127, 128) / 64.0, jumping(2 - 2**-7, 1), 32, jumps=(2 - 2**-7,)
    ),
    ("float8_e4m3fn", "even", "float8_e8m0fnu", 32): Model(
        levels("float8_e4m3fn"), jumping(2 - 2**-4, -7), 32, jumps=(2 - 2**-4,)
    ),
    ("float4_e2m1fn", "rceil", "float8_e8m0fnu", 32): Model(
        levels("float4_e2m1fn"), jumping(6, 1), 32, jumps=(6.0,)
    ),
    ("float4_e2m1fn", "max", "float8_e4m3fn", 16): Model(
        levels("float4_e2m1fn"), in_e4m3_alone, 16, jumps=E4M3_JUMPS
    ),
}


@pytest.mark.parametrize("fields", UNNAMED)
def test_discontinuous_scales_match_quadrature(fields: tuple[str, str, str, int]):
    element, rule, scales, block = fields
    powers = scales == "float8_e8m0fnu"
    scaling = jaxq.MX(rule) if powers else jaxq.Symmetric(rule=rule, scale_format=scales)
    recipe = jaxq.Recipe(element, jaxq.PerBlock(block), scaling)
    want = mean_squared_error(UNNAMED[fields])
    assert expected_error(recipe, (64, 1024)).mse == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", DERIVED)
def test_error_ratio_to_base_recipe(name: str):
    base, low, high = DERIVED[name]
    assert low < measured(name)[0] / measured(base)[0] < high


@pytest.mark.parametrize(
    ("count", "error"),
    [(2, 0.3634), (4, 0.1188), (8, 0.03744), (16, 0.01154), (32, 0.00349)],
)
def test_quadrature_matches_published_errors(count: int, error: float):
    """Compares with Max (1960): the best evenly spaced levels for normal numbers."""
    steps = {2: 1.596, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881}
    spaced = np.arange(count) - (count - 1) / 2
    model = Model(spaced, lambda a: steps[count] + 0 * a, 10**7)
    assert mean_squared_error(model) == pytest.approx(error, rel=2e-3)
