"""Measures the speed of casts against a plain pass and against other libraries.

python benchmarks/casts.py [--rounds N] [--shapes RxC ...] [--output PAGE] [--old FOLDER]
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp
from timing import Cases, compiled, main

import jaxq

DETERMINISTIC = ("nearest_away", "toward_zero", "up", "down", "to_odd")
E4M3 = "float8_e4m3fn"


def ours(x: jax.Array, library: Any) -> Cases:
    """Returns the cases of a version of jaxq."""
    cases: Cases = {}
    for name, fmt in library.formats.FORMATS.items():
        if fmt.bits <= 8 or name in ("float16", "bfloat16", "tf32"):
            cast = compiled(lambda x, name=name: library.cast(x, name), x)
            cases["jaxq.cast, nearest even", name] = cast
    for mode in DETERMINISTIC:
        run = compiled(lambda x, mode=mode: library.cast(x, E4M3, rounding=mode), x)
        cases[f"jaxq.cast to {E4M3}", mode] = run
    key = jax.random.key(0)
    run = compiled(lambda x: library.cast(x, E4M3, overflow="saturate"), x)
    cases[f"jaxq.cast to {E4M3}", "nearest even, saturating"] = run
    for bits in (8, 16, 23):
        mode = library.Stochastic(bits)
        dtype = mode.random_dtype
        run = compiled(lambda x, k, m=mode: library.cast(x, E4M3, rounding=m, key=k), x, key)
        draw = compiled(lambda k, d=dtype: jax.random.bits(k, x.shape, d), key)
        cases[f"jaxq.cast to {E4M3}", f"stochastic, {bits} bits"] = run
        cases[f"jaxq.cast to {E4M3}", f"drawing the {bits} random bits alone"] = draw

    def value_and_pullback(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull_back = jax.vjp(lambda x: library.cast(x, E4M3), x)
        return y, pull_back(cotangent)[0]

    run = compiled(value_and_pullback, x, x + 1)
    cases[f"jaxq.cast to {E4M3}", "nearest even, with its gradient"] = run
    for name in (E4M3, "float4_e2m1fn", "int8", "nf4"):
        codes = library.encode(x, name)
        encode = compiled(lambda x, n=name: library.encode(x, n), x)
        decode = compiled(lambda c, n=name: library.decode(c, n), codes)
        cases["jaxq.encode", name], cases["jaxq.decode", name] = encode, decode
    codes = library.encode(x, "float6_e2m3fn")
    cases["jaxq.numerics.pack", "6-bit codes"] = compiled(
        lambda c: library.numerics.pack(c, 6), codes
    )
    return cases


def jax_peers(x: jax.Array) -> Cases:
    """Returns the cases of JAX."""

    def by_search(x: jax.Array) -> jax.Array:
        """Rounds to NF4 by a search among the midpoints of its values."""
        levels = jnp.asarray(np.sort(jaxq.get_format("nf4").values), jnp.float32)
        return levels[jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x)]

    def look_up(places: jax.Array) -> jax.Array:
        """Looks up two tables, as a cast to dynamic8 does to find a level."""
        counts = jnp.arange(8192, dtype=jnp.int32) // 32
        levels = jnp.linspace(-1, 1, 256)
        index = counts.at[places].get(mode="promise_in_bounds")
        return levels.at[index].get(mode="promise_in_bounds")

    places = jax.lax.bitcast_convert_type(x, jnp.uint32) >> np.uint32(19)
    return {
        ("two table look-ups alone", "8,192 and 256 entries"): compiled(look_up, places),
        ("astype, round trip", E4M3): compiled(
            lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), x
        ),
        ("astype, round trip", "bfloat16"): compiled(
            lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x
        ),
        ("jnp.searchsorted", "nf4"): compiled(by_search, x),
    }


def numpy_peers(x: jax.Array) -> Cases:
    """Returns the cases of ml_dtypes in NumPy, which uses one thread."""
    array = np.asarray(x)

    def round_trip() -> np.ndarray:
        with np.errstate(over="ignore"):
            return array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)

    return {("ml_dtypes in NumPy, round trip", E4M3): round_trip}


def gfloat_peers(x: jax.Array) -> Cases:
    """Returns the cases of gfloat on JAX arrays, jitted."""
    from gfloat import round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    def function(x: jax.Array) -> jax.Array:
        # The annotation asks for a NumPy array, but the function also accepts JAX arrays.
        return round_ndarray(format_info_ocp_e4m3, x)  # type: ignore[arg-type]

    return {("gfloat, jitted", E4M3): compiled(function, x)}


def torch_peers(x: jax.Array) -> Cases:
    """Returns the cases of PyTorch with its default number of threads."""
    import torch

    array = torch.from_numpy(np.array(x))
    return {
        ("PyTorch, round trip", E4M3): lambda: array.to(torch.float8_e4m3fn).to(torch.float32),
        ("PyTorch, round trip", "bfloat16"): lambda: array.to(torch.bfloat16).to(torch.float32),
        ("PyTorch, fake_quantize_per_tensor", "int8"): lambda: (
            torch.fake_quantize_per_tensor_affine(array, 0.02, 0, -128, 127)
        ),
    }


def pychop_peers(x: jax.Array) -> Cases:
    """Returns the cases of pychop on its JAX backend, which jits by itself."""
    import pychop

    pychop.backend("jax")
    chop = pychop.Chop(exp_bits=4, sig_bits=3, rmode=1, subnormal=True)
    return {("pychop on JAX", "4 and 3 bits"): lambda: jax.block_until_ready(chop(x))}


if __name__ == "__main__":
    main(
        "Speed of casts",
        "the time of one pass over an array",
        "out/benchmarks.md",
        ours,
        (jax_peers, numpy_peers, gfloat_peers, torch_peers, pychop_peers),
    )
