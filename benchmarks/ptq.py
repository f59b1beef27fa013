"""Measures `jaxq.ptq` on a stack of layers: Hessians, and all of `quantize_weights` by GPTQ.

The model scans over layers of two products, `[size, 4 size]` and back, with random weights. The
Hessians are compared with a plain product of the same number of multiplications, in interleaved
rounds. `quantize_weights` runs twice. The second run counts: it compiles the parts of the model
and nothing else. Processor seconds of all cores are given beside the time, because a busy machine
changes mostly the latter. There, set OPENBLAS_NUM_THREADS=1: threads of OpenBLAS that wait for each
other in a Cholesky factorization count as processor time.

    python benchmarks/ptq.py [--size 1024] [--layers 12] [--tokens 4096] [--rounds 5]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxq
from jaxq import ptq

RECIPE = jaxq.Recipe("int4", jaxq.PerBlock(64))


class Seconds(NamedTuple):
    """The duration of a call: by the clock, and in processor seconds of all cores."""

    clock: float
    processor: float


def timed(function: Callable[[], Any]) -> Seconds:
    """Returns the duration of a call."""
    clock, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns the result of all layers, `[tokens, size]`."""

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        x = x + jax.nn.gelu(x @ w["up"]) @ w["down"]
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)), None

    return lax.scan(layer, x, params)[0]


def hessians(size: int, tokens: int, rounds: int) -> tuple[Seconds, Seconds]:
    """Returns the shortest durations of a plain product and of the statistics of an input."""
    x = jax.random.normal(jax.random.key(0), (tokens, size))
    product, statistics = jax.jit(lambda x: x.T @ x), jax.jit(ptq.collect)
    cases = [lambda: product(x), lambda: statistics(x)]
    for case in cases:
        jax.block_until_ready(case())
    durations: list[list[Seconds]] = [[], []]
    for _ in track(range(rounds), description="Hessians"):
        for times, case in zip(durations, cases, strict=True):
            times.append(timed(case))
    first, second = (Seconds(*np.min(times, axis=0).tolist()) for times in durations)
    return first, second


def main() -> None:
    """Runs the benchmark from its command line and prints the table."""
    parser = argparse.ArgumentParser(description="Measures quantization after training.")
    for name, default in (("size", 1024), ("layers", 12), ("tokens", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    product, statistics = hessians(4 * args.size, args.tokens, args.rounds)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = args.layers, args.size, 4 * args.size
    params = {
        "up": jax.random.normal(keys[0], shape) / args.size**0.5,
        "down": jax.random.normal(keys[1], (shape[0], shape[2], shape[1])) / args.size,
    }
    count = sum(w.size for w in params.values())
    x = jax.random.normal(keys[2], (args.tokens, args.size))
    batches = np.split(np.asarray(x), 4)
    solve = ptq.quantize_weights(model, RECIPE)
    first = timed(lambda: solve(params, batches)[0])
    second = timed(lambda: solve(params, batches)[0])
    grid = Table(title=f"Quantization after training, {args.tokens} tokens")
    for head in ("case", "seconds", "processor seconds"):
        grid.add_column(head, justify="left" if head == "case" else "right")
    width = 4 * args.size
    for name, seconds in (
        (f"x.T @ x, {width} inputs", product),
        (f"statistics of an input, {width} inputs", statistics),
        (f"quantize_weights, {count / 1e6:.0f} million weights, first run", first),
        (f"quantize_weights, {count / 1e6:.0f} million weights, second run", second),
    ):
        grid.add_row(name, f"{seconds.clock:.2f}", f"{seconds.processor:.2f}")
    ratios = [b / a for a, b in zip(product, statistics, strict=True)]
    grid.caption = (
        f"Statistics take {ratios[0]:.2f} times as long as the product, in processor seconds "
        f"{ratios[1]:.2f} times."
    )
    Console().print(grid)


if __name__ == "__main__":
    main()
