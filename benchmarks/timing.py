"""What the benchmarks share: timing in interleaved rounds, beside a plain pass, and the page.

Every case runs once a round, round after round, so that a busy machine slows all alike; a case's
time is its fastest round. The figure is its ratio to `x * 1.0001`, jitted, over the same float32
array, timed in the same rounds. Peers that are not installed are left out.
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

Cases = dict[tuple[str, str], Callable[[], object]]  # (group, label): one whole run.

BASE = ("plain pass", "x * 1.0001")


def compiled(function: Callable, *arguments: object) -> Callable[[], object]:
    """A run of a jitted function, until its result is there."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def collect(x: jax.Array, ours: Callable, peers: Sequence[Callable]) -> Cases:
    """All cases that can run here; a peer that is not installed is named."""
    cases: Cases = {BASE: compiled(lambda x: x * 1.0001, x)} | ours(x)
    for find in peers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = find(x)
                for run in found.values():
                    run()
        except ImportError as error:
            print(f"Left out, not installed: {error.name}")
        else:
            cases |= found
    return cases


def measure(cases: Cases, rounds: int, label: str) -> dict[tuple[str, str], float]:
    """Seconds of the fastest round."""
    best = dict.fromkeys(cases, np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in cases.values():
            run()  # Compiles.
        for _ in track(range(rounds), description=label):
            for i, case in enumerate(cases):
                # The plain pass again and again: it shall not only come after the heaviest case.
                for timed in (BASE, case) if i % 8 == 0 else (case,):
                    start = time.perf_counter()
                    cases[timed]()
                    best[timed] = min(best[timed], time.perf_counter() - start)
    return best


def page(title: str, what: str, columns: dict[str, dict[tuple[str, str], float]]) -> str:
    """The ratios as a page of the documentation."""
    rows = []
    for case in next(iter(columns.values())):
        group, label = case
        ratios = " | ".join(f"{times[case] / times[BASE]:.2f}" for times in columns.values())
        rows.append(f"| {group} | {label} | {ratios} |")
    sizes = {name: 8 * np.prod([int(n) for n in name.split("x")]) for name in columns}
    bases = ", ".join(
        f"{name}: {1e3 * times[BASE]:.2f} ms, {1e-9 * sizes[name] / times[BASE]:.0f} GB/s"
        for name, times in columns.items()
    )
    versions = (
        f"Python {platform.python_version()}, jax {jax.__version__}, on "
        f"{jax.devices()[0].device_kind} with {os.cpu_count()} cores"
    )
    return f"""# {title}

`make bench` writes this page: {what}, as its ratio to `x * 1.0001` over the same float32 array of
normal random numbers, both jitted, in the same run. The fastest of many interleaved rounds counts.

The plain pass, reads and writes together: {bases}.

Made with {versions}.

| what | which | {" | ".join(columns)} |
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
    """Measures and writes the page; the command line of a benchmark.

    Args:
      title: of the page.
      what: is measured, in words.
      output: the page's file, where the command line names no other.
      ours: gives the cases to run over an array.
      peers: functions like it that import another library.
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
    arguments.output.write_text(text)
    print(text)
