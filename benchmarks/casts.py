"""How long a cast takes, beside a plain pass over the same array and beside other libraries.

Every case runs once a round, round after round, so that a busy machine slows all alike; a case's
time is its fastest round. The figure is its ratio to `x * 1.0001`, jitted, over the same float32
array, timed in the same rounds. Peers that are not installed are left out.

    python benchmarks/casts.py [--rounds N] [--shapes RxC ...] [--output PAGE]
"""

import argparse
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp
from rich.progress import track

import jaxq

Cases = dict[tuple[str, str], Callable[[], object]]  # (group, label): one whole run.

BASE = ("plain pass", "x * 1.0001")
DETERMINISTIC = ("nearest_away", "toward_zero", "up", "down", "to_odd")
E4M3 = "float8_e4m3fn"
RECIPES = (
    *("int8_tensor", "int8_channel", "int8_token", "uint8_channel", "int4_g128"),
    *("fp8_e4m3_tensor", "fp8_e4m3_tile128", "nf4", "mxfp8_e4m3", "mxfp4", "nvfp4"),
)


def compiled(function: Callable, *arguments: jax.Array) -> Callable[[], object]:
    """A run of a jitted function, until its result is there."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def ours(x: jax.Array) -> Cases:
    """The cases of jaxq."""
    cases: Cases = {BASE: compiled(lambda x: x * 1.0001, x)}
    for name, fmt in jaxq.catalog.ALL.items():
        if fmt.bits <= 8 or name in ("float16", "bfloat16", "tf32"):
            cast = compiled(lambda x, name=name: jaxq.cast(x, name), x)
            cases["jaxq.cast, nearest even", name] = cast
    for mode in DETERMINISTIC:
        run = compiled(lambda x, mode=mode: jaxq.cast(x, E4M3, rounding=mode), x)
        cases[f"jaxq.cast to {E4M3}", mode] = run
    key = jax.random.key(0)
    run = compiled(lambda x: jaxq.cast(x, E4M3, overflow="saturate"), x)
    cases[f"jaxq.cast to {E4M3}", "nearest even, saturating"] = run
    for bits in (8, 16, 23):
        mode = jaxq.Stochastic(bits)
        dtype = mode.random_dtype
        run = compiled(lambda x, k, m=mode: jaxq.cast(x, E4M3, rounding=m, key=k), x, key)
        draw = compiled(lambda k, d=dtype: jax.random.bits(k, x.shape, d), key)
        cases[f"jaxq.cast to {E4M3}", f"stochastic, {bits} bits"] = run
        cases[f"jaxq.cast to {E4M3}", f"only drawing the {bits} bits"] = draw

    def value_and_pullback(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull_back = jax.vjp(lambda x: jaxq.cast(x, E4M3), x)
        return y, pull_back(cotangent)[0]

    run = compiled(value_and_pullback, x, x + 1)
    cases[f"jaxq.cast to {E4M3}", "nearest even, and pulling a cotangent back"] = run
    for name in (E4M3, "float4_e2m1fn", "int8", "nf4"):
        codes = jaxq.encode(x, name)
        encode = compiled(lambda x, n=name: jaxq.encode(x, n), x)
        decode = compiled(lambda c, n=name: jaxq.decode(c, n), codes)
        cases["jaxq.encode", name], cases["jaxq.decode", name] = encode, decode
    codes = jaxq.encode(x, "float6_e2m3fn")
    cases["jaxq.pack", "6-bit codes"] = compiled(lambda c: jaxq.pack(c, 6), codes)
    for recipe in RECIPES:
        run = compiled(lambda x, r=recipe: jaxq.fake_quant(x, r), x)
        cases["jaxq.fake_quant", recipe] = run
    return cases


def jax_peers(x: jax.Array) -> Cases:
    """What JAX itself offers."""

    def naive(x: jax.Array) -> jax.Array:
        """A search among NF4's midpoints, and a look-up."""
        levels = jnp.asarray(np.sort(jaxq.get_format("nf4").values), jnp.float32)
        return levels[jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x)]

    return {
        ("astype and back", E4M3): compiled(
            lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), x
        ),
        ("astype and back", "bfloat16"): compiled(
            lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x
        ),
        ("jnp.searchsorted", "nf4"): compiled(naive, x),
    }


def numpy_peers(x: jax.Array) -> Cases:
    """ml_dtypes in NumPy, one thread."""
    array = np.asarray(x)

    def there_and_back() -> np.ndarray:
        with np.errstate(over="ignore"):
            return array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)

    return {("ml_dtypes in NumPy", E4M3): there_and_back}


def gfloat_peers(x: jax.Array) -> Cases:
    """The same cast by gfloat on JAX arrays, jitted."""
    from gfloat import round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    def function(x: jax.Array) -> jax.Array:
        return round_ndarray(format_info_ocp_e4m3, x)  # type: ignore[arg-type]

    return {("gfloat, jitted", E4M3): compiled(function, x)}


def torch_peers(x: jax.Array) -> Cases:
    """PyTorch's casts, its own threads."""
    import torch  # type: ignore[import-not-found]

    array = torch.from_numpy(np.array(x))
    return {
        ("PyTorch, there and back", E4M3): lambda: array.to(torch.float8_e4m3fn).to(torch.float32),
        ("PyTorch, there and back", "bfloat16"): lambda: array.to(torch.bfloat16).to(torch.float32),
        ("PyTorch, fake_quantize_per_tensor", "int8"): lambda: (
            torch.fake_quantize_per_tensor_affine(array, 0.02, 0, -128, 127)
        ),
    }


def pychop_peers(x: jax.Array) -> Cases:
    """The same widths by pychop on its JAX backend, as it jits itself."""
    import pychop  # type: ignore[import-not-found]

    pychop.backend("jax")
    chop = pychop.Chop(exp_bits=4, sig_bits=3, rmode=1, subnormal=True)
    return {("pychop on JAX", "4 and 3 bits"): lambda: jax.block_until_ready(chop(x))}


def collect(x: jax.Array) -> Cases:
    """All cases that can run here; whatever warns or fails while being set up is said."""
    cases = ours(x) | jax_peers(x) | numpy_peers(x)
    for peers in (gfloat_peers, torch_peers, pychop_peers):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = peers(x)
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


def page(columns: dict[str, dict[tuple[str, str], float]]) -> str:
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
    return f"""# Speed

`make bench` writes this page: what a whole pass costs, as its ratio to `x * 1.0001` over the same
float32 array of normal random numbers, both jitted, in the same run. The fastest of many
interleaved rounds counts.

The plain pass, reads and writes together: {bases}.

Made with {versions}.

| what | which | {" | ".join(columns)} |
|---|---|{"---:|" * len(columns)}
{chr(10).join(rows)}
"""


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "8192x4096"])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    columns = {}
    for shape in arguments.shapes:
        height, width = map(int, shape.split("x"))
        x = jax.random.normal(jax.random.key(0), (height, width))
        rounds = max(5, arguments.rounds * 1024 * 4096 // x.size)
        columns[shape] = measure(collect(x), rounds, shape)
    text = page(columns)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
