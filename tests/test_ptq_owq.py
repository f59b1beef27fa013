"""OWQ, which stores the most sensitive inputs as floats and solves the others."""

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import ptq

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

INPUTS, OUTPUTS, FLOAT_INPUTS = 32, 8, 3
RECIPE = jaxq.Recipe("int3", jaxq.PerBlock(16), outliers=jaxq.recipes.Outliers(0.1))
PLAIN = jaxq.Recipe("int3", jaxq.PerBlock(16))


def samples() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, INPUTS)) @ (np.eye(INPUTS) + 0.3 * rng.random((INPUTS, INPUTS)))
    x[:, [4, 20, 21]] *= 6
    return x.astype(np.float32)


WEIGHT = np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
HESSIAN = samples().T @ samples()


def loss(values: np.ndarray) -> float:
    return float(np.sum((samples().astype(np.float64) @ (values - WEIGHT)) ** 2))


def reference(order: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs that stay floats, and the values of OBQ with these inputs last.

    The other inputs are ordered by the Hessian that remains if the floats have their best values.
    """
    w = WEIGHT.astype(np.float64)
    blocks = np.abs(w).reshape(-1, 16, OUTPUTS)
    scale = np.repeat(blocks.max(1) / 3, 16, 0)
    cost = np.diagonal(HESSIAN) * np.sum((np.round(w / scale) * scale - w) ** 2, 1)
    floats = np.sort(np.argsort(-cost)[:FLOAT_INPUTS])
    others = np.setdiff1d(np.arange(INPUTS), floats)
    left = w.copy()
    left[floats] = 0
    scale = np.repeat(np.abs(left).reshape(-1, 16, OUTPUTS).max(1) / 3, 16, 0)
    hessian = HESSIAN.astype(np.float64)
    hessian = hessian + 0.01 * np.mean(np.diagonal(hessian)) * np.eye(INPUTS)
    if order:
        rest = np.linalg.inv(np.linalg.inv(hessian)[np.ix_(others, others)])
        others = others[np.argsort(-np.diagonal(rest))]
    inverse, moved, result = np.linalg.inv(hessian), w.copy(), w.copy()
    for i in others:
        result[i] = np.clip(np.round(moved[i] / scale[i]), -3, 3) * scale[i]
        moved -= np.outer(inverse[:, i], (moved[i] - result[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    result[floats] = moved[floats]
    return floats, result


@pytest.mark.parametrize(("axis", "order"), [(0, "static"), (1, None)])
def test_owq_equals_obq_with_the_float_inputs_last(axis: int, order: str | None):
    weight = WEIGHT if axis == 0 else WEIGHT.T
    q = ptq.owq(weight, HESSIAN, RECIPE, axis=axis, order=order)
    values = np.asarray(q.dequantize())
    values = values if axis == 0 else values.T
    floats, expected = reference(order)
    assert set(floats) >= {20, 21}
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)
    rounded = np.setdiff1d(np.arange(INPUTS), floats)
    np.testing.assert_allclose(values[rounded], expected[rounded], rtol=1e-6)
    # The form is that of the recipe: unused slots for outliers stay empty.
    plain = jaxq.quantize(weight, RECIPE, axis=axis)
    assert jax.tree.structure(q) == jax.tree.structure(plain)
    assert [x.shape for x in jax.tree.leaves(q)] == [x.shape for x in jax.tree.leaves(plain)]


def test_choice_of_inputs_of_16_bit_weights_ignores_the_rounding_of_their_dtype():
    recipe = jaxq.Recipe("int8", jaxq.PerBlock(16), outliers=jaxq.recipes.Outliers(0.1))
    weight = jnp.asarray(WEIGHT, jnp.bfloat16)
    q = ptq.owq(weight, jnp.eye(INPUTS), recipe)
    w = np.float64(weight)
    scale = np.repeat(np.abs(w).reshape(-1, 16, OUTPUTS).max(1) / 127, 16, 0)
    cost = np.sum((np.round(w / scale) * scale - w) ** 2, axis=1)
    stored = np.unravel_index(q.outliers[1][: FLOAT_INPUTS * OUTPUTS], w.shape)[0]
    assert set(stored) == set(np.argsort(-cost)[:FLOAT_INPUTS])
    chex.assert_type(q, jnp.bfloat16)


def test_damping_is_raised_until_all_inputs_have_a_factor():
    indefinite = HESSIAN - 0.5 * np.mean(np.diagonal(HESSIAN)) * np.eye(INPUTS)
    q = ptq.owq(WEIGHT, indefinite, RECIPE)
    assert loss(q.dequantize()) < 0.5 * loss(jaxq.quantize(WEIGHT, RECIPE, axis=0).dequantize())
    # One of the inputs that stay floats is always 0.
    few = np.diag(np.where(np.arange(INPUTS) < FLOAT_INPUTS - 1, 2.0, 0.0))
    q = ptq.owq(WEIGHT, few, RECIPE, damping=0)
    np.testing.assert_allclose(q.dequantize()[:2], WEIGHT[:2], rtol=2**-11)


@pytest.mark.slow
def test_float_inputs_reduce_the_error_of_the_outputs():
    owq_loss = loss(ptq.owq(WEIGHT, HESSIAN, RECIPE).dequantize())
    assert owq_loss < 0.7 * loss(ptq.gptq(WEIGHT, HESSIAN, PLAIN).dequantize())
    assert owq_loss < 0.3 * loss(jaxq.quantize(WEIGHT, RECIPE, axis=0).dequantize())


@pytest.mark.parametrize(
    ("recipe", "hessian", "message"),
    [
        (PLAIN, HESSIAN, "must have outliers without `sigma`"),
        (
            jaxq.Recipe("int3", outliers=jaxq.recipes.Outliers(0.01)),
            HESSIAN,
            "for at least one of the 32 inputs, got the fraction 0.01. Use at least 0.0312",
        ),
        (RECIPE, HESSIAN[:8], r"must have the shape \(n, n\)"),
        (RECIPE, HESSIAN * np.nan, "must be positive semidefinite, finite"),
        (RECIPE, jnp.zeros_like(HESSIAN), "must be positive semidefinite, finite"),
    ],
)
def test_bad_calls_are_errors(recipe, hessian, message: str):
    with pytest.raises(ValueError, match=message):
        ptq.owq(WEIGHT.T, hessian, recipe, axis=1, order=None)


def test_order_by_groups_is_an_error():
    for call in (
        lambda: ptq.OWQ(order="group"),
        lambda: ptq.owq(WEIGHT, HESSIAN, RECIPE, order=""),
    ):
        with pytest.raises(ValueError, match="`order` must be 'static' or None"):
            call()
