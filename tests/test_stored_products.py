"""Products of stored weights that are dequantized part by part."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq.products import stored_dot_general
from tests import data

pytestmark = pytest.mark.unoptimized

AFFINE = jaxq.Recipe("uint4", jaxq.PerBlock(32), jaxq.Affine())
OUTLIERS = jaxq.Recipe("int4", outliers=jaxq.Outliers(0.01))
ALONG_OUTPUTS = (((1,), (1,)), ((), ()))
KERNEL = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))


def whole_numbers(*shape: int, seed: int = 0) -> jax.Array:
    """Returns integers below 8, of which all sums in these tests are exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-7, 8, shape), jnp.float32)


def temporary(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("recipe", "numbers", "shape", "chunk"),
    [
        ("int4_g32", ALONG_OUTPUTS, (45, 64), 7 * 64),  # The last part overlaps.
        data.slow("int3_g128", KERNEL, (64, 384), 64 * 128),  # Packed along the free axis.
        ("nf4_dq", KERNEL, (64, 64), 8 * 64),  # The blocks span the outputs: parts of the sum.
        data.slow(AFFINE, BATCHED, (3, 16, 32), 600),
    ],
)
def test_parts_give_the_product_of_the_whole_weight(recipe, numbers, shape: tuple, chunk: int):
    w = jaxq.quantize(whole_numbers(*shape), recipe)
    contracted = shape[numbers[0][1][0]]
    x = whole_numbers(*shape[: len(numbers[1][0])], 2, contracted, seed=1)

    @jax.jit
    def both(x, w):
        part = functools.partial(stored_dot_general, dimension_numbers=numbers, chunk=chunk)
        y, pull = jax.vjp(lambda x: part(x, w), x)
        return y, pull(jnp.ones_like(y))[0], w.dequantize()

    y, gradient, floats = both(x, w)
    exact = np.asarray(floats, np.float64)
    dot = lambda a, b: np.einsum(
        {ALONG_OUTPUTS: "ti,oi->to", KERNEL: "ti,io->to", BATCHED: "bti,bio->bto"}[numbers], a, b
    )
    np.testing.assert_allclose(y, dot(np.asarray(x, np.float64), exact), rtol=1e-5, atol=1e-4)
    back = exact.sum(0 if numbers == ALONG_OUTPUTS else -1)
    back = back[:, None] if numbers == BATCHED else back
    np.testing.assert_allclose(gradient, np.broadcast_to(back, x.shape), rtol=1e-5, atol=1e-4)


def test_parts_along_outputs_have_the_bits_of_the_whole_product():
    x, w = whole_numbers(4, 64), jaxq.quantize(whole_numbers(48, 64, seed=1) * 0.1, "mxfp8_e4m3")
    y = jax.jit(lambda x, w: stored_dot_general(x, w, ALONG_OUTPUTS, chunk=1024))(x, w)
    # All products and sums are exact: 4 bits, 4 bits and shared exponents.
    np.testing.assert_array_equal(y, np.asarray(x) @ np.asarray(w.dequantize()).T)


def test_bfloat16_sums_of_parts_are_float32():
    w = jaxq.quantize(jnp.ones((256, 2), jnp.bfloat16), jaxq.Recipe("int8", jaxq.PerChannel(1)))
    x = jnp.ones((1, 256), jnp.bfloat16).at[0, 0].set(3)
    y = stored_dot_general(x, w, KERNEL, chunk=2)
    # In bfloat16, which has 8 significant bits, the sum would stay at 256.
    chex.assert_type(y, jnp.bfloat16)
    assert y.tolist() == [[258, 258]]


def test_temporary_memory_is_that_of_one_part():
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    floats = 512 * 512 * 4
    for recipe in ("int4_g32", "q4_0"):
        make = functools.partial(jaxq.quantize, recipe=recipe)
        w = jax.eval_shape(make, jax.ShapeDtypeStruct((512, 512), jnp.float32))
        at_once = temporary(lambda x, w: lax.dot_general(x, w.dequantize(), ALONG_OUTPUTS), x, w)
        part = functools.partial(stored_dot_general, dimension_numbers=ALONG_OUTPUTS, chunk=2**14)
        assert temporary(part, x, w) < floats / 8 < floats <= at_once


def model(params, x, sizes):
    """Runs scanned layers with kernels of both layouts, experts, and an output layer."""

    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"].T, None

    x, _ = lax.scan(layer, x, params["layers"])
    return lax.ragged_dot(x, params["experts"], sizes) @ params["out"]


@functools.cache
def arguments() -> tuple:
    layers = {"up": whole_numbers(2, 128, 256) / 64, "down": whole_numbers(2, 128, 256) / 64}
    params = {"layers": layers, "experts": whole_numbers(3, 128, 128) / 64}
    params["out"] = whole_numbers(128, 64) / 64
    return params, whole_numbers(16, 128, seed=1) / 8, jnp.array([5, 0, 11], jnp.int32)


def test_models_dequantize_their_weights_in_parts():
    params, x, sizes = arguments()
    rules = {"out": "w8a8", "": "int4_g32"}
    small = jaxq.quantize_weights(model, rules)(params, x, sizes)
    results, memory = [], []
    for chunk in (None, 2**11):
        run = jax.jit(jaxq.quantize_fn(model, rules, chunk=chunk)).lower(small, x, sizes).compile()
        results.append(run(small, x, sizes))
        memory.append(run.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)
    # The largest float weight has 196,608 bytes, and a part of it has 8,192.
    assert memory[1] < 196_608 / 2 < 196_608 <= memory[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: stored_dot_general(jnp.ones((1, 64)), q, KERNEL), "tensor with outliers"),
        (lambda _: jaxq.quantize_fn(model, "int8_channel", chunk=0), "at least 1, got 0"),
        (
            lambda _: stored_dot_general(
                jnp.ones((1, 64)), jaxq.quantize(jnp.ones((64, 2)), "int8_tensor"), KERNEL, chunk=0
            ),
            "at least 1, got 0",
        ),
    ],
)
def test_errors_say_what_to_do(call, message: str):
    q = jaxq.quantize(jnp.ones((64, 64)), OUTLIERS)
    with pytest.raises(ValueError, match=message) as error:
        call(q)
    assert len(str(error.value)) <= 300
