"""GPTAQ and QEP, which correct the drift of inputs that packed weights cause."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.ptq_data import normal

pytestmark = pytest.mark.unoptimized

SIZE, TOKENS, ALPHA, PROPAGATION = 160, 400, 0.25, 0.5
RECIPE = jaxq.Recipe("int3", jaxq.PerChannel())


def model(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


PARAMS = {"up": normal(0, 24, SIZE), "down": normal(1, SIZE, 8)}
BATCHES = [normal(2, TOKENS // 2, 24), normal(3, TOKENS // 2, 24)]


SOLVERS = {
    "gptq": ptq.GPTQ(order=None),
    "gptaq": ptq.GPTQ(order=None, asymmetry=ALPHA),
    "qep": ptq.GPTQ(order=None, propagation=PROPAGATION),
    "gptaq, static": ptq.GPTQ(asymmetry=ALPHA),
    "qep, static": ptq.GPTQ(propagation=PROPAGATION),
}


@functools.cache
def solved(name: str):
    """Returns the packed parameters and the report of a solver."""
    return ptq.quantize_weights(model, RECIPE, solver=SOLVERS[name])(PARAMS, BATCHES)


def drifted(packed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs of the second product: with packed and with float weights."""
    x = np.concatenate(BATCHES).astype(np.float64)
    up = np.asarray(packed["up"].dequantize(), np.float64)
    return np.maximum(x @ up, 0), np.maximum(x @ PARAMS["up"], 0)


def matrices(x: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the damped Hessian, the drift, and the upper Cholesky factor of the inverse."""
    gram = x.T @ x
    gram += 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    return gram, (reference - x).T @ x, upper


def gptaq(
    weight: np.ndarray, scale: np.ndarray, drift: np.ndarray, upper: np.ndarray, alpha: float
) -> np.ndarray:
    """Computes GPTAQ as published, column by column, on a weight `[outputs, inputs]`."""
    shifts = alpha * np.triu(drift @ upper.T, 1) @ upper
    left, result = weight.astype(np.float64), np.zeros(weight.shape)
    for i in range(weight.shape[1]):
        column = left[:, i].copy()
        result[:, i] = np.clip(np.round(column / scale), -3, 3) * scale
        error = (column - result[:, i]) / upper[i, i]
        left[:, i:] += np.outer(column, shifts[i, i:]) - np.outer(error, upper[i, i:])
    return result


@pytest.mark.parametrize(
    "name", ["gptaq", data.slow("qep"), data.slow("gptaq, static"), data.slow("qep, static")]
)
def test_codes_equal_the_published_formulas_in_float64(name: str):
    packed, report = solved(name)
    x, reference = drifted(packed)
    order = np.argsort(-np.square(x).sum(0)) if "static" in name else np.arange(SIZE)
    gram, drift, upper = matrices(x[:, order], reference[:, order])
    weight, alpha = PARAMS["down"].T.astype(np.float64)[:, order], ALPHA
    if "qep" in name:
        weight, alpha = weight + PROPAGATION * weight @ drift @ np.linalg.inv(gram), 0.0
    scale = np.asarray(packed["down"].scales, np.float64).reshape(-1)
    expected = gptaq(weight, scale, drift, upper, alpha)
    np.testing.assert_allclose(packed["down"].dequantize().T[:, order], expected, rtol=1e-5)
    assert not report.unsolved


@pytest.mark.slow
def test_correction_brings_the_outputs_closer_to_the_float_model():
    x = np.concatenate(BATCHES)
    errors = {}
    for name in ("gptq", "gptaq", "qep"):
        y = model(jaxq.dequantize_tree(solved(name)[0]), x) - model(PARAMS, x)
        errors[name] = float(np.sum(np.square(y)))
    assert errors["gptaq"] < 0.97 * errors["gptq"]
    assert errors["qep"] < 0.97 * errors["gptq"]


@pytest.mark.slow
def test_searched_scales_are_compared_by_the_outputs_of_the_float_model():
    rules = {"up": RECIPE, "down": jaxq.Recipe("int4", jaxq.PerChannel())}
    solver = ptq.GPTQ(order=None, propagation=1, search=ptq.ScaleSearch(factors=(1.0, 0.9, 0.8)))
    packed, report = ptq.quantize_weights(model, rules, solver=solver)(PARAMS, BATCHES)
    # The correction of the drift increases the loss on the same input.
    assert report.rows[1].loss > report.rows[1].rtn
    assert not report.unsolved
    plain = jaxq.quantize_weights(model, rules)(PARAMS, BATCHES[0])
    factors = packed["down"].scales / plain["down"].scales
    assert np.unique(np.round(factors, 3)).size > 1


@pytest.mark.slow
def test_layers_of_a_scan_are_corrected_and_loops_are_reported():
    def scanned(w, x):
        x, _ = lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, w["layers"])
        return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ w["loop"]), x)

    def unrolled(w, x):
        return jnp.tanh(jnp.tanh(x @ w["layers"][0]) @ w["layers"][1])

    stack = {"layers": normal(0, 2, 8, 8), "loop": normal(1, 8, 8)}
    batches = [normal(2, 50, 8)]
    one, report = ptq.quantize_weights(scanned, RECIPE, solver="gptaq")(stack, batches)
    listed = {"layers": list(stack["layers"])}
    other, _ = ptq.quantize_weights(unrolled, RECIPE, solver="gptaq")(listed, batches)
    for i in range(2):
        np.testing.assert_array_equal(one["layers"].codes[i], other["layers"][i].codes)
    (row,) = report.unsolved
    assert row.product == "loop"
    assert "without input drift" in row.unsolved_reason


@pytest.mark.slow
def test_padding_has_no_drift():
    keep = np.arange(60) < 50
    padded = np.concatenate([normal(2, 50, 24), np.full((10, 24), 1e3, np.float32)])
    plain, _ = ptq.quantize_weights(model, RECIPE, solver="qep")(PARAMS, [padded[:50]])
    masked = ptq.quantize_weights(model, RECIPE, solver="qep", mask=lambda _: keep)
    np.testing.assert_array_equal(masked(PARAMS, [padded])[0]["down"].codes, plain["down"].codes)


def test_bad_settings_are_errors():
    with pytest.raises(
        ValueError, match=r"`asymmetry` must be a number of at least 0, .* Use 0 \(off\), or 0.25"
    ):
        ptq.GPTQ(asymmetry=-1)
    with pytest.raises(ValueError, match="must not both be positive"):
        ptq.GPTQ(asymmetry=0.25, propagation=0.5)
    with pytest.raises(ValueError, match="`sequential` must be True"):
        ptq.quantize_weights(model, RECIPE, solver="qep", sequential=False)
