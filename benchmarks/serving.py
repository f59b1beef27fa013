"""Measures products of stored weights, dequantized at once and part by part, beside float32.

Each round runs every case once, so that a busy machine slows all cases alike, and the time of a
case is that of its fastest round.

    python benchmarks/serving.py [--rounds N] [--size N] [--chunk N] [--output PAGE]
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
from rich.progress import track

import jaxq

NUMBERS = (((1,), (1,)), ((), ()))  # Weights are [outputs, inputs].
RECIPES = ("int8_channel", "int4_g32", "int4_g128", "nf4_dq", "mxfp4", "nvfp4")
RECIPES += ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0")
TOKENS = (1, 64)


def whole(x: jax.Array, w: Any) -> jax.Array:
    """Returns the product of a weight that is dequantized at once."""
    return jax.lax.dot_general(x, w.dequantize(), NUMBERS)


def in_parts(chunk: int) -> Callable:
    """Returns the product of a weight that is dequantized part by part."""
    return lambda x, w: jaxq.products.stored_dot_general(x, w, NUMBERS, chunk=chunk)


def measured(size: int, rounds: int, chunk: int) -> tuple[list[str], float]:
    """Returns the rows of the table, and the milliseconds of the float32 product of one token."""
    w = jax.random.normal(jax.random.key(0), (size, size))
    weights = {name: jaxq.quantize(w, name) for name in RECIPES}
    functions: dict[str, Callable] = {"at once": whole, "in parts": in_parts(chunk)}
    cases, memory = {}, {}
    for tokens in TOKENS:
        x = jax.random.normal(jax.random.key(1), (tokens, size))
        exact = jax.jit(lambda x, w: jax.lax.dot_general(x, w, NUMBERS)).lower(x, w).compile()
        cases["float32", tokens, ""] = exact, (x, w)
        for name, stored in weights.items():
            for how, function in functions.items():
                compiled = jax.jit(function).lower(x, stored).compile()
                cases[name, tokens, how] = compiled, (x, stored)
                analysis = compiled.memory_analysis()
                assert analysis is not None, "every backend has one"
                memory[name, tokens, how] = analysis.temp_size_in_bytes
    best = dict.fromkeys(cases, np.inf)
    for _ in track(range(rounds), description="running"):
        for case, (run, arguments) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            best[case] = min(best[case], time.perf_counter() - start)
    rows = []
    for name, stored in weights.items():
        cells = [f"{8 * stored.nbytes / w.size:.2f}"]
        for tokens in TOKENS:
            base = best["float32", tokens, ""]
            cells += [f"{best[name, tokens, how] / base:.1f}" for how in functions]
        cells += [f"{memory[name, TOKENS[-1], how] / 2**20:.1f}" for how in functions]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows, 1e3 * best["float32", TOKENS[0], ""]


def page(rows: list[str], base: float, arguments: argparse.Namespace) -> str:
    """Returns the documentation page."""
    size, few, many = arguments.size, *TOKENS
    return f"""# Speed of stored weights

`make bench` writes this page: the product of float32 tokens and a stored weight of {size} by \
{size}, dequantized at once or in parts of at most {arguments.chunk:,} elements \
(`jaxq.products.stored_dot_general`). Times are ratios to the float32 product in the same run, the \
fastest of many interleaved rounds; that of one token takes {base:.1f} ms. *MiB* is the temporary \
memory of the compiled program for {many} tokens; the float weight has \
{4 * size * size / 2**20:.0f} MiB.

Made with Python {platform.python_version()}, jax {jax.__version__}, on \
{jax.devices()[0].device_kind} with {os.cpu_count()} cores.

<!-- table -->

| weight | bits | {few} token, at once | in parts | {many} tokens, at once | in parts \
| MiB, at once | in parts |
|---|{"---:|" * 7}
{chr(10).join(rows)}
"""


def main() -> None:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=2**18)
    output = pathlib.Path("out/benchmarks-serving.md")
    parser.add_argument("--output", type=pathlib.Path, default=output)
    arguments = parser.parse_args()
    rows, base = measured(arguments.size, arguments.rounds, arguments.chunk)
    text = page(rows, base, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
