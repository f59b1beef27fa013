"""Compares jaxq's codes and values with independent references on all 2^32 float32 inputs.

- Rounding to nearest even, for every float type of ml_dtypes: the reference is the conversion of
  ml_dtypes.
- The other deterministic modes, for three formats: the reference is a table of integer thresholds,
  computed with exact fractions from the values that ml_dtypes gives for the format's codes.

The inputs are checked in chunks by several processes. Finished chunks are stored in a folder, and a
run that is started again continues from there unless the lowered programs of jaxq have changed. At
the end the tool writes a page with the table of results, followed by the parts of
`docs/verification.md` that other tools compute.

    python tools/verify.py [--only FORMAT ...] [--workers N] [--state FOLDER] [--output FILE]
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import platform
import queue
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import jaxq

ROOT = pathlib.Path(__file__).parent.parent
CHUNK = 2**21  # Inputs per chunk; small enough for the processor's cache.
CHUNKS = 2**32 // CHUNK
FLOATS = [
    name
    for name, fmt in jaxq.formats.FORMATS.items()
    if isinstance(fmt, jaxq.FloatFormat) and fmt.dtype is not None and fmt.bits <= 16
]
MODES = ("nearest_away", "toward_zero", "up", "down", "to_odd")
MODE_FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
)
OTHERS = "## Solvers"  # The first heading of the page that this tool does not write.
JOBS = [(name, "nearest_even") for name in FLOATS]
JOBS += [(name, mode) for name in MODE_FORMATS for mode in MODES]

Reference = Callable[[int], np.ndarray]  # From the index of a chunk to the expected codes.


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype of ml_dtypes or NumPy with a format's name, independently of jaxq."""
    return np.dtype(getattr(ml_dtypes, name, name))


def inputs(chunk: int) -> np.ndarray:
    """Returns the float32 inputs of a chunk, ordered by their bits."""
    start = chunk * CHUNK
    return np.arange(start, start + CHUNK, dtype=np.uint32).view(np.float32)


def converted(name: str, chunk: int) -> np.ndarray:
    """Returns the codes of a chunk by the conversion of ml_dtypes."""
    dtype = dtype_of(name)
    with np.errstate(all="ignore"):
        return inputs(chunk).astype(dtype).view(f"u{dtype.itemsize}")


def oracle(name: str, mode: str, negative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the thresholds between codes for all inputs of one sign.

    Every value of these formats, and every midpoint of two neighboring values, is a float32 number.
    The inputs between two neighbors are thus two open intervals and the midpoint.

    Args:
      name: the format.
      mode: the rounding mode.
      negative: True for the negative inputs.

    Returns:
      The float32 bits, without the sign, at which each run of equal codes starts, and its code.
    """
    dtype = dtype_of(name)
    codes = np.arange(2 ** (jaxq.get_format(name).bits - 1), dtype=np.uint8)
    table = codes.view(dtype).astype(np.float32)
    values = [Fraction(float(v)) for v in table[np.isfinite(table)]]
    last = len(values) - 1
    values.append(2 * values[-1] - values[-2])  # The value that would follow the largest one.

    def code_of(x: float) -> int:
        with np.errstate(invalid="ignore"):
            return int(np.array([x], np.float32).astype(dtype).view(np.uint8)[0])

    sign = -1.0 if negative else 1.0
    # Under to_odd, finite inputs beyond the largest value become that value.
    inward = {"toward_zero": True, "to_odd": True, "up": negative, "down": not negative}
    inward = inward.get(mode, False)
    overflow = code_of(sign * np.inf)

    def signed(index: int) -> int:
        if index > last:
            return signed(last) if inward else overflow
        return code_of(sign * float(values[index]))

    runs: list[tuple[int, int]] = []
    for i in range(last + 1):
        at, middle, after = (
            int(np.float32(float(v)).view(np.uint32))
            for v in (values[i], (values[i] + values[i + 1]) / 2, values[i + 1])
        )
        if mode == "nearest_away":
            lower, tie, upper = i, i + 1, i + 1
        elif mode == "to_odd":
            lower = tie = upper = i if i % 2 else i + 1
        else:
            lower = tie = upper = i if inward else i + 1
        runs += [(at, signed(i)), (at + 1, signed(lower))]
        runs += [(middle, signed(tie)), (middle + 1, signed(upper))]
        if i == last:
            runs.append((after, signed(i + 1)))
    infinity = 0x7F800000
    runs += [(infinity, code_of(sign * np.inf)), (infinity + 1, code_of(np.copysign(np.nan, sign)))]
    starts, codes_of_runs = zip(*runs, strict=True)
    return np.array(starts, np.int64), np.array(codes_of_runs, np.uint8)


def thresholds(name: str, mode: str) -> Reference:
    """Returns a function that expands the oracle's thresholds to the codes of a chunk."""
    sides = [oracle(name, mode, negative) for negative in (False, True)]

    def codes(chunk: int) -> np.ndarray:
        starts, run_codes = sides[chunk >= CHUNKS // 2]
        first = chunk % (CHUNKS // 2) * CHUNK
        edges = np.clip(np.append(starts, 2**31), first, first + CHUNK)
        return np.repeat(run_codes, np.diff(edges))

    return codes


def check(name: str, mode: str, chunk: int, reference: Reference) -> tuple[int, int, int, str]:
    """Checks one chunk.

    Returns:
      The numbers of inputs that differ from the reference, become zero and become NaN, and the
      SHA-256 of jaxq's codes.
    """
    codes, values = kernels(name, mode)
    x = jnp.asarray(inputs(chunk))
    got, y = np.asarray(codes(x)), np.asarray(values(x))
    want = reference(chunk)
    with np.errstate(invalid="ignore"):
        decoded = want.view(dtype_of(name)).astype(np.float32)
    not_a_number = np.isnan(decoded)
    wrong = y.view(np.uint32) != decoded.view(np.uint32)
    wrong &= ~(not_a_number & np.isnan(y))
    # For 16-bit formats jaxq drops the payload of a NaN, so any NaN code is accepted there.
    payload = not_a_number & (want.itemsize == 2)
    wrong |= np.where(payload, ~np.isnan(got.view(dtype_of(name)).astype(np.float32)), got != want)
    digest = hashlib.sha256(got.astype(got.dtype.newbyteorder("<")).tobytes()).hexdigest()
    return int(wrong.sum()), int((decoded == 0).sum()), int(not_a_number.sum()), digest


@functools.cache
def kernels(name: str, mode: str) -> tuple[Any, Any]:
    """Returns jitted `jaxq.encode` and `jaxq.cast`."""
    return (
        jax.jit(lambda x: jaxq.encode(x, name, rounding=mode)),
        jax.jit(lambda x: jaxq.cast(x, name, rounding=mode)),
    )


def programs(name: str, mode: str) -> str:
    """Returns a hash of the lowered programs under test and the version of JAX."""
    x = jax.ShapeDtypeStruct((CHUNK,), jnp.float32)
    texts = "".join(kernel.lower(x).as_text() for kernel in kernels(name, mode))
    return hashlib.sha256(f"{jax.__version__} {texts}".encode()).hexdigest()


def run(job: tuple[str, str], folder: pathlib.Path, news: Any) -> list:
    """Checks the chunks that are missing in a job's state file and returns all results."""
    name, mode = job
    state_file = folder / f"{name}-{mode}.json"
    done, checked = [], programs(name, mode)
    if state_file.exists():
        state = json.loads(state_file.read_text())
        done = state["chunks"] if state["programs"] == checked else []
    news.put((job, len(done)))
    if len(done) < CHUNKS:
        nearest = mode == "nearest_even"
        reference = functools.partial(converted, name) if nearest else thresholds(name, mode)
        for chunk in range(len(done), CHUNKS):
            done.append(check(name, mode, chunk, reference))
            news.put((job, 1))
            if chunk % 128 == 127:
                state_file.write_text(json.dumps({"programs": checked, "chunks": done}))
    return done


def run_all(jobs: list[tuple[str, str]], folder: pathlib.Path, workers: int) -> dict:
    """Checks all jobs with a progress bar and returns the results of the chunks by job."""
    folder.mkdir(parents=True, exist_ok=True)
    # JAX is multithreaded, and a forked process could deadlock.
    context = multiprocessing.get_context("spawn")
    columns = [
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
    ]
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
    ):
        news = manager.Queue()
        futures = {job: pool.submit(run, job, folder, news) for job in jobs}
        total = progress.add_task("all", total=len(jobs) * CHUNKS)
        tasks: dict[tuple[str, str], TaskID] = {}
        while not progress.finished:
            try:
                job, count = news.get(timeout=1)
            except queue.Empty:
                broken = [f for f in futures.values() if f.done() and f.exception()]
                for future in broken:
                    future.result()
                continue
            if job not in tasks:
                tasks[job] = progress.add_task(" ".join(job), total=CHUNKS)
            progress.advance(tasks[job], count)
            progress.advance(total, count)
            progress.update(tasks[job], visible=not progress.tasks[tasks[job]].finished)
        return {job: future.result() for job, future in futures.items()}


def report(jobs: list[tuple[str, str]], chunks: dict) -> str:
    """Returns the documentation page with the table of results."""
    rows = []
    for name, mode in jobs:
        wrong, zeros, nans = (sum(chunk[i] for chunk in chunks[name, mode]) for i in range(3))
        digests = "".join(chunk[3] for chunk in chunks[name, mode])
        root = hashlib.sha256(digests.encode()).hexdigest()[:16]
        rows.append(f"| {name} | {mode} | {wrong} | {zeros} | {nans} | `{root}` |")
    versions = (
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"ml_dtypes {ml_dtypes.__version__}, NumPy {np.__version__}, "
        f"on {jax.devices()[0].device_kind}"
    )
    table = "\n".join(rows)
    return f"""# Verification

`make verify` writes the table. Each row covers all 2^32 float32 inputs, NaNs and subnormals
included. The results of `jaxq.encode` and `jaxq.cast` are compared with a reference for every
input: the conversion of ml_dtypes for `nearest_even`, and a table of exact integer thresholds for
the other modes. *Differ* counts the inputs whose code or value is not bit-identical; the payloads
of float16 and bfloat16 NaNs are not compared. The hash identifies the codes: it is the shortened
SHA-256 of the concatenated hexadecimal SHA-256 digests of the codes of each 2^21 inputs, in the
order of their bits.

Made with {versions}.

| format | rounding | differ | become zero | become NaN | hash of the codes |
|---|---|---:|---:|---:|---|
{table}
"""


def main() -> int:
    """Runs the check and returns the exit status: 1 if any input differs, else 0."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="FORMAT", help="checks only these formats and writes no page"
    )
    parser.add_argument("--state", type=pathlib.Path, default=ROOT / "build" / "verify")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "out" / "verification.md")
    arguments = parser.parse_args()
    jobs = [job for job in JOBS if arguments.only is None or job[0] in arguments.only]
    chunks = run_all(jobs, arguments.state, arguments.workers)
    page = report(jobs, chunks)
    if arguments.only is None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        others = (ROOT / "docs" / "verification.md").read_text().partition(OTHERS)
        arguments.output.write_text(page + "\n" + "".join(others[1:]))
    print(page[page.index("| format") :])
    differ = sum(chunk[0] for job in jobs for chunk in chunks[job])
    print("Every input agrees." if differ == 0 else f"{differ} inputs differ.")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
