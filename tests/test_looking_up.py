"""Look-ups in quantized tables: the same numbers, of the rows that are read alone."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from tests.oracle import assert_same

TABLE = jnp.asarray(np.random.default_rng(0).standard_normal((40, 6, 32)), jnp.float32)
BY_ROW = jaxq.Quantizer("int4", jaxq.PerChannel(0), gradient="clipped")
IDS = jnp.array([[3, 39], [3, 0]])


def quantized_shapes(fn, *args) -> list[tuple[int, ...]]:
    """The shapes of what is quantized."""
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
        (read, ROW, ROW, (2, 2, 6, 32)),
        (filled, ROW, ROW, (2, 2, 6, 32)),
        (parts, ROW, ROW, (2, 2, 6, 32)),
        (read, jaxq.PerBlock((1, 10), pad=True), jaxq.PerBlock(10, pad=True), (2, 2, 6, 32)),
        (columns, ROW, jaxq.PerChannel(2), (40, 6, 2, 2)),
        (read, jaxq.PerTensor(), jaxq.PerTensor(), WHOLE),
        (read, jaxq.PerBlock((8, 32)), jaxq.PerBlock((8, 1, 32)), WHOLE),
    ],
)
def test_values_and_gradients_are_those_of_the_whole_table(look, granularity, own, shape):
    """A recipe's granularity is that of the matrix [index, element], `own` the table's."""
    recipe, own = (dataclasses.replace(BY_ROW, granularity=g) for g in (granularity, own))
    rules = [("", jaxq.DotRecipe(None, recipe))]
    quantized = jaxq.quantize_fn(lambda t: look(t["e"], IDS), rules)
    assert quantized_shapes(quantized, {"e": TABLE}) == [shape]
    y, pull = jax.vjp(quantized, {"e": TABLE})
    want, pull_whole = jax.vjp(lambda t: look(jaxq.fake_quant(t["e"], own), IDS), {"e": TABLE})
    assert_same(y, want)
    cotangent = jnp.round(8 * TABLE.reshape(-1)[: y.size].reshape(y.shape))  # Their sums are exact.
    assert_same(pull(cotangent)[0]["e"], pull_whole(cotangent)[0]["e"])


@pytest.mark.parametrize(
    "fields",
    [
        {"outliers": jaxq.Outliers(0.01)},
        {"rounding": "stochastic"},
        {"scale_format": "float8_e4m3fn", "second_level": jaxq.TensorScale()},
    ],
)
def test_what_depends_on_the_whole_table_is_quantized_whole(fields):
    recipe = dataclasses.replace(BY_ROW, **fields)
    key = jax.random.key(0) if "rounding" in fields else None
    rules = [("", jaxq.DotRecipe(None, recipe))]
    quantized = jaxq.quantize_fn(lambda t: read(t["e"], IDS), rules, key=key)
    assert quantized_shapes(quantized, {"e": TABLE}) == [WHOLE]


def test_a_table_of_which_more_is_read_than_it_has_is_quantized_whole():
    ids = jnp.zeros(50, jnp.int32)
    quantized = jaxq.quantize_fn(lambda t: t["e"][ids], [("", jaxq.DotRecipe(None, BY_ROW))])
    assert quantized_shapes(quantized, {"e": TABLE}) == [WHOLE]
