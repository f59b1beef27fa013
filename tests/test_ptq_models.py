"""Post-training quantization of whole models."""

import dataclasses

import chex
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

RULES = "int4_channel"


def layer(w, x):
    """Computes two products of one input, a third of their result, and a residual sum."""
    q = jnp.einsum("btd,dhk->bthk", x, w["q"])
    gate = jax.nn.silu(jnp.einsum("btd,dhk->bthk", x, w["gate"]))
    return x + 0.3 * jnp.tanh((q * gate).reshape(x.shape) @ w["out"])


def scanned(params, tokens):
    x = params["embed"][tokens]
    x, _ = lax.scan(lambda x, w: (layer(w, x), None), x, params["layers"])
    return x @ params["embed"].T


def unrolled(params, tokens):
    x = params["embed"][tokens]
    for w in params["layers"]:
        x = layer(w, x)
    return x @ params["embed"].T


def stacked(count: int = 2) -> dict:
    layers = {
        "q": normal(1, count, 8, 2, 4),
        "gate": normal(2, count, 8, 2, 4),
        "out": normal(3, count, 8, 8),
    }
    return {"layers": layers, "embed": normal(4, 8, 8)}


def separate(count: int = 2) -> dict:
    params = stacked(count)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]
    return {**params, "layers": layers}


BATCHES = [np.random.default_rng(n).integers(0, 8, (4, 7)) for n in range(3)]


@pytest.mark.slow
def test_scan_gives_the_codes_of_unrolled_layers():
    one, report = ptq.quantize_weights(scanned, RULES)(stacked(), BATCHES)
    other, _ = ptq.quantize_weights(unrolled, RULES)(separate(), BATCHES)
    for name, leaf in one["layers"].items():
        for i in range(2):
            np.testing.assert_array_equal(leaf.codes[i], other["layers"][i][name].codes)
    np.testing.assert_array_equal(one["embed"].codes, other["embed"].codes)
    assert [row.product for row in report.rows[2:4]] == ["layers/out[0]", "layers/q[1]"]
    assert not report.unsolved
    assert all(row.loss < row.rtn and row.tokens == 84 for row in report.rows)
    # The result has the form of `jaxq.quantize_weights`, and runs as that does.
    plain = jaxq.quantize_weights(scanned, RULES)(stacked(), BATCHES[0])
    assert jax.tree.structure(one) == jax.tree.structure(plain)
    logits = jaxq.quantize_fn(scanned, RULES)(one, BATCHES[0])
    floats = scanned(jaxq.dequantize_tree(one), BATCHES[0])
    np.testing.assert_allclose(logits, floats, rtol=1e-5, atol=1e-5)


def two(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def two_params() -> dict:
    return {"up": normal(0, 8, 8), "down": normal(1, 8, 8)}


@pytest.mark.parametrize("sequential", data.each([True, False], [True]))
def test_second_product_is_solved_on_the_output_of_the_first(sequential: bool):
    params, batches = two_params(), [normal(2, 40, 8), normal(3, 40, 8)]
    rules = jaxq.Recipe("int2", jaxq.PerChannel())
    packed, _ = ptq.quantize_weights(two, rules, sequential=sequential)(params, batches)
    up = packed["up"].dequantize() if sequential else params["up"]
    hidden = np.maximum(np.concatenate(batches) @ up, 0)
    expected = ptq.gptq(params["down"], hidden.T @ hidden, rules)
    np.testing.assert_array_equal(packed["down"].codes, expected.codes)
    other = np.maximum(np.concatenate(batches) @ params["up"], 0)
    if sequential:
        wrong = ptq.gptq(params["down"], other.T @ other, rules)
        assert np.any(packed["down"].codes != wrong.codes)


def convolution(w, x):
    return lax.conv_general_dilated(
        x, w, (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NCHW")
    )


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([13, 20, 7], jnp.int32))


PRODUCTS = {
    "kernel on the left": (lambda w, x: w @ x, normal(0, 8, 8), normal(1, 8, 40)),
    "two contracted axes": (
        lambda w, x: jnp.einsum("hkd,bthk->btd", w, x), normal(0, 2, 4, 8), normal(1, 4, 10, 2, 4)
    ),
    "fused, reshaped and transposed": (
        lambda w, x: jnp.stack([x @ part for part in jnp.split(w.reshape(24, 8).T, 3, axis=1)]),
        normal(0, 6, 4, 8), normal(1, 40, 8),
    ),
    "experts": (lambda w, x: jnp.einsum("edf,etd->etf", w, x), normal(0, 3, 8, 8),
                normal(1, 3, 40, 8)),
    "ragged": (ragged, normal(0, 3, 8, 8), normal(1, 40, 8)),
    "convolution": (convolution, normal(0, 1, 2, 4, 8), normal(1, 2, 6, 6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", data.each(PRODUCTS, ["convolution"]))
def test_reported_losses_equal_the_errors_of_the_outputs(name: str):
    model, w, x = PRODUCTS[name]
    packed, report = ptq.quantize_weights(model, RULES)(w, [x])
    assert all("a smaller loss" in row.unsolved_reason for row in report.unsolved)
    plain = jaxq.quantize_weights(model, RULES)(w, x)
    y = model(w, x)
    for stored, attribute in ((packed, "loss"), (plain, "rtn")):
        power = sum(row.power * row.tokens for row in report.rows)
        losses = [getattr(row, attribute) * row.power * row.tokens for row in report.rows]
        if name not in ("experts", "ragged"):  # `tokens` is that of the smallest expert.
            error = jaxq.quantize_fn(model, RULES)(stored, x) - y
            np.testing.assert_allclose(sum(losses) / power, np.sum(error**2) / np.sum(y**2), 1e-3)
        else:
            (row,) = report.rows
            error = jaxq.quantize_fn(model, RULES)(stored, x) - y
            relative = np.sum(error**2) / np.sum(y**2)
            np.testing.assert_allclose(getattr(row, attribute), relative, 1e-3)
    assert all(row.loss <= row.rtn for row in report.rows)


@pytest.mark.slow
def test_codes_of_a_convolution_equal_those_of_its_windows():
    w, x = normal(0, 3, 2, 4, 8), normal(1, 2, 8, 6, 4) + np.float32(0.5)

    def model(w, x):
        return lax.conv_general_dilated(
            x, w, (2, 1), [(1, 1), (0, 2)], rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    padded = np.pad(x, [(0, 0), (1, 1), (0, 2), (0, 0)])
    starts = np.ndindex(2, 4, 6)  # The images and the windows in them.
    windows = np.stack([padded[n, 2 * i : 2 * i + 3, j : j + 3 : 2].ravel() for n, i, j in starts])
    recipe = jaxq.Recipe("int3", jaxq.PerChannel())
    packed, report = ptq.quantize_weights(model, recipe)(w, [x])
    expected = ptq.gptq(w.reshape(-1, 8), windows.T @ windows, recipe)
    np.testing.assert_array_equal(packed.dequantize().reshape(-1, 8), expected.dequantize())
    error = np.sum((windows @ (expected.dequantize() - w.reshape(-1, 8))) ** 2)
    power = np.sum((windows @ w.reshape(-1, 8)) ** 2)
    assert report.rows[0].loss == pytest.approx(float(error / power), rel=1e-4)


def inside(w, x):
    """Products in constructs that are not run in parts."""

    @jax.custom_jvp
    def custom(x):
        return x @ w["custom"]

    custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0] @ w["custom"]))
    x = jax.checkpoint(lambda x: x @ w["remat"])(x)
    x = lax.cond(x.sum() > 0, lambda x: x @ w["yes"], lambda x: x @ w["no"], x)
    x = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w["loop"]), custom(x))
    x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ w["shared"]), None), x, None, length=2)
    return x


def test_products_in_loops_branches_and_custom_derivatives_are_solved():
    w = {name: normal(i, 8, 8) for i, name in enumerate(("custom", "remat", "yes", "no", "loop"))}
    w["shared"] = normal(9, 8, 8)
    batches = [normal(n, 20, 8) @ normal(8, 8, 8) for n in range(4)]
    packed, report = ptq.quantize_weights(inside, RULES)(w, batches)
    rows = {row.product: row for row in report.rows}
    assert {*rows} == {*w}
    assert rows["loop"].tokens == 3 * 80
    assert rows["shared"].tokens == 2 * 80
    assert rows["yes"].tokens + rows["no"].tokens == 80
    for name in ("custom", "remat", "loop", "shared"):
        assert rows[name].loss < rows[name].rtn
    assert all(isinstance(leaf, jaxq.Quantized) for leaf in packed.values())


def test_weight_of_several_products_is_solved_with_the_sum_of_their_hessians():
    model = lambda w, x: jnp.tanh(x @ w) @ w
    w, x = normal(0, 8, 8), normal(1, 50, 8)
    packed, report = ptq.quantize_weights(model, RULES, sequential=False)(w, [x])
    hidden = np.tanh(x @ w)
    expected = ptq.gptq(w, x.T @ x + hidden.T @ hidden, RULES)
    np.testing.assert_array_equal(packed.codes, expected.codes)
    assert [row.tokens for row in report.rows] == [50, 100]


def test_padding_does_not_count():
    params, x = two_params(), normal(2, 6, 5, 8)
    padded = np.concatenate([x, np.full((6, 3, 8), 1e3, np.float32)], axis=1)
    keep = np.broadcast_to(np.arange(8) < 5, (6, 8))
    plain, _ = ptq.quantize_weights(two, RULES)(params, [x])
    packed, report = ptq.quantize_weights(two, RULES, mask=lambda _: keep)(params, [padded])
    assert report.rows[0].tokens == 30
    np.testing.assert_array_equal(packed["down"].codes, plain["down"].codes)
    with pytest.raises(ValueError, match=r"`mask` must have one element .* shape \(8, 6\)"):
        ptq.quantize_weights(two, RULES, mask=lambda _: keep.T)(params, [padded])


@pytest.mark.slow
def test_expert_without_tokens_is_rounded_to_nearest_and_reported():
    model = lambda w, x: lax.ragged_dot(x, w, jnp.array([25, 0, 15], jnp.int32))
    w, x = normal(0, 3, 8, 8), normal(1, 40, 8)
    packed, report = ptq.quantize_weights(model, RULES)(w, [x])
    plain = jaxq.quantize_weights(model, RULES)(w, x)
    np.testing.assert_array_equal(packed.codes[1], plain.codes[1])
    assert report.rows[0].unsolved_reason == "1 of 3 matrices: received no tokens"
    assert "received no tokens" in str(report)


def test_weights_that_are_not_solved_are_reported():
    def model(w, x):
        return x @ (w["a"] * 2), x @ w["b"], w["table"][jnp.array([0, 1])]

    w = {"a": normal(0, 8, 8), "b": normal(1, 8, 8), "table": normal(2, 4, 8)}
    packed, report = ptq.quantize_weights(model, RULES)(w, [normal(3, 9, 8)])
    reasons = {row.product: row.unsolved_reason for row in report.rows}
    assert "not stored: computed from a" in reasons["computed(a)"]
    assert "look-up" in reasons["table"]
    assert not isinstance(packed["a"], jaxq.Quantized)
    assert isinstance(packed["table"], jaxq.Quantized)
    assert report.rows[1].note == ""
    assert report.rows[1].rank == 8


def test_report_notes_the_rank_of_few_tokens():
    _, report = ptq.quantize_weights(two, RULES)(two_params(), [normal(2, 5, 8)])
    assert report.rows[1].note == "rank at most 5 of 8"


@dataclasses.dataclass
class Module:
    w: jax.Array

    def __call__(self, x):
        return x @ self.w


jax.tree_util.register_dataclass(Module, ["w"], [])


def test_module_with_activation_recipes_is_solved():
    rows = []
    solve = ptq.quantize_weights(Module(normal(0, 8, 8)), "w8a8", progress=rows.append)
    packed, report = solve([(normal(1, 30, 8),)])
    assert isinstance(packed.w, jaxq.Quantized)
    assert rows == list(report.rows)


def test_products_without_weights_keep_their_recipes():
    inner = lambda w, x: (x @ w["a"]) @ x.T
    model = lambda w, x: inner(w, x) @ w["b"]
    w, x = {"a": normal(0, 8, 8), "b": normal(2, 32, 8)}, normal(1, 32, 8)
    activations = jaxq.ProductRecipe("int4_tensor", "int4_tensor")
    rules = [jaxq.Rule("", RULES), jaxq.Rule(operation="dot_general", recipe=activations)]
    packed, report = ptq.quantize_weights(model, rules)(w, [x])
    assert [row.product for row in report.rows] == ["a", "b"]
    y = jax.jit(jaxq.quantize_fn(inner, rules))(packed, x)
    want = ptq.gptq(w["b"], ptq.collect(y).hessian, RULES)
    np.testing.assert_array_equal(packed["b"].codes, want.codes)


def compilations(function) -> int:
    """Returns how many programs a call compiles."""
    count = 0

    def listen(event: str, _: float, **__: object) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


@pytest.mark.slow
def test_more_layers_of_one_shape_compile_nothing_more():
    solve = ptq.quantize_weights(unrolled, RULES)
    solve(separate(2), BATCHES)  # Compiles all parts that two layers need.
    few = compilations(lambda: solve(separate(2), BATCHES))
    more = compilations(lambda: solve(separate(4), BATCHES))
    assert few == more <= 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ptq.quantize_weights(two, RULES)(two_params(), []), "at least one batch"),
        (lambda: ptq.quantize_weights(two, RULES)(two_params(), normal(0, 4, 8)), "into a list"),
        (lambda: ptq.quantize_weights(two, RULES)(two_params()), "params and batches, got 1"),
        (
            lambda: ptq.quantize_weights(two, RULES)(
                two_params(), [normal(0, 4, 8), normal(0, 5, 8)]
            ),
            "batch 1 differs from the first",
        ),
        (
            lambda: ptq.quantize_weights(two, RULES)(two_params(), [np.full((4, 8), np.nan)]),
            "dot_general 'up' .* has a NaN or an infinity",
        ),
        (
            lambda: ptq.quantize_weights(two, {"upp": RULES})(two_params(), [normal(0, 4, 8)]),
            "matches no weight. Did you mean up",
        ),
        (
            lambda: ptq.quantize_weights(two, [])(two_params(), [normal(0, 4, 8)]),
            "must quantize the weight of some product",
        ),
        (
            lambda: ptq.quantize_weights(two, jaxq.Recipe("int4", rounding="stochastic"))(
                two_params(), [normal(0, 4, 8)]
            ),
            "'up' .* must not use stochastic rounding",
        ),
        (
            lambda: ptq.observe(two, [])(two_params(), normal(0, 4, 8)),
            "ptq.observe: `rules` must quantize the weight",
        ),
    ],
)
def test_bad_calls_are_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["up", "down"])
def test_weights_that_are_not_finite_are_errors(solver: str, bad: float, name: str):
    params = {key: np.array(x) for key, x in two_params().items()}
    params[name][1, 2] = bad
    message = f"weights must be finite, but that of dot_general '{name}'"
    for call in (
        ptq.quantize_weights(two, RULES, solver=solver),
        ptq.sensitivity(two, [RULES], solver=solver, weights=name),
        ptq.scale_inputs(two, RULES),
    ):
        with pytest.raises(ValueError, match=message):
            call(params, [normal(0, 4, 8)])


def test_sums_that_overflow_are_errors():
    # The squares overflow, and with a smaller input only those of the outputs.
    for factor, message in (
        (1e20, "sums over inputs must fit into float32, but those of dot_general 'up' "),
        (1e18, "squared outputs must fit into float32, but their sum overflows for dot_general"),
    ):
        batches = [np.float32(factor) * normal(0, 4, 8)]
        params = {key: 100 * x for key, x in two_params().items()}
        for call in (ptq.quantize_weights(two, RULES), ptq.sensitivity(two, [RULES])):
            with pytest.raises(ValueError, match=message):
                call(params, batches)


def test_observed_inputs_are_shared_stacked_and_mergeable():
    observe = jax.jit(ptq.observe(scanned, RULES))
    states = [observe(stacked(), batch)[1] for batch in BATCHES]
    merged = states[0].merge(states[1]).merge(states[2])
    assert [*merged] == ["layers/q", "layers/gate", "layers/out", "embed#2"]
    assert [*merged.statistics] == ["embed#2", "layers/out", "layers/q"]
    chex.assert_shape(merged["layers/gate"].hessian, (2, 8, 8))
    assert merged["layers/q"].tokens.tolist() == [84] * 2
    assert merged.unseen == ()
    x = stacked()["embed"][np.concatenate(BATCHES)].reshape(-1, 8)
    np.testing.assert_allclose(merged["layers/q"].hessian[0], x.T @ x, rtol=1e-5)
    with pytest.raises(ValueError, match="must have the products of this state"):
        merged.merge(ptq.observe(two, RULES)(two_params(), normal(0, 4, 8))[1])


@pytest.mark.slow
def test_reshaped_or_shared_stacks_are_solved_in_every_iteration():
    def model(w, x):
        pairs = w["pairs"].reshape(2, 2, 8, 8)
        x, _ = lax.scan(lambda x, pair: (jnp.tanh(x @ pair[0]) @ pair[1], None), x, pairs)
        return lax.scan(
            lambda x, kernel: (jnp.tanh(jnp.tanh(x @ kernel) @ kernel), None), x, w["twice"]
        )[0]

    w, x = {"pairs": normal(0, 4, 8, 8), "twice": normal(1, 2, 8, 8)}, normal(2, 60, 8)
    packed, report = ptq.quantize_weights(model, RULES)(w, [x])
    assert [row.product for row in report.rows] == [
        "pairs[0]", "pairs#2[0]", "pairs[1]", "pairs#2[1]",
        "twice[0]", "twice#2[0]", "twice[1]", "twice#2[1]",
    ]  # fmt: skip
    assert [row.tokens for row in report.rows[4:]] == [60, 120, 60, 120]
    for i in range(4):
        expected = ptq.gptq(w["pairs"][i], x.T @ x, RULES)
        np.testing.assert_array_equal(packed["pairs"].codes[i], expected.codes)
        x = x @ expected.dequantize()
        x = x if i % 2 else jnp.tanh(x)
