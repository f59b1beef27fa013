"""Measures the time to run and to compile quantized products with their gradients.

Each round runs every case once, so that a busy machine slows all cases alike, and the time of a
case is that of its fastest round. Times are reported as ratios to the same product in float32. The
time to trace and compile is measured for a product alone and for a training step.

    python benchmarks/dots.py [--rounds N] [--size N] [--output PAGE]
"""

import argparse
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from rich.progress import track
from timing import compiled

import jaxq

MATMUL = (((1,), (0,)), ((), ()))
FLOAT32 = "float32"
KERNEL = "float32 and one kernel"
NAMES = (FLOAT32, KERNEL, *jaxq.products.PRODUCT_RECIPES)


def product(name: str, key: jax.Array) -> Callable:
    """Returns a matrix product in float32, in float32 after an addition, or in a product recipe."""
    if name == KERNEL:
        return lambda x, w: jaxq.dot_general(x + 0.5, w, MATMUL)
    recipe = None if name == FLOAT32 else jaxq.get_product_recipe(name)
    drawn = key if recipe is not None and recipe.draws else None
    return lambda x, w: jaxq.dot_general(x, w, MATMUL, recipe=recipe, key=drawn)


def value_and_gradients(name: str) -> Callable:
    """Returns a function that computes a product and pulls a cotangent back to both operands."""

    def run(x: jax.Array, w: jax.Array, g: jax.Array, key: jax.Array) -> tuple:
        y, pull = jax.vjp(product(name, key), x, w)
        return (y, *pull(g))

    return run


def training_step(name: str) -> Callable:
    """Returns an Adam step on residual blocks, each with two products and a normalization."""

    def loss(params: Any, x: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        dot = product(name, key)
        for up, down in params:
            h = jax.nn.standardize(x)
            x = x + dot(jax.nn.gelu(dot(h, up)), down)
        return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1).mean()

    def step(params: Any, first: Any, second: Any, *data: jax.Array) -> tuple:
        value, gradients = jax.value_and_grad(loss)(params, *data)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradients)
        params = jax.tree.map(
            lambda p, m, v: p - 1e-3 * m / (jnp.sqrt(v) + 1e-8), params, first, second
        )
        return value, params, first, second

    return step


def run_times(size: int, rounds: int) -> dict[str, float]:
    """Returns the seconds of the fastest round of every recipe."""
    x, w, g = jax.random.normal(jax.random.key(0), (3, size, size))
    key = jax.random.key(1)
    cases = {name: compiled(value_and_gradients(name), x, w, g, key) for name in NAMES}
    best = dict.fromkeys(cases, np.inf)
    for run in cases.values():
        run()  # Compiles.
    for _ in track(range(rounds), description="running"):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def compile_times(make: Callable, arguments: tuple, repeats: int, what: str) -> dict[str, float]:
    """Returns the least processor seconds to trace and compile, of several runs without caches."""
    best = dict.fromkeys(NAMES, np.inf)
    for _ in track(range(repeats), description=f"compiling {what}"):
        for name in NAMES:
            jax.clear_caches()
            start = time.process_time()
            jax.jit(make(name)).lower(*arguments).compile()
            best[name] = min(best[name], time.process_time() - start)
    return best


def page(size: int, columns: dict[str, dict[str, float]]) -> str:
    """Returns the documentation page with the table of ratios."""
    bases = ", ".join(f"{what} {1e3 * t[FLOAT32]:.0f} ms" for what, t in columns.items())
    rows = [
        f"| {name} | " + " | ".join(f"{t[name] / t[FLOAT32]:.2f}" for t in columns.values()) + " |"
        for name in NAMES[1:]
    ]
    return f"""# Speed of quantized products

`make bench` writes this page: the time of `jaxq.dot_general` with a recipe, as a ratio to the time
of the same product in float32 in the same run. *Run* is a product of two square matrices of size
{size} with both gradients, the fastest of many interleaved rounds. *Compile* is the
processor time of tracing and compiling, measured for that product alone and for a training step
with eight products, four normalizations and Adam. (Processor time depends little on other load.)

XLA on CPU compiles no kernel for a product in float32, which is a call of a library. The row
*{KERNEL}* adds 0.5 to an operand: that takes one kernel, and each further one takes
nearly as long. A recipe needs at least two kernels for each layout in which it quantizes a tensor.

In float32: {bases}.

Made with Python {platform.python_version()}, jax {jax.__version__}, on \
{jax.devices()[0].device_kind} with {os.cpu_count()} cores.

| recipe | {" | ".join(columns)} |
|---|{"---:|" * len(columns)}
{chr(10).join(rows)}
"""


def main() -> None:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    output = pathlib.Path("out/benchmarks-dots.md")
    parser.add_argument("--output", type=pathlib.Path, default=output)
    arguments = parser.parse_args()
    n = arguments.size
    matrix, key = jax.ShapeDtypeStruct((n, n), jnp.float32), jax.random.key(0)
    params = [(matrix, matrix)] * 4
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    step = (params, params, params, matrix, labels, key)
    columns = {
        "run": run_times(n, arguments.rounds),
        "compile, a product": compile_times(
            value_and_gradients, (matrix, matrix, matrix, key), arguments.repeats, "a product"
        ),
        "compile, a step": compile_times(training_step, step, arguments.repeats, "a step"),
    }
    text = page(n, columns)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
