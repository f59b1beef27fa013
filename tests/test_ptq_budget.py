"""Sensitivities of weights to recipes, and the best recipes under a budget."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq

RECIPES = [*map(jaxq.get_recipe, ("int8_channel", "int4_channel", "int2_g64")), None]


def random_scores(weights: int, seed: int = 0) -> ptq.Scores:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(weights):
        size = int(rng.integers(10, 60))
        for recipe, bits in zip(RECIPES, (8, 4, 2, 32), strict=True):
            damage = float(rng.random() * 4.0**-bits)
            rows.append(ptq.Score(f"layers/{i}/w", recipe, bits * size, 2 * damage, damage))
    return ptq.Scores(tuple(rows))


def brute_force(scores: ptq.Scores, nbytes: float, by: str, groups: int = 1) -> float:
    """Returns the least damage; `groups` weights in a row share a recipe."""
    least = np.inf
    per_weight = [scores.of(weight) for weight in scores.weights]
    blocks = [per_weight[i : i + groups] for i in range(0, len(per_weight), groups)]
    for choice in itertools.product(range(len(RECIPES)), repeat=len(blocks)):
        chosen = [w[k] for block, k in zip(blocks, choice, strict=True) for w in block]
        if sum(s.nbytes for s in chosen) <= nbytes:
            least = min(least, sum(getattr(s, by) for s in chosen))
    return least


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["relative", "loss"])
def test_choice_equals_brute_force(seed: int, by: str):
    scores = random_scores(5, seed)
    damage = np.inf
    for nbytes in (450, 800, 1500.5, 4000, 1e9):
        try:
            best = ptq.budget(scores, nbytes, by=by)
        except ValueError:
            assert brute_force(scores, nbytes, by) == np.inf
            continue
        assert best.nbytes == sum(s.nbytes for s in best.choices) <= nbytes
        np.testing.assert_allclose(best.damage, brute_force(scores, nbytes, by), rtol=1e-12)
        assert best.damage <= damage
        damage = best.damage
        assert best.is_exact


def test_weights_of_a_group_share_a_recipe():
    scores = random_scores(6)
    # Weights 0 and 1, 2 and 3, 4 and 5.
    best = ptq.budget(scores, 1500, groups=["/[01]/", "/[23]/", "/[45]/"], by="relative")
    names = [score.recipe for score in best.choices]
    assert names[::2] == names[1::2]
    np.testing.assert_allclose(best.damage, brute_force(scores, 1500, "relative", 2))
    captured = ptq.budget(scores, 1500, groups=[r"layers/(\d)/w"], by="relative")
    assert captured.damage == ptq.budget(scores, 1500, by="relative").damage


def test_front_has_no_dominated_point():
    best = ptq.budget(random_scores(8), 1e6, by="loss")
    nbytes = [row.nbytes for row in best.front.rows]
    damage = [row.damage for row in best.front.rows]
    assert nbytes == sorted(set(nbytes))
    assert damage == sorted(set(damage), reverse=True)
    assert damage[-1] < 1e-15  # All weights stay floats.
    assert "nbytes" in str(best.front)
    assert "damage" in str(best)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: ptq.budget(s, 10, by="loss"),
            "`nbytes` must be at least 400, the size with the smallest",
        ),
        (lambda s: ptq.budget(s, 1e6, groups=["/q$"], by="loss"), "got '/q\\$'"),
        (lambda s: ptq.budget(s, 1e6, groups=["("], by="loss"), "must be regular expressions"),
        (lambda s: ptq.budget(s, float("nan"), by="loss"), "`nbytes` must be at least"),
        (lambda s: ptq.budget(s, 1e6, by="lost"), "'loss' or 'relative', got 'lost'"),
        (lambda _: ptq.budget(ptq.Scores(()), 1e6), "at least one weight"),
    ],
)
def test_bad_budgets_are_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(random_scores(5))


@pytest.mark.parametrize(
    ("by", "loss", "remedy"),
    [
        ("gradient", 0.0, "Pass a loss and gradient=True .* or use by='loss'"),
        ("relative", 0.0, "Remove weights without such a score, or use by='loss'"),
        ("relative", np.nan, r"Remove weights without such a score\.$"),
        ("loss", np.nan, r"Remove weights without such a score\.$"),
        ("loss", np.inf, r"Remove weights without such a score\.$"),
    ],
)
def test_remedy_for_missing_scores_helps(by: str, loss: float, remedy: str):
    scores = ptq.Scores((ptq.Score("w", None, nbytes=64, loss=loss, relative=np.nan),))
    got = "an infinity" if by == "loss" and np.isinf(loss) else "NaN"
    with pytest.raises(ValueError, match=f"got {got} for 'w'. {remedy}"):
        ptq.budget(scores, 1e6, by=by)


def test_groups_in_a_string_raise():
    """Raises an error, because each character would be an expression, and `|` matches anything."""
    with pytest.raises(TypeError, match="must be a list of strings"):
        ptq.budget(random_scores(5), 1e6, groups="q|k", by="loss")


@pytest.mark.unoptimized
def test_sensitivity_is_the_error_of_the_outputs_and_its_budget_runs():
    rng = np.random.default_rng(0)
    params = {
        "layers": rng.standard_normal((2, 8, 8)).astype(np.float32),
        "head": rng.standard_normal((8, 8)).astype(np.float32),
    }
    batches = [rng.standard_normal((20, 8)).astype(np.float32) for _ in range(2)]

    def model(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return x @ params["head"]

    scores = ptq.sensitivity(model, [*RECIPES[:2], None])(params, batches)
    assert [(row.weight, row.name) for row in scores.rows] == [
        (weight, name)
        for weight in ("head", "layers")
        for name in ("int8_channel", "int4_channel", "float")
    ]
    for name in ("int8_channel", "int4_channel"):
        packed = jaxq.quantize_weights(model, name)(params, batches[0])
        errors = []
        hidden = np.concatenate(batches)
        for i in range(2):
            w = params["layers"][i]
            error = hidden @ (packed["layers"].dequantize()[i] - w)
            errors.append((np.sum(error**2), np.sum((hidden @ w) ** 2)))
            hidden = np.tanh(hidden @ w)
        (row,) = [row for row in scores.of("layers") if row.name == name]
        assert row.nbytes == packed["layers"].nbytes
        np.testing.assert_allclose(row.loss, sum(e for e, _ in errors), rtol=1e-3)
        np.testing.assert_allclose(row.relative, sum(e / p for e, p in errors), rtol=1e-3)
    best = ptq.budget(scores, 260, by="relative")
    packed = jaxq.quantize_weights(model, best.rules)(params, batches[0])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == best.nbytes <= 260
    with pytest.raises(ValueError, match="at least one recipe"):
        ptq.sensitivity(model, [None])


def stacked_loss(params, x):
    """Scans over layers; the result is a scalar."""

    def layer(x, w):
        return x + jnp.tanh(x @ w["in"].T) @ w["out"], None

    return jnp.mean(jnp.square(lax.scan(layer, x, params)[0]))


def perturbed_loss(shifts, params, x):
    """Computes the same loss without a scan, with shifts of the outputs of all products."""
    for i in range(2):
        y = x @ params["in"][i].T + shifts["in"][i]
        x = x + jnp.tanh(y) @ params["out"][i] + shifts["out"][i]
    return jnp.mean(jnp.square(x))


@pytest.mark.unoptimized
def test_scores_by_gradient_weight_errors_of_outputs_by_the_gradient_of_the_loss():
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal((2, 8, 8)).astype(np.float32) for n in ("in", "out")}
    batches = [rng.standard_normal((10, 8)).astype(np.float32) for _ in range(2)]
    candidates = ["int8_channel", "int4_channel", None]
    scores = ptq.sensitivity(stacked_loss, candidates, gradient=True)(params, batches)
    expected = {"in": np.zeros(2), "out": np.zeros(2)}
    for x in batches:
        zeros = {n: jnp.zeros((2, 10, 8)) for n in params}
        gradients = jax.grad(perturbed_loss)(zeros, params, x)
        for i in range(2):
            hidden = np.tanh(x @ params["in"][i].T)
            for n, tokens, axis in (("in", x, 1), ("out", hidden, 0)):
                w = params[n][i]
                for k, recipe in enumerate(candidates[:2]):
                    error = np.asarray(jaxq.fake_quant(w, recipe, axis=axis)) - w
                    error = tokens @ (error.T if n == "in" else error)
                    expected[n][k] += np.sum((np.asarray(gradients[n][i]) * error) ** 2)
            x = x + hidden @ params["out"][i]
    for n, values in expected.items():
        actual = [row.gradient for row in scores.of(n)]
        np.testing.assert_allclose(actual, [*values, 0.0], rtol=2e-3)
    assert ptq.budget(scores, 500).damage > 0
    plain = ptq.Scores(tuple(dataclasses.replace(row, gradient=np.nan) for row in scores.rows))
    with pytest.raises(ValueError, match="must have finite numbers in 'gradient', got NaN"):
        ptq.budget(plain, 500)
    with pytest.raises(ValueError, match=r"must return a scalar loss, got .*\(10, 8\)"):
        ptq.sensitivity(lambda w, x: x @ w, ["int8_channel"], gradient=True)(
            params["in"][0], batches
        )


@pytest.mark.unoptimized
@pytest.mark.parametrize("transposed", [False, True])
def test_padding_has_no_gradient_scores(transposed: bool):
    """Compares scores of batches padded with NaN with those of the tokens alone."""
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal((8, 8)).astype(np.float32) for n in ("up", "down")}
    tokens = [rng.standard_normal((10, 8)).astype(np.float32) for _ in range(2)]
    padded = [
        {"x": np.pad(x, ((0, 6), (0, 0)), constant_values=np.nan), "mask": np.arange(16) < 10}
        for x in tokens
    ]

    def model(params, x):
        if transposed:
            return (params["down"].T @ jnp.tanh(params["up"].T @ x.T)).T
        return jnp.tanh(x @ params["up"]) @ params["down"]

    def loss(params, x):
        return jnp.sum(jnp.square(model(params, x)))

    def padded_loss(params, batch):
        y = model(params, batch["x"])
        return jnp.sum(jnp.where(batch["mask"][:, None], jnp.square(y), 0))

    candidates = ["int8_channel", "int4_channel"]
    want = ptq.sensitivity(loss, candidates, gradient=True)(params, tokens)
    score = ptq.sensitivity(padded_loss, candidates, gradient=True, mask=lambda b: b["mask"])
    got = score(params, padded)
    assert len(got.rows) == 4
    for a, b in zip(got.rows, want.rows, strict=True):
        np.testing.assert_allclose(a.gradient, b.gradient, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (lambda loss: jnp.sqrt(loss * 0), "nan"),
        (lambda loss: loss * 1e25, "inf"),
    ],
)
def test_gradient_scores_that_are_not_finite_are_errors(change, value: str):
    w, x = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    loss = lambda w, x: change(jnp.sum(jnp.square(x @ w)))
    message = rf"gradient scores must be finite, but that of dot_general .* is {value} in batch 0"
    with pytest.raises(ValueError, match=message) as error:
        ptq.sensitivity(loss, ["int4_tensor"], gradient=True)(w, [x])
    assert len(str(error.value)) <= 400
