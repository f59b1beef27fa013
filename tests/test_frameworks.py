"""Models of Flax Linen, Flax NNX, Equinox and Haiku, bitwise against models quantized by hand.

The tests include cases that fail in Qwix, which patches JAX's functions at run time. After a plain
`init` it silently leaves functions in float that JAX has already compiled (`x @ w`, `jnp.dot`,
jitted helpers, `jax.checkpoint` and `Embed.attend`). If the quantized model runs first, it also
quantizes the float model. Forward mode raises, negative axes are ignored, and a misspelled pattern
quantizes nothing.

To add a case, add a function that returns it to `CASES`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same, assert_same_trees

pytestmark = pytest.mark.unoptimized
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
IMAGES = jax.random.normal(jax.random.key(2), (2, 5, 5, 3))
IDS = jnp.arange(6).reshape(2, 3)
TABLE = jaxq.ProductRecipe(None, "int8_channel")


class Case(NamedTuple):
    """A model that is built again for each test, so that JAX has not cached it.

    Attributes:
      init: a function that returns the parameters as the framework initializes them.
      apply: the model, `(params, x) -> y`.
      by_hand: the same model with products written as calls of jaxq.
      products: the names of all products.
      x: the input.
      recipe: the product recipe of every product.
    """

    init: Callable[[], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    by_hand: Callable[[Any, jax.Array], jax.Array]
    products: tuple[str, ...]
    x: jax.Array = X
    recipe: Any = "w8a8"


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies along the last axis of x by a quantized product."""
    return jaxq.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), recipe="w8a8")


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """Applies a quantized convolution."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jaxq.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, recipe="w8a8")


def linen(body: Callable, by_hand: Callable, *products: str, **more: Any) -> Case:
    """Returns a case of a Linen module with a given body."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return body(self, x)

    model, x = Model(), more.get("x", X)
    names = tuple(f"params/{name}" for name in products)
    return Case(lambda: model.init(KEY, x), model.apply, by_hand, names, **more)


def linen_dense() -> Case:
    def by_hand(p: Any, x: jax.Array) -> jax.Array:
        return dot(x, p["params"]["Dense_0"]["kernel"]) + p["params"]["Dense_0"]["bias"][None]

    return linen(lambda _, x: nn.Dense(4)(x), by_hand, "Dense_0/kernel")


def linen_conv() -> Case:
    return linen(
        lambda _, x: nn.Conv(4, (3, 3), use_bias=False)(x),
        lambda p, x: conv(x, p["params"]["Conv_0"]["kernel"]),
        "Conv_0/kernel",
        x=IMAGES,
    )


def linen_attend() -> Case:
    """Returns a case whose embedding table is also the output layer."""

    def body(_: Any, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(10, 8)
        return embed.attend(jnp.tanh(embed(ids)))

    def by_hand(p: Any, ids: jax.Array) -> jax.Array:
        table = p["params"]["Embed_0"]["embedding"]
        numbers = (((2,), (0,)), ((), ()))
        x = jaxq.fake_quant(table, jaxq.Recipe("int8", jaxq.PerChannel(0)))[ids]
        return jaxq.dot_general(jnp.tanh(x), table.T, numbers, recipe=TABLE)

    names = "Embed_0/embedding", "Embed_0/embedding#2"
    return linen(body, by_hand, *names, x=IDS, recipe=TABLE)


def kernel(module: nn.Module) -> jax.Array:
    """Returns a weight of the module."""
    return module.param("w", nn.initializers.lecun_normal(), (8, 8))


def linen_own(product: Callable) -> Callable[[], Case]:
    """Returns a factory of a case with a product written by the user."""

    def case() -> Case:
        return linen(
            lambda self, x: product()(x, kernel(self)),
            lambda p, x: dot(x, p["params"]["w"]),
            "w",
        )

    return case


def linen_layers(lift: Callable, by_hand_lift: Callable) -> Callable[[], Case]:
    """Returns a factory of a case with three scanned layers, each transformed by `lift`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(nn.Dense(8, use_bias=False)(x)), None

    def body(_: Any, x: jax.Array) -> jax.Array:
        own = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(lift(Layer), length=3, **own)
        return layers(name="layers")(x, None)[0]

    def by_hand(p: Any, x: jax.Array) -> jax.Array:
        weights = p["params"]["layers"]["Dense_0"]["kernel"]
        layer = by_hand_lift(lambda x, w: (jnp.tanh(dot(x, w)), None))
        return lax.scan(layer, x, weights)[0]

    return lambda: linen(body, by_hand, "layers/Dense_0/kernel")


def nnx_layers() -> Case:
    """Returns a case with a convolution and layers under `nnx.vmap` and `nnx.scan`."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
            make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, use_bias=False, rngs=rngs))
            self.layers = make(rngs.split(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            run = nnx.scan(lambda x, f: jnp.tanh(f(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(self.conv(x), self.layers)

    definition, _ = nnx.split(Model(nnx.Rngs(0)))

    def by_hand(p: Any, x: jax.Array) -> jax.Array:
        x = conv(x, p["conv"]["kernel"][...])
        layers = p["layers"]["kernel"][...]
        return lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, layers)[0]

    return Case(
        lambda: nnx.split(Model(nnx.Rngs(0)))[1],
        lambda state, x: nnx.merge(definition, state)(x),
        by_hand,
        ("conv/kernel/value", "layers/kernel/value"),
        IMAGES,
    )


def equinox_layers() -> Case:
    """Returns a case of `eqx.nn.Linear`, which multiplies single vectors from the left."""

    class Model(eqx.Module):
        first: eqx.nn.Linear
        last: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return eqx.filter_jit(eqx.filter_vmap(self.first))(x) @ self.last

    w8a8 = jaxq.get_product_recipe("w8a8")
    left = jaxq.ProductRecipe(w8a8.rhs, w8a8.lhs)

    def by_hand(p: Any, x: jax.Array) -> jax.Array:
        def first(x: jax.Array) -> jax.Array:
            numbers = (((1,), (0,)), ((), ()))
            return jaxq.dot_general(p.first.weight, x, numbers, recipe=left) + p.first.bias

        return dot(jax.vmap(first)(x), p.last)

    return Case(
        lambda: Model(eqx.nn.Linear(8, 6, key=KEY), jnp.ones((6, 4)) / 3),
        lambda model, x: model(x),
        by_hand,
        ("first/weight", "last"),
    )


def haiku_layers() -> Case:
    """Returns a case with a convolution and a layer under `hk.remat`."""

    def body(x: jax.Array) -> jax.Array:
        x = hk.Conv2D(4, 3, with_bias=False)(x)
        return hk.remat(hk.Linear(3, with_bias=False))(x)

    model = hk.transform(body)
    return Case(
        lambda: model.init(KEY, IMAGES),
        lambda params, x: model.apply(params, None, x),
        lambda p, x: dot(conv(x, p["conv2_d"]["w"]), p["linear"]["w"]),
        ("conv2_d/w", "linear/w"),
        IMAGES,
    )


CASES: dict[str, Callable[[], Case]] = {
    "linen Dense": linen_dense,
    "linen Conv": linen_conv,
    "linen Embed.attend": linen_attend,
    "linen x @ w": linen_own(lambda: lambda x, w: x @ w),
    "linen jnp.dot": linen_own(lambda: jnp.dot),
    "linen jitted helper": linen_own(lambda: jax.jit(lambda x, w: x @ w)),
    "linen jax.checkpoint": linen_own(lambda: jax.checkpoint(lambda x, w: x @ w)),
    "linen scan": linen_layers(lambda layer: layer, lambda layer: layer),
    "linen remat": linen_layers(nn.remat, jax.checkpoint),
    "nnx": nnx_layers,
    "equinox": equinox_layers,
    "haiku": haiku_layers,
}


# The most complex case of every framework.
FAST = ("linen Embed.attend", "linen scan", "nnx", "equinox", "haiku")


def everything(fn: Callable, params: Any, x: jax.Array) -> Any:
    """Returns the value, gradient, tangent and vmapped values of a model."""

    def loss(params: Any) -> Any:
        y = fn(params, x)
        return (y**2).mean(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    _, tangent = jax.jvp(lambda params: fn(params, x), (params,), (params,))
    batch = jax.vmap(fn, (None, 0))(params, jnp.stack([x, x[::-1]]))
    return y, gradient, tangent, batch


@pytest.mark.parametrize("name", data.each(CASES, FAST))
def test_model_quantized_after_init_matches_model_by_hand(name: str):
    case = CASES[name]()
    params = case.init()
    before = jax.jit(case.apply)(params, case.x)
    rules = [("", case.recipe)]
    quantized = jaxq.quantize_fn(case.apply, rules)
    got = jax.jit(everything, static_argnums=0)(quantized, params, case.x)
    assert_same_trees(got, jax.jit(everything, static_argnums=0)(case.by_hand, params, case.x))
    assert not np.array_equal(got[0], before)
    assert_same_trees(jax.jit(case.apply)(params, case.x), before)
    table = jaxq.explain(case.apply, rules)(params, case.x)
    assert tuple(row.product for row in table.rows) == case.products
    assert all("test_frameworks.py" in row.source for row in table.rows)


@pytest.mark.parametrize("name", data.each(CASES, ["linen jitted helper", "nnx"]))
def test_float_model_is_unchanged_after_quantized_one(name: str):
    make = CASES[name]
    params = make().init()
    case = make()
    quantized = jax.jit(jaxq.quantize_fn(case.apply, [("", case.recipe)]))(params, case.x)
    after = jax.jit(case.apply)(params, case.x)
    other = make()
    assert_same_trees(after, jax.jit(other.apply)(params, other.x))
    assert_same_trees(*map(jax.tree.leaves, (case.init(), params)))
    assert not np.array_equal(quantized, after)


def test_callable_module_is_quantized():
    """Uses an Equinox module with leaves that are not arrays, such as activation functions."""
    model = eqx.nn.MLP(8, 4, 8, 1, key=KEY)
    rules = [("layers/1", "w4a16")]
    got = jaxq.quantize_fn(model, rules)(X[0])
    hidden = jax.nn.relu(model.layers[0](X[0]))
    weight = jaxq.fake_quant(model.layers[1].weight, jaxq.Recipe("int4", jaxq.PerChannel(0)))
    assert_same(got, weight @ hidden + model.layers[1].bias)
    gradient = eqx.filter_grad(lambda m: jaxq.quantize_fn(m, rules)(X[0]).sum())(model)
    assert_same(gradient.layers[1].weight, jnp.broadcast_to(hidden, (4, 8)))
    assert gradient.activation is None


W = jax.random.normal(jax.random.key(3), (2, 4, 6))
Y = jax.random.normal(jax.random.key(4), (3, 2, 4))


@pytest.mark.parametrize(
    ("negative", "positive"),
    [
        (
            lambda w, y: jnp.tensordot(y, w, axes=((-1, -2), (-2, -3))),
            lambda w, y: jnp.tensordot(y, w, axes=((2, 1), (1, 0))),
        ),
        (
            lambda w, y: lax.conv_general_dilated(y, jnp.moveaxis(w, 0, -2), (1,), "SAME"),
            lambda w, y: lax.conv_general_dilated(y, jnp.transpose(w, (1, 0, 2)), (1,), "SAME"),
        ),
        (
            lambda w, y: jax.vmap(lambda w: jnp.tensordot(y, w), -1, -1)(w),
            lambda w, y: jax.vmap(lambda w: jnp.tensordot(y, w), 2, 1)(w),
        ),
        (
            lambda w, y: nn.DenseGeneral(6, axis=(-2, -1)).apply(dense(w), y),
            lambda w, y: nn.DenseGeneral(6, axis=(1, 2)).apply(dense(w), y),
        ),
        (
            lambda w, _: jnp.take(w, jnp.array([3, 0]), axis=-2),
            lambda w, _: jnp.take(w, jnp.array([3, 0]), axis=1),
        ),
    ],
    ids=["tensordot", "conv", "vmap", "DenseGeneral", "take"],
)
def test_negative_axes_equal_positive_axes(negative, positive):
    """Uses functions with negative axes, which `jax.lax.dot_general` itself rejects."""
    for recipe in ("w8a8", jaxq.ProductRecipe(None, jaxq.Recipe("int4", jaxq.PerBlock(2)))):
        got, want = (jaxq.quantize_fn(f, [("", recipe)])(W, Y) for f in (negative, positive))
        # XLA may sum the 8 terms in another order.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
        assert np.abs(got - negative(W, Y)).max() > 1e-3
    with pytest.raises(TypeError, match="nonnegative"):
        jax.lax.dot_general(Y, W, (((-1,), (-2,)), ((), ())))


def dense(w: jax.Array) -> Any:
    return {"params": {"kernel": w, "bias": jnp.zeros(w.shape[-1])}}


def test_negative_axes_of_recipes_equal_positive_axes():
    def f(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("nbi,bio->no", x, p["w"])

    def run(axes: Any) -> jax.Array:
        kind = jaxq.Recipe("int4", jaxq.PerChannel(axes))
        return jaxq.quantize_fn(f, [("w", jaxq.ProductRecipe(None, kind))])({"w": W}, Y)

    assert_same(run(-1), run(0))


def test_misspelled_pattern_raises_with_suggestion():
    case = linen_dense()
    text = "matches no weight. Did you mean params/Dense_0/kernel"
    with pytest.raises(ValueError, match=re.escape(text)):
        jaxq.quantize_fn(case.apply, [("Dense_O/kernel", "w8a8")])(case.init(), X)


def scanned(cell: eqx.Module, x: jax.Array, state: Any) -> Any:
    return lax.scan(lambda state, x: (cell(x, state), None), state, x)[0]


def recurrent(core: Any, x: jax.Array) -> Any:
    """Unrolls a recurrent cell of Haiku."""
    return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]


SEQUENCE = jax.random.normal(KEY, (2, 3, 8))
ZEROS = jnp.zeros(6)
STORED: dict[str, tuple[Callable[[], Any], jax.Array]] = {
    "linen attention": (lambda: nn.MultiHeadDotProductAttention(2, qkv_features=8), SEQUENCE),
    "linen LSTM": (lambda: nn.RNN(nn.OptimizedLSTMCell(6)), SEQUENCE),
    "linen transposed": (lambda: nn.ConvTranspose(4, (3, 3), transpose_kernel=True), IMAGES),
    "nnx attention": (
        lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)),
        SEQUENCE,
    ),
    "nnx LSTM": (lambda: nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=nnx.Rngs(0))), SEQUENCE),
    "equinox attention": (lambda: eqx.nn.MultiheadAttention(2, 8, key=KEY), SEQUENCE[0]),
    "equinox LSTM": (lambda: eqx.nn.LSTMCell(8, 6, key=KEY), SEQUENCE[0]),
    "equinox groups": (lambda: eqx.nn.Conv2d(4, 4, 3, groups=2, key=KEY), jnp.ones((4, 5, 5))),
    "haiku LSTM": (lambda: hk.transform(lambda x: recurrent(hk.LSTM(6), x)), SEQUENCE),
    "haiku GRU": (lambda: hk.transform(lambda x: recurrent(hk.GRU(6), x)), SEQUENCE),
    "haiku depthwise": (lambda: hk.transform(lambda x: hk.DepthwiseConv2D(1, 3)(x)), IMAGES),
}


def function_of(make: Callable[[], Any], x: jax.Array) -> tuple[Callable[..., Any], Any]:
    """Returns a model as a function of its parameters, and the shapes of the parameters."""
    if "eqx" in make.__code__.co_names:
        params, static = eqx.partition(
            eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        )

        def apply(params: Any, x: jax.Array) -> Any:
            model = eqx.combine(params, static)
            if isinstance(model, eqx.nn.LSTMCell):
                return scanned(model, x, (ZEROS, ZEROS))
            return model(x, x, x) if isinstance(model, eqx.nn.MultiheadAttention) else model(x)

        return apply, params
    if "nnx" in make.__code__.co_names:
        definition, state = nnx.split(nnx.eval_shape(make))
        return lambda state, x: nnx.merge(definition, state)(x), state
    model = make()
    params = jax.eval_shape(model.init, KEY, x)
    if isinstance(model, nn.Module):
        return model.apply, params
    return lambda params, x: model.apply(params, None, x), params


@pytest.mark.parametrize(("make", "x"), STORED.values(), ids=STORED)
def test_weights_of_framework_layers_are_stored(make: Callable[[], Any], x: jax.Array):
    fn, params = function_of(make, x)
    rules = [("", "int4_channel")]
    packed = jax.eval_shape(jaxq.quantize_weights(fn, rules, strict=True), params, x)
    leaves = jax.tree.leaves(packed, is_leaf=lambda leaf: isinstance(leaf, jaxq.Quantized))
    assert any(isinstance(leaf, jaxq.Quantized) for leaf in leaves)
    rows = jaxq.explain(fn, rules)(params, x).rows
    # Attention also multiplies activations by each other, which have no stored weight.
    assert {row.stored for row in rows if "/dot_general" not in row.product} == {"yes"}


def test_lstm_with_concatenated_kernels_runs_on_stored_weights():
    model, rng = nn.RNN(nn.OptimizedLSTMCell(6)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        jax.eval_shape(model.init, KEY, SEQUENCE),
    )
    rules = [("", "int4_channel")]
    quantized = jax.jit(jaxq.quantize_fn(model.apply, rules))
    packed = jaxq.quantize_weights(model.apply, rules, strict=True)(params, SEQUENCE)
    got, want = quantized(packed, SEQUENCE), quantized(params, SEQUENCE)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)  # Sums of 8 terms may differ in order.
