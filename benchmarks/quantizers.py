"""How long a quantizer takes, beside a plain pass over the same array and beside other libraries.

python benchmarks/quantizers.py [--rounds N] [--shapes RxC ...] [--output PAGE]
"""

import dataclasses

import jax
import numpy as np
from timing import Cases, compiled, main

import jaxq

STORED = ("int8_token", "uint8_channel", "int4_g128", "nf4", "mxfp8_e4m3", "mxfp4", "nvfp4")
SIZES = {"int4_g128": 128, "nf4": 64, "mxfp8_e4m3": 32, "mxfp4": 32, "nvfp4": 16}


def ours(x: jax.Array) -> Cases:
    """The cases of jaxq."""

    def with_gradient(x: jax.Array, recipe: str | jaxq.Quantizer) -> jax.Array:
        """The value, as it is computed where its gradient is wanted too."""
        return jax.vjp(lambda x: jaxq.fake_quant(x, recipe), x)[0]

    cases: Cases = {}
    for name in jaxq.presets.ALL:
        run = compiled(lambda x, r=name: with_gradient(x, r), x)
        cases["jaxq.fake_quant, its gradient ready", name] = run
    for name, size in SIZES.items():
        granularity = jaxq.PerBlock(size, axes=0)
        recipe = dataclasses.replace(jaxq.get_quantizer(name), granularity=granularity)
        run = compiled(lambda x, r=recipe: with_gradient(x, r), x)
        cases["the same, blocks on axis 0", name] = run
    for name in STORED:
        cases["jaxq.quantize", name] = compiled(lambda x, r=name: jaxq.quantize(x, r), x)
    for name in STORED:
        cases["jaxq.dequantize", name] = compiled(jaxq.dequantize, jaxq.quantize(x, name))
    return cases


def qwix_peers(x: jax.Array) -> Cases:
    """Qwix, quantized and dequantized in one jitted function."""
    import qwix

    def there_and_back(x: jax.Array, kind: str, tiles: dict[int, int]) -> jax.Array:
        return qwix.dequantize(qwix.quantize(x, kind, channelwise_axes=(0,), tiled_axes=tiles))

    cases: Cases = {}
    blocks = {"int8": None, "int4": 128, "nf4": 64, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
    for kind, size in blocks.items():
        run = compiled(lambda x, k=kind, t={1: size} if size else {}: there_and_back(x, k, t), x)
        cases["Qwix, there and back", f"{kind}, {f'blocks of {size}' if size else 'rows'}"] = run
    return cases


def torchao_peers(x: jax.Array) -> Cases:
    """Torchao's MX formats, not compiled."""
    import torch
    from torchao.prototype.mx_formats import mx_tensor

    array = torch.from_numpy(np.array(x))

    def there_and_back(kind: object) -> object:
        scale, values = mx_tensor.to_mx(array, kind, 32)
        return mx_tensor.to_dtype(values, scale, kind, 32, torch.float32)

    return {
        ("torchao, not compiled", "mxfp8_e4m3"): lambda: there_and_back(torch.float8_e4m3fn),
        ("torchao, not compiled", "mxfp4"): lambda: there_and_back(torch.float4_e2m1fn_x2),
    }


def bitsandbytes_peers(x: jax.Array) -> Cases:
    """Bitsandbytes on CPU."""
    import torch
    from bitsandbytes import functional

    array = torch.from_numpy(np.array(x))

    def there_and_back(kind: str) -> object:
        codes, state = functional.quantize_4bit(array, blocksize=64, quant_type=kind)
        return functional.dequantize_4bit(codes, state)

    return {
        ("bitsandbytes, there and back", "nf4"): lambda: there_and_back("nf4"),
        ("bitsandbytes, there and back", "fp4_bnb"): lambda: there_and_back("fp4"),
    }


if __name__ == "__main__":
    main(
        "Speed of quantizers",
        "what a whole quantizer costs",
        "docs/benchmarks-quantizers.md",
        ours,
        (qwix_peers, torchao_peers, bitsandbytes_peers),
    )
