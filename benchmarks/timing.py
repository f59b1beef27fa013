"""Shared code of the benchmarks: timing in interleaved rounds, and the page of results.

Each round runs every case once, so that a busy machine slows all cases alike, and the time of a
case is that of its fastest round. Times are reported as ratios to `x * 1.0001`, jitted, on the same
float32 array in the same rounds. Libraries that are not installed are left out.
"""

import argparse
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Sequence

import jax
import numpy as np
from rich.progress import track

Cases = dict[
    tuple[str, str], Callable[[], object]
]  # From (operation, case) to a function that runs the case.

BASE = ("plain pass", "x * 1.0001")


def compiled(function: Callable, *arguments: object) -> Callable[[], object]:
    """Returns a function that runs a jitted function and waits for its result."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def collect(x: jax.Array, ours: Callable, peers: Sequence[Callable]) -> Cases:
    """Returns all cases, and prints which libraries are not installed."""
    cases: Cases = {BASE: compiled(lambda x: x * 1.0001, x)} | ours(x)
    for find in peers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = find(x)
                for run in found.values():
                    run()
        except ImportError as error:
            print(f"Skipped, because it is not installed: {error.name}")
        else:
            cases |= found
    return cases


def measure(cases: Cases, rounds: int, label: str) -> dict[tuple[str, str], float]:
    """Returns the seconds of the fastest round of each case."""
    best = dict.fromkeys(cases, np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in cases.values():
            run()  # Compiles.
        for _ in track(range(rounds), description=label):
            for i, case in enumerate(cases):
                # The plain pass is repeated, because its time depends on the case before it.
                for timed in (BASE, case) if i % 8 == 0 else (case,):
                    start = time.perf_counter()
                    cases[timed]()
                    best[timed] = min(best[timed], time.perf_counter() - start)
    return best


def page(title: str, what: str, columns: dict[str, dict[tuple[str, str], float]]) -> str:
    """Returns the documentation page with the table of ratios."""
    rows = []
    for case in next(iter(columns.values())):
        operation, label = case
        ratios = " | ".join(f"{times[case] / times[BASE]:.2f}" for times in columns.values())
        rows.append(f"| {operation} | {label} | {ratios} |")
    sizes = {name: 8 * np.prod([int(n) for n in name.split("x")]) for name in columns}
    bases = "; ".join(
        f"{name}: {1e3 * times[BASE]:.2f} ms, {1e-9 * sizes[name] / times[BASE]:.0f} GB/s"
        for name, times in columns.items()
    )
    versions = (
        f"Python {platform.python_version()}, jax {jax.__version__}, on "
        f"{jax.devices()[0].device_kind} with {os.cpu_count()} cores"
    )
    return f"""# {title}

`make bench` writes this page: {what}, as a ratio to the time of
`x * 1.0001` on the same float32 array of normal random numbers, both jitted, in the same run. Each
time is that of the fastest of many interleaved rounds.

Time and bandwidth (reads and writes) of the plain pass: {bases}.

Made with {versions}.

| operation | case | {" | ".join(columns)} |
|---|---|{"---:|" * len(columns)}
{chr(10).join(rows)}
"""


def main(
    title: str,
    what: str,
    output: str,
    ours: Callable[[jax.Array], Cases],
    peers: Sequence[Callable],
) -> None:
    """Runs a benchmark from its command line and writes the page.

    Args:
      title: the title of the page.
      what: the measured quantity in words, for the page and the help text.
      output: the default path of the page.
      ours: a function from a float32 array to the cases of jaxq.
      peers: functions from a float32 array to the cases of another library, which they import.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "8192x4096"])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    arguments = parser.parse_args()
    columns = {}
    for shape in arguments.shapes:
        height, width = map(int, shape.split("x"))
        x = jax.random.normal(jax.random.key(0), (height, width))
        rounds = max(5, arguments.rounds * 1024 * 4096 // x.size)
        columns[shape] = measure(collect(x, ours, peers), rounds, shape)
    text = page(title, what, columns)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)
