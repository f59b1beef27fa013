"""Makes tests/golden/checkpoints.safetensors: weights stored by other libraries, and their values.

The tensors of a case are named `CASE|NAME`, those that the library dequantizes `CASE|=NAME`, and
its configuration is in the metadata under the name of the case.

Run it with a Python that has compressed-tensors 0.20, transformers, bitsandbytes 0.50, mlx with
mlx-cpu 0.32, and PyTorch: `python tools/golden_checkpoints.py`.
"""

# pyright: reportMissingImports=false

import json
import pathlib
from typing import Any

import numpy as np

OUTPUT = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "checkpoints.safetensors"

_Case = tuple[dict[str, Any], dict[str, Any]]


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns normal numbers with some large ones, in float32."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.02)
    w[:, :: columns // 4] *= 8
    return w


def compressed_tensors() -> dict[str, _Case]:
    """Returns the cases that compressed-tensors compresses and decompresses."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    def case(fmt: str, rows: int, columns: int, scale: Any, extra: Any = (), **args: Any) -> _Case:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        state = {"weight": torch.tensor(weights(rows, columns)), "weight_scale": scale}
        state |= dict(extra)
        compressor = BaseCompressor.get_value_from_registry(fmt)
        stored = compressor.compress(state, scheme)
        wide = dict(stored)
        if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            wide["weight_scale"] = stored["weight_scale"].float()
        value = compressor.decompress(wide, scheme)["weight"].float()
        if "weight_global_scale" in stored:  # The compressor computes in bfloat16.
            elements = unpack_fp4_from_uint8(stored["weight_packed"], rows, columns, torch.float32)
            value = dequantize(
                elements,
                stored["weight_scale"].float(),
                args=scheme.weights,
                global_scale=stored["weight_global_scale"],
                dtype=torch.float32,
            )
        tensors = {f"layer.{name}": tensor for name, tensor in stored.items()}
        group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": fmt}
        config |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
        return {**tensors, "=layer.weight": value}, {"quantization_config": config}

    def amax(rows: int, columns: int, group: int) -> Any:
        w = torch.tensor(weights(rows, columns)).abs()
        return w.reshape(rows, columns // group, group).amax(-1)

    blocks = torch.tensor(np.pad(weights(40, 72), ((0, 8), (0, 24)))).abs().reshape(3, 16, 3, 32)
    zero = torch.arange(33 * 2).reshape(33, 2) % 7 - 3
    whole = torch.tensor([448 * 6 / 0.37])
    local = amax(8, 64, 16) / 6 * whole
    powers = torch.exp2(torch.floor(torch.log2(amax(8, 64, 32))))
    return {
        "ct_int4": case(
            "pack-quantized", 8, 64, (amax(8, 64, 32) / 7.5).bfloat16(),
            num_bits=4, strategy="group", group_size=32,
        ),
        "ct_int3_zero": case(
            "pack-quantized", 33, 64, amax(33, 64, 32) / 3.5,
            {"weight_zero_point": zero.to(torch.int8)},
            num_bits=3, symmetric=False, strategy="group", group_size=32,
        ),
        "ct_int8": case(
            "pack-quantized", 8, 64, (amax(8, 64, 64) / 127.5).half(),
            num_bits=8, strategy="channel",
        ),
        "ct_int8_plain": case(
            "int-quantized", 8, 64, amax(8, 64, 64) / 127.5, num_bits=8, strategy="channel",
        ),
        "ct_fp8_tensor": case(
            "float-quantized", 8, 64, amax(8, 64, 64).max().reshape(1) / 448,
            num_bits=8, type="float", strategy="tensor",
        ),
        "ct_fp8_channel": case(
            "float-quantized", 8, 64, (amax(8, 64, 64) / 448).bfloat16(),
            num_bits=8, type="float", strategy="channel",
        ),
        "ct_fp8_block": case(
            "float-quantized", 40, 72, blocks.amax((1, 3)) / 448,
            num_bits=8, type="float", strategy="block", block_structure=[16, 32],
        ),
        "ct_nvfp4": case(
            "nvfp4-pack-quantized", 8, 64, local.to(torch.float8_e4m3fn).float(),
            {"weight_global_scale": whole},
            num_bits=4, type="float", strategy="tensor_group", group_size=16,
        ),
        "ct_mxfp4": case(
            "mxfp4-pack-quantized", 8, 64, powers / 4,
            num_bits=4, type="float", strategy="group", group_size=32,
        ),
        "ct_mxfp8": case(
            "mxfp8-quantized", 8, 64, powers / 256,
            num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8",
        ),
    }  # fmt: skip


def converted() -> dict[str, _Case]:
    """Returns the cases whose values come from converters of other packages."""
    import torch
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    words = torch.tensor(rng.integers(-(2**31), 2**31, (64, 4)), dtype=torch.int32)
    zeros = torch.tensor(rng.integers(-(2**31), 2**31, (2, 4)), dtype=torch.int32)
    scales = torch.tensor(rng.random((2, 32)) * 0.01 + 1e-3).half()
    codes, scale, zero = AutoAWQConverter.from_autoawq_config({})._convert_gemm_module(
        words, scales, zeros
    )
    spread = [t.float().repeat_interleave(32, 1) for t in (scale, zero)]
    awq = {"a.qweight": words, "a.qzeros": zeros, "a.scales": scales}
    awq["=a.weight"] = (codes.float() - spread[1]) * spread[0]
    blocks = torch.tensor(rng.integers(0, 256, (2, 6, 3, 16)), dtype=torch.uint8)
    powers = torch.tensor(rng.integers(110, 130, (2, 6, 3)), dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, powers, dtype=torch.float32)
    name = "mlp.experts.down_proj"
    oss = {f"{name}_blocks": blocks, f"{name}_scales": powers, f"={name}": values.mT.contiguous()}
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}
    return {
        "awq": (awq, {"quantization_config": config}),
        "gpt_oss": (oss, {"quantization_config": {"quant_method": "mxfp4"}}),
    }


def bitsandbytes() -> dict[str, _Case]:
    """Returns the cases of bitsandbytes."""
    import torch
    from bitsandbytes import functional

    result: dict[str, _Case] = {}
    for kind, nested, columns in (("nf4", 0, 64), ("nf4", 1, 64), ("fp4", 0, 64), ("nf4", 0, 40)):
        w = torch.tensor(weights(16, columns))
        data, state = functional.quantize_4bit(
            w, blocksize=64, quant_type=kind, compress_statistics=bool(nested)
        )
        tensors = {"a.weight": data}
        tensors |= {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors["=a.weight"] = functional.dequantize_4bit(data, state)
        name = f"bnb_{kind}{'_nested' * nested}{'_rows' * (columns != 64)}"
        result[name] = tensors, {"quantization_config": {"quant_method": "bitsandbytes"}}
    codes, rows, _ = functional.int8_vectorwise_quant(torch.tensor(weights(8, 64)).half())
    value = functional.int8_vectorwise_dequant(codes, rows)
    tensors = {"a.weight": codes, "a.SCB": rows, "=a.weight": value}
    result["bnb_int8"] = tensors, {"quantization_config": {"load_in_8bit": True}}
    return result


def mlx() -> dict[str, _Case]:
    """Returns the cases of MLX."""
    import mlx.core as mx

    result: dict[str, _Case] = {}
    w = mx.array(weights(8, 128))
    for bits, kind in ((3, mx.float16), (4, mx.bfloat16), (6, mx.float32)):
        parts = mx.quantize(w.astype(kind), group_size=64, bits=bits)
        value = mx.dequantize(*[parts[0], *(p.astype(mx.float32) for p in parts[1:])], 64, bits)
        tensors = dict(zip(("a.weight", "a.scales", "a.biases"), parts, strict=True))
        config = {"group_size": 64, "bits": bits}
        tensors = {key: array(t) for key, t in {**tensors, "=a.weight": value}.items()}
        result[f"mlx_{bits}"] = tensors, {"quantization": config, "quantization_config": config}
    for mode, group, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        data, scales = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        value = mx.dequantize(data, scales, group_size=group, bits=bits, mode=mode)
        tensors = {"a.weight": data, "a.scales": scales, "=a.weight": value.astype(mx.float32)}
        config = {"group_size": group, "bits": bits, "mode": mode}
        tensors = {key: array(t) for key, t in tensors.items()}
        result[f"mlx_{mode}"] = tensors, {"quantization": config}
    return result


def array(x: Any) -> Any:
    """Returns an array of MLX as a tensor of PyTorch."""
    import mlx.core as mx
    import torch

    if x.dtype == mx.bfloat16:
        return torch.tensor(np.array(x.astype(mx.float32))).bfloat16()
    return torch.tensor(np.array(x))


if __name__ == "__main__":
    import safetensors.torch

    cases = {**compressed_tensors(), **converted(), **bitsandbytes(), **mlx()}
    tensors = {
        f"{case}|{name}": tensor.contiguous()
        for case, (parts, _) in cases.items()
        for name, tensor in parts.items()
    }
    configs = {case: json.dumps(config) for case, (_, config) in cases.items()}
    safetensors.torch.save_file(tensors, OUTPUT, configs)
