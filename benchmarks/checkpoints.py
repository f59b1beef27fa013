"""Measures quantization to GGUF against libgguf, and the speed of `jaxq compare`.

python benchmarks/checkpoints.py [--rounds N] [--rows N] [--output PAGE]

Both programs read a safetensors file and write a GGUF file in each round. The times are CPU times
of the process, which a busy machine changes least. libgguf (`pip install libgguf`) is left out if
it is not installed.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy

from jaxq.cli import main

TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
RECIPES = "int8_tensor,int8_token,fp8_e4m3_tensor,mxfp8_e4m3,int4_g32,nf4_g64,mxfp4,nvfp4"
COLUMNS = 4096
NAME = "double_blocks.0.img_attn.proj.weight"  # libgguf's converter knows diffusion models only.


def converter() -> str | None:
    """Returns the path of libgguf's converter; None if libgguf is not installed."""
    spec = importlib.util.find_spec("libgguf")
    if spec is None or spec.origin is None:
        return None
    package = pathlib.Path(spec.origin).parent
    name = "libgguf_quantize_gguf"
    paths = [
        path
        for path in (pathlib.Path(sys.prefix) / "bin" / name, package.parent / "bin" / name)
        if path.exists()
    ]
    return str(paths[0]) if paths else None


def quietly(*arguments: str) -> None:
    """Runs a command of jaxq without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    if code:
        raise RuntimeError(f"jaxq {' '.join(arguments)} failed")


def cpu() -> float:
    """Returns the CPU seconds of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def fastest(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the CPU seconds of the fastest round of each case, after one that compiles."""
    best = dict.fromkeys(cases, np.inf)
    for number in range(rounds + 1):
        for name, run in cases.items():
            start = cpu()
            run()
            if number:
                best[name] = min(best[name], cpu() - start)
    return best


def page(rows: int, rounds: int) -> str:
    """Returns the page with all results."""
    rng, peer = np.random.default_rng(0), converter()
    if peer is None:
        print("Skipped, because it is not installed: libgguf")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        source = str(folder / "a.safetensors")
        weights = rng.standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)
        safetensors.numpy.save_file({NAME: weights}, source)
        lines = []
        for kind in TYPES:
            ours, theirs = str(folder / "ours.gguf"), str(folder / "theirs.gguf")
            quantize = ("quantize", source, ours, "--recipe", kind)
            cases: dict[str, Callable[[], object]] = {"jaxq": lambda q=quantize: quietly(*q)}
            if peer is not None:
                command = [peer, "--src", source, "--dst", theirs, "--qtype", kind.upper()]
                command += ["--overwrite", "--policy", "uniform", "--threads", str(os.cpu_count())]
                command += ["--backend", "cpu"]
                cases["libgguf"] = lambda c=command: subprocess.run(
                    c, check=True, capture_output=True
                )
            times = fastest(cases, rounds)
            ratio = f"{times['libgguf'] / times['jaxq']:.2f}" if peer is not None else "-"
            each = " | ".join(
                f"{1e9 * times[n] / weights.size:.2f}" if n in times else "-"
                for n in ("jaxq", "libgguf")
            )
            lines.append(f"| {kind} | {each} | {ratio} |")
        compare = ("compare", source, "--recipes", RECIPES, "--json")
        seconds = fastest({"compare": lambda: quietly(*compare)}, rounds)["compare"]
    count = len(RECIPES.split(","))
    return f"""# Speed of checkpoints

`make bench` writes this page: CPU nanoseconds per weight of `jaxq quantize` and of libgguf's
converter, each from a safetensors file of {rows}×{COLUMNS} float32 numbers to a GGUF file, in the
same rounds; the fastest of {rounds} rounds, without the compilation and the start of Python.
`jaxq quantize` also measures the SQNR. The last column is libgguf's time divided by jaxq's: above
1, jaxq is faster.

| type | jaxq | libgguf | ratio |
|---|---:|---:|---:|
{chr(10).join(lines)}

`jaxq compare` with {count} recipes: {count * weights.size / seconds / 1e6:.0f} million weights ×
recipes per CPU second.

Made with Python {platform.python_version()}, jax {jax.__version__}, on
{jax.devices()[0].device_kind} with {os.cpu_count()} cores.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the speed of checkpoints.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/checkpoints.md"))
    options = parser.parse_args()
    text = page(options.rows, options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)
