"""Outliers, which are stored separately from the codes."""

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests.oracle import assert_same


def heavy(shape: tuple[int, ...] = (32, 64)) -> np.ndarray:
    return np.random.default_rng(0).standard_t(2, shape).astype(np.float32)


def recipe(**fields) -> jaxq.Recipe:
    return jaxq.Recipe("int4", jaxq.PerBlock(32), outliers=jaxq.Outliers(**fields))


def by_hand(x: np.ndarray, chosen: np.ndarray, dtype=np.float16) -> np.ndarray:
    rest = np.where(chosen, np.float32(0), x)
    y = np.array(jaxq.fake_quant(rest, "int4_g32"))
    limit = np.float32(np.finfo(dtype).max)
    y[chosen] = np.clip(x[chosen], -limit, limit).astype(dtype).astype(np.float32)
    return y


def largest(x: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(x.size, bool)
    chosen[np.argsort(-np.abs(x.ravel()), kind="stable")[:count]] = True
    return chosen.reshape(x.shape)


def test_fraction_sets_the_number_of_outliers():
    x = heavy()
    r = recipe(fraction=0.01)
    want = by_hand(x, largest(x, 21))  # 1% of 2048, rounded up.
    assert_same(jaxq.fake_quant(x, r), want)
    q = jaxq.quantize(x, r)
    assert_same(q.dequantize(), want)
    assert 8 * q.nbytes == r.bits_per_weight(x.shape) * x.size
    assert q.nbytes == 2048 // 2 + 64 * 4 + 21 * (2 + 4)
    assert_same(jax.vmap(lambda x: jaxq.quantize(x, r))(x[None]).dequantize()[0], want)


def test_equal_magnitudes_are_chosen_together_or_not_at_all():
    x = np.clip(heavy(), -5, 5)
    x[3, :20] = np.where(np.arange(20) % 2, 9, -9)
    x[5, :14] = 50
    q = jaxq.quantize(x, recipe(fraction=0.01))
    places = np.asarray(q.outliers[1])
    expected = np.flatnonzero(np.abs(x) > 9)
    np.testing.assert_array_equal(places[: len(expected)], expected)
    np.testing.assert_array_equal(places[len(expected) :], x.size)
    assert_same(q.dequantize(), by_hand(x, np.abs(x) > 9))


@pytest.mark.slow
def test_sigma_stores_only_distant_values():
    x = heavy()
    distant = np.abs(x - x.mean()) > 4 * x.std()
    assert 3 < distant.sum() < 21
    q = jaxq.quantize(x, recipe(fraction=0.01, sigma=4.0))
    assert_same(q.dequantize(), by_hand(x, distant))
    assert (np.asarray(q.outliers[1]) == x.size).sum() == 21 - distant.sum()
    few = recipe(fraction=0.001, sigma=4.0)  # At most three outliers.
    assert_same(jaxq.fake_quant(x, few), by_hand(x, largest(x - x.mean(), 3)))
    assert_same(jaxq.fake_quant(x, recipe(fraction=0.01, sigma=1e6)), by_hand(x, x != x))


def test_outliers_reduce_error():
    """Checks that storing large numbers as outliers reduces the error of the other numbers."""
    x = np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32)
    x[:, 5] *= 60
    pure = np.asarray(jaxq.fake_quant(x, "int4_g32"))
    mixed = np.asarray(jaxq.fake_quant(x, recipe(fraction=0.016)))
    assert ((pure - x) ** 2).mean() > 20 * ((mixed - x) ** 2).mean()


def test_nonfinite_outliers_stay_outside_of_blocks():
    x = heavy()
    clean = np.asarray(jaxq.fake_quant(x, recipe(fraction=0.01)))
    bad = x.copy()
    bad[1, 2], bad[3, 4], bad[5, 6], bad[7, 8] = np.nan, np.inf, -np.inf, 1e6
    y = np.asarray(jaxq.fake_quant(bad, recipe(fraction=0.01)))
    assert np.isnan(y).sum() == 1
    assert (y[3, 4], y[5, 6], y[7, 8]) == (np.inf, -np.inf, 65504)
    chex.assert_tree_all_finite(clean)
    assert np.isnan(jaxq.fake_quant(bad, recipe(fraction=0.01, sigma=3.0))).sum() == 3 * 32


def test_clipped_gradients_pass_outliers():
    x = jnp.asarray(heavy())
    clipping = jaxq.Recipe(
        "int4", scaling=jaxq.Symmetric("absmean"), gradient="clipped", outliers=jaxq.Outliers(0.01)
    )
    g = np.asarray(jax.grad(lambda x: jaxq.fake_quant(x, clipping).sum())(x))
    rest = np.where(largest(np.asarray(x), 21), 0, x)
    inside = np.abs(np.asarray(x)) <= np.abs(rest).mean()
    np.testing.assert_array_equal(g != 0, inside | largest(np.asarray(x), 21))


def test_outliers_of_bfloat16_tensors_are_stored_exactly():
    x = heavy().astype(jnp.bfloat16)
    r = recipe(fraction=0.01, format="bfloat16")
    y = jaxq.fake_quant(x, r)
    chex.assert_type(y, jnp.bfloat16)
    assert_same(y, jaxq.quantize(x, r).dequantize())
    chosen = largest(np.asarray(x, np.float32), 21)
    assert_same(np.asarray(y)[chosen], np.asarray(x)[chosen])


def test_invalid_arguments_raise():
    for fields, text in (
        ({"fraction": 0.0}, "`fraction` must be a number between"),
        ({"sigma": -1.0}, "`sigma` must be a positive number"),
        ({"format": "int8"}, "a signed float"),
    ):
        with pytest.raises(ValueError, match=text):
            jaxq.Outliers(**fields)
    with pytest.raises(ValueError, match="positions in the whole tensor"):
        jaxq.quantize(heavy(), recipe())[0]
