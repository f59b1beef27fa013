"""Searches for the scales of weights, weighted by the statistics of their inputs."""

import jax
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
    found = np.empty((INPUTS // GROUP, OUTPUTS))
    for g in range(len(found)):
        own, block = x[:, g * GROUP : (g + 1) * GROUP], w[g * GROUP : (g + 1) * GROUP]
        losses = []
        for factor in FACTORS:
            scale = np.abs(block).max(0) / 7 * factor
            error = np.clip(np.round(block / scale), -7, 7) * scale - block
            if weighting == "hessian":
                losses.append(np.sum((own @ error) ** 2, 0))
            else:
                losses.append(np.sum(np.square(own).sum(0)[:, None] * error**2, 0))
        found[g] = np.take(FACTORS, np.argmin(losses, 0))
    return found


@pytest.mark.parametrize("weighting", ["hessian", "square"])
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


@pytest.mark.parametrize("name", data.each(["nvfp4", "mxfp4", "uint4_channel", "q4_1", "q4_0"], []))
def test_search_stays_on_the_grid_of_the_scales(name: str):
    search = ptq.ScaleSearch(factors=(1.0, 0.75, 0.5, 1.5))
    model = lambda w, x: x @ w
    solver = ptq.GPTQ(search=search)
    packed, report = ptq.quantize_weights(model, name, solver=solver)(kernel(), [samples()])
    assert report.rows[0].loss < report.rows[0].rtn
    plain = jaxq.quantize_weights(model, name)(kernel(), samples())
    assert packed.scale.dtype == plain.scale.dtype
    for own, other in zip(packed.second, plain.second, strict=True):
        np.testing.assert_array_equal(own, other)
    assert np.any(packed.scale != plain.scale)


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
            kept = np.maximum(np.abs(error) - np.abs(error) ** (0.7 - 1) / beta, 0)
        zero = np.mean(q - (w - np.sign(error) * kept) / scale, axis=1, keepdims=True)
        beta *= 1.01
        if not np.mean(np.abs(error)) < best:
            break
        best = np.mean(np.abs(error))
    return zero


def test_hqq_finds_the_zero_points_of_the_published_iteration():
    w = np.random.default_rng(2).standard_t(3, (OUTPUTS, INPUTS)).astype(np.float32)
    w[0, :GROUP] = 0
    model = lambda w, x: x @ w.T
    recipe = jaxq.Recipe("uint4", jaxq.PerBlock(GROUP), jaxq.recipes.ScaleAndMin(stored=True))
    found, ends = [], []
    for iterations in (2, 20):
        solver = ptq.RTN(search=ptq.HQQ(iterations=iterations))
        independent = np.eye(INPUTS, dtype=np.float32)
        packed, report = ptq.quantize_weights(model, recipe, solver=solver)(w, [independent])
        plain = jaxq.quantize_weights(model, recipe)(w, independent)
        scale = np.float64(plain.scales).reshape(-1, 1)
        minimum = np.float64(plain.zero_point.view(jnp.float16)).reshape(-1, 1)
        blocks = np.float64(w).reshape(-1, GROUP)
        step = np.where(scale == 0, 1, scale)
        zero = expected_zero_points(blocks, step, minimum, iterations)
        own = packed.zero_point.view(jnp.float16).reshape(-1, 1)
        # Half of the last bit of float16, and of float32 sums of 32 codes.
        np.testing.assert_allclose(own, -zero * scale, rtol=2**-11 + 1e-5, atol=1e-5)
        np.testing.assert_array_equal(packed.scale, plain.scale)
        found.append(report.rows[0])
        ends.append(np.asarray(own))
    assert np.any(ends[0] != ends[1])
    assert found[1].loss < found[0].loss < found[0].rtn
    assert not packed.dequantize()[0, :GROUP].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ptq.HQQ(norm=0), "`norm` must be in"),
        (lambda: ptq.HQQ(iterations=0), "`iterations` must be positive"),
        (
            lambda: ptq.quantize_weights(lambda w, x: x @ w, "int4_g32", solver="hqq")(
                kernel(), [samples()]
            ),
            "must store a minimum per block.* Symmetric",
        ),
        (lambda: ptq.ScaleSearch("imatrix"), "`weighting` must be 'hessian' or 'square'"),
        (lambda: ptq.ScaleSearch(factors=(1.0, 0.0)), "`factors` must be positive"),
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
