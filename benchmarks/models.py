"""What quantizing a whole model costs: to trace, to compile, to train a step, to explain.

The transformer of `examples/language_model.py`, its layers under `jaxq.quantize_fn` by every recipe
for products, beside the same in float32 in the same run: ratios, of the fastest of some interleaved
rounds. Then the time of `jaxq.explain` on a model of 1,000 products, and whether a scan over layers
stays one scan. What should hold is said beside each, and the command fails where it does not.

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
NAMES = (FLOAT32, *jaxq.dot_recipes.ALL)
OPTIMIZER = optax.adamw(1e-3)
# What is measured: the largest ratio to float32 that is wanted, for which recipe.
LIMITS = {"trace and compile": (2.0, "w8a8"), "step": (1.5, "w8a8")}
EXPLAIN_SECONDS, PRODUCTS = 2.0, 1000


def loss(name: str, key: jax.Array) -> Callable:
    """The model's loss, its layers by a recipe."""
    if name == FLOAT32:
        return language_model.loss
    drawn = key if jaxq.get_dot_recipe(name).draws else None
    return jaxq.quantize_fn(language_model.loss, [("^layers/", name)], key=drawn)


def training_step(name: str) -> Callable:
    """A step of AdamW."""

    def step(params: Any, moments: Any, rows: jax.Array, key: jax.Array) -> tuple:
        gradients = jax.grad(loss(name, key))(params, rows)
        updates, moments = OPTIMIZER.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    return step


def compile_times(arguments: tuple, rounds: int) -> dict[str, float]:
    """Processor seconds to trace and compile a step, caches cleared before each."""
    best = dict.fromkeys(NAMES, np.inf)
    for _ in track(range(rounds), description="compiling"):
        for name in NAMES:
            jax.clear_caches()
            start = time.process_time()
            jax.jit(training_step(name)).lower(*arguments).compile()
            best[name] = min(best[name], time.process_time() - start)
    return best


def step_times(arguments: tuple, rounds: int) -> dict[str, float]:
    """Seconds of a step."""
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
    """Processor seconds to explain a model of many products of different shapes, the faster run."""
    names = [f"layer{i}" for i in range(PRODUCTS)]
    params = {
        name: jax.ShapeDtypeStruct((64 + i, 65 + i), jnp.float32) for i, name in enumerate(names)
    }
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    def explained() -> float:
        start = time.process_time()
        table = jaxq.explain(model, [("", "w8a8")])(params, x)
        assert len(table.rows) == PRODUCTS
        return time.process_time() - start

    return min(explained(), explained())


def loops(name: str, arguments: tuple) -> tuple[int, int]:
    """How many scans a model's jaxpr has, and how many matrix products."""
    params, _, rows, key = arguments
    text = str(jax.make_jaxpr(loss(name, key))(params, rows))
    return text.count(" scan["), text.count(" dot_general[")


def page(columns: dict[str, dict[str, float]], explained: float, scans: dict[str, Any]) -> str:
    """The ratios as a page of the documentation."""
    rows = [
        f"| {name} | " + " | ".join(f"{t[name] / t[FLOAT32]:.2f}" for t in columns.values()) + " |"
        for name in NAMES[1:]
    ]
    bases = ", ".join(f"{what} {1e3 * t[FLOAT32]:.0f} ms" for what, t in columns.items())
    limits = ", ".join(f"{what} {most:g} for {name}" for what, (most, name) in LIMITS.items())
    over = "; ".join(
        f"{what}: "
        + (
            ", ".join(n for n, t in columns[what].items() if t > most * columns[what][FLOAT32])
            or "none"
        )
        for what, (most, _) in LIMITS.items()
    )
    return f"""# Speed of quantized models

`make bench` writes this page: a transformer of four layers (`examples/language_model.py`, 8 rows of
128 bytes, gradient and AdamW included) under `jaxq.quantize_fn`, as ratios to the same in float32
in the same run; the fastest of some interleaved rounds counts. To trace and compile is measured in
processor time, which a busy machine changes little, and a step in time on the clock.

At most wanted: {limits}.

In float32: {bases}.

Made with Python {platform.python_version()}, jax {jax.__version__}, on \
{jax.devices()[0].device_kind} with {os.cpu_count()} cores.

| recipe | {" | ".join(columns)} |
|---|{"---:|" * len(columns)}
{chr(10).join(rows)}

Above these limits, which not all recipes are held to: {over}.

A recipe that quantizes both operands of all three products (`mxfp8`, `nvfp4`) has six quantizers
where `w8a8` has two, and XLA on CPU compiles each for every shape; those of NVFP4 have two levels
of scales, random bits and a transform besides. What keeps that low is in the
[architecture](architecture.md#what-a-model-costs-to-compile).

`jaxq.explain` on a model of {PRODUCTS:,} products: {explained:.2f} s (at most {EXPLAIN_SECONDS:g}).
The model has {scans[FLOAT32][0]} scan over its layers and {scans[FLOAT32][1]} products in its text;
quantized, it has {scans["w8a8"][0]} and {scans["w8a8"][1]}.
"""


def main() -> None:
    """Measures, writes the page, and fails where a limit is passed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    output = pathlib.Path("docs/benchmarks-models.md")
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
    options.output.write_text(text)
    print(text)
    failed = [
        what
        for what, (most, name) in LIMITS.items()
        if columns[what][name] > most * columns[what][FLOAT32]
    ]
    failed += ["explain"] * (explained > EXPLAIN_SECONDS)
    failed += ["a scan stays a scan"] * (scans[FLOAT32] != scans["w8a8"])
    if failed:
        sys.exit(f"Not as wanted: {', '.join(failed)}")


if __name__ == "__main__":
    main()
