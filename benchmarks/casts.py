"""How long a cast takes, beside a plain pass over the same array and beside other libraries.

python benchmarks/casts.py [--rounds N] [--shapes RxC ...] [--output PAGE]
"""

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp
from timing import Cases, compiled, main

import jaxq

DETERMINISTIC = ("nearest_away", "toward_zero", "up", "down", "to_odd")
E4M3 = "float8_e4m3fn"


def ours(x: jax.Array) -> Cases:
    """The cases of jaxq, and of what JAX and NumPy themselves offer."""
    cases: Cases = {}
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
    return cases | jax_peers(x) | numpy_peers(x)


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
        # NumPy's by its annotation, but any array that NumPy's functions take will do.
        return round_ndarray(format_info_ocp_e4m3, x)  # type: ignore[arg-type]

    return {("gfloat, jitted", E4M3): compiled(function, x)}


def torch_peers(x: jax.Array) -> Cases:
    """PyTorch's casts, its own threads."""
    import torch

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
    import pychop

    pychop.backend("jax")
    chop = pychop.Chop(exp_bits=4, sig_bits=3, rmode=1, subnormal=True)
    return {("pychop on JAX", "4 and 3 bits"): lambda: jax.block_until_ready(chop(x))}


if __name__ == "__main__":
    main(
        "Speed of casts",
        "what a whole pass costs",
        "docs/benchmarks.md",
        ours,
        (gfloat_peers, torch_peers, pychop_peers),
    )
