"""Quantizes one model in plain JAX, Flax NNX and Equinox with the same call.

The model is the transformer of `language_model.py`, written with the layers of each framework and
with the same parameters. `jaxq.quantize_fn` takes each version unchanged. The versions differ in
the paths of the weights and, for Equinox, in their axes: `eqx.nn.Linear` stores `[out, in]` and
multiplies from the left.

The table shows the loss of one batch and the relative error of the gradient of the embedding,
compared with plain JAX. The gradient of Equinox differs because some of its sums run in
another order. With stochastic rounding it also differs because random bits are drawn by position in
the tensor and its axes are swapped: for `nvfp4_training` this changes the gradient as much as
another key does. Rounded to nearest, the difference is below 2e-8.

    python examples/frameworks.py [--short]
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import language_model
from jax import lax
from jax import numpy as jnp
from language_model import LAYERS, VOCABULARY, WIDTH

import jaxq

try:
    import equinox as eqx
    from flax import nnx
except ImportError as error:
    sys.exit(f"This example needs {error.name}: pip install '.[examples]'")

RECIPES = ("w8a8", "fp8_training", "mxfp4_training", "nvfp4_training", "w4a16_g128")
SHORT = ("fp8_training",)
PRODUCTS = ("query", "key", "value", "output", "up", "down")


class NnxLayer(nnx.Module):
    """A transformer layer made of `nnx.Linear`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.output = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.norms = nnx.Param(jnp.ones((2, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x plus the outputs of attention and of the perceptron."""
        y = language_model.normalize(self.norms[0], x)
        heads = [f(y) for f in (self.query, self.key, self.value)]
        x = x + self.output(language_model.attend(*heads))
        y = language_model.normalize(self.norms[1], x)
        return x + self.down(jax.nn.gelu(self.up(y)))


class NnxModel(nnx.Module):
    """The transformer in NNX, with stacked layers in a scan."""

    def __init__(self, params: Any) -> None:
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.vmap(NnxLayer)(rngs.split(LAYERS))
        self.norm = nnx.Param(params["norm"])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)
        self.embedding.embedding[...] = params["embedding"]
        self.head.kernel[...] = params["head"]
        layer_params = params["layers"]
        for name in PRODUCTS:
            part = layer_params["mlp" if name in ("up", "down") else "attention"]
            getattr(self.layers, name).kernel[...] = part[name]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits `[batch, length, 128]`."""
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(self.embedding(tokens), self.layers)
        return self.head(language_model.normalize(self.norm[...], x))


class EqxLayer(eqx.Module):
    """A transformer layer made of `eqx.nn.Linear`, which takes single vectors."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: jax.Array

    def __init__(self, params: Any) -> None:
        attention_params, mlp = params["attention"], params["mlp"]
        self.query, self.key, self.value, self.output = (
            _linear(attention_params[name]) for name in ("query", "key", "value", "output")
        )
        self.up, self.down = _linear(mlp["up"]), _linear(mlp["down"])
        self.norms = jnp.stack([attention_params["norm"], mlp["norm"]])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x plus the outputs of attention and of the perceptron."""
        y = language_model.normalize(self.norms[0], x)
        heads = [_per_token(f)(y) for f in (self.query, self.key, self.value)]
        x = x + _per_token(self.output)(language_model.attend(*heads))
        y = language_model.normalize(self.norms[1], x)
        return x + _per_token(self.down)(jax.nn.gelu(_per_token(self.up)(y)))


class EqxModel(eqx.Module):
    """The transformer in Equinox, with stacked layers in a scan."""

    embedding: eqx.nn.Embedding
    layers: EqxLayer
    norm: jax.Array
    head: eqx.nn.Linear

    def __init__(self, params: Any) -> None:
        self.embedding = eqx.nn.Embedding(weight=params["embedding"])
        self.layers = eqx.filter_vmap(EqxLayer)(params["layers"])
        self.norm = params["norm"]
        self.head = _linear(params["head"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits `[batch, length, 128]`."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            return eqx.combine(arrays, rest)(x), None

        x, _ = lax.scan(layer, _per_token(self.embedding)(tokens), arrays)
        return _per_token(self.head)(language_model.normalize(self.norm, x))


def _linear(kernel: jax.Array) -> eqx.nn.Linear:
    """Returns a linear layer with a kernel `[in, out]`."""
    linear = eqx.nn.Linear(*kernel.shape, use_bias=False, key=jax.random.key(0))
    return eqx.tree_at(lambda layer: layer.weight, linear, kernel.T)


def _per_token(function: Callable) -> Callable:
    """Maps a function over both leading axes, rows and tokens."""
    return jax.vmap(jax.vmap(function))


def run(recipe: str, rows: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns the loss and its gradient for the embedding, by framework."""
    params = language_model.init(jax.random.key(0))
    # A head of zeros, as `init` returns it, would make the logits independent of the layers.
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape) / WIDTH**0.5
    definition, state = nnx.split(NnxModel(params))
    key = jax.random.key(2) if jaxq.get_product_recipe(recipe).draws else None

    def nnx_loss(state: Any, rows: jax.Array) -> jax.Array:
        model = nnx.merge(definition, state)
        return language_model.cross_entropy(model(rows[:, :-1]), rows)

    def equinox_loss(model: EqxModel, rows: jax.Array) -> jax.Array:
        return language_model.cross_entropy(model(rows[:, :-1]), rows)

    cases = {
        "plain JAX": (language_model.loss, params, lambda g: g["embedding"]),
        "Flax NNX": (nnx_loss, state, lambda g: g["embedding"]["embedding"][...]),
        "Equinox": (equinox_loss, EqxModel(params), lambda g: g.embedding.weight),
    }
    results = {}
    for name, (loss, params, embedding) in cases.items():
        quantized = jaxq.quantize_fn(loss, [("layers/", recipe)], key=key)
        value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(quantized))(params, rows)
        results[name] = (value, embedding(gradient))
    return results


def _distance(x: jax.Array, y: jax.Array) -> float:
    """Returns the norm of the difference of two arrays relative to the norm of y."""
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, tuple[jax.Array, jax.Array]]]:
    """Runs the model in all frameworks, prints the table and returns the results."""
    args = common.arguments(__doc__, argv)
    data, _ = language_model.text()
    rows = language_model.windows(data, jnp.arange(2) * 1000)
    results = {recipe: run(recipe, rows) for recipe in (SHORT if args.short else RECIPES)}
    grid = common.Table(title="One transformer in three frameworks: loss in bits per byte")
    names = [*next(iter(results.values()))]
    for head in ("recipe", *names, *(f"gradient\nerror of\n{name}" for name in names[1:])):
        grid.add_column(head)
    for recipe, by_framework in results.items():
        losses, gradients = zip(*by_framework.values(), strict=True)
        distances = [_distance(x, gradients[0]) for x in gradients[1:]]
        grid.add_row(
            recipe,
            *(f"{loss:.7f}" for loss in losses),
            *("identical" if d == 0 else f"{d:.0e}" for d in distances),
        )
    common.Console().print(grid)
    return results


if __name__ == "__main__":
    main()
