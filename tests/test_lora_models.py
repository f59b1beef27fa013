"""Adapters of experts in ragged products, and of models of Flax and Equinox."""

import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import lora, ptq
from tests import data

pytestmark = pytest.mark.unoptimized

INT3 = jaxq.Recipe("int3", jaxq.PerBlock(8))
SIZES = jnp.array([5, 0, 7], jnp.int32)
ROWS = [range(5), range(0), range(5, 12)]


def experts(params, x, sizes):
    """Runs two scanned layers of experts, the second kernel of each transposed by the model."""

    def layer(x, own):
        h = jnp.tanh(lax.ragged_dot(x, own["up"], sizes))
        return x + lax.ragged_dot(h, own["down"].swapaxes(-1, -2), sizes), None

    return lax.scan(layer, x, params)[0]


@functools.cache
def inputs() -> tuple:
    params = {"up": data.normal((2, 3, 16, 8)) / 4, "down": data.normal((2, 3, 16, 8), 1) / 4}
    return params, data.normal((12, 16), 2), SIZES


def by_hand(up, down, x):
    """Returns the experts' result for the matrices [layers, experts, inputs, outputs]."""
    for own_up, own_down in zip(up, down, strict=True):
        y = [
            np.tanh(x[list(rows)] @ a) @ b
            for rows, a, b in zip(ROWS, own_up, own_down, strict=True)
        ]
        x = x + np.concatenate(y)
    return x


@pytest.mark.slow
def test_experts_of_a_ragged_product_have_adapters():
    params, x, _ = inputs()
    small, state = lora.adapt(experts, INT3, lora.LoftQ(2, iterations=1))(*inputs())
    shapes = {name: (own.a.shape, own.b.shape) for name, own in state.adapters.items()}
    assert shapes == {
        "up": ((2, 3, 16, 2), (2, 3, 2, 8)),
        "down": ((2, 3, 8, 2), (2, 3, 2, 16)),
    }
    floats = jax.tree.map(lambda w: np.asarray(w, np.float64), jaxq.dequantize_tree(small))
    # LoftQ: the adapter of an expert is the best approximation of its own error.
    u, s, v = np.linalg.svd(np.asarray(params["up"], np.float64) - floats["up"])
    best = u[..., :2] * s[..., None, :2] @ v[..., :2, :]
    np.testing.assert_allclose(state.adapters["up"].delta, best, atol=1e-5)

    def objective(state):
        return jnp.square(jaxq.quantize_fn(experts, state)(small, x, SIZES)).sum()

    y = jax.jit(lambda state: jaxq.quantize_fn(experts, state)(small, x, SIZES))(state)
    down = floats["down"].swapaxes(-1, -2) + np.asarray(state.adapters["down"].delta)
    exact = by_hand(floats["up"] + np.asarray(state.adapters["up"].delta), down, np.asarray(x))
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)

    gradient = jax.jit(jax.grad(objective))(state)
    # The expert without tokens has no gradient.
    assert all(bool((leaf[:, 1] == 0).all()) for leaf in jax.tree.leaves(gradient))
    assert all(bool((leaf[:, ::2] != 0).any()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_eora_weighs_the_inputs_of_each_expert():
    _, x, _ = inputs()
    y = experts(*inputs())
    seen = ptq.observe(experts, INT3)(*inputs())[1]
    errors = []
    for method in (lora.LoftQ(1, iterations=1), lora.EoRA(seen, 1)):
        small, state = lora.adapt(experts, INT3, method)(*inputs())
        found = jaxq.quantize_fn(experts, state)(small, x, SIZES)
        errors.append(float(jnp.square(found - y).sum()))
    assert errors[1] < errors[0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(jnp.tanh(nn.Dense(16)(x)))


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


def linen() -> tuple:
    return Linen().apply, Linen().init(jax.random.key(0), jnp.ones((1, 8)))


def flax_nnx() -> tuple:
    graph, state = nnx.split(Module(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def equinox() -> tuple:
    mlp = eqx.nn.MLP(8, 4, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    return lambda mlp, x: jax.vmap(mlp)(x), mlp


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen, flax_nnx, equinox])
def test_modules_of_frameworks_train_adapters_of_packed_weights(make):
    apply, params = make()
    x, target = data.normal((16, 8), 3), data.normal((16, 4), 4)
    # The recipe is coarse, so that the error without adapters is far above rounding.
    small, state = lora.adapt(apply, INT3, lora.QLoRA(2))(params, x)
    packed = [leaf for leaf in jax.tree.leaves(small, is_leaf=is_packed) if is_packed(leaf)]
    assert len(packed) == len(state.adapters) == 2
    plain = jaxq.quantize_fn(apply, INT3)(small, x)
    np.testing.assert_allclose(jaxq.quantize_fn(apply, state)(small, x), plain, rtol=1e-6)

    def loss(state):
        return jnp.square(jaxq.quantize_fn(apply, state)(small, x) - target).mean()

    @jax.jit
    def descend(state):
        def step(state, _):
            value, gradient = jax.value_and_grad(loss)(state)
            return jax.tree.map(lambda p, g: p - np.float32(0.3) * g, state, gradient), value

        return lax.scan(step, state, None, 20)[1]

    values = descend(state)
    assert float(values[-1]) < 0.9 * float(values[0])
    merged = lora.merge(apply, state)(small, x)
    np.testing.assert_allclose(apply(merged.params, x), plain, rtol=1e-4, atol=1e-5)


def is_packed(x) -> bool:
    return isinstance(x, jaxq.Quantized)


def test_module_that_is_not_an_argument_is_an_error():
    _, mlp = equinox()
    with pytest.raises(TypeError, match=r"got a module of type MLP. Pass, .* `lambda module, x"):
        lora.adapt(mlp, INT3)(jnp.ones(8))


def test_merge_with_rules_raises():
    with pytest.raises(TypeError, match=r"`state` must be the state that lora.adapt returned"):
        lora.merge(lambda w, x: x @ w, "int4_g32")
