"""Look-ups in tables, which quantize only the rows that are read."""

import dataclasses

import jax
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same

TABLE = data.normal((40, 6, 32))
BY_ROW = jaxq.Recipe("int4", jaxq.PerChannel(0), gradient="clipped")
IDS = jnp.array([[3, 39], [3, 0]])


def quantized_shapes(fn, *args) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays that are quantized."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return [e.invars[0].aval.shape for e in jaxpr.eqns if e.params.get("name") == "_fake_quant"]


def read(table, ids):
    return table[ids]


def filled(table, ids):
    return table.at[ids + 1].get(mode="fill")


def columns(table, ids):
    return table[:, :, ids % 32]


def parts(table, ids):
    return jax.vmap(lambda i: lax.dynamic_slice(table, (i, 0, 0), (2, 6, 32)))(ids[0])


ROW, WHOLE = jaxq.PerChannel(0), TABLE.shape


@pytest.mark.parametrize(
    ("look", "granularity", "own", "shape"),
    [
        data.slow(read, ROW, ROW, (2, 2, 6, 32)),
        data.slow(filled, ROW, ROW, (2, 2, 6, 32)),
        (parts, ROW, ROW, (2, 2, 6, 32)),
        data.slow(
            read, jaxq.PerBlock((1, 10), pad=True), jaxq.PerBlock(10, pad=True), (2, 2, 6, 32)
        ),
        (columns, ROW, jaxq.PerChannel(2), (40, 6, 2, 2)),
        data.slow(read, jaxq.PerTensor(), jaxq.PerTensor(), WHOLE),
        (read, jaxq.PerBlock((8, 32)), jaxq.PerBlock((8, 1, 32)), WHOLE),
    ],
)
def test_values_and_gradients_equal_whole_table(look, granularity, own, shape):
    """Compares with quantizing the whole table by the granularity `own`.

    The granularity of the recipe applies to the matrix [index, element].
    """
    recipe, own = (dataclasses.replace(BY_ROW, granularity=g) for g in (granularity, own))
    rules = [("", jaxq.ProductRecipe(None, recipe))]
    quantized = jaxq.quantize_fn(lambda t: look(t["e"], IDS), rules)
    assert quantized_shapes(quantized, {"e": TABLE}) == [shape]
    y, pull = jax.vjp(quantized, {"e": TABLE})
    want, pull_whole = jax.vjp(lambda t: look(jaxq.fake_quant(t["e"], own), IDS), {"e": TABLE})
    assert_same(y, want)
    cotangent = jnp.round(8 * TABLE.reshape(-1)[: y.size].reshape(y.shape))  # Sums are exact.
    assert_same(pull(cotangent)[0]["e"], pull_whole(cotangent)[0]["e"])


@pytest.mark.parametrize(
    "fields",
    [
        {"outliers": jaxq.Outliers(0.01)},
        {"rounding": "stochastic"},
        {"scaling": jaxq.TwoLevel()},
    ],
)
def test_recipes_of_whole_table_quantize_whole_table(fields):
    recipe = dataclasses.replace(BY_ROW, **fields)
    key = jax.random.key(0) if "rounding" in fields else None
    rules = [("", jaxq.ProductRecipe(None, recipe))]
    quantized = jaxq.quantize_fn(lambda t: read(t["e"], IDS), rules, key=key)
    assert quantized_shapes(quantized, {"e": TABLE}) == [WHOLE]


def test_many_look_ups_quantize_whole_table():
    ids = jnp.zeros(50, jnp.int32)
    quantized = jaxq.quantize_fn(lambda t: t["e"][ids], [("", jaxq.ProductRecipe(None, BY_ROW))])
    assert quantized_shapes(quantized, {"e": TABLE}) == [WHOLE]
