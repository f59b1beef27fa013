"""Shared code of the benchmarks: timing in interleaved rounds, and the page of results.

Each round runs every case once, so that a busy machine slows all cases alike, and the time of a
case is that of its fastest round. Times are reported as ratios to `x * 1.0001`, jitted, on the same
float32 array in the same rounds. Libraries that are not installed are left out. Another version of
jaxq, in a folder that holds its package, can be measured beside the installed one.
"""

import argparse
import importlib
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from rich.progress import track

import jaxq

Cases = dict[
    tuple[str, str], Callable[[], object]
]  # From (operation, case) to a function that runs the case.

BASE = ("plain pass", "x * 1.0001")
OLD = "old version of "  # The prefix of the other version's operations.


def compiled(function: Callable, *arguments: object) -> Callable[[], object]:
    """Returns a function that runs a jitted function and waits for its result."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def version_in(folder: pathlib.Path) -> Any:
    """Imports the version of jaxq in a folder, beside the one that is already imported."""

    def take() -> dict[str, Any]:
        """Removes and returns the modules of jaxq that are imported."""
        names = [name for name in sys.modules if name.split(".")[0] == "jaxq"]
        return {name: sys.modules.pop(name) for name in names}

    installed = take()
    sys.path.insert(0, str(folder.resolve()))
    # `jax.export` takes each name of a pytree only once.
    names = ("register_pytree_node_serialization", "register_namedtuple_serialization")
    ignored = dict.fromkeys(names, lambda kind, **_: kind)
    try:
        with mock.patch.multiple(jax.export, **ignored):
            return importlib.import_module("jaxq")
    finally:
        sys.path.pop(0)
        take()
        sys.modules.update(installed)


def collect(x: jax.Array, ours: Callable, peers: Sequence[Callable], old: Any = None) -> Cases:
    """Returns all cases, and prints which libraries are not installed."""
    cases: Cases = {BASE: compiled(lambda x: x * 1.0001, x)} | ours(x, jaxq)
    if old is not None:
        cases |= {(OLD + what, label): run for (what, label), run in ours(x, old).items()}
    for find in peers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer_cases = find(x)
                for run in peer_cases.values():
                    run()
        except ImportError as error:
            print(f"Skipped, because it is not installed: {error.name}")
        else:
            cases |= peer_cases
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
    first = next(iter(columns.values()))
    compared = any(operation.startswith(OLD) for operation, _ in first)
    rows = []
    for operation, label in first:
        if operation.startswith(OLD):
            continue
        cells = []
        for times in columns.values():
            prefixes = ("", OLD)[: 1 + compared]
            seconds = [times.get((prefix + operation, label)) for prefix in prefixes]
            cells += ["" if t is None else f"{t / times[BASE]:.2f}" for t in seconds]
        rows.append(f"| {operation} | {label} | {' | '.join(cells)} |")
    heads = [name + end for name in columns for end in ("", ", old version")[: 1 + compared]]
    version = "\n*Old version* is the version of jaxq given by `--old`.\n" if compared else ""
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
{version}
Time and bandwidth (reads and writes) of the plain pass: {bases}.

Made with {versions}.

| operation | case | {" | ".join(heads)} |
|---|---|{"---:|" * len(heads)}
{chr(10).join(rows)}
"""


def main(
    title: str,
    what: str,
    output: str,
    ours: Callable[[jax.Array, Any], Cases],
    peers: Sequence[Callable],
) -> None:
    """Runs a benchmark from its command line and writes the page.

    Args:
      title: the title of the page.
      what: the measured quantity in words, for the page and the help text.
      output: the default path of the page.
      ours: a function from a float32 array and a version of jaxq to the cases of that version.
      peers: functions from a float32 array to the cases of another library, which they import.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "8192x4096"])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    parser.add_argument("--old", type=pathlib.Path, help="a folder with another version of jaxq")
    arguments = parser.parse_args()
    old = arguments.old and version_in(arguments.old)
    columns = {}
    for shape in arguments.shapes:
        height, width = map(int, shape.split("x"))
        x = jax.random.normal(jax.random.key(0), (height, width))
        rounds = max(5, arguments.rounds * 1024 * 4096 // x.size)
        columns[shape] = measure(collect(x, ours, peers, old), rounds, shape)
    text = page(title, what, columns)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)
