"""Experts with a recipe each: leaves that a model stacks for one product."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.oracle import assert_same, assert_same_trees

pytestmark = pytest.mark.unoptimized

INT4 = jaxq.Recipe("int4", jaxq.PerBlock(8))
UINT4 = jaxq.Recipe("uint4", jaxq.PerBlock(4), jaxq.Affine())
SIZES = jnp.array([5, 0, 7], jnp.int32)
RULES = [("up/1", "int8_channel"), ("down/0", UINT4), ("down/2", None), ("", INT4)]
RECIPES = {"up": [INT4, "int8_channel", INT4], "down": [UINT4, INT4, None]}


def model(params, x):
    """Runs two scanned layers of experts: a ragged product, and all experts on all tokens."""

    def layer(x, weights):
        # `up` is stored [outputs, inputs], as in PyTorch, and `down` [inputs, outputs].
        h = jnp.tanh(lax.ragged_dot(x, jnp.stack(weights["up"]).swapaxes(-1, -2), SIZES))
        y = jnp.einsum("ti,eio->eto", h, jnp.stack(weights["down"]))
        return x + y.sum(0), None

    return lax.scan(layer, x, params)[0]


@functools.cache
def inputs() -> tuple:
    up = [data.normal((2, 8, 16), i) / 4 for i in range(3)]
    down = [data.normal((2, 8, 16), 3 + i) / 4 for i in range(3)]
    return {"up": up, "down": down}, data.normal((12, 16), 6)


def by_hand(params):
    """Returns the parameters with every expert of every layer quantized by itself."""

    def one(w, recipe, axis):
        if recipe is None:
            return w
        return jax.vmap(lambda w: jaxq.fake_quant(w, recipe, axis=axis))(w)

    return {
        name: [one(w, r, axis) for w, r in zip(params[name], RECIPES[name], strict=True)]
        for name, axis in (("up", -1), ("down", -2))
    }


def test_every_expert_has_its_own_recipe():
    params, x = inputs()
    small = jaxq.quantize_weights(model, RULES)(params, x)
    assert [w.recipe.element.name for w in small["up"]] == ["int4", "int8", "int4"]
    assert [getattr(w, "ndim", 0) and type(w) for w in small["down"]] == [
        jaxq.Quantized,
        jaxq.Quantized,
        type(params["down"][2]),
    ]

    @jax.jit
    def run(params, small):
        quantized = jaxq.quantize_fn(model, RULES)
        loss = lambda f: jax.value_and_grad(lambda p: jnp.square(f(p)).sum())(params)
        return (
            loss(lambda p: quantized(p, x)),
            loss(lambda p: model(by_hand(p), x)),
            quantized(small, x),
            model(by_hand(params), x),
        )

    actual, expected, stored, plain = run(params, small)
    assert_same_trees(actual, expected)
    assert_same(stored, plain)


def test_explain_shows_the_recipes_and_bytes_of_experts():
    params, x = inputs()
    small = jaxq.quantize_weights(model, RULES)(params, x)
    for tree in (params, small):
        up, down = jaxq.explain(model, RULES)(tree, x).rows
        assert up.bytes == sum(w.nbytes for w in small["up"])
        assert down.bytes == sum(w.nbytes for w in small["down"])
    up, down = jaxq.explain(model, RULES)(params, x).rows
    assert (up.recipe, down.recipe) == ("- int4_g8|int8_channel", "uint4_g4|int4_g8|float -")
    assert (up.stored, down.stored) == ("yes", "yes")


def ragged(params, x):
    return lax.ragged_dot(x, jnp.stack(params["experts"]), SIZES)


@functools.cache
def experts() -> tuple:
    return {"experts": [data.normal((16, 8), i) for i in range(3)]}, data.normal((12, 16), 3)


def test_scores_of_experts_count_their_own_tokens():
    params, x = experts()
    scores = ptq.sensitivity(ragged, [INT4, "int8_channel"])(params, [(x,), (2 * x,)])
    assert [score.tokens for score in scores.rows] == [10, 10, 0, 0, 14, 14]
    rows, tokens = [range(5), range(0), range(5, 12)], np.asarray(x, np.float64)
    power = sum(
        5 * np.square(tokens[indices] @ np.asarray(w, np.float64)).sum()
        for indices, w in zip(map(list, rows), params["experts"], strict=True)
    )
    for i, w in enumerate(params["experts"]):
        for score, recipe in zip(scores.of(f"experts/{i}"), (INT4, "int8_channel"), strict=True):
            error = np.asarray(jaxq.fake_quant(w, recipe, axis=0) - w, np.float64)
            loss = 5 * np.square(tokens[list(rows[i])] @ error).sum()
            np.testing.assert_allclose(score.loss, loss, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(score.relative, loss / power, rtol=1e-4, atol=1e-9)
    # The expert without tokens gets the fewest bytes; of the others, the one with more loss 8 bits.
    int4, int8 = (score.nbytes for score in scores.rows[:2])
    best = ptq.budget(scores, 2 * int4 + int8, by="loss")
    names = [score.recipe.element.name for score in best.choices]
    losses = [scores.of(f"experts/{i}")[0].loss for i in (0, 2)]
    assert names == (
        ["int8", "int4", "int4"] if losses[0] > losses[1] else ["int4", "int4", "int8"]
    )
    assert jaxq.quantize_weights(ragged, best.rules)(params, x)["experts"][1].nbytes == int4


SEARCH = ptq.ScaleSearch(factors=(1.0, 0.95, 0.9))
SOLVERS = [ptq.GPTQ(search=SEARCH), ptq.RTN(search=SEARCH), ptq.GPTQ()]


@pytest.mark.parametrize("solver", data.each(SOLVERS, SOLVERS[:1]))
def test_solver_solves_every_expert_like_a_separate_weight(solver):
    params, x = experts()
    rules = [("experts/0", UINT4), ("experts/1", "int8_channel"), ("", INT4)]
    packed, report = ptq.quantize_weights(ragged, rules, solver=solver)(params, [(x,)])
    plain = jaxq.quantize_weights(ragged, rules)(params, x)
    for i, recipe, tokens in ((0, UINT4, x[:5]), (2, INT4, x[5:])):
        alone = ptq.quantize_weights(lambda w, x: x @ w, recipe, solver=solver)
        alone, _ = alone(params["experts"][i], [(tokens,)])
        assert_same_trees(packed["experts"][i], alone)
        has_new_scales = np.any(alone.scale != plain["experts"][i].scale)
        assert has_new_scales == (solver.search is not None)
    assert_same_trees(packed["experts"][1], plain["experts"][1])
    (row,) = report.rows
    assert (row.format, row.tokens) == ("uint4|int8|int4", 0)
    assert row.unsolved_reason == "1 of 3 matrices: received no tokens"
    assert row.loss < row.rtn


@pytest.mark.slow
def test_experts_are_not_solved_if_one_stays_float():
    params, x = experts()
    rules = [("experts/0", None), ("", INT4)]
    packed, report = ptq.quantize_weights(ragged, rules)(params, [(x,)])
    nearest = jaxq.quantize_weights(ragged, rules)(params, x)
    assert_same_trees(packed, nearest)
    assert report.rows[0].unsolved_reason == "a part of its weight stays float"


@pytest.mark.slow
def test_joined_outputs_with_different_recipes_are_not_solved():
    params, x = experts()
    model = lambda params, x: x @ jnp.concatenate(params["experts"], 1)
    rules = [("experts/0", UINT4), ("", INT4)]
    packed, report = ptq.quantize_weights(model, rules)(params, [(x,)])
    assert_same_trees(packed, jaxq.quantize_weights(model, rules)(params, x))
    assert report.rows[0].unsolved_reason == "its outputs have different recipes"
    exact = [
        jaxq.fake_quant(w, UINT4 if i == 0 else INT4, axis=0)
        for i, w in enumerate(params["experts"])
    ]
    assert_same(jaxq.quantize_fn(model, rules)(packed, x), model({"experts": exact}, x))


def joined(params, x):
    return jnp.tile(x, (1, 3)) @ jnp.concatenate(params["experts"], 0)


@pytest.mark.parametrize(
    ("fn", "rules", "message"),
    [
        (ragged, [("experts/0", "w8a8"), ("", INT4)], "differ only in the recipe of the weight"),
        (joined, [("experts/0", "int8_channel"), ("", INT4)], "unless they lie along"),
        (
            ragged,
            [("experts/0", jaxq.Recipe("int8", rounding="stochastic")), ("", INT4)],
            "rounded deterministically",
        ),
        (
            ragged,
            [
                (name, jaxq.ProductRecipe(None, recipe, hadamard=jaxq.Hadamard(8, (1,) * 8)))
                for name, recipe in (("experts/0", UINT4), ("", INT4))
            ],
            "no Hadamard transform",
        ),
        (ragged, [("experts/0", jaxq.Recipe("int4", jaxq.PerBlock(5))), ("", INT4)], "divide"),
    ],
)
def test_errors_say_what_to_do(fn, rules, message: str):
    with pytest.raises(ValueError, match=message) as error:
        jaxq.explain(fn, rules)(*experts())
    assert len(str(error.value)) <= 400
