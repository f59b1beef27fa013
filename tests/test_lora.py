"""Low-rank adapters of quantized weights."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import lora, ptq
from tests import data

pytestmark = pytest.mark.unoptimized

INT3 = jaxq.Recipe("int3", jaxq.PerBlock(16))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return data.normal(shape, seed)


def model(params, x):
    """Runs two scanned layers with kernels of both layouts, and three experts."""

    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"].T, None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.einsum("ebd,edf->ebf", jnp.stack([x, x, x]), params["experts"])


@functools.cache
def inputs() -> tuple:
    layers = {"up": normal(2, 16, 32) / 4, "down": normal(2, 16, 32, seed=1) / 4}
    params = {"layers": layers, "experts": normal(3, 16, 4, seed=2)}
    return params, normal(8, 16, seed=3) * jnp.geomspace(0.1, 10, 16)[None]


@functools.cache
def adapted(name: str, rank: int = 2, iterations: int = 1) -> lora.AdaptedModel:
    params, x = inputs()
    method = lora.QLoRA(rank, alpha=8)
    if name == "loftq":
        method = lora.LoftQ(rank, iterations)
    elif name == "pissa":
        method = lora.PiSSA(rank)
    elif name == "eora":
        method = lora.EoRA(ptq.observe(model, INT3)(params, x)[1], rank)
    return lora.adapt(model, INT3, method)(params, x)


def matrices(params) -> dict[str, np.ndarray]:
    """Returns the weights as matrices [inputs, outputs], by the names of the products."""
    floats = jax.tree.map(np.asarray, jaxq.dequantize_tree(params))
    layers = floats["layers"]
    down = layers["down"].swapaxes(-1, -2)
    return {"layers/up": layers["up"], "layers/down": down, "experts": floats["experts"]}


def absmax3(w: np.ndarray) -> np.ndarray:
    """Returns a float64 matrix in 3 bits, with scales for 16 inputs of an output."""
    blocks = w.reshape(-1, 16, w.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True) / 3
    return (np.rint(blocks / scale) * scale).reshape(w.shape)


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qlora", "loftq", "eora")]


@pytest.mark.parametrize("method", ["pissa", *SLOW])
def test_adapter_is_added_to_the_product_of_the_stored_weight(method: str):
    _, x = inputs()
    small, state = adapted(method)
    assert {name: a.a.shape for name, a in state.adapters.items()} == {
        "layers/up": (2, 16, 2),
        "layers/down": (2, 32, 2),
        "experts": (3, 16, 2),
    }
    adapters = {
        name: dataclass_with(adapter, b=adapter.b + 0.1) for name, adapter in state.adapters.items()
    }
    state = lora.Adapted(adapters, state.rules)
    y = jax.jit(lambda state, small: jaxq.quantize_fn(model, state)(small, x))(state, small)
    w = {
        name: own.astype(np.float64) + np.asarray(adapters[name].delta, np.float64)
        for name, own in matrices(small).items()
    }
    h = np.asarray(x, np.float64)
    for i in range(2):
        h = h + np.tanh(h @ w["layers/up"][i]) @ w["layers/down"][i]
    np.testing.assert_allclose(y, h @ w["experts"], rtol=1e-4, atol=1e-4)


def dataclass_with(adapter: lora.LoRA, **changes) -> lora.LoRA:
    return lora.LoRA(**{"a": adapter.a, "b": adapter.b, "scaling": adapter.scaling, **changes})


def test_initial_values_follow_the_published_formulas():
    params, _ = inputs()
    for name, w in matrices(params).items():
        for i, exact in enumerate(w.astype(np.float64)):
            approximated = np.zeros_like(exact)
            for _ in range(3):
                q = absmax3(exact - approximated)
                approximated = truncated(exact - q, 2)
            small, state = adapted("loftq", iterations=3)
            np.testing.assert_allclose(matrices(small)[name][i], q, atol=1e-4)
            np.testing.assert_allclose(state.adapters[name].delta[i], approximated, atol=1e-4)
            small, state = adapted("pissa")
            principal = truncated(exact, 2)
            np.testing.assert_allclose(state.adapters[name].delta[i], principal, atol=1e-4)
            np.testing.assert_allclose(
                matrices(small)[name][i], absmax3(exact - principal), atol=1e-4
            )
    small, state = adapted("qlora")
    assert all(bool((adapter.b == 0).all()) for adapter in state.adapters.values())
    assert state.adapters["experts"].scaling == 4
    plain = jaxq.quantize_weights(model, INT3)(*inputs())
    assert jax.tree.all(jax.tree.map(jnp.array_equal, small, plain))


def test_loftq_reduces_the_error_of_weights_with_every_iteration():
    params, _ = inputs()
    exact = matrices(params)
    errors = []
    for iterations in (1, 3):
        small, state = adapted("loftq", iterations=iterations)
        errors.append(
            sum(
                np.square(w - matrices(small)[name] - state.adapters[name].delta).sum()
                for name, w in exact.items()
            )
        )
    plain = matrices(adapted("qlora").params)
    without = sum(np.square(w - plain[name]).sum() for name, w in exact.items())
    assert errors[1] < errors[0] < without


def test_weighted_approximation_has_the_least_error_of_outputs():
    x = np.random.default_rng(5).standard_normal((64, 12)) * np.geomspace(0.1, 10, 12)
    w = np.random.default_rng(6).standard_normal((12, 10))
    a, b = lora.low_rank(w, 3, hessian=x.T @ x, damping=0.0)
    # Eckart-Young: the best approximation of x w of rank 3 leaves the other singular values.
    least = np.square(np.linalg.svd(x @ w, compute_uv=False)[3:]).sum()
    error = np.square(x @ (w - np.asarray(a, np.float64) @ np.asarray(b, np.float64))).sum()
    np.testing.assert_allclose(error, least, rtol=1e-4)
    unweighted = np.square(x @ (w - truncated(w, 3))).sum()
    assert error < 0.5 * unweighted


@pytest.mark.slow
def test_eora_reduces_the_error_of_outputs_more_than_loftq():
    params, x = inputs()
    exact = model(params, x)
    errors = {}
    for name in ("qlora", "loftq", "eora"):
        small, state = adapted(name)
        y = jax.jit(lambda state, small: jaxq.quantize_fn(model, state)(small, x))(state, small)
        errors[name] = float(jnp.square(y - exact).sum())
    assert errors["eora"] < errors["loftq"] < errors["qlora"]


@pytest.mark.slow
def test_eora_compensates_weights_that_gptq_has_quantized():
    w, x = normal(16, 8, seed=7), normal(40, 16, seed=8)
    fn = lambda params, x: x @ params["w"]
    seen = ptq.observe(fn, INT3)({"w": w}, x)[1]
    packed, _ = ptq.quantize_weights(fn, INT3, solver=ptq.GPTQ())({"w": w}, [(x,)])
    small, state = lora.adapt(fn, INT3, lora.EoRA(seen, 4), packed=packed)({"w": w}, x)
    assert small is packed
    before = jnp.square(x @ (packed["w"].dequantize() - w)).sum()
    after = jnp.square(jaxq.quantize_fn(fn, state)(small, x) - x @ w).sum()
    assert after < 0.6 * before


def test_training_changes_only_the_adapters():
    _, x = inputs()
    small, state = adapted("loftq")
    target = jnp.ones((3, 8, 4))
    optimizer = optax.adam(1e-2)

    def loss(state):
        return jnp.square(jaxq.quantize_fn(model, state)(small, x) - target).mean()

    @jax.jit
    def step(state, opt_state):
        value, gradient = jax.value_and_grad(loss)(state)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(state, updates), opt_state, value, gradient

    def dense(state):
        delta = {name: adapter.delta for name, adapter in state.adapters.items()}
        floats = jaxq.dequantize_tree(small)
        down = floats["layers"]["down"] + delta["layers/down"].swapaxes(-1, -2)
        layers = {"up": floats["layers"]["up"] + delta["layers/up"], "down": down}
        changed = {"layers": layers, "experts": floats["experts"] + delta["experts"]}
        return jnp.square(model(changed, x) - target).mean()

    opt_state = optimizer.init(state)
    expected = jax.jit(jax.grad(dense))(state)
    found = step(state, opt_state)[-1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max()))
    before = jax.tree.map(np.asarray, small)
    values = []
    for _ in range(20):
        state, opt_state, value, _ = step(state, opt_state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, small))
    assert opt_state[0].mu.nbytes == state.nbytes


def test_weights_stay_packed_in_the_backward_pass():
    def layer(x, w):
        return x + jnp.tanh(x @ w.T), None

    def deep(params, x):
        return jnp.square(jax.lax.scan(layer, x, params)[0]).sum()

    # XLA on CPU before JAX 0.12 dequantizes all weights first where layers are not in a scan.
    params, x = jnp.ones((8, 128, 128)), jnp.ones((2, 128))
    small, state = lora.adapt(deep, "nf4_g64", lora.QLoRA(rank=2))(params, x)
    gradient = jax.jit(jax.grad(lambda state, small: jaxq.quantize_fn(deep, state)(small, x)))
    compiled = gradient.lower(state, small).compile()
    # One weight at a time is dequantized, and the packed ones are copied once.
    assert compiled.memory_analysis().temp_size_in_bytes < params.nbytes / 3


def test_weights_without_a_scan_are_saved_packed():
    def deep(params, x):
        return jnp.square(jnp.tanh(x @ params[0].T) @ params[1]).sum()

    params, x = [jnp.ones((128, 128))] * 2, jnp.ones((2, 128))
    small, state = lora.adapt(deep, "nf4_g64", lora.QLoRA(rank=2))(params, x)

    def saved(state, small):
        return jax.vjp(lambda state: jaxq.quantize_fn(deep, state)(small, x), state)[1]

    # The residuals, which the forward pass leaves for the backward pass, hold no float weight.
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(saved, state, small))]
    assert (128, 128) not in shapes
    assert small[0].codes.shape in shapes


def test_merging_reports_the_error_of_quantizing_again():
    _, x = inputs()
    small, state = adapted("pissa")
    merged = lora.merge(model, state)(small, x)
    exact, rounded, stored = map(matrices, (merged.params, merged.packed, small))
    for name, adapter in state.adapters.items():
        np.testing.assert_allclose(exact[name], stored[name] + adapter.delta, atol=1e-5)
        error = np.linalg.norm(rounded[name] - exact[name], axis=(-2, -1))
        expected = error / np.linalg.norm(adapter.delta, axis=(-2, -1))
        np.testing.assert_allclose(merged.errors[name].lost, expected, rtol=1e-4)
        expected = error / np.linalg.norm(exact[name], axis=(-2, -1))
        np.testing.assert_allclose(merged.errors[name].relative, expected, rtol=1e-4)


def test_state_can_be_saved(tmp_path):
    _, state = adapted("loftq")
    jaxq.save(tmp_path / "state.safetensors", state)
    loaded = jaxq.load(tmp_path / "state.safetensors")
    assert loaded.rules == state.rules
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, state))


def tied(params, x):
    return params["table"][x] @ params["table"].T


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora.get_method("loftqq"), "Did you mean loftq"),
        (lambda: lora.low_rank(jnp.ones((4, 3)), 4), "from 1 to 3"),
        (lambda: lora.QLoRA(rank=0), "at least 1, got 0"),
        (lambda: lora.low_rank(jnp.ones((4, 3)), 1, hessian=jnp.eye(3)), "must have the shape"),
        (
            lambda: lora.adapt(tied, "int8_channel", lora.PiSSA(2))(
                {"table": jnp.ones((8, 4))}, jnp.arange(3)
            ),
            "no other use",
        ),
        (
            lambda: lora.adapt(model, INT3, "pissa", packed=1)(*inputs()),
            "`packed` must be None",
        ),
        (lambda: lora.adapt(model, [("", None)])(*inputs()), "must quantize"),
        (
            lambda: jaxq.quantize_fn(lambda p, x: x @ p, adapted("qlora").state)(
                jnp.ones((16, 4)), inputs()[1]
            ),
            "which the function lacks",
        ),
    ],
)
def test_errors_say_what_to_do(call, message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value)) <= 320
