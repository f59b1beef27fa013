"""Errors that newcomers meet: each names the remedy, and the remedy works."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import jaxq

W = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def loss(w, x):
    return (x @ w).sum()


def test_closed_over_arrays_are_not_parameters():
    model = jax.tree_util.Partial(lambda w, x: x @ w["weight"], {"weight": jnp.asarray(W)})
    with pytest.raises(ValueError, match=r"closes over arrays.*lambda module, x: jax.vmap"):
        jaxq.quantize_fn(jax.vmap(model), {"weight": "int8_channel"})(W)
    remedy = jaxq.quantize_fn(lambda m, x: jax.vmap(m)(x), {"weight": "int8_tensor"})
    np.testing.assert_allclose(remedy(model, W), W @ jaxq.fake_quant(W, "int8_tensor"), rtol=1e-6)


@pytest.mark.parametrize("make", [jaxq.optim.quantize_state, jaxq.optim.quantize_gradients])
def test_delayed_state_is_refused_by_optimizers(make):
    state = jaxq.delayed_scaling(loss, {"": "fp8_training"})(W, W)
    optimizer = make(optax.adam(1e-3), "int8_tensor") if make is jaxq.optim.quantize_state else None
    optimizer = optimizer or make("int8_tensor")
    with pytest.raises(ValueError, match=r"state of delayed scaling.*state.update\(seen\)"):
        optimizer.init({"w": W, "scaling": state})


def test_delayed_state_among_parameters_is_refused():
    state = jaxq.delayed_scaling(loss, {"": "fp8_training"})(W, W)

    def objective(params):
        return jaxq.quantize_fn(lambda p, x: loss(p["w"], x), params["scaling"])(params, W)

    with pytest.raises(ValueError, match=r"must not contain the state of delayed scaling"):
        jax.grad(objective)({"w": W, "scaling": state})


def test_traced_width_of_format_names_remedy():
    for make, remedy in (
        (lambda n: jaxq.FloatFormat("mine", 5, n), "float_grid"),
        (lambda n: jaxq.FloatFormat("mine", n, 2), "float_grid"),
        (lambda n: jaxq.IntFormat("mine", n), "int_grid"),
    ):
        with pytest.raises(TypeError, match=f"must be an integer, got a traced value.*{remedy}"):
            jax.vmap(lambda n, make=make: jaxq.cast(W, make(n)))(jnp.arange(2, 4))
    assert jaxq.FloatFormat("mine", np.int64(5), np.int64(2)).max == 114688.0
