"""Input scales: SmoothQuant and AWQ on whole models."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.ptq_data import gated, gated_params, normal

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

RULES = {"layers": "int4_channel"}

PARAMS = gated_params(8)
SIZES = np.exp(np.arange(8) / 2 - 2).astype(np.float32)  # Some inputs are much larger than others.
# Batches of different magnitude: means over batches of scales and of their inverses would differ.
BATCHES = [normal(5 + n, 40, 8) * SIZES * 10**n for n in range(3)]


def levels(w: np.ndarray) -> np.ndarray:
    """Returns `[inputs, outputs]` on int4 levels, one scale per output."""
    scale = np.abs(w).max(0) / 7
    return np.round(w / scale) * scale


def awq(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Computes AWQ's scales, with the error of the outputs as the loss."""
    mean, best, scales = np.abs(x).mean(0), np.inf, np.ones(x.shape[1])
    for step in range(21):
        s = mean ** (step / 20)
        s = s / np.sqrt(s.max() * s.min())
        loss = sum(np.sum((x @ (levels(w * s[:, None]) / s[:, None] - w)) ** 2) for w in weights)
        if loss < best:
            best, scales = loss, s
    return scales


def smoothquant(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    largest = np.abs(np.concatenate(weights, axis=1)).max(1)
    return np.abs(x).max(0) ** 0.5 / largest**0.5


@functools.cache
def scaled_by(method: str):
    return ptq.scale_inputs(gated, RULES, method=method)(PARAMS, BATCHES)


@pytest.mark.parametrize("method", data.each(["awq", "smoothquant"], ["awq"]))
def test_scales_equal_the_formula_and_preserve_the_outputs(method: str):
    params, scales = scaled_by(method)
    scaled = jax.jit(scales.apply(gated))
    for batch in BATCHES:
        y = gated(PARAMS, batch)
        np.testing.assert_allclose(scaled(params, batch), y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
    # Both products of one input share their factors, one for each layer.
    assert scales.inputs == (
        ("layers/gate", "layers/gate"), ("layers/up", "layers/gate"), ("layers/down", "layers/down")
    )  # fmt: skip
    x = np.concatenate(BATCHES).astype(np.float64)
    layer = {name: w[0].astype(np.float64) for name, w in PARAMS["layers"].items()}
    layer["gate"] = layer["gate"].reshape(8, 8)
    formula = {"awq": awq, "smoothquant": smoothquant}[method]
    expected = formula(x, [layer["gate"], layer["up"].T])
    np.testing.assert_allclose(1 / scales.factors["layers/gate"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(
        params["layers"]["up"][0], PARAMS["layers"]["up"][0] * expected, rtol=1e-4
    )
    np.testing.assert_array_equal(params["head"], PARAMS["head"])


@pytest.mark.slow
def test_solvers_work_on_the_scaled_function():
    params, scales = scaled_by("awq")
    scaled = scales.apply(gated)
    packed, report = ptq.quantize_weights(scaled, RULES, solver="rtn")(params, BATCHES[:1])
    assert [row.product for row in report.rows[:3]] == [
        "layers/gate[0]", "layers/up[0]", "layers/down[0]"
    ]  # fmt: skip
    # The stored model is the simulated one.
    one = jaxq.quantize_fn(scaled, RULES)(packed, BATCHES[0])
    other = jaxq.quantize_fn(scaled, RULES)(params, BATCHES[0])
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # Products of one input still share one Hessian.
    inputs = ptq.observe(scaled, RULES, hessian=False)(params, BATCHES[0])[1]
    assert [*inputs.statistics] == ["layers/gate", "layers/down"]


@pytest.mark.slow
def test_smoothquant_moves_outliers_of_activations_into_weights():
    apply = lambda params, x: x @ params["w"]
    params, x = {"w": normal(0, 64, 8)}, normal(1, 50, 64)
    x[:, 3] *= 100
    new, scales = ptq.scale_inputs(apply, "w8a8", method="smoothquant")(params, [x])
    error = [
        np.abs(jaxq.quantize_fn(fn, "w8a8")(tree, x) - x @ params["w"]).mean()
        for fn, tree in ((apply, params), (scales.apply(apply), new))
    ]
    assert error[1] < 0.3 * error[0]


@pytest.mark.slow
def test_each_expert_has_its_own_scales():
    apply = lambda w, x: jnp.einsum("edf,etd->etf", w, x)
    w, x = normal(0, 3, 8, 8), normal(1, 3, 40, 8) * SIZES
    x[1] = 0  # An expert without data.
    new, scales = ptq.scale_inputs(apply, "int4_channel")(w, [x])
    np.testing.assert_allclose(scales.apply(apply)(new, x), apply(w, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(new[1], w[1])
    for i in (0, 2):
        expected = awq(x[i].astype(np.float64), [w[i].astype(np.float64)])
        np.testing.assert_allclose(1 / scales.factors[""][i], expected, rtol=1e-4)


def left(params, x):
    def body(state):
        return state[0] + 1, jnp.tanh(state[1] @ params["loop"])

    _, x = lax.while_loop(lambda state: state[0] < 2, body, (0, x @ params["tied"]))
    return (x @ params["tied"]) @ params["plain"]


def test_products_without_scales_are_listed_with_the_reason():
    params = {name: normal(i, 8, 8) for i, name in enumerate(("loop", "tied", "plain"))}
    x = normal(9, 20, 8)
    new, scales = ptq.scale_inputs(left, "int4_channel")(params, [x])
    assert [name for name, _ in scales.inputs] == ["plain"]
    reasons = dict(scales.skipped)
    assert "also used by tied#2" in reasons["tied"]
    assert "while loop" in reasons["loop"]
    assert "while loop" in str(scales)
    np.testing.assert_array_equal(new["tied"], params["tied"])
    with pytest.raises(ValueError, match="'loop' cannot be changed because it is in a while loop"):
        ptq.scale_inputs(left, {"loop": "int4_channel"})(params, [x])
    with pytest.raises(ValueError, match="must contain all changed products, but lacks 'plain'"):
        scales.apply(lambda params, x: x @ params["loop"])(params, x)


def normed(params, x):
    """Scans over layers with a norm before two products, and a third after a fourth."""

    def layer(x, w):
        h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * w["norm"][None] + w["shift"][None]
        return x + (jax.nn.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T

    return lax.scan(lambda x, w: (layer(x, w), None), x, params)[0]


def test_factors_fold_into_the_norm_and_the_weight_before():
    params = {name: normal(i, 2, 8, 8) for i, name in enumerate(("gate", "up", "down"))}
    params |= {"norm": 1 + normal(3, 2, 8) / 8, "shift": normal(5, 2, 8) / 4}
    x = normal(4, 30, 8) * SIZES
    new, scales = ptq.scale_inputs(normed, {"gate|up|down": "int4_channel"})(params, [x])
    folded, rest = scales.fold(new, {"up": ["norm", "shift"], "down": ("up", -2)})
    assert rest.factors == {}
    assert dict(rest.skipped) == {
        "gate": "folded into norm and shift", "up": "folded into norm and shift",
        "down": "folded into up",
    }  # fmt: skip
    y, run = normed(params, x), jax.jit(normed)
    np.testing.assert_allclose(run(folded, x), y, rtol=1e-4, atol=1e-4)
    for into, message in (
        ({"up": "nrom"}, "a leaf of `params`, got 'nrom'. Did you mean norm"),
        ({"upp": "norm"}, "a product with factors, got 'upp'. Did you mean up"),
        ({"up": ("down", 0)}, r"factors of shape \(2, 8\) .* axis 0, got the shape \(2, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scales.fold(new, into)
    packed = {**new, "up": jaxq.quantize(new["up"], "int4_tensor")}
    with pytest.raises(ValueError, match="it is already quantized"):
        scales.fold(packed, {"down": "up"})


@pytest.mark.slow
def test_scaled_functions_are_differentiated_and_stay_in_bfloat16():
    params, scales = scaled_by("awq")
    x = BATCHES[0]
    loss = lambda fn: lambda x, p: jnp.sum(jnp.tanh(fn(p, x)))
    gradient = jax.grad(loss(scales.apply(gated)))(x, params)
    np.testing.assert_allclose(gradient, jax.grad(loss(gated))(x, PARAMS), rtol=1e-3, atol=1e-4)
    w = {"w": normal(0, 8, 8)}
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), w)
    apply = lambda w, x: x @ w["w"]
    new, factors = ptq.scale_inputs(apply, "int4_channel")(half, [jnp.asarray(x, jnp.bfloat16)])
    y = factors.apply(apply)(new, jnp.asarray(x, jnp.bfloat16))
    chex.assert_type([new["w"], y], jnp.bfloat16)


@jax.tree_util.register_pytree_node_class
class Module:
    def tree_flatten(self):
        return (normal(0, 8, 8),), None

    @classmethod
    def tree_unflatten(cls, _, __):
        return cls()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ptq.scale_inputs(gated, RULES, method="akw"), ValueError, "Did you mean awq"),
        (
            lambda: ptq.scale_inputs(gated, RULES, method=ptq.AWQ),
            TypeError,
            "must be a name or an input scaler",
        ),
        (lambda: ptq.scale_inputs(Module(), RULES), TypeError, "got a pytree, Module. Pass lambda"),
        (lambda: ptq.AWQ(steps=0), ValueError, "`steps` must be an integer of at least 1, got 0"),
        (lambda: ptq.SmoothQuant(1.5), ValueError, "`alpha` must be a number from 0 to 1, got 1.5"),
        (
            lambda: ptq.scale_inputs(lambda w, x: x @ w + w.sum(), "int4_channel")(
                normal(0, 8, 8), [BATCHES[0]]
            ),
            ValueError,
            "must equal `fn`, but its outputs differ by .* outside its product",
        ),
        (
            lambda: ptq.scale_inputs(lambda w, x: x @ w, "int4_channel")(
                normal(0, 8, 8), [np.full((4, 8), np.nan)]
            ),
            ValueError,
            "has a NaN or an infinity in its input",
        ),
    ],
)
def test_bad_calls_are_errors(call, error, message: str):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", data.each(ptq.INPUT_SCALERS, ["awq"]))
def test_contract_of_input_scalers(name: str):
    """Checks that every method is hashable and returns positive finite scales, also for zeros."""
    scaler = ptq.INPUT_SCALERS[name]
    assert hash(scaler) == hash(ptq.get_input_scaler(name))
    x = normal(0, 2, 30, 8)
    x[1] = 0
    x[0, :, 2] = 0
    statistics = ptq.collect(x, hessian=scaler.needs_hessian)
    problem = ptq.InputProblem((normal(1, 2, 8, 4),), statistics, lambda weights: list(weights))
    scales = np.asarray(scaler.scales(problem))
    chex.assert_shape(scales, (2, 8))
    chex.assert_tree_all_finite(scales)
    assert (scales > 0).all()
