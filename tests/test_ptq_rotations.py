"""Rotations of inputs and weights: online Hadamard transforms, and folds into weights."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.ptq_data import gated, gated_params, normal

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float32).eps)
RULES = {"layers": "int4_channel"}


def sylvester(n: int) -> np.ndarray:
    return np.array([[1]]) if n == 1 else np.kron(sylvester(n // 2), [[1, 1], [1, -1]])


PARAMS = gated_params(16)
X = normal(5, 40, 8)


def test_rotated_weights_equal_the_formula_and_preserve_the_outputs():
    params, rotations = ptq.rotate_inputs(gated, RULES)(PARAMS, X, key=KEY)
    assert rotations.lengths == (("layers/gate", 8), ("layers/down", 16))
    assert rotations.inputs == (
        ("layers/gate", "layers/gate"), ("layers/up", "layers/gate"), ("layers/down", "layers/down")
    )  # fmt: skip
    for name, old in PARAMS["layers"].items():
        signs = np.asarray(rotations.signs[dict(rotations.inputs)[f"layers/{name}"]])
        for i in range(2):
            matrix = signs[i][:, None] * sylvester(len(signs[i])) / np.sqrt(len(signs[i]))
            w = old[i].T if name == "up" else old[i]
            new = np.asarray(params["layers"][name][i])
            expected = np.tensordot(matrix, w.astype(np.float64), (0, 0))
            expected = expected.T if name == "up" else expected
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    assert np.any(rotations.signs["layers/gate"][0] != rotations.signs["layers/gate"][1])
    rotated = rotations.apply(gated)
    y = gated(PARAMS, X)
    np.testing.assert_allclose(rotated(params, X), y, rtol=1e-5, atol=1e-5 * float(np.abs(y).max()))
    np.testing.assert_array_equal(params["head"], PARAMS["head"])
    # Products of one input still share their statistics.
    inputs = ptq.observe(rotated, RULES, hessian=False)(params, X)[1]
    assert [*inputs.statistics] == ["layers/gate", "layers/down"]


def linear(w, x):
    return x @ w


@pytest.mark.parametrize("length", data.each([32, None], [None]))
def test_rotated_products_differ_by_rounding_only(length: int | None):
    n = 192
    w, x = normal(6, n, 16), normal(7, 50, n) * np.exp(normal(8, n))
    new, rotations = ptq.rotate_inputs(linear, "int4_g32", length=length)(w, x, key=KEY)
    block = length or 64
    assert rotations.lengths == (("", block),)
    y = np.asarray(rotations.apply(linear)(new, x), np.float64)
    # A rotation rounds log2(length) sums and one product of vectors that keep their norms, and the
    # product of the operands n sums.
    rounding = EPS * (n + 2 * np.log2(block) + 4)
    bound = rounding * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)
    assert np.all(np.abs(y - x.astype(np.float64) @ w) <= bound)


def test_rotation_spreads_the_outliers_of_activations():
    w, x = normal(9, 128, 32), normal(10, 100, 128)
    x[:, 5] *= 20
    recipe = jaxq.ProductRecipe(jaxq.Recipe("int4", jaxq.PerToken()), "int4_channel")
    new, rotations = ptq.rotate_inputs(linear, recipe)(w, x, key=KEY)
    rotated = rotations.apply(linear)
    errors = [
        np.linalg.norm(jaxq.quantize_fn(fn, recipe)(weight, x) - x @ w)
        for fn, weight in ((linear, w), (rotated, new))
    ]
    assert errors[1] < 0.7 * errors[0]
    # The stored model is the simulated one.
    packed = jaxq.quantize_weights(rotated, recipe)(new, x)
    stored = jaxq.quantize_fn(rotated, recipe)(packed, x)
    assert np.linalg.norm(stored - x @ w) == pytest.approx(float(errors[1]), rel=1e-4)


def test_products_without_rotation_are_listed_with_the_reason():
    def fn(params, x):
        return x @ params["odd"] + x[:, :2] @ params["tied"] + x[:, 1:] @ params["tied"]

    params = {"odd": normal(1, 3, 4), "tied": normal(2, 2, 4), "plain": normal(3, 4, 4)}
    both = lambda params, x: fn(params, x) @ params["plain"]
    _, rotations = ptq.rotate_inputs(both, "int8_channel")(params, normal(4, 5, 3), key=KEY)
    assert rotations.inputs == (("plain", "plain"),)
    reasons = dict(rotations.skipped)
    assert reasons["odd"] == "the number of its inputs, 3, is odd"
    assert "also used by" in reasons["tied"]
    assert "is odd" in str(rotations)


D, HEADS, SIZE, TOKENS = 24, 2, 4, 7


def norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None]


def transformer(params, tokens):
    """Scans over layers of attention and a gated network, with RMSNorms."""

    def layer(x, w):
        h = norm(x, w["norm1"])
        q, k = (jnp.einsum("td,dhk->htk", h, w[name]) for name in "qk")
        v = (h @ w["v"]).reshape(-1, HEADS, SIZE).transpose(1, 0, 2)
        weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2))
        x = x + jnp.einsum("hts,hsk,hkd->td", weights, v, w["o"])
        h = norm(x, w["norm2"] + 1)
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"].T)) @ w["down"] + w["bias"][
            None
        ], None

    x = lax.scan(layer, params["embed"][tokens], params["layers"])[0]
    return norm(x, params["norm"]) @ params["head"]


def stream(params, tokens):
    """Returns the residual stream in front of the head."""
    shown = {**params, "norm": jnp.ones(D), "head": jnp.eye(D)}
    return transformer(shown, tokens)


def transformer_params() -> dict:
    shapes = {
        "norm1": (D,), "q": (D, HEADS, SIZE), "k": (D, HEADS, SIZE), "v": (D, HEADS * SIZE),
        "o": (HEADS, SIZE, D), "norm2": (D,), "gate": (D, 16), "up": (16, D), "down": (16, D),
        "bias": (D,),
    }  # fmt: skip
    layers = {name: normal(n, 2, *shape) / 4 for n, (name, shape) in enumerate(shapes.items())}
    embed = normal(20, 11, D)
    embed[:, 3] *= 30  # An outlier channel, as in trained language models.
    return {
        "layers": layers, "embed": embed, "norm": normal(21, D) + 1, "head": normal(22, D, 11)
    }  # fmt: skip


TOKENS_IN = np.arange(TOKENS) % 11
STREAM = {"embed": -1, "head": -2} | {
    f"layers/{name}": axis
    for name, axis in {
        "q": -3, "k": -3, "v": -2, "o": -1, "gate": -2, "up": -1, "down": -1, "bias": -1
    }.items()
}  # fmt: skip
NORMS = [
    ptq.Norm("layers/norm1", ["layers/q", "layers/k", "layers/v"]),
    ptq.Norm("layers/norm2", ["layers/gate", "layers/up"], offset=1.0),
    ptq.Norm("norm", ["head"]),
]
INSIDE = {"layers/v": -1, "layers/o": -2}


def folded(params):
    """Returns parameters with R1 in the residual stream and R2 in the heads."""
    stream = ptq.random_rotation(D, KEY)
    params = ptq.fold_rotation(transformer, stream, STREAM, norms=NORMS)(params, TOKENS_IN)
    inside = ptq.random_rotation(SIZE, jax.random.key(1))
    return ptq.fold_rotation(transformer, inside, INSIDE)(params, TOKENS_IN)


def test_folded_rotations_do_not_change_the_outputs():
    params = transformer_params()
    new = folded(params)
    y, z = (np.asarray(transformer(tree, TOKENS_IN)) for tree in (params, new))
    np.testing.assert_allclose(z, y, atol=1e-4 * np.abs(y).max())
    np.testing.assert_array_equal(new["layers"]["norm1"], np.ones((2, D)))
    np.testing.assert_array_equal(new["layers"]["norm2"], np.zeros((2, D)))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
    # The vectors themselves are rotated, and their outliers are spread.
    before, after = (np.asarray(stream(tree, TOKENS_IN), np.float64) for tree in (params, new))
    matrix = ptq.random_rotation(D, KEY)
    np.testing.assert_allclose(after, before @ matrix, atol=1e-4 * np.abs(before).max())
    kurtosis = [np.mean(x**4) / np.mean(x**2) ** 2 for x in (before, after)]
    assert kurtosis[0] > 10
    assert kurtosis[1] < 4


@pytest.mark.slow
def test_folded_rotations_are_exact_in_float64():
    params = jax.tree.map(lambda x: x.astype(np.float64), transformer_params())
    with jax.enable_x64(True):
        new = folded(params)
        assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(np.float64)}
        y, z = (np.asarray(transformer(tree, TOKENS_IN)) for tree in (params, new))
    np.testing.assert_allclose(z, y, rtol=1e-12, atol=1e-12 * np.abs(y).max())


def test_layernorm_commutes_with_a_rotation_that_keeps_the_mean():
    def fn(params, x):
        x = x @ params["in"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.std(x, -1, keepdims=True)
        return (x * params["scale"][None] + params["bias"][None]) @ params["out"]

    params = {"in": normal(0, 5, 12), "scale": normal(1, 12), "out": normal(2, 12, 3)}
    params["bias"] = normal(4, 12)
    x = normal(3, 9, 5)
    axes, norms = {"in": -1, "out": -2}, [ptq.Norm("scale", ["out"], bias="bias")]
    rotation = ptq.random_rotation(12, KEY, keep_mean=True)
    np.testing.assert_allclose(np.ones(12) @ rotation, np.ones(12), atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-12)
    new = ptq.fold_rotation(fn, rotation, axes, norms=norms)(params, x)
    np.testing.assert_allclose(fn(new, x), fn(params, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="but they differ by"):
        ptq.fold_rotation(fn, ptq.random_rotation(12, KEY), axes, norms=norms)(params, x)
    missing = [ptq.Norm("scale", ["out"])]
    with pytest.raises(ValueError, match="with a scale or a bias to `norms`"):
        ptq.fold_rotation(fn, rotation, axes, norms=missing)(params, x)
    dead = {**params, "scale": params["scale"] * (np.arange(12) > 0)}
    with pytest.raises(ValueError, match=r"the bias 'bias' must .* be 0 where that is 0"):
        ptq.fold_rotation(fn, rotation, axes, norms=norms)(dead, x)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 44, 60, 64, 76, 108, 140, 576])
def test_random_rotations_are_hadamard_matrices(n: int):
    rotation = ptq.random_rotation(n, KEY)
    np.testing.assert_allclose(np.abs(rotation), 1 / np.sqrt(n), rtol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(n), atol=1e-12)
    np.testing.assert_array_equal(rotation, ptq.random_rotation(n, KEY))


def test_other_sizes_have_random_orthogonal_matrices():
    for n in (3, 7, 92):
        rotation = ptq.random_rotation(n, KEY)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(n), atol=1e-12)
        assert np.any(np.abs(rotation) > 1.01 / np.sqrt(n))
    assert ptq.random_rotation(1, KEY, keep_mean=True).tolist() == [[1.0]]


def tied(params, tokens):
    x = params["embed"][tokens]
    return norm(x, params["norm"]) @ params["embed"].T


TIED = {"embed": normal(0, 5, 8), "norm": normal(1, 8)}


def test_tied_embeddings_are_errors_until_they_are_copied():
    rotation = ptq.random_rotation(8, KEY)
    norms = [ptq.Norm("norm", ["embed"])]
    with pytest.raises(ValueError, match=r"'embed', which is also looked up \(a tied"):
        ptq.fold_rotation(tied, rotation, {"embed": -1}, norms=norms)(TIED, np.arange(5))

    def untied(params, tokens):
        return norm(params["embed"][tokens], params["norm"]) @ params["head"].T

    params = {**TIED, "head": TIED["embed"]}
    fold = ptq.fold_rotation(
        untied, rotation, {"embed": -1, "head": -1}, norms=[ptq.Norm("norm", ["head"])]
    )
    new = fold(params, np.arange(5))
    y = tied(TIED, np.arange(5))
    np.testing.assert_allclose(untied(new, np.arange(5)), y, rtol=1e-4, atol=1e-4)
    # Without a norm to fold, one rotation is right for both uses of the leaf.
    plain = {**TIED, "norm": np.ones(8, np.float32)}
    ptq.fold_rotation(tied, rotation, {"embed": -1})(plain, np.arange(5))


def rotate(axes, rotation=None, norms=(), params=None):
    fold = ptq.fold_rotation(
        tied, ptq.random_rotation(8, KEY) if rotation is None else rotation, axes, norms=norms
    )
    return fold(TIED if params is None else params, np.arange(5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rotate({"embed": -1}, np.ones((8, 8))), ValueError, "must be an orthogonal"),
        (lambda: rotate({"embd": -1}), ValueError, "'embd' must be the path .* embed"),
        (lambda: rotate({"embed": 1}), ValueError, "a negative axis of 'embed'"),
        (lambda: rotate({"embed": -2}), ValueError, r"multiple of 8, got -2 for the shape \(5, 8"),
        (
            lambda: rotate({"embed": -1}),
            ValueError,
            "must not change the outputs, but they",
        ),
        (
            lambda: rotate({"embed": -1}, norms=[ptq.Norm("norm", ["head"])]),
            ValueError,
            "all readers of norm 'norm', but lacks 'head'",
        ),
        (
            lambda: rotate({"embed": -1}, params={**TIED, "embed": np.arange(40).reshape(5, 8)}),
            ValueError,
            "must be a float array, but it has the dtype int64",
        ),
        (lambda: ptq.Norm("norm", "head"), TypeError, "must be a list of strings"),
        (lambda: ptq.random_rotation(0, KEY), ValueError, "`n` must be an integer of at least 1"),
        (
            lambda: ptq.rotate_inputs(linear, "int4_g32", length=48)(
                normal(0, 96, 4), normal(1, 3, 96), key=KEY
            ),
            ValueError,
            "must be a power of two that divides the inputs .* got 48 for the 96 inputs",
        ),
        (
            lambda: ptq.rotate_inputs(lambda w, x: x @ w + w.sum(), "int4_channel")(
                normal(0, 8, 4), X, key=KEY
            ),
            ValueError,
            "must equal `fn`, but its outputs differ by",
        ),
        (lambda: ptq.rotate_inputs([linear], "int4_g32"), TypeError, "got a pytree, list"),
    ],
)
def test_bad_calls_are_errors(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
