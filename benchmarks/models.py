"""Measures the time to compile, train and explain a quantized model.

The model is the transformer of `examples/language_model.py`, its layers quantized by
`jaxq.quantize_fn` with every product recipe. Times are reported as ratios to the float32 model in
the same run; each is that of the fastest of several interleaved rounds. The benchmark also measures
`jaxq.explain` on a model of 1,000 products and checks that a scan over layers remains one scan. The
command fails if a limit is exceeded.

    python benchmarks/models.py [--rounds N] [--output PAGE]
"""

import argparse
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from rich.progress import track
from timing import compiled

import jaxq

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

import language_model

FLOAT32 = "float32"
NAMES = (FLOAT32, *jaxq.products.PRODUCT_RECIPES)
OPTIMIZER = optax.adamw(1e-3)
# The largest accepted ratio to float32, and the recipe to which it applies, by measurement.
LIMITS = {"trace and compile": (2.0, "w8a8"), "step": (1.5, "w8a8")}
EXPLAIN_SECONDS, PRODUCTS = 2.0, 1000


def loss(name: str, key: jax.Array) -> Callable:
    """Returns the model's loss function with its layers quantized by a recipe."""
    if name == FLOAT32:
        return language_model.loss
    drawn = key if jaxq.get_product_recipe(name).draws else None
    return jaxq.quantize_fn(language_model.loss, [("^layers/", name)], key=drawn)


def training_step(name: str) -> Callable:
    """Returns a training step with AdamW."""

    def step(params: Any, moments: Any, rows: jax.Array, key: jax.Array) -> tuple:
        gradients = jax.grad(loss(name, key))(params, rows)
        updates, moments = OPTIMIZER.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    return step


def compile_times(arguments: tuple, rounds: int) -> dict[str, float]:
    """Returns the processor seconds to trace and compile a step without caches."""
    best = dict.fromkeys(NAMES, np.inf)
    for _ in track(range(rounds), description="compiling"):
        for name in NAMES:
            jax.clear_caches()
            start = time.process_time()
            jax.jit(training_step(name)).lower(*arguments).compile()
            best[name] = min(best[name], time.process_time() - start)
    return best


def step_times(arguments: tuple, rounds: int) -> dict[str, float]:
    """Returns the seconds of a training step, the fastest of all rounds."""
    cases = {name: compiled(training_step(name), *arguments) for name in NAMES}
    best = dict.fromkeys(cases, np.inf)
    for run in cases.values():
        run()  # Compiles.
    for _ in track(range(rounds), description="training"):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def explain_time() -> float:
    """Returns the processor seconds to explain a model of 1,000 products of different shapes."""
    names = [f"layer{i}" for i in range(PRODUCTS)]
    params = {
        name: jax.ShapeDtypeStruct((64 + i, 65 + i), jnp.float32) for i, name in enumerate(names)
    }
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    def measure() -> float:
        start = time.process_time()
        table = jaxq.explain(model, [("", "w8a8")])(params, x)
        assert len(table.rows) == PRODUCTS
        return time.process_time() - start

    return min(measure(), measure())


def loops(name: str, arguments: tuple) -> tuple[int, int]:
    """Returns the number of scans and of matrix products in the jaxpr of a model."""
    params, _, rows, key = arguments
    text = str(jax.make_jaxpr(loss(name, key))(params, rows))
    return text.count(" scan["), text.count(" dot_general[")


def page(columns: dict[str, dict[str, float]], explained: float, scans: dict[str, Any]) -> str:
    """Returns the documentation page with the table of ratios."""
    rows = [
        f"| {name} | " + " | ".join(f"{t[name] / t[FLOAT32]:.2f}" for t in columns.values()) + " |"
        for name in NAMES[1:]
    ]
    bases = ", ".join(f"{what} {1e3 * t[FLOAT32]:.0f} ms" for what, t in columns.items())
    limits = ", ".join(f"{what} {most:g} ({name})" for what, (most, name) in LIMITS.items())
    over = "; ".join(
        f"{what}: "
        + (
            ", ".join(n for n, t in columns[what].items() if t > most * columns[what][FLOAT32])
            or "none"
        )
        for what, (most, _) in LIMITS.items()
    )
    return f"""# Speed of quantized models

`make bench` writes this page: the time of a transformer of four layers
(`examples/language_model.py`, 8 rows of 128 bytes, gradient and AdamW included) under
`jaxq.quantize_fn`, as a ratio to the time of the same model in float32 in the same run. Each time
is that of the fastest of several interleaved rounds. Tracing and compiling are measured in
processor time, whose ratios differ by up to a fifth between runs; a training step is measured in
wall time.

The benchmark fails if a ratio exceeds its limit: {limits}.

In float32: {bases}.

Made with Python {platform.python_version()}, jax {jax.__version__}, on \
{jax.devices()[0].device_kind} with {os.cpu_count()} cores.

| recipe | {" | ".join(columns)} |
|---|{"---:|" * len(columns)}
{chr(10).join(rows)}

Other recipes have no limit. Those above the ratios of the limits are: {over}.

A recipe that quantizes both operands of all three products (`mxfp8_training`, `nvfp4_training`) has
six quantizers where `w8a8` has two, and XLA on CPU compiles each for every shape. The quantizers of
NVFP4 also have two levels of scales, random bits and a transform. The
[architecture](architecture.md#workarounds-for-jax-and-xla) page describes how compile time is
reduced.

`jaxq.explain` on a model of {PRODUCTS:,} products: {explained:.2f} s (limit {EXPLAIN_SECONDS:g} s).
Scans and products in the jaxpr of the model: {scans[FLOAT32][0]} and {scans[FLOAT32][1]} in
float32, {scans["w8a8"][0]} and {scans["w8a8"][1]} with w8a8.
"""


def main() -> None:
    """Runs the benchmark, writes the page and fails if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    output = pathlib.Path("out/benchmarks-models.md")
    parser.add_argument("--output", type=pathlib.Path, default=output)
    options = parser.parse_args()
    params = language_model.init(jax.random.key(0))
    data, _ = language_model.text()
    rows = language_model.windows(data, jnp.arange(8) * 1000)
    arguments = (params, OPTIMIZER.init(params), rows, jax.random.key(1))
    columns = {
        "trace and compile": compile_times(arguments, max(1, options.rounds // 2)),
        "step": step_times(arguments, options.rounds),
    }
    explained = explain_time()
    scans = {name: loops(name, arguments) for name in (FLOAT32, "w8a8")}
    text = page(columns, explained, scans)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)
    failed = [
        what
        for what, (most, name) in LIMITS.items()
        if columns[what][name] > most * columns[what][FLOAT32]
    ]
    failed += ["explain"] * (explained > EXPLAIN_SECONDS)
    failed += ["number of scans or products"] * (scans[FLOAT32] != scans["w8a8"])
    if failed:
        sys.exit(f"Limits exceeded: {', '.join(failed)}")


if __name__ == "__main__":
    main()
