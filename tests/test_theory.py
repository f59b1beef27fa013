"""Every preset's error on a million normal numbers, by jaxq's theory, and by another quadrature."""

import functools

import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import presets
from jaxq.analysis import expected_error
from tests.quadrature import Model, mean_squared_error

ROWS, COLUMNS = 1024, 1024
SIZE = ROWS * COLUMNS


@functools.cache
def sample() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def levels(name: str) -> np.ndarray:
    """The values of a format, by ml_dtypes or by hand."""
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
    """NVFP4: a scale relative to the tensor's."""
    tensor = np.abs(sample()).max()

    def scale(a):
        enlarge = 448 * largest / tensor
        relative = np.minimum(a / largest * enlarge, 448).astype(ml_dtypes.float8_e4m3fn)
        return relative.astype(np.float64) / enlarge

    return scale


def half_precision(scale):
    return lambda a: scale(a).astype(np.float16).astype(np.float64)


def whole_zero(lowest: int):
    """Levels begin where a whole zero point puts the lowest code."""
    return lambda low, s: (
        -s * (np.clip(lowest - np.rint(np.minimum(low, 0) / s), 0, 2**16) - lowest)
    )


def symmetric(name: str, block: int) -> Model:
    values = levels(name)
    return Model(values, over(values.max()), block)


def mx(name: str, emax: int) -> Model:
    return Model(levels(name), floor(emax), 32)


def unsigned(bits: int, block: int) -> Model:
    top = 2**bits - 1
    return Model(np.arange(top + 1.0), over(top), block, whole_zero(0))


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
    **{f"int4_{kind}": symmetric("int4", n) for kind, n in (("tensor", SIZE), ("channel", ROWS))},
    **{f"int4_g{n}": symmetric("int4", n) for n in (32, 64, 128)},
    "int3_g128": symmetric("int3", 128),
    "int2_g64": symmetric("int2", 64),
    "uint8_channel": unsigned(8, ROWS),
    "uint4_channel": unsigned(4, ROWS),
    "uint4_g128": unsigned(4, 128),
    "uint8_tensor": unsigned(8, SIZE),
    "fp8_e4m3_tensor": symmetric("float8_e4m3fn", SIZE),
    "fp8_e4m3_channel": symmetric("float8_e4m3fn", ROWS),
    "fp8_e4m3_tile128": symmetric("float8_e4m3fn", 128 * 128),
    "fp8_e5m2_tensor": symmetric("float8_e5m2", SIZE),
    "nf4": symmetric("nf4", 64),
    "fp4_bnb": symmetric("fp4_bnb", 64),
    "mxfp8_e4m3": mx("float8_e4m3fn", 8),
    "mxfp8_e5m2": mx("float8_e5m2", 15),
    "mxfp6_e2m3": mx("float6_e2m3fn", 2),
    "mxfp6_e3m2": mx("float6_e3m2fn", 4),
    "mxfp4": mx("float4_e2m1fn", 2),
    "mxint8": Model(np.arange(-127, 128) / 64.0, floor(0), 32),
    "nvfp4": Model(levels("float4_e2m1fn"), in_e4m3(6), 16),
    "nvfp4_tile16": Model(levels("float4_e2m1fn"), in_e4m3(6), 256),
    "q8_0": Model(levels("int8"), half_precision(over(127)), 32),
    "q4_0": gguf_extremum(4),
    "q5_0": gguf_extremum(5),
    "q4_1": gguf_minimum(4),
    "q5_1": gguf_minimum(5),
    # The scale of a tensor's mean magnitude is the same for all.
    "ternary": Model(np.array([-1.0, 0, 1]), lambda a: MEAN + 0 * a, SIZE),
    "binary": Model(np.array([-1.0, 1]), lambda a: MEAN + 0 * a, SIZE),
}
# What has no formula, and the preset that it is made of, with a bound on the ratio of errors.
BESIDE = {"nf4_dq": ("nf4", 0.99, 1.02), "nvfp4_4over6": ("nvfp4", 0.75, 0.95)}


def measured(name: str) -> tuple[float, float]:
    """The mean squared error of a preset and its standard error."""
    squares = (np.asarray(jaxq.fake_quant(sample(), name), np.float64) - sample()) ** 2
    # Numbers that share a scale err together, so parts are taken every way that blocks may lie.
    tiles = squares.reshape(8, 128, 8, 128).mean((1, 3)).ravel()
    rows, columns = (squares.mean(axis) for axis in (1, 0))
    errors = (part.std() / np.sqrt(part.size - 1) for part in (tiles, rows, columns))
    return float(squares.mean()), float(max(errors))


def test_every_preset_is_here():
    assert set(presets.ALL) == set(MODELS) | set(BESIDE)


# Scales that jump with a, which the oracle's evenly spaced nodes do not resolve, and rounding with
# a scale that is not stored, which it leaves out.
ROUGH = {"q8_0": 2e-3, "nvfp4": 2e-3, "nvfp4_tile16": 2e-3, "mxfp8_e4m3": 1e-2, "mxfp4": 5e-3}
ROUGH |= dict.fromkeys(["mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8"], 5e-3)
ROUGH |= dict.fromkeys(["uint8_channel", "uint4_g128", "q4_1", "q5_1"], 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_measured_is_expected(name: str):
    error, deviation = measured(name)
    model, expected = MODELS[name], expected_error(name, (ROWS, COLUMNS))
    assert abs(error - expected.mse) <= 4 * expected.deviation
    # The one block of a tensor is taken as it is; of many the ends are averaged over.
    ends = (float(sample().min()), float(sample().max())) if model.block == SIZE else None
    want = mean_squared_error(model, ends)
    assert abs(error - want) <= 4 * deviation
    if ends is None:
        assert expected.mse == pytest.approx(want, rel=ROUGH.get(name, 1e-4))


@pytest.mark.parametrize("name", BESIDE)
def test_beside_what_it_is_made_of(name: str):
    base, low, high = BESIDE[name]
    assert low < measured(name)[0] / measured(base)[0] < high


@pytest.mark.parametrize(
    ("count", "error"),
    [(2, 0.3634), (4, 0.1188), (8, 0.03744), (16, 0.01154), (32, 0.00349)],
)
def test_the_quadrature_itself_gives_published_numbers(count: int, error: float):
    """Max (1960): the best evenly spaced levels for a normal variable."""
    steps = {2: 1.596, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881}
    spaced = np.arange(count) - (count - 1) / 2
    model = Model(spaced, lambda a: steps[count] + 0 * a, 10**7)
    assert mean_squared_error(model) == pytest.approx(error, rel=2e-3)
