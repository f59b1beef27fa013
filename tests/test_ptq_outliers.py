"""Solvers on recipes that store outliers separately."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.ptq_data import normal

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

INPUTS, OUTPUTS = 32, 8
RECIPE = jaxq.Recipe("int3", jaxq.PerBlock(16), outliers=jaxq.Outliers(0.05))


def obq(weight: np.ndarray, gram: np.ndarray, start: jaxq.Quantized) -> np.ndarray:
    """Returns the values of OBQ in float64, with outliers that keep theirs."""
    w, gram = weight.astype(np.float64), gram.astype(np.float64)
    is_outlier = np.zeros(w.size, bool)
    is_outlier[np.asarray(start.outliers[1])] = True
    is_outlier = is_outlier.reshape(w.shape)
    stored = np.asarray(start.dequantize(), np.float64)
    blocks = np.abs(np.where(is_outlier, 0, w)).reshape(-1, 16, OUTPUTS)
    scale = np.repeat(blocks.max(1) / 3, 16, 0)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(len(gram)))
    result = np.zeros_like(w)
    for i in range(len(w)):
        snapped = np.clip(np.round(w[i] / scale[i]), -3, 3) * scale[i]
        result[i] = np.where(is_outlier[i], stored[i], snapped)
        w -= np.outer(inverse[:, i], (w[i] - result[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


def test_gptq_with_outliers_gives_the_values_of_float64_obq():
    x = normal(0, 200, INPUTS) @ (np.eye(INPUTS) + 0.2 * normal(1, INPUTS, INPUTS)).astype("f")
    weight = normal(2, INPUTS, OUTPUTS)
    start = jaxq.quantize(weight, RECIPE, axis=0)
    q = ptq.gptq(weight, x.T @ x, RECIPE, axis=0, order=None)
    np.testing.assert_array_equal(q.outliers[1], start.outliers[1])
    np.testing.assert_allclose(q.dequantize(), obq(weight, x.T @ x, start), rtol=1e-6)


@pytest.mark.parametrize("solver", ["gptq", data.slow("owq")])
def test_weight_by_outputs_is_stored_like_its_transpose(solver: str):
    w, x = normal(0, INPUTS, OUTPUTS), normal(1, 200, INPUTS)
    x[:, 3] *= 20
    first, _ = ptq.quantize_weights(lambda w, x: x @ w, RECIPE, solver=solver)(w, [x])
    second, report = ptq.quantize_weights(lambda w, x: x @ w.T, RECIPE, solver=solver)(w.T, [x])
    assert not report.unsolved
    assert second.nbytes == first.nbytes
    np.testing.assert_array_equal(second.dequantize().T, first.dequantize())


def scanned(params, x):
    def layer(x, w):
        return x + 0.3 * jnp.tanh(jax.nn.relu(x @ w["up"]) @ w["down"]), None

    return lax.scan(layer, x, params)[0]


def test_stored_model_with_outliers_has_the_reported_losses():
    params = {"up": normal(0, 2, 16, 32), "down": normal(1, 2, 32, 16)}
    batches = [normal(2, 64, 16), normal(3, 64, 16)]
    # The search moves scales, and the outliers stay.
    solver = ptq.GPTQ(search=ptq.ScaleSearch())
    packed, report = ptq.quantize_weights(scanned, RECIPE, solver=solver)(params, batches)
    nearest = jax.jit(jaxq.quantize_weights(scanned, RECIPE))(params, batches[0])
    for name, q in packed.items():
        for actual, other in zip(q.outliers, nearest[name].outliers, strict=True):
            np.testing.assert_array_equal(actual, other)
    x, first = np.concatenate(batches), report.rows[0]
    weight, stored = params["up"][0], np.asarray(packed["up"].dequantize())[0]
    loss = np.sum((x @ (stored - weight)) ** 2) / np.sum((x @ weight) ** 2)
    np.testing.assert_allclose(first.loss, loss, rtol=1e-4)
    assert all(row.loss < row.rtn for row in report.rows)
    values = jax.jit(jaxq.quantize_fn(scanned, RECIPE))(packed, x)
    want = jax.jit(lambda packed, x: scanned(jaxq.dequantize_tree(packed), x))(packed, x)
    np.testing.assert_allclose(values, want, atol=1e-5)


@pytest.mark.slow
def test_owq_of_a_model_equals_owq_of_each_weight():
    large = np.ones(32, np.float32)
    large[[3, 20]] = 20

    def model(params, x):
        return (large[None] * jnp.tanh(x @ params["up"])) @ params["down"]

    params = {"up": normal(0, 16, 32), "down": normal(1, 32, 16)}
    batches = [normal(2, 64, 16) * large[None, :16]]
    recipe = jaxq.Recipe("int3", jaxq.PerBlock(16), outliers=jaxq.Outliers(0.07))
    packed, report = ptq.quantize_weights(model, recipe, solver="owq")(params, batches)
    x = batches[0]
    for name, row in zip(("up", "down"), report.rows, strict=True):
        expected = ptq.owq(params[name], x.T @ x, recipe)
        np.testing.assert_array_equal(packed[name].outliers[1], expected.outliers[1])
        np.testing.assert_allclose(packed[name].dequantize(), expected.dequantize(), atol=2e-2)
        error = np.asarray(packed[name].dequantize()) - params[name]
        loss = np.sum((x @ error) ** 2) / np.sum((x @ params[name]) ** 2)
        np.testing.assert_allclose(row.loss, loss, rtol=1e-3)
        assert row.loss < row.rtn
        assert not row.unsolved_reason
        if name == "up":
            x = large[None] * np.tanh(x @ np.asarray(packed[name].dequantize()))


def test_report_notes_weights_that_owq_cannot_solve():
    rules = {"up": RECIPE, "down": jaxq.Recipe("int3", jaxq.PerBlock(16))}
    params = {"up": normal(0, 2, 16, 32), "down": normal(1, 2, 32, 16)}
    _, report = ptq.quantize_weights(scanned, rules, solver="owq")(params, [normal(2, 64, 16)])
    reasons = [row.unsolved_reason for row in report.rows[::2]]
    assert reasons == ["no inputs are stored as outliers"] * 2
