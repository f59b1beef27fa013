"""Statistics of arrays that a function marks by `checkpoint_name`, and of product results."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq.analysis import Monitoring, monitor
from tests import data
from tests.oracle import assert_same

PARAMS = {"layers": data.normal((3, 32, 32)) / 5, "out": data.normal((32, 32), 1)}
X, G = data.normal((4, 32), 2), data.normal((4, 32), 3)
REQUEST = Monitoring(
    "^(hidden|scores)$",
    statistics=("amax", "rms", "mean", "zeros", "sqnr_db", "mse", "flushed", "clipped"),
    counterfactuals=["mxfp4", "float8_e5m2"],
)


def model(params, x):
    """Computes scanned layers with a marked activation, and marked scores under `jit`."""

    @jax.checkpoint
    def layer(x, w):
        return checkpoint_name(jax.nn.relu(x @ w), "hidden"), None

    x = lax.scan(layer, x, params["layers"])[0]
    return (jax.jit(lambda x: checkpoint_name(x @ params["out"], "scores"))(x) * G).sum()


def run(fn, rules, request, *args):
    """Returns the value, the gradient of the parameters, and the statistics."""
    state = monitor(fn, rules, request)(*args)

    def objective(params, state):
        return jaxq.quantize_fn(fn, state)(params, *args[1:])

    step = jax.jit(jax.value_and_grad(objective, (0, 1)))
    value, (gradients, seen) = step(args[0], state)
    return value, gradients, seen.statistics()


def expected(x, y=None):
    """Returns statistics of an array, or of the errors of its approximation, in float64."""
    x = np.asarray(x, np.float64)
    if y is None:
        names = {"amax": np.abs(x).max(), "rms": np.sqrt((x**2).mean()), "mean": x.mean()}
        return {**names, "zeros": (x == 0).mean()}
    y = np.asarray(y, np.float64)
    noise = ((y - x) ** 2).mean()
    return {
        "sqnr_db": 10 * np.log10((x**2).mean() / noise),
        "mse": noise,
        "flushed": ((y == 0) & (x != 0)).mean(),
    }


def assert_agree(got, want, prefix):
    for name, value in want.items():
        np.testing.assert_allclose(
            got[f"{prefix}/{name}"], value, rtol=2e-5, atol=1e-6, err_msg=f"{prefix}/{name}"
        )


def test_marked_arrays_have_a_row_for_each_layer():
    value, gradients, got = run(model, [], REQUEST, PARAMS, X)
    plain = jax.jit(jax.value_and_grad(model))(PARAMS, X)
    jax.tree.map(assert_same, (value, gradients), plain)
    assert set(got) == {"hidden", "scores"}
    hidden, x = [], X
    for w in PARAMS["layers"]:
        hidden.append(jax.nn.relu(x @ w))
        x = hidden[-1]
    cotangents = [G @ PARAMS["out"].T]
    for w, h in zip(PARAMS["layers"][:0:-1], hidden[:0:-1], strict=True):
        cotangents.insert(0, jnp.where(h > 0, cotangents[0], 0) @ w.T)
    for i in range(3):
        own = {name: values[i] for name, values in got["hidden"].items()}
        for tensor, array in (("output", hidden[i]), ("cotangent", cotangents[i])):
            assert_agree(own, expected(array), tensor)
            assert_agree(own, expected(array, jaxq.fake_quant(array, "mxfp4")), f"{tensor}/mxfp4")
    scores = np.asarray(x @ PARAMS["out"])
    assert_agree(got["scores"], expected(scores), "output")
    narrow = scores.astype(ml_dtypes.float8_e5m2)
    assert_agree(got["scores"], expected(scores, narrow), "output/float8_e5m2")
    assert_agree(got["scores"], expected(G), "cotangent")


@pytest.mark.slow
def test_runs_of_a_mark_in_a_loop_without_layers_are_merged():
    def loop(w, x):
        def step(x, _):
            return checkpoint_name(x @ w, "state"), None

        return lax.scan(step, x, None, length=2)[0].sum()

    w = PARAMS["out"] / 8
    got = run(loop, [], Monitoring("state", statistics="amax"), w, X)[2]["state"]
    assert got["output/amax"] == max(jnp.abs(X @ w).max(), jnp.abs(X @ w @ w).max())


def test_mark_with_the_name_of_a_product_gets_a_number():
    def marked(params, x):
        return checkpoint_name(x @ params["w"], "w").sum()

    got = run(marked, [], Monitoring(statistics="amax"), {"w": PARAMS["out"]}, X)[2]
    assert set(got) == {"w", "w#2"}
    assert set(got["w#2"]) == {"output/amax", "cotangent/amax"}
    assert "lhs/amax" in got["w"]


def test_mark_without_a_cotangent_is_refused():
    def loop(w, x):
        def step(x):
            return checkpoint_name(x @ w, "state")

        return lax.while_loop(lambda x: x.sum() < 0, step, x).sum()

    with pytest.raises(ValueError, match=r"array 'state' .* its cotangent is unknown"):
        monitor(loop, [], Monitoring("state"))(PARAMS["out"], X)
    with pytest.raises(ValueError, match="Did you mean scores"):
        monitor(model, [], Monitoring("scorse"))(PARAMS, X)


def multiplied(params, x):
    return ((x @ params["w"]) * G).sum()


def sqnr_db(exact, y) -> float:
    exact, y = (np.asarray(v, np.float64) for v in (exact, y))
    return float(10 * np.log10((exact**2).sum() / ((y - exact) ** 2).sum()))


@pytest.mark.slow
def test_error_of_emulated_accumulation_is_separate():
    narrow = jaxq.Accumulation("bfloat16", 4)
    single = jaxq.SingleProduct("fp8_e5m2_tensor", "fp8_e4m3_tensor", execution=narrow)
    recipe = jaxq.ProductRecipe("fp8_e4m3_tensor", "fp8_e4m3_tensor", None, narrow, drhs=single)
    params, request = {"w": PARAMS["out"]}, Monitoring(statistics="product")
    got = run(multiplied, recipe, request, params, X)[2]["w"]
    x, w = (np.asarray(jaxq.fake_quant(v, "fp8_e4m3_tensor"), np.float64) for v in (X, params["w"]))
    y = jaxq.einsum("ik,kj->ij", X, params["w"], recipe=recipe)
    g = np.asarray(jaxq.fake_quant(G, "fp8_e5m2_tensor"), np.float64)
    (drhs,) = jax.grad(lambda w: (jaxq.einsum("ik,kj->ij", X, w, recipe=recipe) * G).sum(), (0,))(
        params["w"]
    )
    for name, exact, wide, result in (
        ("output", np.float64(X) @ np.float64(params["w"]), x @ w, y),
        ("drhs", np.float64(X).T @ np.float64(G), x.T @ g, drhs),
    ):
        for part, reference in (("product", exact), ("accumulation", wide)):
            want = sqnr_db(reference, result)
            np.testing.assert_allclose(got[f"{name}/{part}/sqnr_db"], want, rtol=1e-4)
    assert "dlhs/accumulation/sqnr_db" not in got, "its sums are not emulated"


@pytest.mark.slow
def test_counterfactuals_of_outputs_match_numpy():
    request = Monitoring(
        tensors="output",
        statistics=("sqnr_db", "mse", "flushed"),
        counterfactuals=["float8_e4m3fn", "int8_token", "nvfp4"],
    )
    rules = [jaxq.Rule("w", "w8a8", output="int4_token")]
    got = run(multiplied, rules, request, {"w": PARAMS["out"]}, X)[2]["w"]
    y = jaxq.einsum("ik,kj->ij", X, PARAMS["out"], recipe="w8a8")
    assert_agree(got, expected(y, jaxq.fake_quant(y, "int4_token")), "output")
    for name in request.counterfactuals[1:]:
        label = name if isinstance(name, str) else jaxq.recipes.title_of(name)
        assert_agree(got, expected(y, jaxq.fake_quant(y, name)), f"output/{label}")
    cast = np.asarray(y).astype(ml_dtypes.float8_e4m3fn)
    assert_agree(got, expected(y, cast), "output/float8_e4m3fn")
