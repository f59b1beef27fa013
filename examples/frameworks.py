"""One model in plain JAX, in Flax NNX and in Equinox: quantized by the same call, to the same bits.

The transformer of `language_model.py`, written three times over with each framework's own layers,
and the same parameters in all. `jaxq.quantize_fn` takes each as it is. What differs is where a
weight is: its path, and for Equinox its axes, as `eqx.nn.Linear` keeps `[out, in]` and multiplies
from the left. Shown is the loss of one batch, and how far the gradient of the embedding is from
that in plain JAX: some sums of Equinox's run in another order, and what is rounded stochastically
draws by place in the tensor, whose axes have another order too. (That moves the gradient of
`nvfp4` as far as another key does; rounded to nearest, it is within 2e-8.)

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
    sys.exit(f"This example needs {error.name}: pip install 'jaxq[examples]'")

RECIPES = ("w8a8", "fp8", "mxfp4", "nvfp4", "w4_g128")
SHORT = ("fp8",)
PRODUCTS = ("query", "key", "value", "output", "up", "down")


class NnxLayer(nnx.Module):
    """One layer, of `nnx.Linear`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.output = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.norms = nnx.Param(jnp.ones((2, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention and a perceptron, each added to what comes in."""
        y = language_model.normalize(self.norms[0], x)
        heads = [f(y) for f in (self.query, self.key, self.value)]
        x = x + self.output(language_model.attend(*heads))
        y = language_model.normalize(self.norms[1], x)
        return x + self.down(jax.nn.gelu(self.up(y)))


class NnxModel(nnx.Module):
    """The transformer in NNX, its layers stacked and scanned."""

    def __init__(self, params: Any) -> None:
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.vmap(NnxLayer)(rngs.split(LAYERS))
        self.norm = nnx.Param(params["norm"])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)
        self.embedding.embedding[...] = params["embedding"]
        self.head.kernel[...] = params["head"]
        own = params["layers"]
        for name in PRODUCTS:
            part = own["mlp" if name in ("up", "down") else "attention"]
            getattr(self.layers, name).kernel[...] = part[name]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits."""
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(self.embedding(tokens), self.layers)
        return self.head(language_model.normalize(self.norm[...], x))


class EqxLayer(eqx.Module):
    """One layer, of `eqx.nn.Linear`, which takes single vectors."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: jax.Array

    def __init__(self, params: Any) -> None:
        own, mlp = params["attention"], params["mlp"]
        self.query, self.key, self.value, self.output = (
            _linear(own[name]) for name in ("query", "key", "value", "output")
        )
        self.up, self.down = _linear(mlp["up"]), _linear(mlp["down"])
        self.norms = jnp.stack([own["norm"], mlp["norm"]])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention and a perceptron, each added to what comes in."""
        y = language_model.normalize(self.norms[0], x)
        heads = [_every(f)(y) for f in (self.query, self.key, self.value)]
        x = x + _every(self.output)(language_model.attend(*heads))
        y = language_model.normalize(self.norms[1], x)
        return x + _every(self.down)(jax.nn.gelu(_every(self.up)(y)))


class EqxModel(eqx.Module):
    """The transformer in Equinox, its layers stacked and scanned."""

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
        """Logits."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            return eqx.combine(arrays, rest)(x), None

        x, _ = lax.scan(layer, _every(self.embedding)(tokens), arrays)
        return _every(self.head)(language_model.normalize(self.norm, x))


def _linear(kernel: jax.Array) -> eqx.nn.Linear:
    """A layer with that kernel."""
    linear = eqx.nn.Linear(*kernel.shape, use_bias=False, key=jax.random.key(0))
    return eqx.tree_at(lambda layer: layer.weight, linear, kernel.T)


def _every(function: Callable) -> Callable:
    """For every byte of every row."""
    return jax.vmap(jax.vmap(function))


def run(recipe: str, rows: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Loss, and its gradient by the embedding, in all three."""
    params = language_model.init(jax.random.key(0))
    # The head starts at zero, which would hide whatever comes before.
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape) / WIDTH**0.5
    definition, state = nnx.split(NnxModel(params))
    key = jax.random.key(2) if jaxq.get_dot_recipe(recipe).draws else None

    def of_nnx(state: Any, rows: jax.Array) -> jax.Array:
        model = nnx.merge(definition, state)
        return language_model.cross_entropy(model(rows[:, :-1]), rows)

    def of_equinox(model: EqxModel, rows: jax.Array) -> jax.Array:
        return language_model.cross_entropy(model(rows[:, :-1]), rows)

    cases = {
        "plain JAX": (language_model.loss, params, lambda g: g["embedding"]),
        "Flax NNX": (of_nnx, state, lambda g: g["embedding"]["embedding"][...]),
        "Equinox": (of_equinox, EqxModel(params), lambda g: g.embedding.weight),
    }
    results = {}
    for name, (loss, params, embedding) in cases.items():
        quantized = jaxq.quantize_fn(loss, [("layers/", recipe)], key=key)
        value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(quantized))(params, rows)
        results[name] = (value, embedding(gradient))
    return results


def _distance(x: jax.Array, y: jax.Array) -> float:
    """How far an array is from another, beside its size."""
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, tuple[jax.Array, jax.Array]]]:
    """Runs all three, prints a table and returns the results."""
    args = common.arguments(__doc__, argv)
    data, _ = language_model.text()
    rows = language_model.windows(data, jnp.arange(2) * 1000)
    results = {recipe: run(recipe, rows) for recipe in (SHORT if args.short else RECIPES)}
    grid = common.Table(title="One transformer, three frameworks: loss in bits a byte")
    names = [*next(iter(results.values()))]
    for head in ("recipe", *names, *(f"gradient, {name}" for name in names[1:])):
        grid.add_column(head)
    for recipe, found in results.items():
        losses, gradients = zip(*found.values(), strict=True)
        distances = [_distance(x, gradients[0]) for x in gradients[1:]]
        grid.add_row(
            recipe,
            *(f"{loss:.7f}" for loss in losses),
            *("identical" if d == 0 else f"{d:.0e} off" for d in distances),
        )
    common.Console().print(grid)
    return results


if __name__ == "__main__":
    main()
