"""Searches for the scales of weights, weighted by the statistics of their inputs."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

INPUTS, OUTPUTS, GROUP = 64, 8, 32
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6)


def samples() -> np.ndarray:
    """Returns correlated tokens with inputs of different sizes."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((200, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    return (mixed * np.exp(rng.standard_normal(INPUTS))).astype(np.float32)


def kernel() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


def expected_factors(weighting: str) -> np.ndarray:
    """Returns the best factor of each group of a column, in float64."""
    w, x = kernel().astype(np.float64), samples().astype(np.float64)
    best = np.empty((INPUTS // GROUP, OUTPUTS))
    for g in range(len(best)):
        tokens, block = x[:, g * GROUP : (g + 1) * GROUP], w[g * GROUP : (g + 1) * GROUP]
        losses = []
        for factor in FACTORS:
            scale = np.abs(block).max(0) / 7 * factor
            error = np.clip(np.round(block / scale), -7, 7) * scale - block
            if weighting == "hessian":
                losses.append(np.sum((tokens @ error) ** 2, 0))
            else:
                losses.append(np.sum(np.square(tokens).sum(0)[:, None] * error**2, 0))
        best[g] = np.take(FACTORS, np.argmin(losses, 0))
    return best


@pytest.mark.parametrize("weighting", data.each(["hessian", "square"], ["hessian"]))
def test_search_takes_the_best_factor_of_each_block(weighting: str):
    model = lambda w, x: x @ w.reshape(OUTPUTS, INPUTS).T
    w = kernel().T.reshape(2, OUTPUTS // 2, INPUTS)
    solver = ptq.RTN(search=ptq.ScaleSearch(weighting, FACTORS))
    packed, report = ptq.quantize_weights(model, "int4_g32", solver=solver)(w, [samples()])
    plain = jaxq.quantize_weights(model, "int4_g32")(w, samples())
    factors = (packed.scales / plain.scales).reshape(OUTPUTS, -1).T
    np.testing.assert_allclose(factors, expected_factors(weighting), rtol=1e-6)
    assert packed.recipe == plain.recipe
    (row,) = report.rows
    error = samples() @ (packed.dequantize() - w).reshape(OUTPUTS, INPUTS).T
    power = np.sum((samples() @ kernel()) ** 2)
    np.testing.assert_allclose(row.loss, np.sum(error**2) / power, rtol=1e-3)
    assert row.loss < row.rtn


BLOCKS = {  # The shape of a block of a weight `[inputs, outputs]`.
    "short": (jaxq.PerBlock(24, pad=True), (24, 1)),
    "tiles": (jaxq.PerBlock((4, 16)), (16, 4)),
    "tensor": (jaxq.PerTensor(), (INPUTS, OUTPUTS)),
}


@pytest.mark.parametrize("name", data.each(BLOCKS, ["short", "tiles"]))
def test_search_takes_the_best_factor_of_blocks_of_any_shape(name: str):
    granularity, shape = BLOCKS[name]
    recipe, weight = jaxq.Recipe("int4", granularity), jnp.asarray(kernel(), jnp.bfloat16)
    solver = ptq.RTN(search=ptq.ScaleSearch(factors=FACTORS))
    model = lambda w, x: x @ w.astype(jnp.float32)
    packed, _ = ptq.quantize_weights(model, recipe, solver=solver)(weight, [samples()])
    plain = jaxq.quantize_weights(model, recipe)(weight, samples())
    factors = packed.scales / plain.scales
    w, x = np.float64(weight), np.float64(samples())
    for i, j in np.ndindex(factors.shape):
        at = np.s_[i * shape[0] : (i + 1) * shape[0], j * shape[1] : (j + 1) * shape[1]]
        losses = []
        for factor in FACTORS:
            scale = np.abs(w[at]).max() / 7 * factor
            error = np.clip(np.round(w[at] / scale), -7, 7) * scale - w[at]
            losses.append(np.sum((x[:, at[0]] @ error) ** 2))
        assert factors[i, j] == pytest.approx(FACTORS[np.argmin(losses)], rel=1e-6)


@pytest.mark.parametrize("name", data.each(["nvfp4", "mxfp4", "uint4_channel", "q4_1", "q4_0"], []))
def test_search_stays_on_the_grid_of_the_scales(name: str):
    search = ptq.ScaleSearch(factors=(1.0, 0.75, 0.5, 1.5))
    model = lambda w, x: x @ w
    solver = ptq.GPTQ(search=search)
    packed, report = ptq.quantize_weights(model, name, solver=solver)(kernel(), [samples()])
    assert report.rows[0].loss < report.rows[0].rtn
    plain = jaxq.quantize_weights(model, name)(kernel(), samples())
    assert packed.scale.dtype == plain.scale.dtype
    for actual, other in zip(packed.second, plain.second, strict=True):
        np.testing.assert_array_equal(actual, other)
    assert np.any(packed.scale != plain.scale)


def fp4_losses(scales: np.ndarray, blocks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted squared errors of blocks `[inputs, n]` for scales `[trials, n]`."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-levels[:0:-1], levels])
    near = np.abs(blocks[None] / scales[:, None] - levels[:, None, None, None]).argmin(0)
    return np.sum(weights[:, None] * (levels[near] * scales[:, None] - blocks) ** 2, axis=1)


# The tries of MXFP4 are the neighbors of an exponent. Those of NVFP4 are so dense that they reach
# every float8_e4m3fn code from a quarter of the scale to four times it.
FP4 = {"mxfp4": (1.0, 2.0, 0.5), "nvfp4": (1.0, *(2 ** (i / 16) for i in range(-32, 33)))}


@pytest.mark.parametrize("name", data.each(FP4, ["nvfp4"]))
def test_search_finds_the_best_of_all_stored_scales(name: str):
    model = lambda w, x: x @ w
    x = np.diag(np.abs(samples()).max(0))  # One input at a time, so that errors do not correlate.
    solver = ptq.RTN(search=ptq.ScaleSearch("square", FP4[name]))
    packed, _ = ptq.quantize_weights(model, name, solver=solver)(kernel(), [x])
    plain = jaxq.quantize_weights(model, name)(kernel(), x)
    weights, size = np.square(x, dtype=np.float64).sum(0), 32 if name == "mxfp4" else 16
    dtype = ml_dtypes.float8_e8m0fnu if name == "mxfp4" else ml_dtypes.float8_e4m3fn
    stored = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    stored = stored[(stored > 0) & (stored < np.inf)]
    nearest, searched = (
        np.asarray(q.scales, np.float64).reshape(-1, OUTPUTS) for q in (plain, packed)
    )
    scale = np.asarray(plain.scale).view(dtype).astype(np.float64).reshape(nearest.shape)
    bound = 2.01 if name == "mxfp4" else 3.99
    for g in range(INPUTS // size):
        rows = slice(g * size, (g + 1) * size)
        tried = stored[:, None] * nearest[g] / scale[g]
        near = np.abs(np.log(tried / nearest[g])) < np.log(bound)
        losses = fp4_losses(tried, kernel()[rows], weights[rows])
        best = np.where(near, losses, np.inf).min(0)
        losses = fp4_losses(searched[g][None], kernel()[rows], weights[rows])[0]
        assert np.all(losses <= best * (1 + 1e-5))
    assert np.any(searched != nearest)


def test_a_search_of_one_factor_gives_rceil_with_another_largest_value():
    scaling = jaxq.recipes.MX("rceil", search=(6 / 7.25,))
    recipe = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(GROUP), scaling)
    ends = np.float32(7.25) * np.exp2(np.arange(-20, 20, dtype=np.float32))
    amax = np.concatenate([np.nextafter(ends, np.float32(0)), ends, np.nextafter(ends, np.inf)])
    x = np.zeros((len(amax), GROUP), np.float32)
    x[:, 3] = -amax
    expected = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 7.25)))
    np.testing.assert_array_equal(jaxq.quantize(x, recipe).scales.ravel(), expected)


@pytest.mark.slow
def test_parts_of_a_fused_leaf_are_searched_one_by_one():
    def model(w, x):
        first, second = jnp.split(w, 2, axis=1)
        return jnp.tanh(x @ first), x @ second

    solver = ptq.RTN(search=ptq.ScaleSearch(factors=FACTORS))
    packed, _ = ptq.quantize_weights(model, "int4_g32", solver=solver)(kernel(), [samples()])
    plain = jaxq.quantize_weights(model, "int4_g32")(kernel(), samples())
    np.testing.assert_allclose(packed.scales / plain.scales, expected_factors("hessian"), rtol=1e-6)


def expected_zero_points(
    w: np.ndarray, scale: np.ndarray, minimum: np.ndarray, iterations: int
) -> np.ndarray:
    """Returns the zero points of HQQ's published iteration in float64, for blocks `[n, length]`."""
    zero, beta, best = -minimum / scale, 10.0, np.inf
    for _ in range(iterations):
        q = np.clip(np.round(w / scale + zero), 0, 15)
        error = w - (q - zero) * scale
        with np.errstate(divide="ignore"):
            outlier = np.maximum(np.abs(error) - np.abs(error) ** (0.7 - 1) / beta, 0)
        zero = np.mean(q - (w - np.sign(error) * outlier) / scale, axis=1, keepdims=True)
        beta *= 1.01
        if not np.mean(np.abs(error)) < best:
            break
        best = np.mean(np.abs(error))
    return zero


def test_hqq_equals_the_published_iteration_and_the_hqq_package():
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "ptq.npz")
    w = golden["hqq_weight"]
    model = lambda w, x: x @ w.T
    recipe = jaxq.Recipe("uint4", jaxq.PerBlock(GROUP), jaxq.recipes.ScaleAndMin(stored=True))
    independent = np.eye(INPUTS, dtype=np.float32)
    plain = jaxq.quantize_weights(model, recipe)(w, independent)
    scale = np.float64(plain.scales).reshape(-1, 1)
    step = np.where(scale == 0, 1, scale)
    minimum = np.float64(plain.zero_point.view(jnp.float16)).reshape(-1, 1)
    zero = expected_zero_points(np.float64(w).reshape(-1, GROUP), step, minimum, 2)
    # The package does not increase beta.
    cases = (
        (ptq.HQQ(iterations=2), -zero * scale),
        (ptq.HQQ(kappa=1.0), golden["hqq_minimum"]),
    )
    rows = []
    for search, expected in cases:
        solver = ptq.RTN(search=search)
        packed, report = ptq.quantize_weights(model, recipe, solver=solver)(w, [independent])
        zero = packed.zero_point.view(jnp.float16).reshape(-1, 1)
        # Half of the last bit of float16, and of float32 sums of 32 codes.
        np.testing.assert_allclose(zero, expected, rtol=2**-11 + 1e-5, atol=1e-5)
        np.testing.assert_array_equal(packed.scale, plain.scale)
        rows.append(report.rows[0])
    assert rows[1].loss < rows[0].loss < rows[0].rtn
    codes = (packed.dequantize().reshape(-1, GROUP) - zero.astype(jnp.float32)) / step
    np.testing.assert_array_equal(np.round(codes).reshape(w.shape), golden["hqq_codes"])
    assert not packed.dequantize()[0, :GROUP].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ptq.HQQ(norm=0), "`norm` must be a number in"),
        (lambda: ptq.HQQ(iterations=0), "`iterations` must be an integer of at least 1"),
        (
            lambda: ptq.quantize_weights(lambda w, x: x @ w, "int4_g32", solver="hqq")(
                kernel(), [samples()]
            ),
            "must store a minimum per block.* Symmetric",
        ),
        (lambda: ptq.ScaleSearch("imatrix"), "`weighting` must be 'hessian' or 'square'"),
        (
            lambda: ptq.ScaleSearch(factors=(1.0, 0.0)),
            "`factors` must be a tuple of positive",
        ),
        (
            lambda: ptq.quantize_weights(
                lambda w, x: x @ w, "nf4_dq", solver=ptq.RTN(ptq.ScaleSearch())
            )(kernel(), [samples()]),
            "must store block scales .* DoubleQuant",
        ),
    ],
)
def test_bad_searches_are_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_searched_solvers_are_hashable():
    assert hash(ptq.GPTQ(search=ptq.ScaleSearch())) == hash(ptq.GPTQ(search=ptq.ScaleSearch()))
    assert jax.tree.leaves(ptq.ScaleSearch()) == [ptq.ScaleSearch()]
