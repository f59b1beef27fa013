"""Compares 8-bit Adam with float32 Adam on three problems, from the same weights and batches.

The table has, for every problem, optimizer and seed, the final loss and the largest update of any
weight in multiples of the learning rate. In the problem with rare features, half of the inputs are
nonzero in one example out of 200, so the second moments in one block span many decades.

    python benchmarks/optimizers.py [--seeds N] [--steps N] [--direct-second-moments]
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from sklearn.datasets import load_digits

import jaxq
from jaxq.optim import SECOND_MOMENTS, quantize_state

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import language_model


class Problem(NamedTuple):
    """A training problem.

    Attributes:
      rate: the learning rate.
      init: a function from a key to initial weights.
      loss: a function from weights and a key, which draws the batch, to the loss.
    """

    rate: float
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one optimizer on one problem, with one number per seed in each cell."""

    problem: str
    optimizer: str
    losses: str
    largest_updates: str


def digits() -> Problem:
    """Returns the problem of training two hidden layers on scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    sizes = (64, 256, 64, 10)

    def init(key: jax.Array) -> Any:
        pairs = zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
        return [jax.random.normal(k, (m, n)) * (2 / m) ** 0.5 for k, m, n in pairs]

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (128,), 0, len(x))
        h = x[rows]
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return optax.softmax_cross_entropy_with_integer_labels(h @ params[-1], y[rows]).mean()

    return Problem(1e-3, init, loss)


def transformer() -> Problem:
    """Returns the problem of training the language model of `examples/language_model.py`."""
    train, _ = language_model.text()

    def loss(params: Any, key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (4,), 0, len(train) - language_model.CONTEXT - 1)
        return language_model.loss(params, language_model.windows(train, starts))

    return Problem(1e-3, language_model.init, loss)


def rare_features() -> Problem:
    """Returns a linear regression in which half of the features are nearly always 0."""
    target = jax.random.normal(jax.random.key(7), (256, 64))
    frequent = jnp.arange(256) % 2 == 0

    def loss(params: Any, key: jax.Array) -> jax.Array:
        values, chances = jax.random.split(key)
        active = frequent | (jax.random.uniform(chances, (64, 256)) < 1 / 200)
        x = jax.random.normal(values, (64, 256)) * active / 16
        return ((x @ (params["w"] - target)) ** 2).mean()

    return Problem(1e-2, lambda key: {"w": jax.random.normal(key, (256, 64)) * 0.1}, loss)


def train(problem: Problem, optimizer: Any, seed: int, steps: int) -> tuple[float, float]:
    """Returns the mean loss of the last ten steps and the largest update over the learning rate."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, state = carry
        value, gradient = jax.value_and_grad(problem.loss)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        largest = jnp.stack([jnp.abs(u).max() for u in jax.tree.leaves(updates)]).max()
        return (optax.apply_updates(params, updates), state), (value, largest)

    params = problem.init(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(100 + seed), steps)
    losses, largest = jax.jit(lambda c, k: jax.lax.scan(step, c, k)[1])(
        (params, optimizer.init(params)), keys
    )
    return float(np.mean(losses[-10:])), float(np.max(largest)) / problem.rate


def main() -> None:
    """Runs the benchmark and prints the table."""
    parser = argparse.ArgumentParser(description="Compares 8-bit Adam with float32 Adam.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--direct-second-moments",
        action="store_true",
        help="quantizes the second moments themselves instead of their square roots",
    )
    args = parser.parse_args()
    second_moments = None if args.direct_second_moments else SECOND_MOMENTS
    rows = []
    for make in (digits, rare_features, transformer):
        problem = make()
        adam = optax.adam(problem.rate)
        for name, tx in {
            "float32": adam,
            "8 bits": quantize_state(adam, second_moments=second_moments),
        }.items():
            measured = [train(problem, tx, seed, args.steps) for seed in range(args.seeds)]
            losses, updates = zip(*measured, strict=True)
            texts = [" ".join(f"{v:.4g}" for v in values) for values in (losses, updates)]
            rows.append(Row(make.__name__, name, *texts))
            print(f"{make.__name__} with {name} state is done", file=sys.stderr, flush=True)
    print(jaxq.Table(tuple(rows)))


if __name__ == "__main__":
    main()
