"""Transformed functions under JAX's debugging modes: leaks, NaNs, no jit and checkify."""

import gc

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.experimental import checkify

import jaxq
from tests import data
from tests.oracle import assert_same_trees

INT4 = jaxq.Recipe("int4", jaxq.PerChannel(-1), rounding="stochastic")
RULES = [
    ("table", "int8_token"),
    ("scanned", jaxq.ProductRecipe("int8_tensor", INT4)),
    ("own", jaxq.ProductRecipe("int8_tensor", "int8_channel")),
    ("", "fp8_training"),
]
KEY = jax.random.key(0)
IDS = jnp.arange(6).reshape(2, 3)


@jax.custom_vjp
def own(x, w):
    return x @ w


own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def model(params, ids):
    """Computes a model with a look-up, control flow, transformations and a custom derivative."""
    x = params["table"][ids].reshape(-1, 8)
    x = jax.jit(lambda x: x @ params["jit"])(x)
    x = jax.checkpoint(lambda x: jnp.tanh(x @ params["checkpoint"]))(x)
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["scanned"])[0]
    x = lax.cond(x.sum() > 1e9, lambda x: x, lambda x: x @ params["cond"], x)
    x = own(x, params["own"])
    loop = lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["while"]))
    steady = lax.while_loop(lambda state: state[0] < 2, loop, (0, x))[1]
    return jax.vmap(lambda x: x @ params["vmap"])(x + lax.stop_gradient(steady)).sum()


def weights():
    names = ("jit", "checkpoint", "cond", "own", "while", "vmap", "scanned")
    rng = np.random.default_rng(0)
    shapes = {**dict.fromkeys(names, (8, 8)), "table": (9, 8), "scanned": (2, 8, 8)}
    return {n: jax.device_put(np.float32(rng.standard_normal(s) / 3)) for n, s in shapes.items()}


def run(params, rules):
    return jaxq.quantize_fn(model, rules, key=KEY)(params, IDS)


@pytest.mark.slow
def test_delayed_scaling_of_a_jitted_function_leaks_no_tracer():
    params, x = {"w": jnp.ones((16, 8))}, jnp.ones((4, 16))
    function = jax.jit(lambda params, x: (x @ params["w"]).sum())
    state = jaxq.delayed_scaling(function, [("w", "fp8_training")])(params, x)
    with jax.checking_leaks():
        jax.eval_shape(jax.grad(lambda s: jaxq.quantize_fn(function, s)(params, x)), state)


@pytest.mark.slow
def test_no_tracer_leaks():
    state = jaxq.delayed_scaling(model, RULES)(weights(), IDS)
    with jax.checking_leaks():
        jax.eval_shape(jax.grad(run, (0, 1)), weights(), state)


@pytest.mark.slow
def test_no_intermediate_nan():
    state = jaxq.delayed_scaling(model, RULES)(weights(), IDS)
    with jax.debug_nans(True):
        jax.jit(jax.grad(run, (0, 1)))(weights(), state)
        for name in ("uint8_tensor", "nvfp4", "nf4_dq", "q4_0"):  # All scales are 0.
            jaxq.fake_quant(jnp.zeros((4, 64)), name)


@pytest.mark.slow
def test_disabled_jit_gives_same_bits_and_states():
    rules = [("", jaxq.ProductRecipe("int8_tensor", INT4))]
    params = {"layers": weights()["scanned"], "while": weights()["while"]}

    def loops(params, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["while"]))
        return lax.while_loop(lambda state: state[0] < 2, step, (0, x))[1]

    def observed():
        return jaxq.observe(loops, rules, key=KEY)(params, weights()["own"])

    want = observed()
    with jax.disable_jit():
        got = observed()
        static = jaxq.freeze(rules, got[1])
    assert_same_trees(got, want)
    jaxq.quantize_fn(loops, static, key=KEY)(params, weights()["own"])


def test_caches_do_not_keep_arrays():
    """Checks that an array captured by a jitted function in a model is freed with the function."""

    def call():
        big = jnp.full((300, 300), 2.0)
        inner = jax.jit(lambda x, w: x @ w + big.sum())
        fn = lambda w, x: inner(x, w)
        rules = [("", "w8a8")]
        w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
        jax.grad(lambda w: jaxq.quantize_fn(fn, rules)(w, x).sum())(w)
        jaxq.quantize_fn(fn, rules)(w, x)

    def bytes_alive():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    call()
    before = bytes_alive()
    call()
    assert bytes_alive() == before


def test_inner_jit_compiles_once(caplog):
    inner = jax.jit(lambda x, w: x @ w, inline=False)
    w, x = jnp.ones((4, 5)), jnp.ones((2, 4))
    call = lambda: jaxq.quantize_fn(lambda w, x: inner(x, w), [("", "w8a8")])(w, x)
    with jax.log_compiles():
        call()
        assert "Compiling" in caplog.text
        caplog.clear()
        call()
        assert "Compiling" not in caplog.text


def test_gradients_of_shared_state_add_and_of_copies_do_not():
    fn = lambda w, x: (x @ w).sum()
    w, x = jnp.eye(4), jnp.ones((2, 4))
    state = jaxq.delayed_scaling(fn, [("", "fp8_training")], history=2)(w, x)

    def loss(states):
        sizes = (2, 8, 4)
        return sum(jaxq.quantize_fn(fn, s)(w, n * x) for s, n in zip(states, sizes, strict=True))

    seen = jax.grad(lambda s: loss(s.copies(3)))(state)
    assert [h.amax.tolist() for h in seen.histories[""]] == [[8, 0], [1, 0], [1, 0]]
    added = jax.grad(lambda s: loss([s] * 3))(state)
    assert [h.amax[0].item() for h in added.histories[""]] == [14, 3, 3]
    with pytest.raises(ValueError, match="`count` must be an integer of at least 1"):
        state.copies(0)


def message(function, *arguments, errors=checkify.all_checks):
    error, _ = jax.jit(checkify.checkify(function, errors=errors))(*arguments)
    return error.get()


def with_and_without_nan():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    bad = x.copy()
    bad[0, 0] = np.nan
    return x, bad


@pytest.mark.parametrize("name", [data.slow("uint8_channel"), "nvfp4", data.slow("nf4_dq")])
def test_checkify_inside_quantizers(name):
    x, bad = with_and_without_nan()
    quantized = lambda x: jaxq.fake_quant(x, jaxq.get_recipe(name)).sum()
    assert message(jax.value_and_grad(quantized), x) is None
    assert "nan generated" in message(quantized, bad, errors=checkify.nan_checks)


@pytest.mark.slow
def test_checkify_inside_products():
    x, bad = with_and_without_nan()
    product = lambda x: jaxq.einsum(
        "bi,oi->bo", jaxq.grad_cast(x, "int8_tensor"), x, recipe="fp8_training"
    ).sum()
    assert message(jax.grad(product), x) is None
    assert "nan generated" in message(jax.grad(product), bad, errors=checkify.nan_checks)


def test_user_checks_inside_quantizer():
    def rounding(units, negative, random):
        del negative, random
        checkify.check(jnp.all(units < 100), "a large number")
        return jnp.round(units)

    recipe = jaxq.Recipe("int8", rounding=rounding)
    for top, want in ((50.0, None), (101.0, "a large number")):
        got = message(lambda x: jaxq.fake_quant(x, recipe, scale=1.0), jnp.array([top]))
        assert (got and got[:14]) == want
