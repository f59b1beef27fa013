"""Measures the speed of quantizers against a plain pass and against other libraries.

Recipes that search for scales as GGUF does are measured by `checkpoints.py`.

python benchmarks/quantizers.py [--rounds N] [--shapes RxC ...] [--output PAGE] [--old FOLDER]
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from timing import Cases, compiled, main

STORED = ("int8_token", "uint8_channel", "int4_g128", "nf4_g64", "mxfp8_e4m3", "mxfp4", "nvfp4")
SIZES = {"int4_g128": 128, "nf4_g64": 64, "mxfp8_e4m3": 32, "mxfp4": 32, "nvfp4": 16}


def ours(x: jax.Array, library: Any) -> Cases:
    """Returns the cases of a version of jaxq."""

    def with_gradient(x: jax.Array, recipe: Any) -> jax.Array:
        """Returns the value, computed together with the residuals of the gradient."""
        return jax.vjp(lambda x: library.fake_quant(x, recipe), x)[0]

    cases: Cases = {}
    for name, recipe in library.recipes.RECIPES.items():
        if recipe.scaling.searches_elements:
            continue
        run = compiled(lambda x, r=name: with_gradient(x, r), x)
        cases["jaxq.fake_quant and its residuals", name] = run
    for name, size in SIZES.items():
        granularity = library.PerBlock(size, axes=0)
        recipe = dataclasses.replace(library.get_recipe(name), granularity=granularity)
        run = compiled(lambda x, r=recipe: with_gradient(x, r), x)
        cases["jaxq.fake_quant and its residuals, blocks on axis 0", name] = run
    for name in STORED:
        cases["jaxq.quantize", name] = compiled(lambda x, r=name: library.quantize(x, r), x)
    for name in STORED:
        cases["jaxq.dequantize", name] = compiled(library.dequantize, library.quantize(x, name))
    return cases


def qwix_peers(x: jax.Array) -> Cases:
    """Returns the cases of Qwix: quantization and dequantization in one jitted function."""
    import qwix

    def round_trip(x: jax.Array, kind: str, tiles: dict[int, int]) -> jax.Array:
        return qwix.dequantize(qwix.quantize(x, kind, channelwise_axes=(0,), tiled_axes=tiles))

    cases: Cases = {}
    blocks = {"int8": None, "int4": 128, "nf4": 64, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
    for kind, size in blocks.items():
        run = compiled(lambda x, k=kind, t={1: size} if size else {}: round_trip(x, k, t), x)
        cases["Qwix, round trip", f"{kind}, {f'blocks of {size}' if size else 'rows'}"] = run
    return cases


def torchao_peers(x: jax.Array) -> Cases:
    """Returns the cases of torchao: its MX formats, not compiled."""
    import torch
    from torchao.prototype.mx_formats import mx_tensor

    array = torch.from_numpy(np.array(x))

    def round_trip(kind: object) -> object:
        scale, values = mx_tensor.to_mx(array, kind, 32)
        return mx_tensor.to_dtype(values, scale, kind, 32, torch.float32)

    return {
        ("torchao, not compiled, round trip", "mxfp8_e4m3"): lambda: round_trip(
            torch.float8_e4m3fn
        ),
        ("torchao, not compiled, round trip", "mxfp4"): lambda: round_trip(torch.float4_e2m1fn_x2),
    }


def bitsandbytes_peers(x: jax.Array) -> Cases:
    """Returns the cases of bitsandbytes on CPU."""
    import torch
    from bitsandbytes import functional

    array = torch.from_numpy(np.array(x))

    def round_trip(kind: str) -> object:
        codes, state = functional.quantize_4bit(array, blocksize=64, quant_type=kind)
        return functional.dequantize_4bit(codes, state)

    return {
        ("bitsandbytes, round trip", "nf4_g64"): lambda: round_trip("nf4"),
        ("bitsandbytes, round trip", "fp4_bnb_g64"): lambda: round_trip("fp4"),
    }


if __name__ == "__main__":
    main(
        "Speed of quantizers",
        "the time of a quantizer",
        "out/benchmarks-quantizers.md",
        ours,
        (qwix_peers, torchao_peers, bitsandbytes_peers),
    )
